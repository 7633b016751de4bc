import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.errors import ConfigurationError
from tethertune.theory.losses import ClippedCrossEntropy, CrossEntropy, Ramp, Scores

logit = st.floats(-6, 6)
vectors = st.lists(st.tuples(logit, logit), min_size=2, max_size=5)


def values(loss, logits, label):
    scores = Scores()
    scores.add(torch.tensor([logits], dtype=torch.float64), torch.tensor([label]))
    return loss.mean(scores), scores


@given(vectors, st.sampled_from([Ramp(0.5), Ramp(2.0), ClippedCrossEntropy(), CrossEntropy(6.0)]))
@settings(deadline=None)
def test_lipschitz_constants_range_and_error(pairs, loss):
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    (first, scores), (second, _) = (values(loss, z, 0) for z in (a, b))
    gap = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    assert abs(first - second) <= loss.lipschitz * float(gap.norm()) + 1e-9
    assert abs(first - second) <= loss.sup_lipschitz * float(gap.abs().max()) + 1e-9
    assert 0 <= first <= loss.largest(len(a)) + 1e-12
    if loss.bounds_error:
        assert first >= scores.error - 1e-9


def test_ties_are_mistakes():
    for loss in (Ramp(), ClippedCrossEntropy()):
        mean, scores = values(loss, [1.0, 1.0], 0)
        assert scores.error == 1
        assert mean == pytest.approx(1, rel=1e-12)


def test_scores_of_several_batches():
    scores = Scores()
    scores.add(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]))
    scores.add(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([1]))
    assert scores.margins.tolist() == [1.0, -2.0]
    assert scores.error == 0.5
    assert Ramp(2.0).mean(scores) == 0.75
    assert scores.classes == 3


def test_cross_entropy_reaches_its_range():
    mean, _ = values(CrossEntropy(3.0), [-3.0, 3.0, 3.0], 0)
    assert mean == pytest.approx(CrossEntropy(3.0).largest(3), rel=1e-12)
    assert not CrossEntropy(3.0).bounds_error
    assert not ClippedCrossEntropy(1.0).bounds_error


def test_a_bound_of_the_logits_that_the_sample_breaks_is_none():
    with pytest.raises(ConfigurationError, match=r"logit_bound=1\.0, but the sample has a logit of size 3"):
        values(CrossEntropy(1.0), [0.0, -3.0], 0)
    assert values(CrossEntropy(3.0), [0.0, -3.0], 0)[0] > 0
    assert [loss.is_bounded for loss in (Ramp(), ClippedCrossEntropy(), CrossEntropy(1.0))] == [True, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(ConfigurationError, match="logits are not finite"):
        Scores().add(torch.tensor([[0.0, value]]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (CrossEntropy, "bound the logits"),
        (lambda: Ramp(0.0), "margin=0.0"),
        (lambda: ClippedCrossEntropy(-1.0), "clip"),
        (lambda: Ramp(None).lipschitz, "has no margin yet"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()


def test_names():
    assert Ramp(0.5).name == "ramp (margin 0.5)"
    assert math.log(2) == ClippedCrossEntropy().clip
    assert ClippedCrossEntropy().name.startswith("clipped cross-entropy")
