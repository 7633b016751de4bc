r"""The complexity of a head on features that do not move, found by drawing signs.

The features of the reference network on the sample are known, so the expectation in its complexity,

.. math:: T = \mathbb E_\sigma \Big[ c \Big\|\sum_i \sigma_i f^0(x_i)\Big\|_\infty
   + \sum_k \Big\|\sum_{i: y_i = k} \sigma_i f^0(x_i)\Big\|_\infty \Big],

is a mean that can be taken over draws. One sign changes a draw by at most ``2 (c + 1) max_r |f0_r(x_i)|``, so by
McDiarmid's inequality the mean of N draws falls short of T by no more than

.. math:: (c + 1) \sqrt{2 \log(1/\delta) \sum_i \max_r f^0_r(x_i)^2 \Big/ N}

with probability at least ``1 - delta`` over the draws. Massart's lemma bounds T without draws, by
``sqrt(2 log 2d)`` times the root sums of squares.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tethertune.theory.bounds import log

__all__ = ["Draws", "FrozenFeatures"]

_SUMS = 1 << 23
"""Entries of the table of sums, which decides how many draws there are."""
_MOST, _LEAST = 8192, 16
_CHUNK = 4096
"""Examples that signs are drawn for at once; not the size of a batch, which must not change the draws."""


@dataclass(frozen=True)
class FrozenFeatures:
    """What is known of T.

    Attributes:
        massart: An upper bound of T, without draws.
        mean: The mean of the draws.
        spread: ``(c + 1) sqrt(2 sum_i max_r f0_r(x_i)^2 / N)``.
        draws: N.
    """

    massart: float = 0.0
    mean: float = 0.0
    spread: float = 0.0
    draws: int = 0

    def log_bound(self, delta: float | None) -> float:
        """``log`` of an upper bound of T that fails with probability at most ``delta``; ``None``: that never fails."""
        if delta is None:
            return log(self.massart)
        return log(min(self.massart, self.mean + self.spread * math.sqrt(math.log(1 / delta))))


class Draws:
    """Adds up the features of a sample under drawn signs, batch by batch.

    The signs come from a fixed seed, so the same sample in the same order gives the same numbers.

    Args:
        classes: c.
        size: d, the number of entries of the features.
        device: Where the features are.
    """

    def __init__(self, classes: int, size: int, device: torch.device) -> None:
        self._count = min(_MOST, max(_LEAST, _SUMS // (classes * size))) // 8 * 8
        self._sums = torch.zeros(classes, self._count, size, dtype=torch.float64, device=device)
        self._squares = torch.zeros(classes, size, dtype=torch.float64, device=device)
        self._largest = 0.0
        self._generator = torch.Generator().manual_seed(0)
        self._features = torch.empty(_CHUNK, size, dtype=torch.float64, device=device)
        self._labels = torch.empty(_CHUNK, dtype=torch.long, device=device)
        self._waiting = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch: features (n, d), labels (n,)."""
        while len(features):
            end = min(self._waiting + len(features), _CHUNK)
            taken = end - self._waiting
            self._features[self._waiting : end] = features[:taken].detach()
            self._labels[self._waiting : end] = labels[:taken]
            features, labels, self._waiting = features[taken:], labels[taken:], end
            if end == _CHUNK:
                self._draw()

    def _draw(self) -> None:
        features, labels = self._features[: self._waiting], self._labels[: self._waiting]
        signs = self._signs(self._waiting).to(features.device)
        self._waiting = 0
        for label in set(labels.tolist()):
            own = labels == label
            self._sums[label] += (2 * signs[own].double() - 1).T @ features[own]
            self._squares[label] += features[own].square().sum(0)
        self._largest += float(features.abs().amax(1).square().sum())

    def _signs(self, examples: int) -> Tensor:
        """Fair bits, (examples, draws), uint8: eight from each byte."""
        shape = (examples, self._count // 8, 1)
        drawn = torch.randint(0, 256, shape, generator=self._generator, dtype=torch.uint8)
        return ((drawn >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)

    def result(self) -> FrozenFeatures:
        """What all batches so far give."""
        if self._waiting:
            self._draw()
        classes, count, size = self._sums.shape
        drawn = classes * self._sums.sum(0).abs().amax(1) + self._sums.abs().amax(2).sum(0)
        roots = classes * self._squares.sum(0).amax().sqrt() + self._squares.amax(1).sqrt().sum()
        return FrozenFeatures(
            massart=math.sqrt(2 * math.log(2 * size)) * float(roots),
            mean=float(drawn.mean()),
            spread=(classes + 1) * math.sqrt(2 * self._largest / count),
            draws=count,
        )
