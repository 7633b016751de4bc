import math

import pytest
from torch import nn

from tethertune import radii, rows
from tethertune.errors import ConfigurationError, PatternError
from tethertune.radii import Relative


@pytest.fixture
def layers():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False))
    return rows.layers(model)


@pytest.mark.parametrize("radius", [2, 0.0, math.inf, Relative(0.5), {"0.*": 1.0, "*": Relative(0.1)}])
def test_a_plain_radius_gives_the_same_radii(layers, radius):
    plain = radii.to_plain(radius)
    assert plain == radii.to_plain(radius)
    (first, *_), by_layer = radii.by_name(plain, layers)[0], radii.by_name(plain, layers)
    assert first == (1.0 if isinstance(radius, dict) else radius)
    assert [len(found) for found in by_layer] == [1, 1, 1]


def test_the_first_pattern_that_matches_counts_and_a_layer_that_none_matches_is_free(layers):
    found = radii.by_name(radii.to_plain({"1.*": 2.0, "[01].*": 3.0}), layers)
    assert found == [[3.0], [2.0], [math.inf]]


def test_a_tied_layer_has_a_radius_for_each_of_its_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    (layer,) = rows.layers(model)
    assert radii.by_name(radii.to_plain({"0.*": 2.0, "1.*": 1.0}), [layer]) == [[2.0, 1.0]]


@pytest.mark.parametrize("radius", [-1.0, math.nan, True, "1", None, {}, {"*": {"0.*": 1.0}}, {"*": -1.0}])
def test_what_is_not_a_radius_is_refused(radius):
    with pytest.raises(ConfigurationError, match="radius="):
        radii.to_plain(radius)


def test_a_pattern_that_matches_nothing_is_refused(layers):
    with pytest.raises(PatternError, match=r"9\.\*"):
        radii.by_name(radii.to_plain({"9.*": 1.0}), layers)
