"""One pass over the training sample: sizes of the frozen features, and the trained network's logits."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from tethertune.errors import ConfigurationError
from tethertune.theory.frozen import Draws, FrozenFeatures
from tethertune.theory.losses import Scores
from tethertune.theory.nodes import Network

__all__ = ["Sample", "observe", "tensors"]

_PIECE = 1 << 22


@dataclass
class Sample:
    """What a certificate needs to know of the training sample.

    Attributes:
        size: m.
        log_features: For each linear map (by its name in the graph), ``log A``: the largest root sum of squares over
            the sample of an entry of what the reference network feeds it.
        log_input: ``log A_0`` of the inputs.
        input_sup: Largest absolute value of an input's entry.
        input_norm: Largest l2 norm of an input.
        scores: Of the trained network.
        distinct: Number of different images.
        frozen: Complexity of the reference's features that the head sees.
        root_counts: ``sum_k sqrt(m_k)`` over the classes.
    """

    size: int = 0
    log_features: dict[str, float] = field(default_factory=dict)
    log_input: float = -math.inf
    input_sup: float = 0.0
    input_norm: float = 0.0
    scores: Scores = field(default_factory=Scores)
    distinct: int = 0
    frozen: FrozenFeatures = field(default_factory=FrozenFeatures)
    root_counts: float = 0.0


def observe(
    network: Network, model: nn.Module, reference: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> Sample:
    """Stream the training sample once through the reference network and the trained one.

    Sums of squares are kept for each entry of each feature map, in float64, and the largest is taken at the end.

    Args:
        network: The traced network.
        model: The trained network, in eval mode.
        reference: Weights and statistics of the reference network's body, by name.
        batches: Images (n, ...) as the network takes them, without augmentation, and labels (n,); each example once.

    Raises:
        ConfigurationError: No data, labels that are no classes of the network, or features that are not finite.
    """
    own = tensors(model)
    body = {name: reference[name] for node in network.linears.values() for name in node.parameters}
    reader = _Reader(network, {**network.constants, **own, **body})
    moved = any(not torch.equal(own[name], tensor) for name, tensor in body.items())
    sample, hashes, counts, draws = Sample(), set[int](), Counter[int](), None
    device = next(iter(model.parameters())).device
    squares: Tensor | None = None
    for images, labels in batches:
        if len(images) != len(labels):
            raise ConfigurationError(f"A batch has {len(images)} images and {len(labels)} labels.")
        images = images.to(device)  # noqa: PLW2901
        with torch.no_grad():
            features, logits = reader.read(images)
            if moved:  # otherwise the reference's body with the trained head is the trained network
                logits = model(images)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise ConfigurationError(
                f"Labels from {int(labels.min())} to {int(labels.max())} given for {logits.shape[1]} logits."
            )
        sample.scores.add(logits, labels)
        counts.update(labels.tolist())
        if draws is None:
            draws = Draws(logits.shape[1], features.shape[1], device)
        draws.add(features, labels)
        flat = images.flatten(1).double()
        sample.size += len(images)
        sample.input_sup = max(sample.input_sup, float(flat.abs().amax()))
        sample.input_norm = max(sample.input_norm, float(flat.norm(dim=1).amax()))
        squares = _plus_squares(squares, images)
        hashes.update(_hash(images).tolist())
    if sample.size == 0 or squares is None or draws is None:
        raise ConfigurationError("There are no training examples: a certificate is about the sample it was trained on.")
    sample.log_input = _log_root(squares, "the input")
    sample.log_features = {name: _log_root(total, name) for name, total in reader.squares.items()}
    sample.distinct = len(hashes)
    sample.frozen = draws.result()
    sample.root_counts = math.fsum(math.sqrt(count) for count in counts.values())
    return sample


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model by name, tied ones under each name, without gradients."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def _log_root(squares: Tensor, name: str) -> float:
    largest = float(squares.amax())
    if not math.isfinite(largest):
        raise ConfigurationError(f"The reference network's features at {name} are not finite on this sample.")
    return 0.5 * math.log(largest) if largest > 0 else -math.inf


def _plus_squares(total: Tensor | None, values: Tensor) -> Tensor:
    """Add to the sum of squares of each entry over the examples, in float64, without a float64 copy of all values."""
    if total is None:
        total = torch.zeros(values.shape[1:], dtype=torch.float64, device=values.device)
    for piece in values.split(max(1, _PIECE // max(1, total.numel()))):  # type: ignore[no-untyped-call]
        total += piece.double().square().sum(0)
    return total


def _hash(images: Tensor) -> Tensor:
    """A 64-bit number for each image, the same for the same image in any batch (exact integer arithmetic)."""
    words = images.float().flatten(1).contiguous().view(torch.int32).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator).to(words.device)
    return (words * factors).sum(1).cpu()


class _Reader(fx.Interpreter):
    """Runs the exported graph with the reference's weights and adds up squares at every linear map's input."""

    def __init__(self, network: Network, state: Mapping[str, Tensor]) -> None:
        super().__init__(network.graph)
        self.squares: dict[str, Tensor] = {}
        self._calls = {node.call for node in network.linears.values()} | {network.head.call}
        self._state = [None if name is None else state[name] for name in network.inputs]
        self._batch, self._filled, self._head = network.batch, 0, network.head.call
        self._features = torch.empty(0)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Take in images, in pieces of the size the graph was made for; the last is filled up and cut again.

        Returns:
            The features that the head sees, (n, entries), and the logits, (n, classes).
        """
        features, logits = [], []
        for piece in images.split(self._batch):  # type: ignore[no-untyped-call]
            self._filled = len(piece)
            if self._filled < self._batch:
                filler = piece.new_zeros(self._batch - self._filled, *piece.shape[1:])
                piece = torch.cat((piece, filler))  # noqa: PLW2901
            (output,) = self.run(*[piece.clone() if tensor is None else tensor for tensor in self._state])
            features.append(self._features.flatten(1))
            logits.append(output[: self._filled])
        return torch.cat(features), torch.cat(logits)

    def run_node(self, n: fx.Node) -> Any:
        """Record what a linear map reads, then run it."""
        if n.name in self._calls:
            args, _ = self.fetch_args_kwargs_from_env(n)
            values = args[0][: self._filled]
            self.squares[n.name] = _plus_squares(self.squares.get(n.name), values)
            if n.name == self._head:
                self._features = values
        return super().run_node(n)
