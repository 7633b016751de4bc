"""What must hold before a constraint or a penalty hangs on an optimiser: its hooks fire, and it holds the weights.

Everything here is checked once, when attaching, so that nothing is found to have been ignored after the training.
"""

from collections.abc import Sequence

from torch.optim import Optimizer

from tethertune.errors import AttachError
from tethertune.rows import Layer

__all__ = ["inner_optimizer", "require_parameters"]


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimiser whose ``step`` moves the weights and calls the step hooks.

    Wrappers that keep it as ``.optimizer`` (Accelerate, Lightning, Fabric) are taken off.

    Args:
        optimizer: A PyTorch optimiser, possibly wrapped.

    Raises:
        AttachError: Its hooks would never fire (timm's ``Lookahead``), it exchanges the weights outside of ``step``
            (schedule-free optimisers), or it is no optimiser.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    name = type(optimizer).__name__
    if any("ScheduleFree" in cls.__name__ for cls in type(optimizer).__mro__):
        raise AttachError(
            f"{name} exchanges the weights for an average outside of step(), where nothing can be attached: use an"
            " optimizer that changes weights in step() only, with a learning-rate schedule."
        )
    if not isinstance(optimizer, Optimizer):
        raise AttachError(f"{name} is not a torch.optim.Optimizer: attach to the optimizer inside it.")
    if not getattr(type(optimizer).step, "hooked", False):
        raise AttachError(
            f"{name} does not call step hooks, so nothing attached to it would ever run: train with the optimizer"
            " that it wraps, and attach to that."
        )
    return optimizer


def require_parameters(optimizers: Sequence[Optimizer], layers: Sequence[Layer]) -> None:
    """Check that the optimisers together hold every layer that is to be trained (``requires_grad``).

    Args:
        optimizers: As :func:`inner_optimizer` returns them.
        layers: The layers that are constrained or penalised.

    Raises:
        AttachError: Layers that the optimiser does not hold, by name.
    """
    held = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    missing = [layer.name for layer in layers if layer.weight.requires_grad and id(layer.weight) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise AttachError(
            f"The optimizer does not hold {shown}: build it from the parameters of this model as it is now (after"
            " moving, wrapping or preparing it), freeze them with requires_grad_(False), or exclude= them."
        )
