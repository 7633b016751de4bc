"""Losses that certificates are about; the bounded ones are at least 1 on every mistake, so they bound the error too.

All are functions of how much the label's logit exceeds the maximum of the others (the ramp), or the soft maximum
``log sum_k exp z_k`` of all (cross-entropy). With the Lipschitz constant of that function, the ``slope``, their
complexity is bounded class by class (docs/theory.md), which is sharper than what the Lipschitz constant in the logits
gives.
"""

import math
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tethertune.errors import ConfigurationError
from tethertune.theory.bounds import positive

__all__ = ["ClippedCrossEntropy", "CrossEntropy", "Loss", "Ramp", "Scores"]


class Scores:
    """What the losses need to know of a network's logits on a sample.

    Attributes:
        classes: c, the number of logits.
        largest_logit: The largest absolute value of a logit.
    """

    def __init__(self) -> None:
        self.classes = 0
        self.largest_logit = 0.0
        self._margins, self._cross_entropies = array("d"), array("d")

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits (n, c), labels (n,).

        Raises:
            ConfigurationError: A logit that is not finite.
        """
        logits, labels = logits.detach().double().cpu(), labels.long().cpu()
        if not bool(logits.isfinite().all()):
            raise ConfigurationError("The network's logits are not finite on this sample.")
        self.classes = logits.shape[1]
        self.largest_logit = max(self.largest_logit, float(logits.abs().max()))
        own = logits.gather(1, labels[:, None]).squeeze(1)
        others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
        self._margins.extend((own - others).tolist())
        self._cross_entropies.extend(functional.cross_entropy(logits, labels, reduction="none").tolist())

    @property
    def margins(self) -> Tensor:
        """Logit of the label less the largest other logit, (m,), float64."""
        return _tensor(self._margins)

    @property
    def cross_entropies(self) -> Tensor:
        """In nats, (m,), float64."""
        return _tensor(self._cross_entropies)

    @property
    def error(self) -> float:
        """Share of mistakes; a tie is one."""
        return float((self.margins <= 0).double().mean())


def _tensor(values: "array[float]") -> Tensor:
    return torch.frombuffer(values, dtype=torch.float64).clone() if values else torch.empty(0, dtype=torch.float64)


class Loss(ABC):
    """A loss that a certificate can be about."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is, with its parameter."""

    @property
    @abstractmethod
    def slope(self) -> float:
        """Lipschitz constant in the logit of the label less the (soft) maximum of the others."""

    @property
    @abstractmethod
    def bounds_error(self) -> bool:
        """Whether it is at least 1 on every mistake and on every tie."""

    @abstractmethod
    def largest(self, classes: int) -> float:
        """b, the largest value, for a number of classes."""

    @abstractmethod
    def values(self, scores: Scores) -> Tensor:
        """The loss of each example, (m,), float64."""

    def mean(self, scores: Scores) -> float:
        """Mean over the sample."""
        return float(self.values(scores).mean())

    @property
    def is_bounded(self) -> bool:
        """Whether its range holds for every network; otherwise the caller vouches for the whole class."""
        return True

    @property
    def lipschitz(self) -> float:
        """rho, the Lipschitz constant in the l2 norm of the logits: ``sqrt(2) slope``."""
        return math.sqrt(2) * self.slope

    @property
    def sup_lipschitz(self) -> float:
        """The Lipschitz constant in the sup norm of the logits: ``2 slope``."""
        return 2 * self.slope


@dataclass(frozen=True)
class Ramp(Loss):
    """``clip(1 - M / margin, 0, 1)`` of the margin M of the label's logit over the others.

    Attributes:
        margin: Fixed before the data are seen, or ``None``: the best one of a grid, which ``certify`` pays for.
    """

    margin: float | None = 1.0

    def __post_init__(self) -> None:
        if self.margin is not None:
            positive(margin=self.margin)

    @property
    def name(self) -> str:
        """``ramp`` with its margin."""
        return f"ramp (margin {self._fixed:.4g})"

    @property
    def _fixed(self) -> float:
        if self.margin is None:
            raise ConfigurationError("Ramp(margin=None) has no margin yet: certify chooses one from its grid.")
        return self.margin

    @property
    def slope(self) -> float:
        """``1 / margin``."""
        return 1 / self._fixed

    @property
    def bounds_error(self) -> bool:
        """It is 1 on every mistake and on every tie."""
        return True

    def largest(self, classes: int) -> float:  # noqa: ARG002 (the same for any number of classes)
        """1."""
        return 1.0

    def values(self, scores: Scores) -> Tensor:
        """The loss of each example."""
        return (1 - scores.margins / self._fixed).clamp(0, 1)


@dataclass(frozen=True)
class ClippedCrossEntropy(Loss):
    """``min(cross-entropy, clip) / clip``.

    Attributes:
        clip: In nats. Up to log 2, the default, the loss is 1 on every mistake, since then ``p_y <= 1/2``.
    """

    clip: float = math.log(2)

    def __post_init__(self) -> None:
        positive(clip=self.clip)

    @property
    def name(self) -> str:
        """``clipped cross-entropy`` with its clip."""
        return f"clipped cross-entropy (at {self.clip:.4g} nats, normalised)"

    @property
    def slope(self) -> float:
        """``1 / clip``."""
        return 1 / self.clip

    @property
    def bounds_error(self) -> bool:
        """Whether it is 1 on every mistake."""
        return self.clip <= math.log(2)

    def largest(self, classes: int) -> float:  # noqa: ARG002 (the same for any number of classes)
        """1."""
        return 1.0

    def values(self, scores: Scores) -> Tensor:
        """The loss of each example."""
        return (scores.cross_entropies / self.clip).clamp_max(1)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross-entropy as it is, for networks whose logits are bounded.

    Attributes:
        logit_bound: Z, a bound of the absolute value of every logit of every network of the class.
    """

    logit_bound: float = math.inf

    name = "cross-entropy"
    slope = 1.0
    bounds_error = False
    is_bounded = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.logit_bound) and self.logit_bound > 0):
            raise ConfigurationError(
                f"Cross-entropy with logit_bound={self.logit_bound} is unbounded, so nothing can be certified: bound"
                " the logits, or use ClippedCrossEntropy() or Ramp()."
            )

    def largest(self, classes: int) -> float:
        """``log(1 + (c - 1) exp(2 Z))``."""
        return 2 * self.logit_bound + math.log(classes - 1 + math.exp(-2 * self.logit_bound))

    def values(self, scores: Scores) -> Tensor:
        """The loss of each example.

        Raises:
            ConfigurationError: A logit is beyond the bound.
        """
        if scores.largest_logit > self.logit_bound:
            raise ConfigurationError(
                f"logit_bound={self.logit_bound}, but the sample has a logit of size {scores.largest_logit:.6g}: it is"
                " no bound."
            )
        return scores.cross_entropies
