"""One plan for all steps: what the kernels take, what is left, and when it is made again."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import tethertune as tt
from tethertune.errors import ConfigurationError, NonFiniteWeightError


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 4, 3),
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        nn.Conv2d(6, 6, 1).bfloat16(),
        nn.Conv2d(6, 5, 1).double(),
    )


def move(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)


def rest(constraint):
    plan, balls = constraint._plan()
    return {balls[number].layer.name for number in plan.rest}


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_kernels_take_what_suits_them_and_all_is_inside(norm):
    model = net()
    constraint = tt.Constraint(model, norm=norm, radius=0.5)
    assert constraint.backend == "native"
    assert rest(constraint) == ({"1.weight", "4.weight"} if norm == "mars" else {"4.weight"})
    move(model)
    constraint.project()
    for name, distance in constraint.distances().items():
        assert 0.2 < distance.value <= 0.5, name


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_the_backends_agree(norm, monkeypatch):
    results = {}
    for backend in ("native", "chunked"):
        monkeypatch.setenv("TETHERTUNE_BACKEND", backend)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30))
        constraint = tt.Constraint(model, norm=norm, radius=0.5)
        move(model)
        constraint.project()
        assert constraint.backend == backend
        results[backend] = [weight.detach() for weight in model.parameters()]
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


CHANGES = {
    "another memory format": lambda conv: conv.to(memory_format=torch.channels_last),
    "other memory": lambda conv: setattr(conv.weight, "data", conv.weight.data.clone()),
    "another dtype": lambda conv: conv.bfloat16(),
    "another parameter": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight.detach().clone())),
    "frozen": lambda conv: conv.weight.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_ends_when_a_weight_changes_its_form(change):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    constraint = tt.Constraint(model, radius=0.5)
    plan = constraint._plan()[0]
    assert constraint._plan()[0] is plan
    CHANGES[change](model[1])
    assert not plan.holds()
    move(model)
    constraint.project()
    assert constraint._plan()[0] is not plan
    assert all(0.2 < distance.value <= 0.5 for distance in constraint.distances().values())


def test_a_plan_stays_when_weights_are_written():
    model = nn.Linear(4, 3)
    constraint = tt.Constraint(model, radius=0.5)
    plan = constraint._plan()[0]
    move(model)
    model.load_state_dict(model.state_dict())
    model.weight.data.mul_(2)
    assert constraint._plan()[0] is plan


def test_a_schedule_may_write_to_the_radii():
    model = nn.Linear(40, 3)
    constraint = tt.Constraint(model, radius=5.0)
    plan = constraint._plan()[0]
    constraint._balls[0].blocks()[0].radius.fill_(0.5)
    move(model)
    constraint.project()
    assert constraint._plan()[0] is plan
    assert 0.49 < constraint.distances()["weight"].value <= 0.5


def test_a_frozen_layer_is_not_in_a_step():
    model = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, 2))
    constraint = tt.Constraint(model, radius=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constraint.attach(optimizer)
    model[0].weight.requires_grad_(False)
    move(model)
    outside = model[0].weight.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, outside)
    assert constraint.distances()["1.weight"].value <= 0.5


def test_rows_that_are_not_finite_raise_and_all_others_are_inside():
    model = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, 2))
    constraint = tt.Constraint(model, radius=0.5)
    move(model)
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=r"Row 1 of 0\.weight"):
        constraint.project()
    with torch.no_grad():
        model[0].weight[1] = 0
    constraint.project()
    assert all(distance.value <= 0.5 for distance in constraint.distances().values())


@pytest.mark.parametrize("name", ["native", "triton"])
def test_forcing_what_suits_no_layer_is_an_error(name, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_BACKEND", name)
    with pytest.raises(ConfigurationError, match=f"TETHERTUNE_BACKEND={name}"):
        _ = tt.Constraint(nn.Linear(3, 2).double(), radius=0.5).backend


def test_a_thousand_tiny_tensors_cost_about_two_microseconds_each():
    """Twice that, because the coverage of tests is measured line by line; `benchmarks/scale.py` measures without."""
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(1000))
    constraint = tt.Constraint(model, radius=1e3)
    taken = []
    for _ in range(20):
        start = time.thread_time()
        constraint.project()
        taken.append(time.thread_time() - start)
    assert min(taken) / 1000 < 4e-6


TRITON = """
import torch
from torch import nn
import tethertune as tt
import tethertune.errors
from tethertune.kernels import backend
backend.choose = lambda device: "triton"
for norm in ("mars", "frobenius"):
    model = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, 2).bfloat16(), nn.Linear(2, 2).double())
    constraint = tt.Constraint(model, norm=norm, radius=0.5)
    assert constraint.backend == "triton"
    plan, balls = constraint._plan()
    assert [balls[number].layer.name for number in plan.rest] == ["2.weight"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    for _ in range(2):
        constraint.project()
        assert all(0.4 < d.value <= 0.5 for d in constraint.distances().values()), constraint.distances()
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    for _ in range(2):
        try:
            constraint.project()
        except tt.errors.NonFiniteWeightError as error:
            assert "Row 1 of 0.weight" in str(error)
        else:
            raise AssertionError("a NaN was not counted")
    with torch.no_grad():
        model[0].weight[1, 2] = 0
    constraint.project()
print(tt.Constraint(model, radius=0.5, projection="euclidean").backend)
"""


def test_the_triton_kernels_in_a_plan_as_triton_interprets_them(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("TETHERTUNE_BACKEND", raising=False)
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "chunked"), done.stderr
