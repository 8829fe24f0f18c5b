"""Removes `torch.compile`'s wrappers from a model, and restores them.

`torch.compile(module)` is an `OptimizedModule` that holds the module as `_orig_mod`. This name
appears in the fqns of the parameters. Cut rules see the modules inside, under their own fqns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from torchrec_fmp.embeddings.fqns import join_fqn, own_fqn

_logger = logging.getLogger(__name__)

# Own fqn of a module -> its compiler, with the user's backend and options.
Compilers = Mapping[str, Any]


def compilers(model: nn.Module) -> list[Any]:
    """Compilers of the model's wrapped modules; copies of the model share them."""
    return [m.dynamo_ctx for m in model.modules() if isinstance(m, OptimizedModule)]


def module_compiled_by(module: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper, or the module itself if it is not wrapped."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def uncompiled(model: nn.Module) -> tuple[nn.Module, Compilers]:
    """An ungated model without its wrappers, changed in place, and the compilers for `compiled`."""
    found: dict[str, Any] = {}
    return _unwrap(model, "", found), found


def compiled(model: nn.Module, compilers: Compilers) -> nn.Module:
    """The model, changed in place, with its remaining modules wrapped again.

    No compiled code is kept: the modules compile again when they are called.
    """
    # Innermost first, so that the outer modules are still found.
    for own in sorted(compilers, key=len, reverse=True):
        # The outermost module with this own fqn, so that its gates are compiled too.
        names = [
            fqn
            for fqn, _ in model.named_modules(remove_duplicate=False)
            if own_fqn(model, fqn) == own
        ]
        if not names:
            continue
        wrapped = compilers[own](model.get_submodule(names[0]))
        if not names[0]:
            return wrapped
        parent, _, name = names[0].rpartition(".")
        setattr(model.get_submodule(parent), name, wrapped)
    return model


def warn_of_compilation_in_place(module: nn.Module, fqn: str) -> None:
    """Warns of `module.compile()`: it leaves no wrapper, and torch does not record its options."""
    if module._compiled_call_impl is not None:
        _logger.warning(
            "%s was compiled in place, and torch does not record how: its counterpart in the "
            "pruned model is not compiled. Call compile() on it again",
            fqn or "the model",
        )


def _unwrap(module: nn.Module, fqn: str, found: dict[str, Any]) -> nn.Module:
    if isinstance(module, OptimizedModule):
        found[fqn] = module.dynamo_ctx
        module = module_compiled_by(module)
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _unwrap(child, join_fqn(fqn, name), found)
    return module
