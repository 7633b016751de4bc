r"""The feature penalty DELTA (Li et al., 2019): keep what layers compute, weighted by how much each channel matters.

For a batch of n inputs and a layer whose feature map :math:`F` has C channels at P positions, the penalty is

.. math:: \lambda \, \frac{1}{n P} \sum_{\text{inputs, positions}} \sum_c a_c \, (F_c - F^0_c)^2

summed over the chosen layers, where :math:`F^0` is the map of a frozen copy of the network as it was. The attention
:math:`a_c` comes from how much the loss grows when channel c is zeroed (:func:`channel_losses`), through one of four
maps (:func:`attention_weights`), because the published codes differ from each other and from the paper's formula.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tethertune import norms, rows
from tethertune.errors import ConfigurationError, ReferenceMismatchError, did_you_mean
from tethertune.penalty import head_strength_for, non_negative
from tethertune.reference import Reference

__all__ = ["FeaturePenalty", "attention_weights", "channel_losses"]

Attention = Literal["softmax", "zscore", "sigmoid", "none"]
Reduction = Literal["mean", "sum"]

_CHANNEL_AXIS = {2: 1, 3: 2, 4: 1}
"""By the dimensions of a feature map: (n, C), (n, tokens, C), (n, C, height, width)."""


class FeaturePenalty:
    r"""DELTA: the price of changing the feature maps of a pre-trained network.

    Build it when the pre-trained weights are in place and before wrapping the model (DDP, ``torch.compile``): it keeps
    a frozen copy of the network and hooks the layers. Call it after the model's own forward, whose maps the hooks have
    kept, with the same inputs; only the copy is run again, in eval mode and without gradients. Without gradients
    (evaluation) the hooks keep nothing.

    How strengths translate, for one layer of C channels:

    - The code published with DELTA: :math:`\frac{\alpha}{2} \sum_\text{inputs} \sum_c C\,a_c\,\|d_c\|^2 / P`
      with z-scored attention is ``attention="zscore"``, ``reduction="sum"``, ``strength`` :math:`= \alpha C / 2`.
      Its head term :math:`\frac{\beta}{2} \|V\|_F^2` (plus the bias) is ``head_strength`` :math:`= \beta / 2`.
    - The comparison in Gouk et al.: :math:`\alpha` times the mean over inputs, positions *and channels* of
      :math:`\operatorname{sigmoid}(\Delta L_c)\, d_c^2` is ``attention="sigmoid"``, ``reduction="mean"``,
      ``strength`` :math:`= \alpha`.

    ``strength`` and ``head_strength`` are read at each call, so that a schedule may set them.

    Args:
        model: The network, with its pre-trained weights in place.
        layers: Names of modules whose output is one tensor: (n, C), (n, tokens, C) or (n, C, height, width).
        strength: :math:`\lambda`, finite and >= 0.
        attention: What :func:`attention_weights` makes of the importance; ``"none"``: every channel counts 1/C.
        importance: For each layer what :func:`channel_losses` returns, shape (C,); ``None`` with ``attention="none"``.
        reduction: Over the batch: its ``"mean"``, or its ``"sum"``. Positions are always averaged.
        head: The name of the new head's module, or a pattern.
        head_strength: :math:`\lambda_V`, which adds :math:`\lambda_V \|V\|_F^2` for the head's linear maps; ``None``
            leaves it free.

    Raises:
        ConfigurationError: An option is not allowed, a layer is not known, or an importance is missing.
        PatternError: ``head`` matches no parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
        >>> penalty = FeaturePenalty(model, layers=["0"], strength=2.0, attention="none")
        >>> inputs = torch.ones(4, 2)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(0.5)
        >>> output = model(inputs)
        >>> round(penalty(inputs).item(), 4)
        2.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str],
        strength: float,
        attention: Attention = "softmax",
        importance: Mapping[str, Tensor] | None = None,
        reduction: Reduction = "mean",
        head: str | None = None,
        head_strength: float | None = None,
    ) -> None:
        if reduction not in get_args(Reduction):
            raise ConfigurationError(f"reduction={reduction!r} is not known: use 'mean' or 'sum'.")
        if isinstance(layers, str) or not layers:
            raise ConfigurationError(f"layers={layers!r} is not allowed: give a list of one or more module names.")
        self.layers = tuple(dict.fromkeys(layers))
        self.strength = non_negative("strength", strength)
        self.head_strength = head_strength_for(head, head_strength)
        self.reduction = reduction
        self.attention = attention
        self.weights = _weights(self.layers, attention, importance)
        found = rows.layers(model, head=head)
        self._head = tuple(layer for layer in found if layer.role == "head" and not layer.rows.free)
        self._body = tuple(layer.name for layer in found if layer.role == "body")
        modules = {name: _submodule(model, name) for name in self.layers}
        self._reference = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self._fingerprint: str | None = None
        self._taps = {name: _Tap() for name in self.layers}
        self._handles = [module.register_forward_hook(self._taps[name]) for name, module in modules.items()]
        self._arm()

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        """The value for the forward that the model has just made.

        Args:
            inputs: What the model was called with.
            options: Likewise, by name.

        Returns:
            0-d, float32 (float64 if the maps are), differentiable in the model's weights.

        Raises:
            ConfigurationError: A layer was not run with gradients since the last call, or its map is not one tensor of
                an allowed shape, of the reference's shape, and of as many channels as there are attention weights.
        """
        maps = {name: tap.take(name) for name, tap in self._taps.items()}
        device = next(iter(maps.values())).device
        with torch.no_grad():
            references = _feature_maps(self._reference.to(device), self.layers, *inputs, **options)
        distances = [self._distance(name, maps[name], references[name]).to(device) for name in self.layers]
        value = self.strength * torch.stack(distances).sum()
        for layer in self._head:
            value = value + self.head_strength * norms.frobenius(layer.weight).square().to(value)
        return value

    def remove(self) -> None:
        """Take the hooks off the model; the penalty is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        for tap in self._taps.values():
            tap.armed, tap.output = False, None

    def state_dict(self) -> dict[str, Any]:
        """The settings, the attention weights, and the fingerprint of the reference network's body."""
        if self._fingerprint is None:
            self._fingerprint = Reference.of(self._reference, self._body).fingerprint()
        settings = {
            "layers": list(self.layers),
            "head": [layer.name for layer in self._head],
            "strength": self.strength,
            "head_strength": self.head_strength,
            "attention": self.attention,
            "reduction": self.reduction,
        }
        return {"format": 1, "settings": settings, "weights": dict(self.weights), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the strengths, the reduction and the attention of a saved penalty around the same network.

        The importance need not be computed again for that: build the penalty with ``attention="none"``, then load.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ConfigurationError: It was saved for other layers or another head.
            ReferenceMismatchError: It was saved around other weights.
        """
        saved, own = state["settings"], self.state_dict()
        for key in ("layers", "head"):
            if saved[key] != own["settings"][key]:
                raise ConfigurationError(
                    f"The saved feature penalty is for {key} {saved[key]}, this one for {own['settings'][key]}:"
                    f" build it with the {key} that it was saved with."
                )
        if state["fingerprint"] != own["fingerprint"]:
            raise ReferenceMismatchError(
                "The reference network is not the one that this penalty was saved with: build it while the model holds"
                " the original pre-trained weights, before loading the fine-tuned ones, then load."
            )
        self.strength, self.head_strength = saved["strength"], saved["head_strength"]
        self.attention, self.reduction = saved["attention"], saved["reduction"]
        self.weights = dict(state["weights"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arm()

    def _arm(self) -> None:
        for tap in self._taps.values():
            tap.armed = True

    def _distance(self, name: str, new: Tensor, old: Tensor) -> Tensor:
        if new.shape != old.shape:
            raise ConfigurationError(
                f"The map of {name} has shape {tuple(new.shape)}, the reference network's {tuple(old.shape)}: call the"
                " penalty with the inputs of the forward that the model has just made."
            )
        axis = _channel_axis(name, new)
        positions = math.prod(size for i, size in enumerate(new.shape) if i not in (0, axis))
        dtype = torch.promote_types(new.dtype, torch.float32)
        squares = (new.to(dtype) - old.to(dtype)).square().sum([i for i in range(new.ndim) if i != axis])
        weighted = squares.mean() if self.attention == "none" else squares @ self._weights_of(name, squares)
        samples = new.shape[0] if self.reduction == "mean" else 1
        return weighted / (samples * positions)

    def _weights_of(self, name: str, squares: Tensor) -> Tensor:
        weights = self.weights[name] = self.weights[name].to(squares)
        if weights.shape != squares.shape:
            raise ConfigurationError(
                f"The importance of {name} is for {len(weights)} channels, its map has {len(squares)}:"
                " compute it with channel_losses on this model and layer."
            )
        return weights


def attention_weights(losses: Tensor, kind: Attention) -> Tensor:
    r"""The attention :math:`a_c` of channels whose absence raises the loss by :math:`\Delta L_c`.

    ==============  ======================================================  =================================
    kind            :math:`a_c`                                             as in
    ==============  ======================================================  =================================
    ``"softmax"``   :math:`\operatorname{softmax}(\Delta L)_c`              the DELTA paper's formula
    ``"zscore"``    :math:`\operatorname{softmax}(z/5)_c`, z the z-score    the DELTA authors' code
    ``"sigmoid"``   :math:`\operatorname{sigmoid}(\Delta L_c) / C`          the code of Gouk et al.
    ``"none"``      :math:`1 / C`                                           no attention
    ==============  ======================================================  =================================

    The first two and the last sum to 1. Of measured losses, softmax and sigmoid are within about 2 % of equal weights.

    Args:
        losses: :math:`\Delta L`, shape (C,), finite; see :func:`channel_losses`.
        kind: Which of the four.

    Returns:
        Shape (C,), float32, or float64 if ``losses`` are.

    Raises:
        ConfigurationError: An unknown kind, or losses that are not finite or not of shape (C,).

    Example:
        >>> attention_weights(torch.tensor([0.0, 1.0986123]), "softmax")
        tensor([0.2500, 0.7500])
    """
    if kind not in get_args(Attention):
        allowed = get_args(Attention)
        raise ConfigurationError(
            f"attention={kind!r} is not known: use one of {', '.join(map(repr, allowed))}.{did_you_mean(kind, allowed)}"
        )
    if losses.ndim != 1 or not losses.numel() or not losses.isfinite().all():
        raise ConfigurationError(
            f"An importance must be finite and of shape (channels,), this one has shape {tuple(losses.shape)}"
            f"{'' if losses.isfinite().all() else ' and values that are not finite'}: see channel_losses."
        )
    losses = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
    if kind == "softmax":
        return losses.softmax(0)
    if kind == "zscore":
        spread = losses.std(correction=0).masked_fill(losses.max() == losses.min(), math.inf)
        return ((losses - losses.mean()) / spread / 5).softmax(0)
    if kind == "sigmoid":
        return losses.sigmoid() / len(losses)
    return torch.full_like(losses, 1 / len(losses))


@torch.no_grad()
def channel_losses(
    model: nn.Module,
    layer: str,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    tail: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""How much the loss grows when one channel of a layer's output is zeroed, leave-one-out for each channel.

    The model is run in eval mode, and left as it was. It needs a head that classifies: in DELTA one trained on the
    frozen features.

    Args:
        model: Maps inputs to logits.
        layer: The name of the module, as for :class:`FeaturePenalty`.
        batches: Pairs of inputs and targets, on the model's device.
        loss: The *mean* loss of logits and targets, 0-d, such as ``torch.nn.functional.cross_entropy``.
        tail: The rest of the network, from the layer's map to the logits, if it is at hand: then each channel costs a
            run of the tail instead of a run of the network. It must be in eval mode if it is not a part of the model.

    Returns:
        :math:`\Delta L_c = L(\text{without } c) - L`, averaged over all samples; float64, shape (C,).

    Raises:
        ConfigurationError: The layer is not known or not run, its map is not one tensor of an allowed shape, or there
            is no batch.
    """
    module = _submodule(model, layer)
    total: Tensor | None = None
    samples = 0
    with _evaluating(model):
        for inputs, targets in batches:
            features = _feature_maps(model, [layer], inputs)[layer]
            axis = _channel_axis(layer, features)
            finish = partial(_run_from, model, module, inputs) if tail is None else tail
            whole = loss(finish(features.clone()), targets)
            channels = torch.arange(features.shape[axis], device=features.device)
            without = [loss(finish(features.index_fill(axis, channel, 0)), targets) for channel in channels]
            rise = len(targets) * (torch.stack(without).double() - whole)
            total = rise if total is None else total + rise
            samples += len(targets)
    if total is None:
        raise ConfigurationError("channel_losses was given no batch: give at least one pair of inputs and targets.")
    return total / samples


class _Tap:
    """A forward hook that keeps a module's last output while gradients are recorded.

    A copy or pickle holds no output, and keeps nothing until the copy of its penalty arms it: a copied model alone is
    free of it.
    """

    def __init__(self) -> None:
        self.armed = False
        self.output: Any = None

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.armed and torch.is_grad_enabled():
            self.output = _own(output)

    def __reduce__(self) -> tuple[type["_Tap"], tuple[()]]:
        return _Tap, ()

    def take(self, name: str) -> Tensor:
        """The output, which is let go of."""
        output, self.output = self.output, None
        if output is None:
            raise ConfigurationError(
                f"{name} has not run with gradients since the last call: call the penalty once after each forward of"
                " the model that it was built on, outside of no_grad."
            )
        return _one_tensor(name, output)


def _own(output: Any) -> Any:
    """The output, safe from in-place activations that follow the layer."""
    return output.clone() if isinstance(output, Tensor) else output


def _one_tensor(name: str, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ConfigurationError(
            f"{name} returns a {type(output).__name__}: choose a module inside it whose output is one tensor."
        )
    return output


def _channel_axis(name: str, features: Tensor) -> int:
    if features.ndim not in _CHANNEL_AXIS:
        raise ConfigurationError(
            f"The map of {name} has shape {tuple(features.shape)}; allowed are (n, channels), (n, tokens, channels) and"
            " (n, channels, height, width): choose another layer."
        )
    return _CHANNEL_AXIS[features.ndim]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = {rows.clean_name(n): m for n, m in model.named_modules(remove_duplicate=False) if n}
    if name not in modules:
        raise ConfigurationError(f"The model has no module {name!r}.{did_you_mean(name, modules)}")
    return modules[name]


def _weights(layers: Sequence[str], attention: Attention, importance: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if attention == "none":
        if importance is not None:
            raise ConfigurationError("attention='none' takes no importance: leave it out, or choose an attention.")
        return {}
    given = {} if importance is None else importance
    if set(given) != set(layers):
        raise ConfigurationError(
            f"attention={attention!r} needs the importance of each layer: layers are {list(layers)}, importance has"
            f" {list(given)}. Compute it with channel_losses, or choose attention='none'."
        )
    return {name: attention_weights(given[name], attention) for name in layers}


def _feature_maps(model: nn.Module, layers: Sequence[str], *inputs: Any, **options: Any) -> dict[str, Tensor]:
    """Run the model and return the layers' outputs."""
    outputs: dict[str, Any] = {}

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[name] = _own(output)

    handles = [_submodule(model, name).register_forward_hook(partial(keep, name)) for name in layers]
    try:
        model(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in outputs:
            raise ConfigurationError(f"{name} does not run in the model's forward: choose a layer that does.")
    return {name: _one_tensor(name, outputs[name]) for name in layers}


def _run_from(model: nn.Module, module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    """What the model makes of the inputs when the output of one module is replaced."""
    handle = module.register_forward_hook(lambda *_: output)
    try:
        logits: Tensor = model(inputs)
        return logits
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
