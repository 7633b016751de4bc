import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tethertune as tt
from tethertune import measure, rows
from tethertune.errors import PatternError, ReferenceMismatchError

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.tokens = nn.Embedding(7, 3)
        self.fc = nn.Linear(6, 5)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.01)


def test_by_hand():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -5.0]]))
    before = snapshot(model)
    with torch.no_grad():
        model.weight.add_(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    moved = tt.distances(model, before)
    assert set(moved) == {"weight"}
    assert moved["weight"] == tt.Displacement(7.0, math.sqrt(26), 5.0, math.sqrt(30), 2, 2, "body")


def test_every_linear_map_in_both_norms(net):
    before = snapshot(net)
    train(net)
    moved = tt.distances(net, before)
    assert set(moved) == {"stem.weight", "depthwise.weight", "up.weight", "fc.weight"}
    T = {name: net.state_dict()[name].double() - before[name].double() for name in moved}
    expected = {
        "stem.weight": T["stem.weight"].abs().sum((1, 2, 3)).max(),
        "depthwise.weight": T["depthwise.weight"].abs().sum((1, 2, 3)).max(),
        "up.weight": torch.stack([T["up.weight"][i : i + 2].abs().sum((0, 2, 3)).max() for i in (0, 2)]).max(),
        "fc.weight": T["fc.weight"].abs().sum(1).max(),
    }
    for name, displacement in moved.items():
        assert displacement.mars == pytest.approx(float(expected[name]), rel=1e-13)
        assert displacement.frobenius == pytest.approx(float(T[name].square().sum().sqrt()), rel=1e-13)
        assert displacement.reference_frobenius == pytest.approx(float(before[name].double().norm()), rel=1e-12)
        assert displacement.role == "body"
    assert (moved["up.weight"].rows, moved["up.weight"].columns) == (6, 8)
    assert (moved["depthwise.weight"].rows, moved["depthwise.weight"].columns) == (4, 9)


def test_the_head_is_measured_from_zero_and_needs_no_reference(net):
    before = snapshot(net)
    own = float(before["fc.weight"].double().abs().sum(1).max())
    del before["fc.weight"]
    head = tt.distances(net, before, head="fc")["fc.weight"]
    assert head.role == "head"
    assert head.mars == pytest.approx(own, rel=1e-13)
    assert head.reference_mars == head.reference_frobenius == 0


def test_nothing_moved(net):
    for displacement in tt.distances(net, snapshot(net)).values():
        assert displacement.mars == displacement.frobenius == 0
        assert displacement.reference_mars > 0


def test_it_agrees_with_the_constraint(net):
    reference = tt.Reference.of(net)
    constraints = {norm: tt.Constraint(net, norm=norm, radius=0.05) for norm in ("mars", "frobenius")}
    train(net)
    moved = tt.distances(net, reference)
    for norm, constraint in constraints.items():
        for name, distance in constraint.distances().items():
            assert distance.value == pytest.approx(getattr(moved[name], norm), rel=1e-13)


def test_the_authors_convention_takes_a_depthwise_kernel_as_one_row(net):
    before = snapshot(net)
    train(net)
    moved = tt.distances(net, before, convention="authors")["depthwise.weight"]
    whole = float((net.depthwise.weight.detach().double() - before["depthwise.weight"].double()).abs().sum())
    assert (moved.rows, moved.columns) == (1, 36)
    assert moved.mars == pytest.approx(whole, rel=1e-13)


def test_a_safetensors_file_and_another_dtype(net, tmp_path):
    save_file(snapshot(net), tmp_path / "weights.safetensors")
    net.bfloat16()
    moved = tt.distances(net, tmp_path / "weights.safetensors")
    assert 0 < moved["fc.weight"].mars <= moved["fc.weight"].reference_mars * 2**-8


def test_of_matrices_of_an_empty_layer():
    empty = measure.of_matrices(torch.ones(0, 3), torch.ones(0, 3), rows.Rows("map"))
    assert (empty.mars, empty.frobenius, empty.rows, empty.columns) == (0, 0, 0, 0)


def test_another_network_is_refused(net):
    with pytest.raises(ReferenceMismatchError, match=r"stem\.weight is missing"):
        tt.distances(net, nn.Linear(2, 2))
    with pytest.raises(PatternError, match="head='classifier'"):
        tt.distances(net, snapshot(net), head="classifier")


def test_weights_that_are_not_finite_show(net):
    before = snapshot(net)
    with torch.no_grad():
        net.fc.weight[0, 0] = math.nan
    moved = tt.distances(net, before)
    assert math.isnan(moved["fc.weight"].mars)
    assert math.isnan(moved["fc.weight"].frobenius)
    assert moved["stem.weight"].mars == 0
