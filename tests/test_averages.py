"""Averages of weights inside their balls: inside as well, exactly, once ``Constraint.on`` has projected them."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tethertune as tt
from tethertune.errors import ConfigurationError, ReferenceMismatchError

torch.set_num_threads(1)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return model.to(dtype)


def ema(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))


def ema_of_timm(model):
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(model, decay=0.7)
    average.update_parameters = average.update
    return average


AVERAGES = {"SWA": AveragedModel, "EMA": ema, "timm's EMA": ema_of_timm}


def distances_by_hand(model, reference, norm):
    """Of the two linear maps from their centres, in float64: body from its reference, head from 0."""
    state = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
    moved = (state["0.weight"].double() - reference.double()).flatten(1), state["4.weight"].double()
    return [float(T.abs().sum(dim=1).max() if norm == "mars" else T.square().sum().sqrt()) for T in moved]


def train(model, constraint, average, held, steps=12, seen=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    constraint.attach(optimizer)
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        optimizer.step()
        average.update_parameters(model)
        if held is not None:
            held.project()
        seen()


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_is_inside_after_every_update(kind, dtype, norm):
    model = network(DTYPES[dtype])
    reference = model[0].weight.detach().clone()
    radii = (0.3, 1.0)
    constraint = tt.Constraint(model, norm=norm, radius=radii[0], head="4", head_radius=radii[1])
    average = AVERAGES[kind](model)
    found = []
    train(
        model,
        constraint,
        average,
        constraint.on(average),
        seen=lambda: found.append(distances_by_hand(average, reference, norm)),
    )
    assert len(found) == 12
    assert all(distance <= radius for row in found for distance, radius in zip(row, radii, strict=True))
    assert all(distance > 0.1 * radius for distance, radius in zip(found[-1], radii, strict=True))


def test_without_it_rounding_leaves_the_ball():
    """Why the helper is there: two stored points on one side of the ball's surface, averaged as torch does it."""
    model = network(torch.bfloat16)
    constraint = tt.Constraint(model, radius=0.3, exclude=["4"])
    reference, average = model[0].weight.detach().clone(), AveragedModel(model)
    outside = 0
    for _ in range(20):
        with torch.no_grad():
            model[0].weight.copy_(reference + torch.rand(reference.shape))
        constraint.project()
        average.update_parameters(model)
        outside += distances_by_hand(average, reference, "mars")[0] > 0.3
    assert outside > 0
    constraint.on(average).project()
    assert 0.29 < distances_by_hand(average, reference, "mars")[0] <= 0.3


class TestOn:
    def test_it_leaves_this_constraint_and_its_network_alone(self):
        model = network()
        constraint = tt.Constraint(model, radius=0.1, head="4", head_radius=1.0)
        constraint.project()
        before, state = copy.deepcopy(model.state_dict()), constraint.state_dict()
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.add_(1)
        held = constraint.on(other)
        held.project()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert constraint.state_dict() == state == held.state_dict()
        assert constraint.distances()["0.weight"].value == 0
        assert 0.099 < held.distances()["0.weight"].value <= 0.1

    def test_weights_inside_keep_their_bits(self):
        model = network()
        constraint = tt.Constraint(model, radius=0.5)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.add_(0.01)
        before = other[0].weight.detach().clone()
        constraint.on(other).project()
        assert torch.equal(other[0].weight, before)

    def test_relative_radii_stay_those_of_the_reference(self):
        model = network()
        constraint = tt.Constraint(model, radius=tt.Relative(0.02))
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.mul_(3)
        radii = [ball.radius for ball in constraint.distances().values()]
        assert [ball.radius for ball in constraint.on(other).distances().values()] == radii

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    def test_a_cast_is_inside_around_the_reference_of_more_digits(self, dtype, norm):
        model = network()
        reference = model[0].weight.detach().clone()
        constraint = tt.Constraint(model, norm=norm, radius=0.3, head="4", head_radius=1.0)
        with torch.no_grad():
            model[0].weight.add_(torch.randn_like(model[0].weight))
            model[4].weight.add_(1)
        constraint.project()
        cast = copy.deepcopy(model).to(DTYPES[dtype])
        if norm == "mars":  # rounding to nearest, of one of many rows: the cast alone leaves the ball
            assert (
                max(distances_by_hand(cast, reference, norm)[0] / 0.3, distances_by_hand(cast, reference, norm)[1]) > 1
            )
        constraint.on(cast).project()
        body, head = distances_by_hand(cast, reference, norm)
        assert 0.25 < body <= 0.3
        assert 0.99 < head <= 1.0

    def test_around_a_rounded_reference_the_true_one_counts(self):
        model = network()
        reference = model[0].weight.detach().clone()
        constraint = tt.Constraint(model, radius=0.3, reference_dtype=torch.bfloat16)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.add_(1)
        constraint.on(other).project()
        assert 0.28 < distances_by_hand(other, reference, "mars")[0] <= 0.3

    def test_a_ball_that_holds_no_number_of_the_dtype_is_refused(self):
        model = network()
        constraint = tt.Constraint(model, radius=1e-4)
        with pytest.raises(ConfigurationError, match=r"weights' dtype=torch.bfloat16 moves the centre of 0.weight"):
            constraint.on(copy.deepcopy(model).bfloat16())

    def test_another_network_is_refused(self):
        constraint = tt.Constraint(network(), radius=0.1)
        with pytest.raises(ReferenceMismatchError, match=r"0.weight has shape"):
            constraint.on(nn.Sequential(nn.Linear(2, 2)))

    def test_a_row_that_is_not_finite_is_told_of_the_copy_alone(self):
        model = network()
        constraint = tt.Constraint(model, radius=0.1)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight[2, 0, 0, 0] = math.nan
        with pytest.raises(tt.TethertuneError, match=r"Row 2 of 0.weight holds a NaN"):
            constraint.on(other).project()
        constraint.project()
