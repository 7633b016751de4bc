"""Which weights make a row, decided by the type of the module that owns them, never by their shape.

A *row* is all the weights that feed one output unit: a row of the matrix of the linear map, or for a convolution the
kernel of one output channel. The distance of the MARS norm is measured row by row, so a wrong axis is a wrong
constraint.

===============================  =============================  =========================================
module                           parameter                      a row is
===============================  =============================  =========================================
Linear, Bilinear, Conv1d/2d/3d   weight                         one output unit (axis 0)
ConvTranspose1d/2d/3d            weight (in, out/g, ...)        one output channel of one group
MultiheadAttention               in/q/k/v_proj_weight           one output unit (axis 0)
RNN, LSTM, GRU and their cells   weight_ih, weight_hh,          one gate unit (axis 0)
                                 weight_hr
transformers' ``Conv1D``         weight (in, out)               one output unit (axis 1)
Embedding, EmbeddingBag          weight                         one token's vector; free by default
normalisation layers, also       weight                         one channel; free by default
called ``...RMSNorm`` and so on
any of these                     biases                         one unit; free by default
anything else                    any                            axis 0; free by default
===============================  =============================  =========================================

``convention="authors"`` follows the code published with the paper instead: the whole kernel of a depthwise
convolution is ONE row, and the scale of a batch-norm layer is constrained as ``weight / sqrt(running_var + 1e-6)``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from tethertune.errors import ConfigurationError, PatternError, did_you_mean

__all__ = [
    "Convention",
    "Kind",
    "Layer",
    "Role",
    "Rows",
    "clean_name",
    "layers",
    "matches",
    "matching",
    "of",
    "select",
    "view",
]

Convention = Literal["operator", "authors"]
Role = Literal["body", "head"]
Kind = Literal["map", "scale", "embedding", "normalisation", "bias", "other"]
"""What a parameter is: the matrix of a linear ``map``; a batch-norm ``scale`` that is constrained relative to its
running variance (authors' convention only); an ``embedding``; a ``normalisation`` scale; a ``bias``; or ``other``.
Maps and scales are constrained by default, the rest is free by default."""

_AXIS_0 = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)
_NORMALISATION = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm, and their subclasses in timm and torchvision
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_CALLED_NORMALISATION = (
    "LayerNorm",
    "RMSNorm",
    "RmsNorm",
)  # language models bring their own: LlamaRMSNorm, T5LayerNorm
_REPARAMETRISED = ("_g", "_v", "_orig")  # by torch.nn.utils' weight_norm, spectral_norm, prune: not the map itself
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Rows:
    """How one parameter is cut into rows.

    Attributes:
        kind: What the parameter is; see :data:`Kind`.
        axis: The axis that numbers the rows (0 or 1).
        groups: The groups of a transposed convolution; 1 otherwise.
        single: The whole parameter is one row.
    """

    kind: Kind
    axis: int = 0
    groups: int = 1
    single: bool = False

    @property
    def free(self) -> bool:
        """Whether the parameter is free unless an ``include`` pattern names it."""
        return self.kind not in ("map", "scale")

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """The number of rows and of columns (weights a row)."""
        rows = 1 if self.single or weight.ndim == 0 else weight.shape[self.axis] * self.groups
        return rows, (weight.numel() // rows if rows else 0)

    def blocks(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Views of the weight whose axis 0 numbers the rows; one a group of a transposed convolution, else one."""
        if self.single or weight.ndim == 0:
            return (weight.unsqueeze(0),)
        if self.groups > 1:
            return tuple(block.movedim(self.axis, 0) for block in weight.chunk(self.groups))
        return (weight.movedim(self.axis, 0),)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (rows, columns): a view where the strides allow it, else a copy, so never write through it."""
        rows, columns = self.shape(weight)
        blocks = [block.reshape(rows // self.groups, columns) for block in self.blocks(weight)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def of(module: nn.Module, attribute: str, *, convention: Convention = "operator") -> Rows:
    """How the parameter ``attribute`` of ``module`` is cut into rows.

    Args:
        module: The module that owns the parameter.
        attribute: The parameter's name inside the module, e.g. ``"weight"``.
        convention: ``"operator"``, or ``"authors"`` for the rules of the paper's published code.

    Raises:
        ConfigurationError: An unknown convention.
    """
    if convention not in ("operator", "authors"):
        raise ConfigurationError(f"convention={convention!r} is not known: use 'operator' or 'authors'.")
    if "bias" in attribute:
        return Rows("bias")
    if "weight" not in attribute or attribute.endswith(_REPARAMETRISED):
        return Rows("other")
    if isinstance(module, _TRANSPOSED):
        return Rows("map", axis=1, groups=module.groups)
    if isinstance(module, _AXIS_0):
        return Rows("map", single=convention == "authors" and _is_depthwise(module))
    if _is_transformers_conv1d(module):
        return Rows("map", axis=1)
    if isinstance(module, _EMBEDDING):
        return Rows("embedding")
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and convention == "authors":
        return Rows("scale" if module.running_var is not None else "normalisation")
    if isinstance(module, _NORMALISATION) or _is_called_normalisation(module):
        return Rows("normalisation")
    return Rows("other")


def view(weight: Tensor, module: nn.Module, *, convention: Convention = "operator") -> Tensor:
    """The weight of a layer as the (rows, columns) matrix that its norm is taken of.

    Args:
        weight: A parameter of ``module``, or any tensor of its shape (a displacement ``W - W0``, say).
        module: The module that owns the parameter.
        convention: ``"operator"`` or ``"authors"``.

    Returns:
        A view where the strides allow it, else a copy: do not write through it.

    Example:
        >>> import torch
        >>> layer = torch.nn.ConvTranspose2d(4, 6, 3, groups=2)
        >>> tuple(view(layer.weight, layer).shape)
        (6, 18)
    """
    names = {id(parameter): name for name, parameter in module.named_parameters(recurse=False)}
    return of(module, names.get(id(weight), "weight"), convention=convention).matrix(weight)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels > 1


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return any(t.__name__ == "Conv1D" and t.__module__.startswith("transformers.") for t in type(module).__mro__)


def _is_called_normalisation(module: nn.Module) -> bool:
    return any(cls.__name__.endswith(_CALLED_NORMALISATION) for cls in type(module).__mro__)


@dataclass(frozen=True, eq=False)
class Layer:
    """One parameter of a model, known by its name.

    The parameter itself is looked up in its module at each use, because wrappers (``fully_shard``, Accelerate)
    replace parameter objects.

    Attributes:
        name: The name in ``model.named_parameters()`` without wrappers' prefixes.
        aliases: Its other names, if the parameter is tied.
        module: The module that owns it.
        attribute: Its name in that module.
        rows: How it is cut into rows.
        role: ``"head"`` for the new classification layer, else ``"body"``.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    attribute: str
    rows: Rows
    role: Role

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    @property
    def variance_name(self) -> str:
        """The name of the running variance beside a batch-norm scale."""
        return self.name.removesuffix(self.attribute) + "running_var"

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)


