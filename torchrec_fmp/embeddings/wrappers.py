"""Markers of modules that stand in the place of the user's and hold it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Wrapper(nn.Module):
    """A module in the place of the user's, which it holds in an attribute."""

    # Name of the attribute; it lengthens the fqns of everything in the user's module.
    inner: ClassVar[str]

    @property
    def wrapped(self) -> Any:
        """The user's module."""
        return getattr(self, self.inner)


class CollectionWrapper(Wrapper):
    """In the place of an embedding collection, sharded or not."""

    @property
    def collection(self) -> Any:
        """The user's collection, or TorchRec's sharded one."""
        return self.wrapped
