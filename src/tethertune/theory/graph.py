"""A network read into the nodes that the (v, a) calculus knows, from a ``torch.export`` graph.

Exporting gives the same few operators for every library's modules, with the sizes of all values and the names of all
parameters: timm's and torchvision's networks need no change. Batch norm is folded into the linear map before it where
nothing else reads that map's output, and is a diagonal linear map elsewhere. A node that the calculus does not cover
raises :class:`NotCoveredError` with its name.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ExportGraphSignature

from tethertune.errors import ConfigurationError
from tethertune.theory.activations import ACTIVATIONS
from tethertune.theory.maps import Convolution, Dense, Diagonal, LinearMap
from tethertune.theory.nodes import (
    BatchNorm,
    Concat,
    Elementwise,
    Fixed,
    Input,
    Linear,
    MaxPool,
    Network,
    Node,
    NotCoveredError,
    Shift,
    Sum,
)
from tethertune.theory.operators import pooling, transposed_axis
from tethertune.theory.taps import Axis

__all__ = ["trace"]


def trace(model: nn.Module, example: Tensor, *, head: str) -> Network:
    """Read a network.

    Args:
        model: The network, in eval mode; its forward takes a batch of images and returns logits.
        example: A batch of images, two or more.
        head: Name of the module that makes the logits, e.g. ``"fc"``: a Linear layer.

    Raises:
        NotCoveredError: A node that no bound is proven for; it names the node.
        ConfigurationError: A model in training mode, or a head that is not the last linear map.
    """
    if len(example) < 2:
        raise ConfigurationError("A network is traced with a batch of two examples or more; one was given.")
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigurationError(f"{name} is a batch norm in training mode: call model.eval() first.")
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), strict=False)
    except Exception as error:
        summary = str(error).strip().partition("\n")[0]
        raise NotCoveredError(type(model).__name__, f"its graph cannot be exported ({summary})") from error
    reader = _Reader(program.graph_signature, batch=len(example))
    for node in program.graph.nodes:
        reader.read(node)
    features, last = reader.finish(head)
    names = tuple(_parameter_names(program.graph_signature).get(n.name) for n in _placeholders(program.graph))
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return Network(tuple(reader.nodes), last, features, len(example), program.graph_module, names, constants)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _parameter_names(signature: ExportGraphSignature) -> dict[str, str]:
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


_REASONS = {
    "layer_norm": "LayerNorm divides by statistics of its own input",
    "group_norm": "GroupNorm divides by statistics of its own input",
    "instance_norm": "InstanceNorm divides by statistics of its own input",
    "rms_norm": "RMSNorm divides by statistics of its own input",
    "softmax": "a softmax inside the network weighs features by features",
    "scaled_dot_product_attention": "attention multiplies features by features",
    "matmul": "it multiplies features by features",
    "bmm": "it multiplies features by features",
    "einsum": "it multiplies features by features",
}

_COORDINATES = {
    "flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "permute", "transpose", "contiguous", "clone",
    "detach", "alias", "dropout", "feature_dropout", "alpha_dropout", "slice", "select", "split", "split_with_sizes",
    "chunk", "unbind", "identity", "narrow", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "flip",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d",
}  # fmt: skip
"""Operators whose output entries are each one of the input's entries, 0, or an average of some."""


@dataclass
class _Pad:
    index: int
    pads: list[int]
    mode: str
    value: float


