import math

import pytest

from tethertune.lab.config import FinetuneConfig
from tethertune.lab.methods import METHODS


def test_the_methods_of_the_paper_are_there_under_their_names():
    assert list(METHODS) == ["none", "l2-sp", "mars-sp", "delta", "l2-pgm", "mars-pgm"]
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_is_described_in_one_sentence_and_has_none_or_two_hyper_parameters(method):
    assert method.description.endswith(".")
    assert method.description.count(". ") == 0
    pair = [method.body, method.head]
    assert pair == [None, None] if method.kind == "none" else None not in pair
    assert all(parameter.name in method.accepts for parameter in pair if parameter)
    assert set(method.defaults) <= set(method.accepts)


def test_the_ranges_are_those_of_the_authors():
    radius, strength = METHODS["mars-pgm"].body, METHODS["l2-sp"].body
    assert (math.log(radius.low), math.log(radius.high)) == pytest.approx((0.5, 3.5))
    assert (math.log(strength.low), math.log(strength.high)) == pytest.approx((-10, -1))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_hyper_parameters_are_configuration_keys_that_their_method_takes(method):
    for parameter in (method.body, method.head):
        if parameter:
            FinetuneConfig("lite0", "fashion", method.name, **{parameter.name: parameter.low})
