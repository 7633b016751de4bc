"""A network as it is after a step, and what a user would do with it without this library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import tethertune as tt
from tethertune import norms, rows

Norm = Literal["mars", "frobenius"]


@dataclass
class Setting:
    """A network whose linear maps have moved.

    Attributes:
        model: The network; every parameter has a gradient.
        layers: Its linear maps, which are what is constrained.
        reference: Where they were.
        moved: Where they are now.
        tight: For each norm, radii by layer that every row (MARS) or layer (Frobenius) is outside of by 5 % or more.
    """

    model: nn.Module
    layers: list[rows.Layer]
    reference: tt.Reference
    moved: dict[str, Tensor]
    tight: dict[Norm, dict[str, float]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "Setting":
        """Move the linear maps of a network by about 1e-3 a weight."""
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        layers = [layer for layer in rows.layers(model) if not layer.rows.free]
        reference = tt.Reference.of(model, [layer.name for layer in layers])
        moved = {layer.name: layer.weight + 1e-3 * torch.randn_like(layer.weight) for layer in layers}
        T = {layer.name: layer.rows.matrix(moved[layer.name] - reference[layer.name]) for layer in layers}
        tight: dict[Norm, dict[str, float]] = {
            "mars": {name: float(norms.row_sums(t).min()) / 1.05 for name, t in T.items()},
            "frobenius": {name: float(norms.frobenius(t)) / 1.05 for name, t in T.items()},
        }
        return cls(model, layers, reference, moved, tight)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the network."""
        return list(self.model.parameters())

    @property
    def constrained(self) -> int:
        """How many weights are constrained."""
        return sum(layer.weight.numel() for layer in self.layers)

    @torch.no_grad()
    def move(self) -> None:
        """Put the weights where they have moved to."""
        for layer in self.layers:
            layer.weight.copy_(self.moved[layer.name])

    def radii(self, norm: Norm, state: str) -> dict[str, float]:
        """Radii by layer: ``"inside"``: so large that nothing is outside. ``"outside"``: so small that all is."""
        return dict.fromkeys(self.tight[norm], 1e6) if state == "inside" else self.tight[norm]

    def constraint(self, norm: Norm, state: str, **options: object) -> tt.Constraint:
        """A constraint on all linear maps, around the shared reference."""
        radii = self.radii(norm, state)
        return tt.Constraint(self.model, norm=norm, radius=radii, reference=self.reference, **options)  # type: ignore[arg-type]

    def plain(self, norm: Norm, state: str) -> "Plain":
        """The same as tensors."""
        radii = self.radii(norm, state)
        return Plain(
            [layer.rows for layer in self.layers],
            [layer.weight for layer in self.layers],
            [self.reference[layer.name] for layer in self.layers],
            [torch.tensor(radii[layer.name], device=layer.weight.device) for layer in self.layers],
            norm,
        )


@dataclass
class Plain:
    """The projection as formulae on lists of tensors; in float32 it ends outside by rounding in half of the rows."""

    rows: list[rows.Rows]
    weights: Sequence[Tensor]
    centres: Sequence[Tensor]
    radii: Sequence[Tensor]
    norm: Norm

    @torch.no_grad()
    def naive(self) -> None:
        """A direct port: a loop over the tensors that applies the formula to all of each."""
        for cut, weight, centre, radius in zip(self.rows, self.weights, self.centres, self.radii, strict=True):
            weight.copy_(_projected(cut, weight, centre, radius, self.norm))

    @torch.no_grad()
    def foreach(self) -> None:
        """The same with PyTorch's functions of lists of tensors."""
        T = torch._foreach_sub(list(self.weights), list(self.centres))
        if self.norm == "frobenius":
            sizes = list(torch._foreach_norm(T))
        else:
            sizes = [_row_sums(cut, t) for cut, t in zip(self.rows, T, strict=True)]
        torch._foreach_div_(sizes, list(self.radii))
        torch._foreach_clamp_min_(sizes, 1.0)
        torch._foreach_div_(T, sizes)
        torch._foreach_add_(T, list(self.centres))
        torch._foreach_copy_(list(self.weights), T)

    def compiled(self) -> Callable[[], None]:
        """The direct port as one graph of ``torch.compile``; the first call compiles, for a minute or more."""
        cuts, norm = self.rows, self.norm

        def project(weights: list[Tensor], centres: list[Tensor], radii: list[Tensor]) -> None:
            for cut, weight, centre, radius in zip(cuts, weights, centres, radii, strict=True):
                weight.copy_(_projected(cut, weight, centre, radius, norm))

        graph = torch.compile(project, fullgraph=True, dynamic=False)
        weights = [weight.detach() for weight in self.weights]

        def run() -> None:
            with torch.no_grad():
                graph(weights, list(self.centres), list(self.radii))

        run()
        return run


def _projected(cut: rows.Rows, weight: Tensor, centre: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    T = weight - centre
    size = _row_sums(cut, T) if norm == "mars" else T.square().sum().sqrt()
    return centre + T * (1 / (size / radius).clamp(min=1))


def _row_sums(cut: rows.Rows, T: Tensor) -> Tensor:
    """The l1 norm of each row in the shape that multiplies T."""
    if cut.groups > 1 or cut.single:
        raise NotImplementedError("the plain ways here know networks whose rows are numbered by an axis")
    axes = [axis for axis in range(T.ndim) if axis != cut.axis]
    return T.abs().sum(dim=axes, keepdim=True)


class Streams:
    """Loops that move the bytes that a step has to move, in order, and compute next to nothing: the floor.

    Args:
        setting: How many weights, and of which dtype.
        device: Where.
    """

    def __init__(self, setting: Setting, device: str) -> None:
        words = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) // 4  # noqa: E731
        self._n = words([layer.weight for layer in setting.layers])
        self._all = words(setting.parameters)
        self._buffers = [torch.full((self._all,), 0.5, device=device) for _ in range(4)]

    def _constrained(self) -> list[Tensor]:
        return [buffer[: self._n] for buffer in self._buffers]

    def read(self) -> None:
        """Weights and reference read: 8 bytes a weight in float32."""
        a, b, *_ = self._constrained()
        torch.dot(a, b)

    def read_and_write(self) -> None:
        """Weights and reference read, weights written: 12 bytes."""
        a, b, *_ = self._constrained()
        torch.add(a, b, alpha=0.0, out=a)

    def read_then_write(self) -> None:
        """Both read, read again and written, as a Frobenius ball needs: 20 bytes."""
        self.read()
        self.read_and_write()

    def add_to_gradient(self) -> None:
        """Weights, reference and gradient read, gradient written: 16 bytes."""
        a, b, c, _ = self._constrained()
        torch.addcmul(a, b, c, value=0.0, out=a)

    def adam(self) -> None:
        """Weights, gradients and two moments read, all but the gradients written: 28 bytes of every parameter."""
        weights, gradients, first, second = self._buffers
        torch.add(weights, gradients, alpha=0.0, out=weights)
        first.mul_(1.0)
        second.mul_(1.0)
