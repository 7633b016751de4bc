"""Which input position each tap of a kernel reads, along one axis of a feature map.

A convolution along an axis is known by a table of positions: tap ``u`` of output ``y`` reads input
``y * stride - before + u * dilation``, sent back into the map by the padding mode. Everything that the norms of the
linear map need is how often each *set of taps that read one and the same input* occurs: a single tap nearly always,
two or more where circular, reflecting or replicating padding folds a kernel onto itself. Weights of such taps add up
before any absolute value is taken.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Axis", "Taps"]


@dataclass(frozen=True)
class Axis:
    """A convolution's geometry along one axis.

    Attributes:
        length: Size of the input map along this axis.
        kernel: Number of taps.
        stride: Step of the output.
        dilation: Distance between neighbouring taps.
        before: Padding before the first position.
        after: Padding after the last position.
        mode: ``zeros``, ``circular``, ``reflect`` or ``replicate``.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    mode: str = "zeros"

    @property
    def outputs(self) -> int:
        """Number of output positions."""
        return (self.length + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def table(self) -> Tensor:
        """The input position that each output's taps read, (outputs, kernel); -1 where it is a padded zero."""
        outputs = torch.arange(self.outputs).unsqueeze(1)
        position = outputs * self.stride - self.before + torch.arange(self.kernel) * self.dilation
        match self.mode:
            case "circular":
                return position % self.length
            case "replicate":
                return position.clamp(0, self.length - 1)
            case "reflect":
                period = max(2 * (self.length - 1), 1)
                position = position % period
                return torch.minimum(position, period - position)
            case _:
                return position.where((position >= 0) & (position < self.length), -1)

    def matrix(self) -> Tensor:
        """The table as zeros and ones, (outputs, kernel, length), float64."""
        table = self.table()
        return (table.unsqueeze(-1) == torch.arange(self.length)).double()

    @property
    def copies(self) -> int:
        """The most positions of the padded map that hold one input: the squared l2 norm of the padding."""
        if self.mode == "zeros":
            return 1
        padded = Axis(self.length, 1, before=self.before, after=self.after, mode=self.mode).table()
        return int(padded.flatten().bincount().max())


@dataclass(frozen=True)
class Taps:
    """The sets of taps that read one input together, and how often each occurs.

    Attributes:
        merge: (sets, kernel), 1 where the tap is in the set, float64.
        rows: (sets, outputs): in how many columns of this output's row the set's weight stands.
        columns: (sets, length): in how many rows of this input's column it stands.
    """

    merge: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, axis: Axis) -> "Taps":
        """Count the sets of an axis."""
        rows: Counter[tuple[tuple[int, ...], int]] = Counter()
        columns: Counter[tuple[tuple[int, ...], int]] = Counter()
        for output, positions in enumerate(axis.table().tolist()):
            readers: dict[int, list[int]] = {}
            for tap, position in enumerate(positions):
                readers.setdefault(position, []).append(tap)
            readers.pop(-1, None)
            for position, together in readers.items():
                rows[tuple(together), output] += 1
                columns[tuple(together), position] += 1
        sets = sorted({taps for taps, _ in rows})
        merge = torch.zeros(len(sets), axis.kernel, dtype=torch.float64)
        by_row = torch.zeros(len(sets), axis.outputs, dtype=torch.float64)
        by_column = torch.zeros(len(sets), axis.length, dtype=torch.float64)
        for number, taps in enumerate(sets):
            merge[number, list(taps)] = 1.0
        index = {taps: number for number, taps in enumerate(sets)}
        for (taps, output), count in rows.items():
            by_row[index[taps], output] = count
        for (taps, position), count in columns.items():
            by_column[index[taps], position] = count
        return cls(merge, by_row, by_column)

    def merged(self, weight: Tensor, dim: int) -> Tensor:
        """The weight with its taps along ``dim`` replaced by the sums over the sets."""
        if torch.equal(self.merge, torch.eye(len(self.merge), dtype=self.merge.dtype)):
            return weight
        return (weight.movedim(dim, -1) @ self.merge.to(weight).T).movedim(-1, dim)
