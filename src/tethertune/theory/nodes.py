"""The nodes of a network that the (v, a) calculus knows, and the network that they make."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from tethertune.errors import ConfigurationError
from tethertune.theory.maps import Convolution, LinearMap
from tethertune.theory.operators import along_rows, batch_norm_scale

__all__ = [
    "BatchNorm",
    "Concat",
    "Elementwise",
    "Fixed",
    "Input",
    "Linear",
    "MaxPool",
    "Network",
    "Node",
    "NotCoveredError",
    "Shift",
    "Sum",
]


class NotCoveredError(ConfigurationError):
    """A network has a node that no bound is proven for.

    Attributes:
        node: The node's name.
        reason: Why it is not covered.
    """

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node} is not covered by any proven bound: {reason}.")
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class Node:
    """One value of the network.

    Attributes:
        name: The module that makes it, or the operator's name in the graph.
        inputs: Positions of the nodes it is made of.
        size: d, the number of entries for one example.
    """

    name: str
    inputs: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Input(Node):
    """The network's input."""


@dataclass(frozen=True)
class BatchNorm:
    """Names of the parameters and statistics of a batch norm in eval mode."""

    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Linear(Node):
    """A linear map with a weight, and what is folded into it.

    Attributes:
        geometry: The map, its weight aside.
        weight: Name of the weight; ``None`` for a batch norm that stands alone.
        bias: Name of the bias.
        norm: The batch norm folded into it.
        call: The graph's name of the operator; its first argument is what the map is applied to.
        fan_in: Number of entries of that argument for one example, padding aside.
    """

    geometry: LinearMap
    weight: str | None
    bias: str | None
    norm: BatchNorm | None
    call: str
    fan_in: int

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of everything that the map is made of, statistics included."""
        norm = self.norm
        names = (self.weight, self.bias) + ((norm.weight, norm.bias, norm.mean, norm.variance) if norm else ())
        return tuple(name for name in names if name is not None)

    def scale(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """The factor of each output channel that the folded batch norm multiplies by, float64."""
        if self.norm is None:
            return None
        weight = None if self.norm.weight is None else state[self.norm.weight]
        return batch_norm_scale(weight, state[self.norm.variance], self.norm.eps)

    def folded(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the map with its batch norm folded in, float64."""
        weight = None if self.weight is None else state[self.weight].detach().double()
        bias = None if self.bias is None else state[self.bias].detach().double()
        if self.norm is None:
            assert weight is not None
            return weight, bias
        scale = self.scale(state)
        assert scale is not None
        shift = -state[self.norm.mean].double() if bias is None else bias - state[self.norm.mean].double()
        bias = scale * shift if self.norm.bias is None else scale * shift + state[self.norm.bias].detach().double()
        if weight is None:
            return scale, bias
        map_ = self.geometry
        groups = map_.groups if isinstance(map_, Convolution) and map_.transposed else None
        return weight * along_rows(scale, weight, groups), bias


@dataclass(frozen=True)
class Elementwise(Node):
    """An activation.

    Attributes:
        lipschitz: Its Lipschitz constant.
        at_zero: Its value at 0.
        ceiling: Its largest absolute value, which may be infinite.
    """

    lipschitz: float
    at_zero: float
    ceiling: float


@dataclass(frozen=True)
class Fixed(Node):
    """A linear map without weights (pooling, flattening, a selection of entries), with its largest row l1 norm."""

    factor: float


@dataclass(frozen=True)
class Shift(Node):
    """A constant added to every entry."""

    constant: float


@dataclass(frozen=True)
class Sum(Node):
    """A weighted sum of nodes; the weights' absolute values."""

    factors: tuple[float, ...]


@dataclass(frozen=True)
class Concat(Node):
    """Nodes side by side."""


@dataclass(frozen=True)
class MaxPool(Node):
    """The maximum over windows of that many entries."""

    window: int


@dataclass(frozen=True, eq=False)
class Network:
    """A traced network.

    Attributes:
        nodes: In an order in which each comes after its inputs; the first is the input.
        head: The last linear map, which gives the logits; it is not among the nodes.
        features: Position of the node that the head is applied to.
        batch: The batch size that the graph runs with.
        graph: The exported graph, whose inputs are the parameters named by ``inputs`` and then the images.
        inputs: Name of the parameter, buffer or constant that each input of the graph takes; ``None`` for images.
        constants: Tensors that are neither parameters nor buffers.
    """

    nodes: tuple[Node, ...]
    head: Linear
    features: int
    batch: int
    graph: fx.GraphModule
    inputs: tuple[str | None, ...]
    constants: Mapping[str, Tensor]

    @property
    def linears(self) -> dict[int, Linear]:
        """The body's linear maps by position."""
        return {index: node for index, node in enumerate(self.nodes) if isinstance(node, Linear)}
