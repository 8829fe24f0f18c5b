"""Base classes of modules that replace a user's module and hold it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Wrapper(nn.Module):
    """A module that replaces a user's module and holds it in an attribute."""

    # Name of the attribute; it lengthens the fqns of everything in the user's module.
    inner: ClassVar[str]

    @property
    def wrapped(self) -> Any:
        """The user's module."""
        return getattr(self, self.inner)


class CollectionWrapper(Wrapper):
    """A wrapper that replaces an embedding collection, sharded or not."""

    @property
    def collection(self) -> Any:
        """The user's collection, or TorchRec's sharded one."""
        return self.wrapped
