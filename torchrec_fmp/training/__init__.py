"""The sharded model, its optimizers, the training loop, and its metrics."""

from __future__ import annotations
