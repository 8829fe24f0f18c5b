"""TorchRec's embedding collections: tables, fqns, shards, and the private names that we need."""

from __future__ import annotations
