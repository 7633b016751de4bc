"""A certificate for a trained network: the radii of its class, one pass over its training sample, and what follows.

With probability at least ``1 - delta`` over the training sample, for every network of the class,

    expected loss <= empirical loss + gap,    gap = 2 min(product bound, distance bound) + confidence.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tethertune.errors import ConfigurationError
from tethertune.theory import certificate, classes, grid
from tethertune.theory.bounds import Bound, log, log_sum, to_log10, to_value
from tethertune.theory.case import Bounds, Case, as_printed, sizes
from tethertune.theory.checklist import Check, Facts, checklist
from tethertune.theory.classes import Measured, Mode, NetworkClass, Sharing
from tethertune.theory.graph import trace
from tethertune.theory.losses import Loss, Ramp
from tethertune.theory.propagation import Ball
from tethertune.theory.sample import observe, tensors

__all__ = ["Certificate", "LayerReport", "certify"]

_MARGINS = range(-60, 61)
"""Grid cells that a ramp loss's margin is looked for in."""
_DRAWN = 0.01
"""The part of delta that the signs drawn for the frozen features may fail with."""
_STEP = 1e-3
"""Relative step of the finite differences that elasticities are found with."""


@dataclass(frozen=True)
class LayerReport:
    """What one linear map of the body adds to the bounds.

    Attributes:
        name: The layer.
        reference: MARS norm of the reference's map, batch norm folded in.
        distance: D_j of the class.
        shift: beta_j of the class, for its bias.
        measured_distance: The distance as it is.
        share: ``(D_j / B_j) / sum (D / B)``.
        printed_elasticity: Percent that printed Theorem 2 changes for one percent of D_j.
        product_elasticity: Percent that the product bound changes.
        distance_elasticity: Percent that the moved part of the distance bound changes.
        frozen_log10: log10 of the distance bound were this layer alone frozen.
        suffix_log10: log10 of the distance bound were this layer and all before it frozen.
    """

    name: str
    reference: float
    distance: float
    shift: float
    measured_distance: float
    share: float
    printed_elasticity: float
    product_elasticity: float
    distance_elasticity: float
    frozen_log10: float
    suffix_log10: float

    @property
    def bound(self) -> float:
        """B_j."""
        return self.reference + self.distance


