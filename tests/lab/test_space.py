from math import exp, inf

import pytest

from tethertune.errors import ConfigurationError
from tethertune.lab.config import COUNT
from tethertune.lab.methods import METHODS
from tethertune.lab.space import (
    LR_RANGE,
    Dimension,
    Movement,
    SearchConfig,
    needs_movement,
    require_free,
    space,
    tuned_keys,
)

CONSTRAINTS = ("l2-pgm", "mars-pgm")
PENALTIES = ("l2-sp", "mars-sp", "delta")
MOVED = Movement(median=0.1434, largest=1.6499, head=88.21)


def ranges(*args, **options):
    return {dimension.key: (dimension.low, dimension.high) for dimension in space(*args, **options)}


class TestSpace:
    @pytest.mark.parametrize("method", CONSTRAINTS)
    @pytest.mark.parametrize(("kind", "top"), [("authors", 3.5), ("v1", 2.5)])
    def test_radii_as_the_authors_searched_them(self, method, kind, top):
        assert ranges(method, kind=kind) == {"radius": (exp(0.5), exp(top)), "head_radius": (exp(0.5), exp(top))}

    @pytest.mark.parametrize("method", PENALTIES)
    @pytest.mark.parametrize("kind", ["authors", "v1"])
    def test_strengths_as_the_authors_searched_them(self, method, kind):
        assert ranges(method, kind=kind) == {"strength": (exp(-10), exp(-1)), "head_strength": (exp(-10), exp(-1))}

    @pytest.mark.parametrize("method", CONSTRAINTS)
    def test_relative_radii_hold_the_default_in_their_middle(self, method):
        found = ranges(method, kind="relative")
        low, high = found.pop("relative_radius")
        assert low < METHODS[method].defaults["relative_radius"] < high
        assert (low * high) ** 0.5 == pytest.approx(0.02)
        assert list(found) == ["head_radius"]

    def test_radii_from_an_epoch(self):
        assert ranges("mars-pgm", kind="auto", movement=MOVED, head="flatten") == {
            "radius": (0.014, 1.6),
            "head_radius": (0.88, 88),
        }
        assert ranges("l2-pgm", kind="auto", movement=MOVED, head="pool")["head_radius"] == (8.8, 880)

    @pytest.mark.parametrize("kind", ["relative", "auto"])
    def test_deltas_own_default_lies_in_the_ranges_that_are_not_the_authors(self, kind):
        assert not needs_movement("delta", kind)
        low, high = ranges("delta", kind=kind)["strength"]
        assert low < METHODS["delta"].defaults["strength"] < high

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("kind", ["authors", "v1", "relative", "auto"])
    def test_the_learning_rate_is_one_more_for_every_method(self, method, kind):
        without = space(method, kind=kind, movement=MOVED)
        assert len(without) == (0 if method == "none" else 2)
        with_rate = space(method, kind=kind, movement=MOVED, tune_lr=True, lr_range=(1e-5, 1e-2))
        assert with_rate == (*without, Dimension("lr", 1e-5, 1e-2))

    def test_only_radii_need_an_epoch(self):
        assert [method for method in METHODS if needs_movement(method, "auto")] == [*CONSTRAINTS]
        assert not any(needs_movement(method, kind) for method in METHODS for kind in ("authors", "v1", "relative"))

    def test_the_default_learning_rate_is_the_middle_of_its_range(self):
        low, high = LR_RANGE
        assert (low * high) ** 0.5 == pytest.approx(3e-4, rel=0.1)


def test_the_ends_of_a_range():
    dimension = Dimension("radius", 1.0, 100.0)
    assert [dimension.edge(value) for value in (1, 1.2, 1.3, 10, 79, 80, 100)] == [
        *("lower", "lower", None, None, None, "upper", "upper"),
    ]


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"trials": 0}, "--trials 0 is not allowed: use a whole number, 1 or more"),
            ({"startup": 0}, "--startup 0 is not allowed"),
            ({"sampler": "tpes"}, "use tpe, random, gp. Did you mean 'tpe'"),
            ({"space": "final"}, "--space final is not allowed: use authors, v1, relative, auto"),
            ({"objective": "error"}, "use accuracy, loss"),
            ({"lr_range": (1e-3, 1e-4)}, "--lr-range 0.001 0.0001 is not allowed: use two numbers above 0, the lower"),
            ({"lr_range": (0, 1)}, "the lower one first"),
            ({"lr_range": (1e-4, inf)}, "the lower one first"),
            ({"lr_range": (1e-4, float("nan"))}, "the lower one first"),
            ({"lr_range": (1e-4,)}, "use two numbers"),
            ({"lr_range": ("a", "b")}, "use two numbers"),
            ({"seed": -1}, "--seed -1 is not allowed"),
            ({"prune": True, "sampler": "gp"}, "--prune goes with --sampler tpe or random"),
        ],
    )
    def test_a_fault_says_what_was_given_and_what_is_allowed(self, values, told):
        with pytest.raises(ConfigurationError) as raised:
            SearchConfig(**values)
        assert told in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_all_faults_at_once(self):
        with pytest.raises(ConfigurationError) as raised:
            SearchConfig(trials=0, startup=-3, objective=1)
        assert str(raised.value).count("\n") == 2

    def test_equal_settings_are_equal(self):
        assert SearchConfig(lr_range=[1, 2]) == SearchConfig(lr_range=(1.0, 2.0))
        assert SearchConfig(lr_range=[1, 2]).identity["lr_range"] == [1.0, 2.0]

    def test_the_number_of_trials_is_no_part_of_what_a_study_is(self):
        assert SearchConfig(trials=3).identity == SearchConfig(trials=4).identity
        assert SearchConfig(seed=3).identity != SearchConfig(seed=4).identity
        assert COUNT[0](1)


def test_what_is_searched_cannot_be_given_too():
    assert tuned_keys("mars-pgm", tune_lr=True) == ("radius", "relative_radius", "head_radius", "lr")
    require_free({"lr", "epochs"}, "mars-pgm", SearchConfig())
    with pytest.raises(ConfigurationError, match=r"^--head-radius, --lr: the search chooses that, so leave it out"):
        require_free({"lr", "epochs", "head_radius"}, "mars-pgm", SearchConfig(tune_lr=True))
