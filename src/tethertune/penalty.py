r"""Penalties on the distance from the reference, added to the loss: l2-SP and MARS-SP.

Where a constraint forbids distance, a penalty prices it. With :math:`W_j` the body's layers, :math:`W_j^0` their
reference and :math:`V` the head's layers, the penalty is

.. math:: c \, \lambda \sum_j \|W_j - W_j^0\|_F^2 + c \, \lambda_V \sum \|V\|_F^2 \quad\text{(l2-SP)}

.. math:: c \, \lambda \sum_j \|W_j - W_j^0\|_\infty + c \, \lambda_V \sum \|V\|_\infty \quad\text{(MARS-SP)}

with the strengths :math:`\lambda, \lambda_V` and a factor :math:`c`, 1 as in equation 5 of the paper (Gouk et al.).
The l2-SP of Li et al. (2018) has :math:`c = 1/2`: a strength means nothing without its factor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tethertune import norms
from tethertune.adapters import AdaptedLayer, fold
from tethertune.attachment import inner_optimizer, require_parameters
from tethertune.errors import AttachError, ConfigurationError, ReferenceMismatchError
from tethertune.kernels.gradients import Gradients, Pull
from tethertune.reference import Reference, Source
from tethertune.rows import Convention, Layer, Rows, layers, select
from tethertune.sharding import is_sharded, local

__all__ = ["Penalty"]

Norm = Literal["frobenius", "mars"]


class Penalty:
    r"""The price of the distance from the reference: l2-SP (``norm="frobenius"``) or MARS-SP (``norm="mars"``).

    Call it for the value and add that to the loss, or :meth:`attach` it to the optimiser, which has the same effect
    on the training and costs less. Never both.

    ``strength``, ``head_strength`` and ``factor`` are read at each use, so that a schedule may set them.

    Args:
        model: The network, with its pre-trained weights in place.
        norm: ``"frobenius"``: the squared Frobenius norm. ``"mars"``: the largest row l1 sum, not squared.
        strength: :math:`\lambda`, for the body; finite and >= 0.
        head: The name of the new head's module, or a pattern; its distance is measured from 0. ``None``: no head.
        head_strength: :math:`\lambda_V`, for the head; ``None`` leaves it free.
        factor: Multiplies both strengths.
        include: Patterns of names to penalise besides the linear maps.
        exclude: Patterns of names to leave out.
        convention: ``"operator"``, or ``"authors"``: the kernel of a depthwise convolution is one row, and the raw
            scales of batch-norm layers are penalised too, the MARS of one being the l1 *sum* over its channels.
        reference: The weights to measure from: a state dict, a module, the path of a safetensors file; default, a
            snapshot of the model now.

    Raises:
        ConfigurationError: An option is not allowed, no parameter is penalised, or the model has adapters (LoRA).
        PatternError: A pattern matches no parameter.
        ReferenceMismatchError: The reference is not of this network.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> penalty = Penalty(model, strength=0.5)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([[3.0, 4.0]]))
        >>> round(penalty().item(), 4)
        12.5
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Norm = "frobenius",
        strength: float,
        head: str | None = None,
        head_strength: float | None = None,
        factor: float = 1.0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        convention: Convention = "operator",
        reference: Source | None = None,
    ) -> None:
        if norm not in get_args(Norm):
            raise ConfigurationError(f"norm={norm!r} is not known: use 'frobenius' (l2-SP) or 'mars' (MARS-SP).")
        self.norm = norm
        self.strength = non_negative("strength", strength)
        self.head_strength = head_strength_for(head, head_strength)
        self.factor = non_negative("factor", factor)
        self.convention = convention
        found = layers(model, head=head, convention=convention)
        if any(isinstance(layer, AdaptedLayer) for layer in fold(model, found)):
            raise ConfigurationError(
                "The model has adapters, and the price of their update is not offered: use a Constraint, or the"
                " optimizer's weight_decay on their factors."
            )
        self.layers = tuple(layer for layer, taken in select(found, include=include, exclude=exclude) if taken)
        if not self.layers:
            raise ConfigurationError("The penalty is on no parameter: include= some, or exclude= fewer.")
        body = [layer for layer in self.layers if layer.role == "body"]
        names = [layer.name for layer in body]
        weights = Reference.of(model, names) if reference is None else Reference.load(reference, body)
        self._reference = weights.part(names)
        self._kernel = Gradients(norm)
        self._fingerprint: str | None = None
        self._stepping = False

    def __call__(self) -> Tensor:
        """The value at the current weights, to be added to the loss.

        Returns:
            0-d, float32 (float64 if the weights are), on the first weight's device; differentiable, with the
            (sub)gradient 0 for a layer that has not moved.

        Raises:
            ConfigurationError: A weight is sharded, so that its norm is on none of the ranks.
        """
        sharded = next((layer.name for layer in self.layers if is_sharded(layer.weight)), None)
        if sharded is not None:
            raise ConfigurationError(f"{sharded} is sharded over ranks: attach() the penalty instead of calling it.")
        values = [self._price(layer) * self._share(layer) for layer in self.layers]
        dtype = torch.promote_types(self.layers[0].weight.dtype, torch.float32)
        return torch.stack([value.to(values[0].device) for value in values]).sum().to(dtype)

    def attach(self, *optimizers: Optimizer) -> None:
        r"""Add the penalty's (sub)gradient to ``.grad`` at the beginning of every ``step()`` from now on.

        That is :math:`2 c \lambda (W - W^0)` for l2-SP, and for MARS-SP :math:`c \lambda \operatorname{sign}(t)` in
        the largest row :math:`t` of each layer. A parameter whose ``.grad`` is ``None`` is not stepped, so it gets
        none. With gradient accumulation the penalty counts once a step. Gradients are clipped before they get here:
        the clipping threshold is for the data's gradient alone. When ``step`` is given a closure, the gradient is
        added after each evaluation of it, while the loss it returns stays the data's (an LBFGS line search wants the
        value: add the penalty to the loss there).

        Args:
            optimizers: One, or several that together hold the penalised parameters; each adds to those it holds.
                Wrappers such as Accelerate's are taken off.

        Raises:
            AttachError: An optimiser cannot carry the penalty, or carries it already.
            ConfigurationError: MARS-SP of sharded weights, whose largest row no rank knows.
        """
        inner = [inner_optimizer(optimizer) for optimizer in optimizers]
        require_parameters(inner, self.layers)
        for layer in self.layers:
            if getattr(layer.module, "sparse", False):
                raise AttachError(f"The gradient of {layer.name} is sparse: build its module with sparse=False.")
            if self.norm == "mars" and is_sharded(layer.weight):
                raise ConfigurationError(
                    f"{layer.name} is sharded over ranks, and none of them knows its largest row:"
                    " use norm='frobenius', or a Constraint with norm='mars'."
                )
        for optimizer in inner:
            if self._before_step in optimizer._optimizer_step_pre_hooks.values():
                raise AttachError("The penalty is attached to this optimizer already, and would count twice.")
            if any(group.get("maximize") for group in optimizer.param_groups):
                raise AttachError(
                    "An optimizer with maximize=True would push the weights away from the reference:"
                    " minimise the negative objective instead."
                )
        for optimizer in inner:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    def state_dict(self) -> dict[str, Any]:
        """The settings and the reference's fingerprint: plain numbers and strings, never the weights."""
        if self._fingerprint is None:
            self._fingerprint = self._reference.fingerprint()
        settings = {
            "norm": self.norm,
            "strength": self.strength,
            "head_strength": self.head_strength,
            "factor": self.factor,
            "convention": self.convention,
            "layers": {layer.name: layer.role for layer in self.layers},
        }
        return {"format": 1, "settings": settings, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the norm, strengths and factor of a saved penalty on the same layers around the same reference.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ConfigurationError: It was saved for other layers or another convention.
            ReferenceMismatchError: It was saved around another reference.
        """
        saved, own = state["settings"], self.state_dict()
        for key in ("convention", "layers"):
            if saved[key] != own["settings"][key]:
                raise ConfigurationError(
                    f"The saved penalty has other {key} than this one: build it with the head, include, exclude and"
                    " convention that it was saved with."
                )
        if state["fingerprint"] != own["fingerprint"]:
            raise ReferenceMismatchError(
                "The reference is not the one that this penalty was saved with: build it with reference= the original"
                " pre-trained weights (or before loading the fine-tuned ones), then load."
            )
        self.norm, self.factor = saved["norm"], saved["factor"]
        self._kernel = Gradients(self.norm)
        self.strength, self.head_strength = saved["strength"], saved["head_strength"]

    def _price(self, layer: Layer) -> float:
        return self.factor * (self.strength if layer.role == "body" else self.head_strength)

    def _displacement(self, layer: Layer) -> Tensor:
        """W - W0 (V for the head) in float32 or wider; the local part of a sharded weight."""
        weight = local(layer.weight)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return wide - self._centre(layer, weight).to(wide.dtype)

    def _centre(self, layer: Layer, weight: Tensor) -> Tensor:
        """W0 beside the local part of the weight, wherever the model has been moved to since; for the head one 0."""
        if layer.role == "head":
            return weight.new_zeros(()).expand(weight.shape)
        return self._reference.beside(layer)

    def _share(self, layer: Layer) -> Tensor:
        """What the layer adds at strength 1: its MARS distance, or the square of its Frobenius distance."""
        T = self._displacement(layer)
        return norms.mars(_rows(layer).matrix(T)) if self.norm == "mars" else norms.frobenius(T).square()

    @torch.no_grad()
    def _add_gradient(self, optimizer: Optimizer) -> None:
        """Add the (sub)gradient to ``.grad`` of what the optimiser holds, in place and without a sync with the host."""
        # GradScaler leaves the gradients scaled when a fused optimiser divides them itself, within its step.
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        pulls = []
        for layer in self.layers:
            weight, price = layer.weight, self._price(layer)
            if id(weight) in held and weight.grad is not None and weight.numel() and price:
                W, factor = local(weight), price if self.norm == "mars" else 2 * price
                pulls.append(Pull(local(weight.grad), W, self._centre(layer, W), _rows(layer), factor))
        self._kernel.add(pulls, scale)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._stepping:  # a subclass's step() that calls super().step() brings us here twice
            return None
        self._stepping = True
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_gradient(optimizer)
            return None

        def with_penalty() -> Any:
            loss = closure()
            self._add_gradient(optimizer)
            return loss

        return (optimizer, with_penalty, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _after_step(self, _optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        self._stepping = False


def non_negative(name: str, value: float) -> float:
    """The value, checked.

    Raises:
        ConfigurationError: It is negative, infinite or NaN.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ConfigurationError(f"{name}={value} is not allowed: give a finite number >= 0.")
    return float(value)


def head_strength_for(head: str | None, head_strength: float | None) -> float:
    """The strength of the head's term, 0 for a free head or none.

    Raises:
        ConfigurationError: A strength without a head, or one that is not allowed.
    """
    if head is None and head_strength is not None:
        raise ConfigurationError(f"head_strength={head_strength} needs head=, the name of the new head's module.")
    return 0.0 if head_strength is None else non_negative("head_strength", head_strength)


def _rows(layer: Layer) -> Rows:
    # The authors take the whole vector of batch-norm scales for one row.
    return replace(layer.rows, single=True) if layer.rows.kind == "scale" else layer.rows
