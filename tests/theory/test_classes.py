"""The class that a trained network is put into: declared, on the grid, or as measured."""

import copy
import math

import pytest
import torch
from torch import nn

from tethertune.errors import ConfigurationError, PatternError, ReferenceMismatchError
from tethertune.theory import grid
from tethertune.theory.classes import choose, measure
from tethertune.theory.graph import trace
from tethertune.theory.sample import tensors

torch.set_num_threads(1)
SLACK = 1 + 1e-5


def make(only=("0.weight", "3.weight", "5.weight", "8.weight")):
    """A network with a folded batch norm, a plain convolution and a transposed one, and a network near it."""
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3),
    ).eval()  # fmt: skip
    reference[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(reference[1].weight, 0.5, 2)
    nn.init.zeros_(reference[8].bias)
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for name in only:
            parameter = model.get_parameter(name)
            parameter.add_(0.01 * torch.randn_like(parameter))
    network = trace(model, torch.zeros(2, 2, 6, 6), head="8")
    state, before = tensors(model), tensors(reference)
    return network, state, before


def chosen(only=("0.weight", "3.weight", "5.weight", "8.weight"), norm="mars", **options):
    network, state, before = make(only)
    measured = measure(network, state, before, norm)
    choice = choose(network, measured, state, before, norm=norm, **options)
    return choice, list(measured.values()), list(choice.balls.values()), network


def test_what_is_measured_is_folded_and_in_float64():
    network, state, before = make(("0.weight", "1.bias", "5.weight"))
    first, second, third = measure(network, state, before).values()
    scale = before["1.weight"].double() / (before["1.running_var"].double() + 1e-5).sqrt()
    moved = (state["0.weight"].double() - before["0.weight"].double()) * scale.view(-1, 1, 1, 1)
    assert first.ball.distance == pytest.approx(float(moved.abs().sum((1, 2, 3)).max()), rel=1e-12)
    assert first.ball.shift == pytest.approx(float((state["1.bias"] - before["1.bias"]).double().abs().max()), rel=1e-6)
    assert not first.same_affine
    assert (second.ball.distance, second.ball.shift, second.same_affine) == (0.0, 0.0, True)
    kernel = (state["5.weight"].double() - before["5.weight"].double()).abs().sum((2, 3))  # (in, out / groups)
    assert third.kernel == pytest.approx(float(torch.stack([half.sum(0) for half in kernel.chunk(2)]).max()), rel=1e-12)
    assert third.ball.distance <= third.kernel * (1 + 1e-12)


def test_as_measured_nothing_is_rounded_and_nothing_paid():
    choice, measured, balls, _ = chosen(mode="measured")
    assert [ball.distance for ball in balls] == [found.ball.distance for found in measured]
    assert (choice.price, choice.paid) == (0.0, ())


def test_on_the_grid_one_index_or_one_for_each_layer():
    shared, measured, balls, _ = chosen(mode="grid", affine="frozen")
    index = {round(math.log(ball.distance / ball.reference) / math.log(grid.RATIO)) for ball in balls}
    assert len(index) == 1
    assert all(found.ball.distance <= ball.distance for found, ball in zip(measured, balls, strict=True))
    each, _, own, _ = chosen(mode="grid", affine="frozen", sharing="per-layer")
    assert all(
        found.ball.distance <= ball.distance <= 1.1 * found.ball.distance * (1 + 1e-9)
        for found, ball in zip(measured, own, strict=True)
    )
    assert shared.price < each.price
    assert shared.paid == each.paid == ("distances of 3 layers", "the head's norm", "the head's bias")


def test_declared_radii_are_taken_with_the_scale_of_a_folded_batch_norm():
    radii = {"0.weight": 1.0, "3.weight": 2.0, "5.weight": 3.0, "8.weight": 30.0, "8.bias": 0.5}
    choice, _, balls, network = chosen(mode="declared", affine="frozen", radii=radii)
    first = next(iter(network.linears.values()))
    scale = float(first.scale(make()[2]).abs().max())
    expected = [1.0 * scale * SLACK, 2.0 * SLACK, 3.0 * SLACK]
    assert [ball.distance for ball in balls] == pytest.approx(expected, rel=1e-12)
    assert (choice.head_bound, choice.head_bias) == pytest.approx((30.0 * SLACK, 0.5 * SLACK))
    assert (choice.price, choice.paid) == (0.0, ())


def test_a_frobenius_radius_bounds_rows_by_the_root_of_their_length():
    radii = {"0.weight": 1.0, "3.weight": 2.0, "5.weight": 3.0, "8.weight": 30.0}
    _, _, balls, network = chosen(norm="frobenius", mode="declared", affine="frozen", radii=radii)
    scale = float(next(iter(network.linears.values())).scale(make()[2]).abs().max())
    lengths = [2 * 9, 2 * 9, 2 * 4]  # inputs a group times taps
    expected = [r * math.sqrt(n) * SLACK for r, n in zip((scale, 2.0, 3.0), lengths, strict=True)]
    assert [ball.distance for ball in balls] == pytest.approx(expected, rel=1e-12)


def test_a_batch_norm_that_may_move_makes_its_layers_radius_count_for_nothing():
    radii = {"0.weight": 1.0, "3.weight": 2.0, "5.weight": 3.0, "8.weight": 30.0}
    choice, _, balls, _ = chosen(mode="declared", radii=radii)
    assert choice.paid == ("distances of 1 layers", "bias shifts of 3 layers", "the head's bias")
    assert balls[1].distance == pytest.approx(2.0 * SLACK)


@pytest.mark.parametrize("mode", ["declared", "grid"])
@pytest.mark.parametrize("options", [{"frozen": ["0", "1"]}, {"frozen": ["[01]"]}, {"radii": {"0.weight": 0.0}}])
def test_what_is_frozen_by_declaration_is_free(mode, options):
    choice, _, balls, _ = chosen(("3.weight", "8.weight"), mode=mode, affine="frozen", **options)
    assert balls[0].distance == 0
    assert choice.paid[0] == "distances of 2 layers"


def test_a_layer_of_norm_zero_has_the_scale_of_the_least_other():
    """timm's last batch norms of a block start at 0: their grid needs a scale all the same."""
    network, state, before = make()
    state["1.weight"], before["1.weight"] = (torch.zeros(4), torch.zeros(4))
    measured = measure(network, state, before)
    choice = choose(network, measured, state, before, mode="grid", affine="frozen", sharing="per-layer")
    assert next(iter(choice.balls.values())).distance > 0


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"mode": "declared", "radii": {"0.wieght": 1.0}}, PatternError, "Did you mean '0.weight'"),
        ({"mode": "declared", "radii": {"3.bias": 1.0}}, PatternError, "no layer's weight, nor the head's bias"),
        ({"mode": "declared", "radii": {"3.weight": -1.0}}, ConfigurationError, "it must be 0 or more"),
        ({"mode": "declared", "radii": {"3.weight": math.nan}}, ConfigurationError, "it must be 0 or more"),
        ({"mode": "declared", "radii": {"3.weight": 1e-9}}, ConfigurationError, "outside of its declared radius"),
        ({"mode": "declared", "radii": {"8.weight": 0.0}}, ConfigurationError, "it must be above 0"),
        ({"mode": "grid", "frozen": ["9"]}, PatternError, "frozen='9' matches no layer"),
        ({"mode": "grid", "frozen": ["3"]}, ConfigurationError, "3 was declared frozen, but its weights have moved"),
        ({"mode": "grd"}, ConfigurationError, "mode='grd' is not known"),
    ],
    ids=str,
)
def test_refusals(options, error, says):
    with pytest.raises(error, match=says):
        chosen(**options)


