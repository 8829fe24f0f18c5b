"""`prune`: the transaction around surgery, planning and reshard."""

from __future__ import annotations
