"""The model's own fqns: the names that its author gave, whatever wraps the modules.

A gate replaces a module and holds it, and so does `torch.compile`. Both lengthen the fqns of
everything inside. The engine knows only own fqns. This module translates them, where a model comes
in and where it goes out.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardingPlan

from torchrec_fmp.embeddings.wrappers import Wrapper

# Attribute in which `torch.compile` holds the wrapped module.
_COMPILED = "_orig_mod"


def join_fqn(prefix: str, name: str) -> str:
    """Fqn of a child; the model itself has the fqn ''."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def own_fqn(model: nn.Module, fqn: str) -> str:
    """The model's own fqn of a module or tensor.

    Args:
        model: model, possibly with gates and compiled modules.
        fqn: fqn in `model`. A wrapper and the module inside have the same own fqn.
    """
    own = []
    module: object = get_unwrapped_module(model)
    for name in fqn.split(".") if fqn else ():
        if name != _COMPILED and not (isinstance(module, Wrapper) and name == module.inner):
            own.append(name)
        module = getattr(module, name, None)
    return ".".join(own)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(own fqn, module) of every module; a wrapper comes before the module inside."""
    for fqn, module in get_unwrapped_module(model).named_modules():
        yield own_fqn(model, fqn), module


def module_at(model: nn.Module, own: str) -> nn.Module:
    """The module with an own fqn, including its gates but not its `torch.compile` wrapper.

    Raises:
        KeyError: if there is no such module.
    """
    modules = get_unwrapped_module(model).named_modules(remove_duplicate=False)
    for fqn, module in modules:
        if own_fqn(model, fqn) == own and not isinstance(module, OptimizedModule):
            return module
    raise KeyError(f"the model has no module {own!r}")


def own_parameters(model: DistributedModelParallel) -> dict[str, tuple[str, nn.Parameter]]:
    """Own fqn -> (fqn in the model, parameter), as TorchRec names the parameters.

    A rank that does not hold a sharded table may have no parameter for it, or an empty one.
    """
    return {own_fqn(model, fqn): (fqn, parameter) for fqn, parameter in model.named_parameters()}


def own_plan(plan: ShardingPlan) -> ShardingPlan:
    """The plan by own fqns; since it was made, modules may have been compiled or uncompiled."""
    return ShardingPlan(
        {
            ".".join(name for name in fqn.split(".") if name != _COMPILED): module_plan
            for fqn, module_plan in plan.plan.items()
        }
    )


def plan_for(plan: ShardingPlan, model: nn.Module) -> ShardingPlan:
    """Renames a plan from own fqns to the fqns of a model that is to be sharded."""
    names: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if not isinstance(module, OptimizedModule):
            names.setdefault(own_fqn(model, fqn), fqn)
    return ShardingPlan({names.get(fqn, fqn): part for fqn, part in plan.plan.items()})


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(own fqn, tensor) of every parameter and buffer of a model; shared tensors repeat."""
    module = get_unwrapped_module(model)
    for fqn, parameter in module.named_parameters(remove_duplicate=False):
        yield own_fqn(model, fqn), parameter
    for fqn, buffer in module.named_buffers(remove_duplicate=False):
        yield own_fqn(model, fqn), buffer
