"""The sharded model, its optimizers, the training loop and metrics."""

from __future__ import annotations