@pytest.mark.parametrize("name", ["8.weight", "8.bias"])
def test_a_head_that_is_not_a_number_is_in_no_ball(name):
    network, state, before = make()
    state[name] = torch.full_like(state[name], math.nan)
    radii = {"0.weight": 1.0, "3.weight": 2.0, "5.weight": 3.0, "8.weight": 30.0, "8.bias": 1.0}
    measured = measure(network, state, before)
    with pytest.raises(ConfigurationError, match="outside of its declared radius"):
        choose(network, measured, state, before, mode="declared", affine="frozen", radii=radii)


def test_a_pattern_freezes_what_it_names_and_nothing_that_is_folded_with_it():
    for pattern in ("1", "1.bias", "0"):  # the batch norm, its bias, the convolution: not both
        choice, _, balls, _ = chosen(("3.weight", "8.weight"), mode="grid", frozen=[pattern])
        assert balls[0].distance > 0
        assert choice.paid[0] == "distances of 3 layers"
    assert chosen(("3.weight", "8.weight"), mode="grid", frozen=["0", "1"])[2][0].distance == 0


def test_a_bias_that_moved_is_not_frozen():
    with pytest.raises(ConfigurationError, match="its bias or batch norm has moved"):
        chosen(("3.bias",), mode="grid", affine="frozen")


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_reference_of_another_network(change):
    network, state, before = make()
    if change == "missing":
        del before["1.running_var"]
    else:
        before["1.running_var"] = torch.ones(5)
    with pytest.raises(ReferenceMismatchError, match=r"1\.running_var"):
        measure(network, state, before)