@dataclass
class _Reader:
    """Turns the operators of an exported graph into nodes, one by one."""

    signature: ExportGraphSignature
    batch: int
    nodes: list[Node] = field(default_factory=list)
    at: dict[str, int] = field(default_factory=dict)  # graph name -> position of the node that it is now
    pads: dict[str, _Pad] = field(default_factory=dict)
    storage: dict[str, str] = field(default_factory=dict)  # graph name -> the value whose memory it shares
    output: fx.Node | None = None
    dtype: torch.dtype = torch.float32
    parameters: dict[str, str] = field(init=False)
    _path: str = ""

    def __post_init__(self) -> None:
        self.parameters = _parameter_names(self.signature)

    def read(self, node: fx.Node) -> None:
        """Take in the next operator."""
        if node.op == "placeholder":
            if node.name in self.signature.user_inputs:
                self._path, self.dtype = node.name, node.meta["val"].dtype
                if self.dtype not in (torch.float32, torch.float64):
                    raise NotCoveredError(node.name, f"values are {self.dtype}, whose rounding no bound counts")
                self._add(node, Input(node.name, (), _entries(node)))
        elif node.op == "output":
            self.output = node
        elif any(source.name in self.at or source.name in self.pads for source in node.all_input_nodes):
            self._path = _path(node)
            self._check(node)
            self._operator(node)

    def finish(self, head: str) -> tuple[int, Linear]:
        """The position of the features, and the head, which is taken out of the nodes."""
        assert self.output is not None
        outputs = self.output.all_input_nodes
        if len(outputs) != 1 or outputs[0].name not in self.at:
            raise NotCoveredError("the output", "a network must return one tensor of logits")
        index = self.at[outputs[0].name]
        while isinstance(last := self.nodes[index], Fixed) and last.size == self.nodes[last.inputs[0]].size:
            if last.factor > 1:
                raise NotCoveredError(last.name, f"it makes the logits {last.factor:g} times as large after the head")
            (index,) = last.inputs
        if not isinstance(last, Linear) or last.weight != f"{head}.weight" or last.norm is not None:
            raise ConfigurationError(
                f"head={head!r} is not the linear map that makes the logits: that is {last.name}. Name it as the head."
            )
        if not isinstance(last.geometry, Dense) or last.geometry.copies != 1:
            raise NotCoveredError(last.name, "the head must be a Linear layer on one vector of features")
        self.nodes = self.nodes[:index]
        return last.inputs[0], last

    def _check(self, node: fx.Node) -> None:
        """Refuse what no operator may do: change the type of numbers, or write anywhere but into its own argument."""
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            if written and (written not in (["self"], ["input"]) or not _is_in_place(schema.name)):
                raise NotCoveredError(self._path, f"it writes into its argument {written[0]}")
        values = node.meta.get("val")
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(value, Tensor) and value.dtype != self.dtype:
                raise NotCoveredError(self._path, f"it turns {self.dtype} into {value.dtype}")

    # Each operator by its name, without the underscore that marks one that works in place.

    def _operator(self, node: fx.Node) -> None:
        target = node.target
        if target is operator.getitem:
            source = node.all_input_nodes[0]
            self._coordinates(node, source, "getitem", {})
            return
        if not isinstance(target, torch._ops.OpOverload):
            raise NotCoveredError(self._path, f"the operator {target} is not known")
        name = target._schema.name.removeprefix("aten::")
        inplace = _is_in_place(target._schema.name)
        name = name.rstrip("_") if inplace else name
        values = _arguments(node)
        if name == "_assert_tensor_metadata":  # looks at its argument and gives nothing
            return
        if name in ACTIVATIONS:
            try:
                lipschitz, at_zero, ceiling = ACTIVATIONS[name](values)
            except ValueError as error:
                raise NotCoveredError(self._path, str(error)) from error
            index = self._index(values.get("self", values.get("input")))
            self._add(node, Elementwise(self._path, (index,), _entries(node), lipschitz, at_zero, ceiling))
        elif name in _COORDINATES:
            self._coordinates(node, node.all_input_nodes[0], name, values)
        elif (handler := self._handlers.get(name)) is not None:
            self._check_axes(node, name)
            handler(self, node, values)
        else:
            raise NotCoveredError(self._path, _REASONS.get(name, f"the operator {name} is not known"))
        if inplace:
            self._overwrite(node, node.all_input_nodes[0])

    def _check_axes(self, node: fx.Node, name: str) -> None:
        """Refuse a convolution or pooling of something without axes for the examples and the channels."""
        axes = {"1d": 3, "2d": 4}.get(name[-2:])
        rank = node.all_input_nodes[0].meta["val"].ndim
        if axes is not None and rank != axes:
            raise NotCoveredError(self._path, f"{name} takes a value of {rank} axes, not examples, channels and places")

    def _overwrite(self, node: fx.Node, source: fx.Node) -> None:
        """From here on the source's value is the node's."""
        root = self.storage.get(source.name, source.name)
        sharing = [name for name, other in self.storage.items() if other == root and name != source.name]
        later = {user.name for user in node.graph.nodes if user > node}
        for other in node.graph.nodes:
            if other.name in sharing and other is not node and any(user.name in later for user in other.users):
                raise NotCoveredError(self._path, "it overwrites memory that another node reads later through a view")
        self.at[source.name] = self.at[node.name]
        self.storage[node.name] = root

    def _add(self, node: fx.Node, new: Node) -> None:
        self.at[node.name] = len(self.nodes)
        self.storage.setdefault(node.name, node.name)
        self.nodes.append(new)

    def _index(self, value: Any) -> int:
        if isinstance(value, fx.Node) and value.name in self.at:
            return self.at[value.name]
        raise NotCoveredError(self._path, "it is applied to something that is not a feature of the network")

    def _parameter(self, value: Any, what: str) -> str | None:
        if value is None:
            return None
        name = self.parameters.get(value.name) if isinstance(value, fx.Node) else None
        if name is None:
            raise NotCoveredError(self._path, f"its {what} is computed, not a parameter")
        return name

    def _coordinates(self, node: fx.Node, source: fx.Node, name: str, values: Mapping[str, Any]) -> None:
        index = self._index(source)
        shapes = [value.meta["val"] for value in (source, node)]
        before, after = ([v] if isinstance(v, Tensor) else list(v) for v in shapes)
        if values.get("train") and values["p"]:
            raise NotCoveredError(self._path, "dropout that is on in eval mode is random")
        if not _keeps_examples(name, values, before[0], after[0], self.batch):
            raise NotCoveredError(self._path, f"{name} moves entries from one example to another")
        size = sum(_tensor_entries(value) for value in after)
        self._add(node, Fixed(self._path, (index,), size, 1.0))
        self.storage[node.name] = self.storage.get(source.name, source.name)

    def _convolution(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        weight = values["weight"].meta["val"]
        source, pads, mode = self._padded(values["input"])
        shape = source.meta["val"].shape
        dims = weight.ndim - 2
        stride, dilation = (_tuple(values[key], dims) for key in ("stride", "dilation"))
        own = values["padding"]
        axes = []
        for d in range(dims):
            if isinstance(own, str):
                total = dilation[d] * (weight.shape[2 + d] - 1) if own == "same" else 0
                before, after = total // 2, total - total // 2
            else:
                before = after = _tuple(own, dims)[d]
            if (before or after) and mode != "constant":
                raise NotCoveredError(self._path, "it pads twice, in two modes")
            first, second = pads[d]
            axis_mode = "zeros" if mode == "constant" else mode
            axes.append(
                Axis(
                    shape[2 + d], weight.shape[2 + d], stride[d], dilation[d], before + first, after + second, axis_mode
                )
            )
        self._linear(node, source, values, _two_axes(axes, values["groups"]))

    def _transposed(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        weight, source = values["weight"].meta["val"], values["input"]
        dims = weight.ndim - 2
        options = [_tuple(values[key], dims) for key in ("stride", "dilation", "padding", "output_padding")]
        axes = [
            transposed_axis(source.meta["val"].shape[2 + d], weight.shape[2 + d], *(option[d] for option in options))
            for d in range(dims)
        ]
        self._linear(node, source, values, _two_axes(axes, values["groups"], transposed=True))

    def _dense(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        source = values["input"]
        self._linear(node, source, values, Dense(torch.Size(source.meta["val"].shape[1:-1]).numel()))

    def _linear(self, node: fx.Node, source: fx.Node, values: Mapping[str, Any], geometry: LinearMap) -> None:
        weight, bias = self._parameter(values["weight"], "weight"), self._parameter(values["bias"], "bias")
        assert weight is not None
        inputs = (self._index(source),)
        name = weight.removesuffix(".weight")
        new = Linear(name, inputs, _entries(node), geometry, weight, bias, None, node.name, _entries(source))
        self._add(node, new)

    def _batch_norm(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        if values["training"] or values["running_mean"] is None:
            raise NotCoveredError(self._path, "batch norm in training mode divides by statistics of its own input")
        source = values["input"]
        names = [self._parameter(values[key], key) for key in ("weight", "bias", "running_mean", "running_var")]
        assert names[2] is not None
        assert names[3] is not None
        norm = BatchNorm(names[0], names[1], names[2], names[3], values["eps"])
        index = self._index(source)
        before = self.nodes[index]
        if isinstance(before, Linear) and _can_fold(before) and len(source.users) == 1:
            self.nodes[index] = replace(before, norm=norm)
            self.at[node.name] = index
            self.storage[node.name] = node.name
            return
        places = Diagonal(torch.Size(source.meta["val"].shape[2:]).numel())
        size = _entries(node)
        self._add(node, Linear(self._path, (index,), size, places, None, None, norm, node.name, size))

    def _pad(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        source, value = values["self"], values.get("value") or 0.0
        pads, mode = list(values["pad"]), values.get("mode", "constant")
        if len(pads) >= 2 * source.meta["val"].ndim and any(pads[-2:]):
            raise NotCoveredError(self._path, "it pads the axis of the examples")
        self.pads[node.name] = _Pad(self._index(source), pads, mode, value)
        if mode != "constant" or value == 0:
            self._add(node, Fixed(self._path, (self._index(source),), _entries(node), 1.0))

    def _padded(self, value: fx.Node) -> tuple[fx.Node, list[tuple[int, int]], str]:
        """What a convolution reads, with a padding before it as the convolution's own, first axis first."""
        dims = value.meta["val"].ndim - 2
        pad = self.pads.get(value.name)
        if pad is None or value.name not in self.at or min(pad.pads) < 0 or len(pad.pads) > 2 * dims:
            return value, [(0, 0)] * dims, "constant"
        (source,) = value.all_input_nodes
        if self.at[source.name] != pad.index:  # overwritten since
            return value, [(0, 0)] * dims, "constant"
        pairs = list(zip(pad.pads[::2], pad.pads[1::2], strict=True))[::-1]
        return source, [(0, 0)] * (dims - len(pairs)) + pairs, pad.mode

    def _max_pool(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        source, dims = values["self"], node.meta["val"].ndim - 2
        pad = self.pads.get(source.name)
        if pad is not None and source.name not in self.at:  # padded with -inf, which no maximum takes
            if pad.value != -torch.inf:
                raise NotCoveredError(self._path, f"padding with {pad.value}")
            index = pad.index
        else:
            index = self._index(source)
        window = torch.Size(_tuple(values["kernel_size"], dims)).numel()
        self._add(node, MaxPool(self._path, (index,), _entries(node), window))

    def _average(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        source, dims = values["self"], node.meta["val"].ndim - 2
        kernel, padding = _tuple(values["kernel_size"], dims), _tuple(values["padding"], dims)
        stride = _tuple(values["stride"], dims) if values["stride"] else kernel
        lengths = tuple(source.meta["val"].shape[2:])
        if dims == 1:
            lengths, kernel, stride, padding = (1, *lengths), (1, *kernel), (1, *stride), (0, *padding)
        pooled = pooling(
            1,
            lengths,
            kernel,
            stride,
            padding,
            ceil_mode=values["ceil_mode"],
            count_include_pad=values["count_include_pad"],
            divisor=values.get("divisor_override"),
        )
        self._fixed(node, source, pooled.mars(torch.ones(())))

    def _mean(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        source = values["self"]
        dims = values.get("dim")
        if dims is not None and "output_size" not in values:
            rank = source.meta["val"].ndim
            if any(dim % rank == 0 for dim in dims):
                raise NotCoveredError(self._path, "it averages over the examples of a batch")
        elif "output_size" not in values:
            raise NotCoveredError(self._path, "it averages over the examples of a batch")
        self._fixed(node, source, 1.0)

    def _fixed(self, node: fx.Node, source: Any, factor: float) -> None:
        self._add(node, Fixed(self._path, (self._index(source),), _entries(node), factor))

    def _sum(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        left, right, alpha = values["self"], values["other"], float(values.get("alpha", 1))
        if isinstance(right, (int, float)):
            self._add(node, Shift(self._path, (self._index(left),), _entries(node), abs(float(right) * alpha)))
            return
        indices = (self._index(left), self._index(right))
        if left.meta["val"].shape != right.meta["val"].shape:
            raise NotCoveredError(self._path, "it adds values of different shapes")
        self._add(node, Sum(self._path, indices, _entries(node), (1.0, abs(alpha))))

    def _product(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        other = values["other"]
        if not isinstance(other, (int, float)):
            raise NotCoveredError(
                self._path, "it multiplies features by features (squeeze-and-excitation, gating) or by a learned scale"
            )
        self._fixed(node, values["self"], abs(float(other)))

    def _quotient(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        other = values["other"]
        if values.get("rounding_mode"):
            raise NotCoveredError(self._path, "it rounds, which is not continuous")
        if not isinstance(other, (int, float)):
            raise NotCoveredError(self._path, "it divides features by features or by a learned scale")
        self._fixed(node, values["self"], 1 / abs(float(other)))

    def _concat(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        if values["dim"] % node.meta["val"].ndim == 0:
            raise NotCoveredError(self._path, "it joins batches of examples")
        self._add(node, Concat(self._path, tuple(self._index(value) for value in values["tensors"]), _entries(node)))

    _handlers = {  # noqa: RUF012 (a table of the methods above, not a field)
        "conv1d": _convolution,
        "conv2d": _convolution,
        "conv_transpose1d": _transposed,
        "conv_transpose2d": _transposed,
        "linear": _dense,
        "batch_norm": _batch_norm,
        "pad": _pad,
        "constant_pad_nd": _pad,
        "max_pool1d": _max_pool,
        "max_pool2d": _max_pool,
        "avg_pool1d": _average,
        "avg_pool2d": _average,
        "adaptive_avg_pool1d": _mean,
        "adaptive_avg_pool2d": _mean,
        "mean": _mean,
        "add": _sum,
        "sub": _sum,
        "mul": _product,
        "div": _quotient,
        "cat": _concat,
        "concat": _concat,
    }


_Handler = Callable[[_Reader, fx.Node, Mapping[str, Any]], None]


def _can_fold(map_: Linear) -> bool:
    """Whether a batch norm after a map scales its rows: not where the map acts at places that are its channels."""
    at_places = isinstance(map_.geometry, Dense) and map_.geometry.copies != 1
    return map_.norm is None and map_.weight is not None and not at_places


def _two_axes(axes: list[Axis], groups: int, *, transposed: bool = False) -> Convolution:
    if len(axes) == 1:
        axes = [Axis(1, 1), *axes]
    return Convolution(axes[0], axes[1], groups, transposed)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def _keeps_examples(name: str, values: Mapping[str, Any], before: Tensor, after: Tensor, batch: int) -> bool:
    """Whether a rearrangement leaves each example's entries to that example."""
    if after.shape[:1] != (batch,):
        return False
    rank = before.ndim
    match name:
        case "permute":
            return bool(values["dims"][0] % rank == 0)
        case "transpose":
            return bool(values["dim0"] % rank and values["dim1"] % rank)
        case "slice" | "select" | "narrow" | "split" | "split_with_sizes" | "chunk" | "unbind":
            return bool(values["dim"] % rank) or before.shape == after.shape
        case "flip":
            return all(dim % rank for dim in values["dims"])
        case "unsqueeze":
            return bool(values["dim"] % (rank + 1))
        case _:
            return True


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.removeprefix("aten::").startswith("__")


def _path(node: fx.Node) -> str:
    """The module that an operator belongs to, and the operator's own name where the module has several."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    path = paths[-1] if paths else ""
    return f"{path} ({node.name})" if path else node.name


def _entries(node: fx.Node) -> int:
    return _tensor_entries(node.meta["val"])


def _tensor_entries(value: Tensor) -> int:
    return torch.Size(value.shape[1:]).numel()


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