@dataclass(frozen=True)
class Certificate:
    """What is known of a network's expected loss from its training sample.

    Attributes:
        kind: ``certificate``, or ``measurement`` where the radii were read off the network for free.
        mode: ``declared``, ``grid`` or ``measured``.
        delta: The probability, at most, that it fails.
        samples: m.
        classes: c.
        loss: Name of the loss.
        empirical_loss: Mean over the training sample.
        empirical_error: Share of mistakes on the training sample.
        bounds_error: Whether the expected loss bounds the expected error.
        product: The product bound.
        distance: The distance bound, with its frozen and moved parts.
        perturbation: The perturbation bound, where a bound of the inputs was declared. It holds with probability
            ``1 - delta`` by itself, not at the same time as the others.
        confidence: The confidence term.
        price: Nats of it that were paid for radii chosen on the sample.
        paid: What was paid for.
        head_bound: B_V of the class, the largest row l1 norm of the head's weights.
        head_bias: The largest absolute value of an entry of the head's bias, of the class.
        gap_log10: log10 of the gap.
        loss_range: b, the largest value of the loss.
        layers: Contribution of each layer, in the network's order.
        comparison: Printed bounds of the same network beside the certificates. Networks that are not chains are taken
            as if they were, without biases, and ``is_upper_bound`` says where the number is proven to bound anything.
        checks: Preconditions, each with pass, fail or unknown.
    """

    kind: Literal["certificate", "measurement"]
    mode: Mode
    delta: float
    samples: int
    classes: int
    loss: str
    empirical_loss: float
    empirical_error: float
    bounds_error: bool
    product: Bound
    distance: Bound
    perturbation: Bound | None
    confidence: float
    price: float
    paid: tuple[str, ...]
    head_bound: float
    head_bias: float
    gap_log10: float
    loss_range: float
    layers: tuple[LayerReport, ...]
    comparison: tuple[Bound, ...]
    checks: tuple[Check, ...]

    @property
    def complexity(self) -> Bound:
        """The smaller of the product and the distance bound."""
        return min(self.product, self.distance, key=lambda bound: bound.log10)

    @property
    def gap(self) -> float | None:
        """How much the expected loss may exceed the empirical one; ``None`` beyond 10^300."""
        return to_value(self.gap_log10)

    @property
    def total(self) -> float | None:
        """The bound of the expected loss; ``None`` beyond 10^300."""
        return None if self.gap is None else self.empirical_loss + self.gap

    @property
    def vacuous(self) -> bool:
        """Whether it promises nothing: empirical loss and gap reach the loss's range, which no loss exceeds anyway.

        A gap that reaches the range alone is the usual reason, whatever the empirical loss.
        """
        return self.total is None or not self.total < self.loss_range

    @property
    def samples_needed_log10(self) -> float:
        """log10 of the sample size at which twice the complexity would be half of the loss's range."""
        return math.log10(self.samples) + 2 * (self.complexity.log10 + math.log10(4 / self.loss_range))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; numbers that JSON cannot hold (log10 of 0) are ``None``."""
        derived = {
            "gap": self.gap,
            "total": self.total,
            "vacuous": self.vacuous,
            "complexity_log10": self.complexity.log10,
            "samples_needed_log10": self.samples_needed_log10,
        }
        plain: dict[str, Any] = _finite({**asdict(self), **derived})
        return plain


def certify(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: Mapping[str, Tensor] | nn.Module,
    head: str,
    delta: float = 0.05,
    loss: Loss | None = None,
    mode: Mode = "grid",
    sharing: Sharing | Literal["better"] = "shared",
    radii: Mapping[str, float] | None = None,
    norm: Literal["mars", "frobenius"] = "mars",
    affine: Literal["free", "frozen"] = "free",
    frozen: Collection[str] = (),
    input_bound: float | None = None,
    facts: Facts | None = None,
) -> Certificate:
    """Certify a trained network.

    Args:
        model: The trained network, in eval mode.
        batches: The training sample, once, as the network takes it and without augmentation: images (n, ...) and labels
            (n,). The first batch's size is that of the pieces that run at once.
        reference: The pre-trained weights and batch-norm statistics by the network's names (the head's are not used),
            or the pre-trained network.
        head: Name of the head, e.g. ``"fc"``.
        delta: The probability, at most, that the certificate fails.
        loss: A bounded loss; ``Ramp(1.0)`` by default. ``Ramp(margin=None)`` finds its margin on the grid.
        mode: ``declared``: the radii given here were fixed before the data. ``grid``: round the measured distances up
            to a grid and pay for it. ``measured``: take the distances as they are; a measurement, not a certificate.
        sharing: One grid cell for all layers (``shared``), one for each (``per-layer``), or the ``better`` of the two,
            with ``delta / 2`` for each.
        radii: In ``declared`` mode, the radius of each weight by its name, the head's included, and under the name of
            the head's bias the largest absolute value of its entries (0 in ``grid`` mode too). What is missing is on
            the grid.
        norm: The norm of the radii.
        affine: ``frozen`` where biases and batch norm were held at the reference by declaration.
        frozen: Names or patterns of layers or parameters that were held at the reference by declaration, their batch
            norms named too.
        input_bound: A bound, known before the data, of the absolute value of every entry of every input.
        facts: What is known about how the network was trained, for the checklist.

    Raises:
        NotCoveredError: The network has a node that no bound is proven for; ``measurements`` works for any network.
        ReferenceMismatchError: The reference is of another network.
        ConfigurationError: Anything else that is wrong with the arguments, in one sentence.
    """
    loss = Ramp() if loss is None else loss
    certificate.confidence(1, delta)  # refuses a delta that is no probability before any work is done
    state = tensors(model)
    pretrained = tensors(reference) if isinstance(reference, nn.Module) else dict(reference)
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise ConfigurationError("There are no training examples: a certificate is about the sample it was trained on.")
    device = next(iter(model.parameters())).device
    example = first[0].to(device)
    network = trace(model, example if len(example) > 1 else torch.cat((example, example)), head=head)
    pretrained = {name: tensor.to(device) for name, tensor in pretrained.items() if _is_body(name, head)}
    measured = classes.measure(network, state, pretrained, norm)
    sharings: list[Sharing] = ["shared", "per-layer"] if sharing == "better" else [sharing]
    choices = [
        classes.choose(
            network,
            measured,
            state,
            pretrained,
            mode=mode,
            sharing=each,
            radii=radii,
            norm=norm,
            affine=affine,
            frozen=frozen,
        )
        for each in sharings
    ]
    sample = observe(network, model, pretrained, chain([first], stream))
    if input_bound is not None and sample.input_sup > input_bound * (1 + 1e-6):
        raise ConfigurationError(
            f"input_bound={input_bound}, but the sample has an entry of size {sample.input_sup:.6g}: it is no bound."
        )
    drawn = _DRAWN * delta
    case = Case(network, sample, input_bound, drawn)
    found = [
        _Outcome(
            case.bounds(choice, option),
            option.mean(sample.scores),
            choice.price + price,
            certificate.confidence(
                sample.size,
                (delta - drawn) / len(choices),
                option.largest(sample.scores.classes),
                price=choice.price + price,
            ),
        )
        for choice in choices
        for option, price in _options(loss)
    ]
    best = min(found, key=lambda outcome: outcome.total_log)
    proven = best.bounds
    kind: Literal["certificate", "measurement"] = "measurement" if mode == "measured" else "certificate"
    comparison = as_printed(case, proven, sizes(network, state, pretrained))
    if mode == "measured":
        proven = proven.as_measured()
    return Certificate(
        kind=kind,
        mode=mode,
        delta=delta,
        samples=sample.size,
        classes=sample.scores.classes,
        loss=proven.loss.name,
        empirical_loss=best.empirical,
        empirical_error=sample.scores.error,
        bounds_error=proven.loss.bounds_error,
        product=proven.product,
        distance=proven.distance,
        perturbation=proven.perturbation,
        confidence=best.confidence,
        price=best.price,
        paid=proven.choice.paid + (("the margin",) if isinstance(loss, Ramp) and loss.margin is None else ()),
        head_bound=proven.choice.head_bound,
        head_bias=proven.choice.head_bias,
        gap_log10=to_log10(best.gap_log),
        loss_range=proven.loss.largest(sample.scores.classes),
        layers=_layers(case, proven.choice, proven.loss, measured),
        comparison=(*comparison, *proven.all),
        checks=checklist(mode, sample, proven.choice, measured, facts or Facts(), proven.loss),
    )


@dataclass(frozen=True)
class _Outcome:
    """What one class and one loss come to."""

    bounds: Bounds
    empirical: float
    price: float
    confidence: float

    @property
    def gap_log(self) -> float:
        complexity = self.bounds.complexity.log10 * math.log(10)
        return log_sum((math.log(2) + complexity, log(self.confidence)))

    @property
    def total_log(self) -> float:
        return log_sum((log(self.empirical), self.gap_log))


def _is_body(name: str, head: str) -> bool:
    return not name.startswith(f"{head}.")


def _options(loss: Loss) -> list[tuple[Loss, float]]:
    """The losses to try and what each costs: one as given, or a ramp for each margin of the grid."""
    if isinstance(loss, Ramp) and loss.margin is None:
        return [(Ramp(grid.RATIO**k), -math.log(grid.weight(k))) for k in _MARGINS]
    return [(loss, 0.0)]


def _layers(case: Case, choice: NetworkClass, loss: Loss, measured: Mapping[int, Measured]) -> tuple[LayerReport, ...]:
    """Contributions and elasticities (docs/theory.md)."""
    balls, linears = choice.balls, case.network.linears
    ratios = {index: ball.distance / ball.bound if ball.bound else 0.0 for index, ball in balls.items()}
    total = math.fsum(ratios.values())
    reports, before = [], dict(balls)
    for index, ball in balls.items():
        still = replace(ball, distance=0.0, shift=0.0)
        before[index] = still
        ratio = ratios[index]
        share = ratio / total if total else 0.0

        def at(factor: float, index: int = index, ball: Ball = ball) -> dict[int, Ball]:
            return {**balls, index: replace(ball, distance=ball.distance * factor)}

        def elasticity(low: float, high: float) -> float:
            return (high - low) / (math.log1p(_STEP) - math.log1p(-_STEP)) if low > -math.inf else 0.0

        ends = [at(1 - _STEP), at(1 + _STEP)]
        reports.append(
            LayerReport(
                name=linears[index].name,
                reference=ball.reference,
                distance=ball.distance,
                shift=ball.shift,
                measured_distance=measured[index].ball.distance,
                share=share,
                printed_elasticity=share * (1 - ratio) + ratio,
                product_elasticity=elasticity(*(case.product(end).log_expectation for end in ends)),
                distance_elasticity=elasticity(*(case.moved(end).log_expectation for end in ends)),
                frozen_log10=to_log10(case.distance({**balls, index: still}, choice, loss)),
                suffix_log10=to_log10(case.distance(before, choice, loss)),
            )
        )
    return tuple(reports)


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
