import json
import sys

import pytest
import torch


@pytest.fixture
def rivals(benchmark):
    return benchmark("rivals")


@pytest.fixture
def setting(benchmark):
    torch.manual_seed(0)
    setting = benchmark("setting").Setting.of(benchmark("common").network("test_efficientnet"))
    setting.move()
    return setting


def weights(setting):
    return [layer.weight.detach().clone() for layer in setting.layers]


def test_it_runs_and_says_what_is_left_outside(rivals, tmp_path, monkeypatch, capsys):
    file = tmp_path / "rivals.json"
    monkeypatch.setattr(
        sys, "argv", ["rivals.py", "--model", "test_efficientnet", "--rounds", "2", "--json", str(file)]
    )
    rivals.main()
    found = json.loads(file.read_text())["results"]["test_efficientnet"]
    assert found["tethertune MARS-PGM"]["outside"] == 0
    assert found["Keras constraint (Gouk et al.)"]["outside"] > 0
    assert found["FTP"]["copies"] == 2
    assert all(summary["ratio"][1] > 0 for summary in found.values())
    assert "rows left outside" in capsys.readouterr().out


def test_fixed_radii_give_our_projection(rivals, setting):
    setting.constraint("mars", "outside").project()
    ours = weights(setting)
    for method in (rivals.keras_constraint, rivals.tpgm):
        setting.move()
        method(rivals.Layers.of(setting))
        for one, other in zip(ours, weights(setting), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_ftp_moves_its_radii_against_the_gradient(rivals):
    """Where the gradient points along the displacement, the loss falls with a smaller radius."""
    for sign in (1.0, -1.0):
        weight = torch.nn.Parameter(torch.tensor([[3.0, 1.0], [-1.0, 1.0]]))
        weight.grad = sign * weight.detach().clone()
        method = rivals.FTP(rivals.Layers([weight], [torch.zeros(2, 2)], [2.0]))
        method.step()
        torch.testing.assert_close(method.radii[0], torch.tensor(2.0 - sign * 0.01))
        sizes = torch.tensor([2.0 - sign * 0.01, min(2.0, 2.0 - sign * 0.01)])
        torch.testing.assert_close(weight.detach().abs().sum(1), sizes)


def test_spd_decays_by_how_far_the_step_led_away_against_the_gradient(rivals):
    consistent, against = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    consistent.grad, against.grad = -consistent.detach(), against.detach().clone()
    method = rivals.SPD(rivals.Layers([consistent, against], [torch.zeros(2)] * 2, [1.0] * 2), decay=0.5)
    method.before()
    with torch.no_grad():
        consistent.mul_(2)
        against.mul_(2)
    method.after()
    torch.testing.assert_close(consistent.detach(), torch.tensor([6.0, 8.0]))
    torch.testing.assert_close(against.detach(), torch.tensor([6.0, 8.0]) * (1 - 0.5 * 0.5))


def test_l2_sp_is_half_the_square(rivals):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    rivals.l2_sp(rivals.Layers([weight], [torch.tensor([1.0, 1.0])], [1.0]))
    torch.testing.assert_close(weight.grad, 1e-9 * torch.tensor([2.0, 3.0]))
