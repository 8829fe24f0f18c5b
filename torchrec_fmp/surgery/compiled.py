"""Takes `torch.compile`'s wrappers off a model, and puts them on again.

`torch.compile(module)` is an `OptimizedModule` that holds the module as `_orig_mod`, which shows in
the fqns of its parameters. Cut rules see the modules inside, under the fqns without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from torchrec_fmp.surgery.rules import join_fqn

# Of a bare fqn: what compiles the module, with the backend and the options that the user gave.
Compilers = Mapping[str, Any]

_INNER = "_orig_mod"


def compilers(model: nn.Module) -> list[Any]:
    """What compiles the model's wrapped modules; copies of the model are to share them."""
    return [m.dynamo_ctx for m in model.modules() if isinstance(m, OptimizedModule)]


def uncompiled(model: nn.Module) -> tuple[nn.Module, Compilers]:
    """The model without wrappers, changed in place, and what `compiled` needs to put them back."""
    found: dict[str, Any] = {}
    return _unwrap(model, "", found), found


def compiled(model: nn.Module, compilers: Compilers) -> nn.Module:
    """The model with its modules wrapped again, but those that are gone; changed in place.

    Nothing compiled is kept: the modules compile anew when they are called.
    """
    # The innermost first, so that the others are still found by their bare fqns.
    for fqn in _inner_first(compilers):
        module = dict(model.named_modules(remove_duplicate=False)).get(fqn)
        if module is None:
            continue
        wrapped = compilers[fqn](module)
        if not fqn:
            return wrapped
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapped)
    return model


def bare_fqn(fqn: str) -> str:
    """Fqn in the model without wrappers."""
    return ".".join(name for name in fqn.split(".") if name != _INNER)


def compiled_fqn(fqn: str, compilers: Compilers) -> str:
    """Fqn in the model with wrappers of what has a bare fqn below a module."""
    for outer in _inner_first(compilers):
        if not outer:
            fqn = f"{_INNER}.{fqn}"
        elif fqn.startswith(f"{outer}."):
            fqn = f"{outer}.{_INNER}{fqn[len(outer) :]}"
    return fqn


def _unwrap(module: nn.Module, fqn: str, found: dict[str, Any]) -> nn.Module:
    if isinstance(module, OptimizedModule):
        found[fqn] = module.dynamo_ctx
        module = module._orig_mod
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _unwrap(child, join_fqn(fqn, name), found)
    return module


def _inner_first(fqns: Iterable[str]) -> list[str]:
    return sorted(fqns, key=len, reverse=True)