def clean_name(name: str) -> str:
    """A parameter's name without what ``torch.compile``, activation checkpointing and DDP put in front of it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def layers(model: nn.Module, *, head: str | None = None, convention: Convention = "operator") -> tuple[Layer, ...]:
    """Every parameter of a model, once, in the order of ``named_parameters``; tied parameters under all their names.

    Args:
        model: Any module, also one wrapped by ``torch.compile`` or DDP.
        head: The name of the head's module (``"fc"``), of a parameter, or a pattern of names; ``None``: no head.
        convention: ``"operator"`` or ``"authors"``.

    Raises:
        PatternError: ``head`` matches no parameter.
        ConfigurationError: A parameter is not initialised yet, is tied between the body and the head, or has the
            name of another.
    """
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = clean_name(f"{prefix}.{attribute}" if prefix else attribute)
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ConfigurationError(f"{name} is not initialised yet: run one batch through the model first.")
            uses = found.setdefault(_identity(parameter), [])
            if name not in [use[0] for use in uses]:
                uses.append((name, module, attribute))
    every_name = [name for uses in found.values() for name, _, _ in uses]
    doubled = next((name for name, count in Counter(every_name).items() if count > 1), None)
    if doubled is not None:
        raise ConfigurationError(
            f"Two parameters are called {doubled!r} once the prefixes of wrappers (module., _orig_mod.) are taken off:"
            " rename the submodule that has such a name."
        )
    heads = set() if head is None else matching(every_name, [head], "head")
    result = []
    for uses in found.values():
        names = [name for name, _, _ in uses]
        in_head = [name in heads for name in names]
        if any(in_head) and not all(in_head):
            raise ConfigurationError(
                f"{names[in_head.index(True)]} belongs to the head and is tied to {names[in_head.index(False)]} of the"
                " body, so its ball would have two centres: untie them, or choose head=None."
            )
        # The least free use decides, so that an embedding tied to an output layer is that layer's linear map.
        ways = [of(module, attribute, convention=convention) for _, module, attribute in uses]
        main = min(range(len(uses)), key=lambda i: ways[i].free)
        name, module, attribute = uses[main]
        aliases = tuple(n for n in names if n != name)
        result.append(Layer(name, aliases, module, attribute, ways[main], "head" if in_head[0] else "body"))
    return tuple(result)


def _identity(parameter: Tensor) -> int:
    """One number for parameters that are the same memory: tied as one object, or as two objects over one storage."""
    if type(parameter) in (Tensor, nn.Parameter) and parameter.device.type != "meta" and parameter.numel():
        return hash((parameter.data_ptr(), parameter.shape, parameter.stride()))
    return id(parameter)


def matching(names: Iterable[str], patterns: Sequence[str], argument: str) -> set[str]:
    """The names that any pattern matches, see :func:`matches`.

    Raises:
        PatternError: A pattern that matches nothing, with the argument it was given for.
    """
    names = list(names)
    hits: set[str] = set()
    for pattern in patterns:
        hit = {name for name in names if matches(name, pattern)}
        if not hit:
            stems = {n.rpartition(".")[0] for n in names} | set(names)
            raise PatternError(
                f"{argument}={pattern!r} matches no parameter of the model.{did_you_mean(pattern, stems)}"
                f" Its parameters are named like {_examples(names)}."
            )
        hits |= hit
    return hits


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter: its name, or that of a module it is in.

    Args:
        name: The parameter's name, e.g. ``"layer4.0.conv1.weight"``.
        pattern: A name (``"layer4.0"``) or a shell pattern (``"*.conv?"``), whose ``*`` matches dots too.

    Example:
        >>> [matches("layer4.0.conv1.weight", p) for p in ("layer4", "*.conv?", "layer4.0.conv1.weight", "conv1")]
        [True, True, True, False]
    """
    shell = fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    return shell or name == pattern or name.startswith(f"{pattern}.")


def _examples(names: Sequence[str]) -> str:
    shown = names if len(names) <= 3 else [names[0], names[len(names) // 2], names[-1]]
    return ", ".join(map(repr, shown)) or "nothing (it has none)"


def select(
    candidates: Sequence[Layer], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Iterator[tuple[Layer, bool]]:
    """Each layer with whether it takes part: linear maps, plus ``include``, minus ``exclude``.

    Raises:
        PatternError: A pattern that matches nothing.
    """
    names = [name for layer in candidates for name in layer.names]
    included = matching(names, include, "include")
    excluded = matching(names, exclude, "exclude")
    for layer in candidates:
        taken = not layer.rows.free or not included.isdisjoint(layer.names)
        yield layer, taken and excluded.isdisjoint(layer.names)
