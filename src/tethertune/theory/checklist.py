"""What must be true for a certificate to hold, each point with pass, fail or unknown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tethertune.theory.classes import Measured, Mode, NetworkClass
from tethertune.theory.losses import Loss
from tethertune.theory.sample import Sample

__all__ = ["Check", "Facts", "Status", "checklist"]

Status = Literal["pass", "fail", "unknown"]


@dataclass(frozen=True)
class Facts:
    """What only the person who trained the network can know; ``None`` where it is not known.

    Attributes:
        independent_reference: The pre-trained weights and statistics owe nothing to the training sample.
        independent_examples: The examples were drawn independently, and none counts twice.
        same_data: These are the examples that the network was trained on (a run's fingerprint says so).
        declared_before_data: The radii were fixed before this sample was looked at, not tuned on it.
        same_preprocessing: Test images go through exactly the same preprocessing.
    """

    independent_reference: bool | None = None
    independent_examples: bool | None = None
    same_data: bool | None = None
    declared_before_data: bool | None = None
    same_preprocessing: bool | None = None


@dataclass(frozen=True)
class Check:
    """One precondition.

    Attributes:
        name: What must hold.
        status: ``pass``, ``fail`` or ``unknown``.
        detail: How it was found, or what to do.
    """

    name: str
    status: Status
    detail: str


def checklist(
    mode: Mode,
    sample: Sample,
    choice: NetworkClass,
    measured: Mapping[int, Measured],
    facts: Facts,
    loss: Loss,
) -> tuple[Check, ...]:
    """The preconditions of a certificate for a network that was traced, folded and measured."""
    repeated = sample.size - sample.distinct
    examples: Status = _known(facts.independent_examples)
    moved = sum(not found.same_affine for found in measured.values())
    return (
        Check(
            "the reference is independent of the training sample",
            _known(facts.independent_reference),
            "weights and batch-norm statistics must come from other data",
        ),
        Check(
            "the examples are independent, and each counts once",
            examples,
            f"{repeated} of {sample.size} images repeat another one" if repeated else "no image repeats another one",
        ),
        Check(
            "these are the examples that the network was trained on",
            _known(facts.same_data),
            "the fingerprint of the run's data says",
        ),
        _radii(mode, choice, facts),
        Check("the loss is bounded", "pass", "by construction")
        if loss.is_bounded
        else Check(
            "the loss is bounded", "unknown", "the bound of the logits must hold for every network of the class"
        ),
        Check("the network is evaluated in eval mode", "pass", "dropout off, batch norm with its statistics"),
        Check("batch norm is folded into the distances", "pass", "with each network's own statistics"),
        Check(
            "biases that moved are accounted for",
            "pass",
            f"{moved} layers moved a bias or batch norm; the head's bias is at most {choice.head_bias:.4g}",
        ),
        Check("every node of the network is covered by a proof", "pass", f"{len(measured)} linear maps and the head"),
        Check(
            "test images are preprocessed as these were",
            _known(facts.same_preprocessing),
            "size, interpolation and normalisation",
        ),
    )


def _radii(mode: Mode, choice: NetworkClass, facts: Facts) -> Check:
    name = "the radii were fixed before the data, or paid for"
    match mode:
        case "measured":
            return Check(name, "fail", "they were read off the network: this is a measurement, not a certificate")
        case "grid":
            return Check(name, "pass", f"{choice.price:.1f} nats paid for {_listed(choice)}")
        case _:
            paid = f"; {choice.price:.1f} nats paid for {_listed(choice)}" if choice.paid else ""
            detail = f"radii tuned on this sample are not declared{paid}"
            return Check(name, _known(facts.declared_before_data), detail)


def _listed(choice: NetworkClass) -> str:
    return ", ".join(choice.paid) or "nothing"


def _known(value: bool | None) -> Status:
    if value is None:
        return "unknown"
    return "pass" if value else "fail"
