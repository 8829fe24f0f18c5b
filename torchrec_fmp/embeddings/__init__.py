"""TorchRec's embedding collections: tables, fqns, shards, and the private names that we use."""

from __future__ import annotations
