r"""Low-rank adapters (LoRA, of the package peft): the ball is on the update that merging adds to the weights.

An adapted layer's weights are :math:`W_0 + s B A` with :math:`W_0` frozen, so its displacement is :math:`s B A`, the
sum of these for several active adapters. Row :math:`i` of it is row :math:`i` of :math:`B` times :math:`s A`: scaling
that row of :math:`B` scales the row of the displacement, which is the radial projection onto its ball exactly. Its
l1 norm is at most :math:`s \sum_k |B_{ik}| \|A_k\|_1`, so most rows are known to be inside without forming any
product; of the others, some rows are formed at a time. The Frobenius norm comes from two small Gram matrices,

.. math:: \|BA\|_F^2 = \operatorname{tr}\left(B^T B \, A A^T\right).

The promise is that of :math:`s B A` in float64 from the stored factors. Adapters are known by their classes' names;
nothing here imports peft.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from tethertune import norms
from tethertune.balls import Block
from tethertune.errors import ConfigurationError
from tethertune.reference import Reference
from tethertune.rows import Layer, Rows, clean_name, of
from tethertune.sharding import full, is_sharded, local, reduce_over_shards, refuse_split_rows

__all__ = ["AdaptedLayer", "UpdateBall", "base_weights", "fold"]

Factors: TypeAlias = tuple[Tensor, Tensor, float]
_PART = 1 << 18  # elements of the update that are formed at a time
_SHARES = (1 / 16, 1.0)  # of the rounding that could happen at worst, what an attempt leaves room for
_INITIALISED_INTO_THE_WEIGHTS = ("corda", "loftq", "lora_ga", "olora", "pissa")
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


@dataclass(frozen=True, eq=False)
class AdaptedLayer(Layer):
    """A frozen weight with adapters beside it, under the name that the weight has once they are merged into it.

    Attributes:
        refusal: Why its update cannot have a ball; empty if it can.
    """

    refusal: str = ""

    @property
    def weight(self) -> nn.Parameter:
        """A factor whose rows (for an embedding: columns) are scaled: that of the first active adapter, or of any."""
        if self.refusal:
            return cast("nn.Parameter", self.base)
        return (self._pairs(self._active()) or self._pairs(self._scaled()))[0][0]

    @property
    def base(self) -> Tensor | None:
        """The frozen weight that the update is added to; ``None`` where its layer has none of that name."""
        weight: Tensor | None = getattr(_base_layer(self.module), self.attribute, None)
        return weight

    def base_norm(self, norm: str) -> float:
        """The norm of the frozen weight, for a radius relative to it.

        Raises:
            ConfigurationError: It is quantised or not finite.
        """
        weight, cut = self.base, of(_base_layer(self.module), self.attribute)
        if weight is None or not weight.is_floating_point():
            raise ConfigurationError(
                f"{self.name} is quantised, so that its norm is not known: give a number as radius=."
            )
        matrix = cut.matrix(full(weight.detach()))
        value = float(norms.mars(matrix) if norm == "mars" else norms.frobenius(matrix))
        if not math.isfinite(value):
            raise ConfigurationError(f"The reference of {self.name} holds a NaN or an infinity: load it again.")
        return value

    def _scaled(self) -> Iterable[str]:
        """The names of the adapters that it has."""
        module: Any = self.module
        return cast("Iterable[str]", module.lora_embedding_A if self._is_embedding else module.lora_B)

    @property
    def _is_embedding(self) -> bool:
        module: Any = self.module
        return len(module.lora_embedding_A) > 0

    def _active(self) -> list[str]:
        module, own = cast("Any", self.module), set(self._scaled())
        return [name for name in module.active_adapters if name in own]

    def _pairs(self, names: Iterable[str]) -> list[tuple[nn.Parameter, Tensor, float]]:
        """Of each adapter: the factor that is scaled, the other one, and the scaling."""
        module: Any = self.module
        if self._is_embedding:
            return [(module.lora_embedding_A[n], module.lora_embedding_B[n], float(module.scaling[n])) for n in names]
        return [(module.lora_B[n].weight, module.lora_A[n].weight, float(module.scaling[n])) for n in names]

    def check(self) -> list[tuple[nn.Parameter, Tensor, float]]:
        """The factors of the active adapters, which must be trained all or not at all.

        Raises:
            ConfigurationError: They are frozen in part.
        """
        pairs = self._pairs(self._active())
        if len({scaled.requires_grad for scaled, _, _ in pairs}) > 1 or any(
            fixed.requires_grad and not scaled.requires_grad for scaled, fixed, _ in pairs
        ):
            raise ConfigurationError(
                f"The active adapters of {self.name} are in part frozen, and the ball is on their sum: train or freeze"
                " all factors of all active adapters, or merge the frozen ones first."
            )
        return pairs

    def factors(self) -> list[Factors]:
        """Of each active adapter: a view (rows, rank) that can be scaled, what it is multiplied by, and the scaling.

        On sharded factors this is a collective call: the rows are this rank's, what they are multiplied by is whole.

        Raises:
            ConfigurationError: The active adapters are frozen in part, or a row is spread over ranks.
        """
        result = []
        for scaled, fixed, scaling in self.check():
            refuse_split_rows(scaled, self.name, axis_0=not self._is_embedding)
            left, right = local(scaled).detach(), full(fixed).detach()
            if self._is_embedding:
                left, right = left.t(), right.t()
            result.append((left.flatten(1), right.flatten(1), scaling))
        return result


def fold(model: nn.Module, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers of a model, with each adapted weight and its adapters' factors as one :class:`AdaptedLayer`.

    Args:
        model: The network, with adapters or without.
        layers: Its layers, as :func:`tethertune.rows.layers` gives them.
    """
    gone: set[str] = set()
    adapted: list[AdaptedLayer] = []
    unusual = _initialised_into_the_weights(model)
    for prefix, module in model.named_modules():
        place = clean_name(f"{prefix}.x").removesuffix("x")
        below = [layer for layer in layers if layer.name.startswith(place)]
        if _is_a(module, "ModulesToSaveWrapper"):  # the trained copy stands beside the original
            gone |= {layer.name for layer in below if layer.name.startswith(f"{place}original_module.")}
        elif _is_a(module, "BaseTunerLayer"):
            lora = _is_a(module, "LoraLayer")
            gone |= {layer.name for layer in below if _is_factor(layer.name.removeprefix(place), lora=lora)}
            base, attribute = _base_layer(module), _adapted_attribute(module)
            own = next((la for la in below if la.module is base and la.attribute == attribute), None)
            gone |= {own.name} if own else set()
            kind = of(base, attribute).kind
            kind = "map" if kind == "other" and lora and hasattr(base, "in_features") else kind  # a quantised one
            cut = Rows(kind, axis=int(kind == "embedding"))
            role = own.role if own else "body"
            refusal = _refusal(module, own, unusual)
            adapted.append(AdaptedLayer(f"{place}{attribute}", (), module, attribute, cut, role, refusal))
    return (*[layer for layer in layers if layer.name not in gone], *adapted)


