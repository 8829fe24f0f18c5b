"""The model's own fqns: those of its author, whatever wraps its modules.

Gates take the place of a module and hold it, and so does `torch.compile`; both lengthen the fqns of
all that is below. The engine knows own fqns alone. They are translated here, where a model comes in
and where it goes out.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardingPlan

from torchrec_fmp.embeddings.wrappers import Wrapper

# Where `torch.compile` holds the module that it wraps.
_COMPILED = "_orig_mod"


def join_fqn(prefix: str, name: str) -> str:
    """Fqn of a child; the model itself has the fqn ''."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def own_fqn(model: nn.Module, fqn: str) -> str:
    """The model's own fqn of a module or tensor.

    Args:
        model: may have gates and compiled modules.
        fqn: in `model`. A wrapper and what it holds have the same own fqn.
    """
    own = []
    module: object = get_unwrapped_module(model)
    for name in fqn.split(".") if fqn else ():
        if name != _COMPILED and not (isinstance(module, Wrapper) and name == module.inner):
            own.append(name)
        module = getattr(module, name, None)
    return ".".join(own)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(own fqn, module) of every module; a wrapper comes before what it holds."""
    for fqn, module in get_unwrapped_module(model).named_modules():
        yield own_fqn(model, fqn), module


def module_at(model: nn.Module, own: str) -> nn.Module:
    """The module of an own fqn, with its gates if it has any, but not what compiles it.

    Raises:
        KeyError: if there is none.
    """
    modules = get_unwrapped_module(model).named_modules(remove_duplicate=False)
    for fqn, module in modules:
        if own_fqn(model, fqn) == own and not isinstance(module, OptimizedModule):
            return module
    raise KeyError(f"the model has no module {own!r}")


def own_parameters(model: DistributedModelParallel) -> dict[str, tuple[str, nn.Parameter]]:
    """Own fqn -> fqn in the model and parameter, as TorchRec names the parameters.

    A rank that does not hold a sharded table may have no parameter of it, or an empty one.
    """
    return {own_fqn(model, fqn): (fqn, parameter) for fqn, parameter in model.named_parameters()}


def own_plan(plan: ShardingPlan) -> ShardingPlan:
    """The plan by own fqns. Modules may have been compiled, or no longer be, since it was made."""
    return ShardingPlan(
        {
            ".".join(name for name in fqn.split(".") if name != _COMPILED): module_plan
            for fqn, module_plan in plan.plan.items()
        }
    )


def plan_for(plan: ShardingPlan, model: nn.Module) -> ShardingPlan:
    """A plan by own fqns, by those of a model that is to be sharded."""
    names: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if not isinstance(module, OptimizedModule):
            names.setdefault(own_fqn(model, fqn), fqn)
    return ShardingPlan({names.get(fqn, fqn): part for fqn, part in plan.plan.items()})


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(own fqn, tensor) of every parameter and buffer of a model, shared ones several times."""
    module = get_unwrapped_module(model)
    for fqn, parameter in module.named_parameters(remove_duplicate=False):
        yield own_fqn(model, fqn), parameter
    for fqn, buffer in module.named_buffers(remove_duplicate=False):
        yield own_fqn(model, fqn), buffer
