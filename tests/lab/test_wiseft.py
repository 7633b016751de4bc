import pytest
import torch
from torch import nn

from tethertune.constraint import Constraint, Relative
from tethertune.lab import wiseft
from tethertune.lab.wiseft import Line, between, largest

ALPHAS = (0.0, 0.05, 0.3, 0.5, 0.75, 0.95, 1.0)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


def moved(network, seed=1, by=0.1):
    """The network's weights after a step in a random direction, with other statistics."""
    torch.manual_seed(seed)
    state = {
        name: tensor + by * torch.randn_like(tensor) if tensor.is_floating_point() else tensor + 7
        for name, tensor in network.state_dict().items()
    }
    return state | {"1.running_var": torch.rand(8) + 1e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_number_lies_between_its_ends_and_the_ends_are_exact(dtype, alpha):
    torch.manual_seed(2)
    scale = torch.logspace(-5, 3, 4000)
    reference = {"body.weight": (torch.randn(4000) * scale).to(dtype)}
    trained = {"body.weight": (torch.randn(4000) * scale.flip(0)).to(dtype)}
    found = between(reference, trained, alpha, head="fc")["body.weight"]

    assert found.dtype == dtype
    low, high = torch.stack([reference["body.weight"], trained["body.weight"]]).aminmax(dim=0)
    assert ((low <= found) & (found <= high)).all()
    if alpha in (0.0, 1.0):
        assert torch.equal(found, (trained if alpha else reference)["body.weight"])
    else:
        exact = (1 - alpha) * reference["body.weight"].double() + alpha * trained["body.weight"].double()
        of_sum = torch.finfo(torch.float64).eps * (low.double().abs() + high.double().abs())
        of_dtype = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((found.double() - exact).abs() <= of_dtype + 2 * of_sum).all()


def test_the_head_and_counters_stay_as_trained_and_statistics_move():
    start = network()
    trained = moved(start)
    found = between(start.state_dict(), trained, 0.25, head="3")

    assert torch.equal(found["3.weight"], trained["3.weight"])
    assert torch.equal(found["3.bias"], trained["3.bias"])
    assert found["1.num_batches_tracked"] == 7
    assert torch.allclose(found["1.running_var"], 0.75 + 0.25 * trained["1.running_var"])
    assert (found["1.running_var"] > 0).all()


@pytest.mark.parametrize("radius", [0.3, Relative(0.05)])
@pytest.mark.parametrize("norm", ["mars", "frobenius"])
@pytest.mark.parametrize("convention", ["operator", "authors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_line_stays_in_the_balls(norm, radius, convention, dtype):
    model = network().to(dtype)
    constraint = Constraint(model, norm=norm, radius=radius, head="3", head_radius=0.5, convention=convention)
    line = Line(model, head="3", constraint=constraint)
    model.load_state_dict(moved(model))
    constraint.project()
    trained = wiseft.weights_of(model)
    ends = constraint.distances()
    assert any(distance.active_rows for distance in ends.values())

    for alpha in ALPHAS:
        line.go(trained, alpha)
        for name, distance in constraint.distances().items():
            assert distance.value <= distance.radius
            if distance.role == "head":
                assert distance.value == ends[name].value
    line.go(trained, 1.0)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_what_would_leave_a_ball_is_projected():
    model = network()
    constraint = Constraint(model, norm="mars", radius=0.1, head="3")
    line = Line(model, head="3", constraint=constraint)
    line.go(moved(model, by=1.0), 0.5)
    assert all(distance.value <= distance.radius for distance in constraint.distances().values())


def test_without_balls_the_line_is_the_line():
    model = network()
    line, reference, trained = Line(model, head="3"), wiseft.weights_of(model), moved(model)
    line.go(trained, 0.3)
    expected = between(reference, trained, 0.3, head="3")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_line_begins_where_the_network_was_though_it_moves():
    model = network()
    reference = wiseft.weights_of(model)
    line = Line(model, head="3")
    trained = moved(model)
    line.go(trained, 1.0)
    line.go(trained, 0.0)
    assert torch.equal(model[0].weight, reference["0.weight"])
    assert torch.equal(model[3].weight, trained["3.weight"])


def test_the_largest_is_found_though_what_is_kept_may_rise_and_fall():
    asked = []

    def keeps(alpha):
        asked.append(alpha)
        return alpha in (0.2, 0.6)

    assert largest(keeps) == 0.6
    assert asked == [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6]


def test_the_reference_itself_keeps_all_and_is_not_asked():
    assert largest(lambda alpha: alpha < 0.05) == 0
    assert largest(lambda alpha: 1 / alpha < 0) == 0
    assert largest(lambda alpha: alpha > 0) == 1