def base_weights(layers: Iterable[Layer]) -> Reference:
    """The frozen weights beneath the adapted ones among some layers, by the names of those; shared."""
    bases = {layer.name: layer.base for layer in layers if isinstance(layer, AdaptedLayer)}
    return Reference({name: weight.detach() for name, weight in bases.items() if weight is not None})


def _is_a(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def _base_layer(module: nn.Module) -> nn.Module:
    """What an adapter wraps; adapters can wrap each other."""
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module


def _adapted_attribute(module: nn.Module) -> str:
    """The name of the adapted weight in the module that owns it."""
    if _is_a(module, "ParamWrapper"):
        return str(module.parameter_name)
    return "in_proj_weight" if isinstance(_base_layer(module), nn.MultiheadAttention) else "weight"


def _is_factor(name: str, *, lora: bool) -> bool:
    """Whether a parameter of an adapter's module (its name there) is a factor, and not the wrapped layer's."""
    if lora:
        return name.startswith(tuple(f"{factor}." for factor in _FACTORS)) and not name.endswith(".bias")
    return not name.startswith("base_layer.")


def _initialised_into_the_weights(model: nn.Module) -> dict[str, str]:
    """The adapters whose initialisation took something out of the base weights, with its name."""
    found = {}
    for module in model.modules():
        configured = getattr(module, "peft_config", None)
        for name, config in configured.items() if isinstance(configured, dict) else ():
            how = str(getattr(config, "init_lora_weights", "")).lower()
            if how.startswith(_INITIALISED_INTO_THE_WEIGHTS):
                found[name] = how
    return found


def _refusal(module: nn.Module, own: Layer | None, unusual: Mapping[str, str]) -> str:
    """Why the update of an adapted layer cannot have a ball; empty if it can."""
    kind = type(module).__name__
    if not _is_a(module, "LoraLayer") or not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        return f"adapted by {kind}, whose update is not a product of two factors: use LoRA"
    if kind in ("MultiheadAttention", "ParamWrapper"):
        return f"adapted by peft's {kind}, which does not keep the adapted weight as a matrix"
    if own and own.weight.requires_grad:
        return "trained itself and adapted: freeze it with requires_grad_(False)"
    if own and own.role == "head":
        return "adapted and of the head, whose ball is around 0: train the head whole (peft's modules_to_save=)"
    if getattr(_base_layer(module), "groups", 1) > 1:
        return "a grouped convolution, into which peft cannot merge an adapter"
    adapter: Any = module
    for name in (*adapter.lora_A, *adapter.lora_embedding_A):
        variant = adapter.lora_variant.get(name)
        if variant is not None:
            what = type(variant).__name__.removesuffix("Variant")
            return f"adapted by the variant {what}, whose update is not s·B·A: use plain LoRA (use_rslora is fine)"
        if name in unusual:
            return (
                f"adapted with init_lora_weights={unusual[name]!r}, which takes the first update out of the weights, so"
                " that s·B·A is not the distance from the pre-trained ones: use True, 'gaussian', 'orthogonal' or 'eva'"
            )
    return ""


@dataclass(eq=False)
class UpdateBall:
    """The ball of an adapted layer's update around 0; stands beside :class:`tethertune.balls.Ball`.

    Attributes:
        layer: Whose update it holds.
        norm: ``"mars"`` or ``"frobenius"``.
        radius: gamma_j, finite, in the norm.

    Raises:
        ConfigurationError: The layer's update is not of a kind that can have a ball.
    """

    layer: AdaptedLayer
    norm: str
    radius: float
    shift: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.layer.refusal:
            raise ConfigurationError(f"{self.layer.name} is {self.layer.refusal}; or exclude= it.")
        self.layer.check()

    @property
    def by_row(self) -> bool:
        """Whether each row has a ball of its own."""
        return self.norm == "mars"

    def in_memory(self, *, device: torch.device | None = None) -> None:
        """``None``: a product of factors is not for the kernels."""

    def blocks(self, *, device: torch.device | None = None) -> list[Block]:  # noqa: ARG002
        """None: there is no weight and no centre to cut."""
        return []

    @property
    def nbytes(self) -> int:
        """Nothing is kept."""
        return 0

    @torch.no_grad()
    def project(self) -> Tensor:
        """Bring the update inside, in place; returns how many rows (MARS) or layers (Frobenius) are not finite, 0-d."""
        factors = self.layer.factors()
        if not factors:
            return torch.zeros((), dtype=torch.long)
        if not self.by_row:
            return self._project_frobenius(factors)
        left, right = _wide(factors)
        chosen = torch.arange(len(left), device=left.device)
        if _host_looks(left.device):
            inside = left.abs() @ right.abs().sum(dim=1) <= self.radius * (1 - 1e-9)
            chosen = (~inside).nonzero().squeeze(1)
        blocks = [block[chosen] for block, _, _ in factors]
        size = max(1, _PART // max(right.shape[1], 1))
        broken = torch.zeros((), dtype=torch.long, device=left.device)
        for start in range(0, len(chosen), size):
            part = [block[start : start + size] for block in blocks]
            broken += self._project_rows(part, factors, right)
        for (block, _, _), scaled in zip(factors, blocks, strict=True):
            block.index_copy_(0, chosen, scaled)
        return broken

    def _project_rows(self, part: Sequence[Tensor], factors: Sequence[Factors], R: Tensor) -> Tensor:
        """Scale the rows of ``part`` in place that are outside; returns how many are not finite."""
        scalings = [scaling for _, _, scaling in factors]
        columns = R.abs().sum(dim=1)
        unit = max(torch.finfo(block.dtype).eps for block in part) / 2
        error = 4 * torch.finfo(torch.float64).eps * (R.shape[0] + R.shape[1])
        for share in (*_SHARES, math.inf):
            L = torch.cat([block.double() * s for block, s in zip(part, scalings, strict=True)], dim=1)
            distance, bound = norms.row_sums(L @ R), L.abs() @ columns
            outside = (distance + error * bound > self.radius) & distance.isfinite()
            if _host_looks(L.device) and not outside.any():
                break
            room = distance + (2 * error + 1.01 * share * unit) * bound
            scale = self.radius / room * (1 - 2**-50) if share < math.inf else torch.zeros_like(room)
            _scale(part, scale, outside)
        return (~distance.isfinite()).sum()

    def _project_frobenius(self, factors: Sequence[Factors]) -> Tensor:
        L, R = _wide(factors)
        if _host_looks(L.device) and not is_sharded(self.layer.weight):
            bound = (torch.linalg.vector_norm(L, dim=0) * torch.linalg.vector_norm(R, dim=1)).sum()
            if bool(bound <= self.radius * (1 - 1e-9)):  # the sum over the ranks of the norms of their products
                return torch.zeros((), dtype=torch.long)
        blocks = [block for block, _, _ in factors]
        unit = max(torch.finfo(block.dtype).eps for block in blocks) / 2
        for share in (*_SHARES, math.inf):
            L, R = _wide(factors)
            right = _gram(R.t())
            square, left = self._reduced(torch.stack([(_gram(L) * right).sum(), L.square().sum()]))
            bound = left * right.diagonal().sum()  # ||L||^2 ||R||^2
            terms = self.layer.rows.shape(self.layer.weight)[0] + R.shape[0] + R.shape[1]
            error = 8 * torch.finfo(torch.float64).eps * terms * bound
            outside = (square + error > self.radius**2) & square.isfinite()
            if _host_looks(L.device) and not bool(outside):
                break
            room = (square.clamp(min=0) + 4 * error).sqrt() + 1.01 * share * unit * bound.sqrt()
            scale = self.radius / room * (1 - 2**-50) if share < math.inf else torch.zeros_like(room)
            _scale(blocks, scale.expand(len(L)), outside.expand(len(L)))
        broken: Tensor = square.isfinite().logical_not().long()
        return broken

    def _reduced(self, values: Tensor) -> Tensor:
        weight = self.layer.weight
        return reduce_over_shards([values], [weight])[0] if is_sharded(weight) else values

    @torch.no_grad()
    def distances(self, kernel: object = None, *, device: torch.device | None = None) -> Tensor:  # noqa: ARG002
        """The l1 norm of each local row of the update (MARS) or its sum of squares (Frobenius), float64, 1-d."""
        factors = self.layer.factors()
        if not factors:  # no adapter is active
            return torch.zeros(self.layer.rows.shape(self.layer.weight)[0], dtype=torch.float64)
        L, R = _wide(factors)
        size = max(1, _PART // max(R.shape[1], 1))
        rows = [L[start : start + size] @ R for start in range(0, len(L), size)]
        parts = [norms.row_sums(T) if self.by_row else norms.add_up_rows(T.square()) for T in rows]
        return torch.cat(parts) if parts else L.new_zeros(0)


def _host_looks(device: torch.device) -> bool:
    """Whether the host may see what is outside: on an accelerator it would wait for it."""
    return device.type == "cpu"


def _wide(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """The update as one product (rows, ranks) x (ranks, columns), both float64."""
    left = torch.cat([block.double() * scaling for block, _, scaling in factors], dim=1)
    return left, torch.cat([other.double() for _, other, _ in factors])


def _gram(X: Tensor) -> Tensor:
    """``X^T X`` of a float64 matrix, added up in an order that does not depend on the number of threads."""
    whole = len(X) // 256 * 256
    parts = X[:whole].reshape(-1, 256, X.shape[1])
    return torch.bmm(parts.transpose(1, 2), parts).sum(dim=0) + X[whole:].t() @ X[whole:]


def _scale(blocks: Iterable[Tensor], scale: Tensor, chosen: Tensor) -> None:
    """Multiply the chosen rows, each product rounded once to the stored numbers; the others keep their bits."""
    for block in blocks:
        block.copy_(torch.where(chosen.unsqueeze(1), (block.double() * scale.unsqueeze(1)).to(block.dtype), block))
