import pytest

from tethertune.theory.checklist import Facts, checklist
from tethertune.theory.classes import Measured, NetworkClass
from tethertune.theory.losses import CrossEntropy, Ramp
from tethertune.theory.propagation import Ball
from tethertune.theory.sample import Sample

REFERENCE = "the reference is independent of the training sample"
EXAMPLES = "the examples are independent, and each counts once"
SAME = "these are the examples that the network was trained on"
RADII = "the radii were fixed before the data, or paid for"
PREPROCESSING = "test images are preprocessed as these were"
RAMP = Ramp()
KNOWN = {
    "independent_reference": REFERENCE,
    "independent_examples": EXAMPLES,
    "same_data": SAME,
    "same_preprocessing": PREPROCESSING,
}


def checks(mode="grid", *, loss=RAMP, size=10, distinct=10, price=0.0, paid=(), moved=(False, True), **facts):
    choice = NetworkClass({}, 1.0, 0.25, price, paid)
    measured = {index: Measured(Ball(1.0, 0.1), 0.1, not has_moved) for index, has_moved in enumerate(moved)}
    found = checklist(mode, Sample(size=size, distinct=distinct), choice, measured, Facts(**facts), loss)
    return {check.name: check for check in found}


@pytest.mark.parametrize("fact", KNOWN)
@pytest.mark.parametrize(("value", "status"), [(None, "unknown"), (True, "pass"), (False, "fail")])
def test_what_only_the_user_knows_is_unknown_until_told(fact, value, status):
    found = checks(**{fact: value})
    assert found[KNOWN[fact]].status == status
    assert {found[name].status for name in KNOWN.values() if name != KNOWN[fact]} == {"unknown"}


def test_every_precondition_is_there_once_and_those_that_code_sees_to_pass():
    found = checks()
    assert len(found) == 10
    assert sum(check.status == "pass" for check in found.values()) == 6
    assert all(check.detail for check in found.values())


def test_images_that_repeat_are_counted():
    assert checks()[EXAMPLES].detail == "no image repeats another one"
    assert checks(distinct=7)[EXAMPLES].detail == "3 of 10 images repeat another one"


@pytest.mark.parametrize(
    ("mode", "facts", "status"),
    [
        ("grid", {}, "pass"),
        ("measured", {"declared_before_data": True}, "fail"),
        ("declared", {}, "unknown"),
        ("declared", {"declared_before_data": True}, "pass"),
        ("declared", {"declared_before_data": False}, "fail"),
    ],
)
def test_radii_are_declared_paid_for_or_read_off(mode, facts, status):
    assert checks(mode, **facts)[RADII].status == status


def test_what_was_paid_is_told():
    paid = {"price": 12.34, "paid": ("distances of 2 layers", "the margin")}
    assert checks("grid", **paid)[RADII].detail == "12.3 nats paid for distances of 2 layers, the margin"
    assert checks("declared", **paid)[RADII].detail.endswith("; 12.3 nats paid for distances of 2 layers, the margin")
    assert checks("grid")[RADII].detail == "0.0 nats paid for nothing"


def test_biases_that_moved_are_counted_with_the_bound_of_the_heads():
    detail = checks(moved=(True, True, False))["biases that moved are accounted for"].detail
    assert detail == "2 layers moved a bias or batch norm; the head's bias is at most 0.25"


def test_a_loss_whose_range_was_declared_is_not_bounded_by_construction():
    name = "the loss is bounded"
    assert checks()[name].status == "pass"
    assert checks(loss=CrossEntropy(3.0))[name].status == "unknown"
