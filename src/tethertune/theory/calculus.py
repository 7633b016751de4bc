r"""The (v, a) calculus: how a bound on the complexity passes through a network.

Every node of a network is known by a pair ``(v, a)`` such that, for all ``lam >= 0``,

.. math:: \log \mathbb E \exp\Big(\lambda \sup \big\|\sum_i \sigma_i u(x_i)\big\|_\infty\Big)
   \le a + \tfrac12 \lambda^2 v^2,

where the supremum is over the class of networks, ``u`` is the node's value (``product`` bound) or what fine-tuning
has changed of it, ``f - f0`` (``distance`` bound). Then the expected supremum is at most ``v sqrt(2 a)``. The rules
below are proven in ``docs/theory.md``; ``v`` is carried as a logarithm, because it passes 10^600 in real networks.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tethertune.theory.bounds import log, log_sum

__all__ = ["ZERO", "Tail", "concat", "elementwise", "max_pool", "mix", "sub_gaussian"]


@dataclass(frozen=True)
class Tail:
    """A pair (v, a).

    Attributes:
        log_v: Natural logarithm of the scale v; ``-inf`` where nothing varies.
        a: The offset, in nats.
    """

    log_v: float
    a: float

    @property
    def v(self) -> float:
        """The scale; infinite where it does not fit a float."""
        return math.exp(self.log_v) if self.log_v < 709 else math.inf

    @property
    def log_expectation(self) -> float:
        """``log(v sqrt(2 a))``, which bounds the logarithm of the expected supremum."""
        return -math.inf if self.log_v == -math.inf else self.log_v + 0.5 * log(2 * self.a)

    def scaled(self, log_factor: float) -> "Tail":
        """The pair after a map that multiplies the sup norm by at most a factor, given as its logarithm."""
        log_v = self.log_v + log_factor
        return ZERO if log_v == -math.inf else replace(self, log_v=log_v)


ZERO = Tail(-math.inf, 0.0)


def sub_gaussian(log_v: float, size: float) -> Tail:
    """One fixed vector of ``size`` entries, each a sum with variance proxy at most v^2: ``(v, log 2 size)``."""
    return ZERO if log_v == -math.inf else Tail(log_v, math.log(2 * size))


def mix(terms: Iterable[Tail]) -> Tail:
    """The sum of several terms: v adds up, a is the v-weighted mean (Hoelder's inequality)."""
    terms = [term for term in terms if term.log_v > -math.inf]
    if not terms:
        return ZERO
    log_v = log_sum(term.log_v for term in terms)
    return Tail(log_v, math.fsum(term.a * math.exp(term.log_v - log_v) for term in terms))


def elementwise(tail: Tail, lipschitz: float, log_union: float) -> Tail:
    """A Lipschitz function of each entry (contraction); ``log_union`` is the price of the union over functions.

    It is ``log(2 d)`` for the distance bound, where each of the d entries has its own function, and ``log 2`` for the
    product bound, where all share one that is 0 at 0.
    """
    moved = tail.scaled(log(lipschitz))
    return moved if moved is ZERO else replace(moved, a=moved.a + log_union)


def concat(tails: Iterable[Tail]) -> Tail:
    """Entries of several nodes side by side: the largest v, the largest a, and a union over the nodes."""
    tails = [tail for tail in tails if tail.log_v > -math.inf]
    if not tails:
        return ZERO
    return Tail(max(tail.log_v for tail in tails), max(tail.a for tail in tails) + math.log(len(tails)))


def max_pool(tail: Tail, window: int, log_union: float) -> Tail:
    """The maximum over ``window`` entries: a tree of ``max(a, b) = (a + b) / 2 + |a - b| / 2``."""
    if tail.log_v == -math.inf:
        return ZERO
    return Tail(tail.log_v + math.log(window), tail.a + 0.5 * math.ceil(math.log2(window)) * log_union)
