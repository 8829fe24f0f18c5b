"""Cut rules of TorchRec's own models, one file each."""

from __future__ import annotations
