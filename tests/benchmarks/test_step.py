import json
import sys
from argparse import Namespace

import pytest
import torch

import tethertune as tt

NORMS = ("mars", "frobenius")
STATES = ("inside", "outside")


@pytest.fixture
def step(benchmark):
    return benchmark("step")


@pytest.fixture
def setting(benchmark):
    torch.manual_seed(0)
    return benchmark("setting").Setting.of(benchmark("common").network("test_efficientnet"))


def test_it_runs_and_records_every_variant(step, tmp_path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["step.py", "--model", "test_efficientnet", "--rounds", "2", "--json", str(file)])
    step.main()
    found = json.loads(file.read_text())["results"]["test_efficientnet"]
    beside = found["beside Adam"]
    for norm in NORMS:
        for state in STATES:
            ways = ("stream", "tethertune", "tethertune, chunked", "foreach", "naive loop")
            assert {f"{norm} {state}: {way}" for way in ways} <= beside.keys()
    assert {f"{p}: {w}" for p in ("l2-SP", "MARS-SP") for w in ("stream", "tethertune", "autograd")} <= beside.keys()
    assert {f"{rule}: tethertune, mars inside" for rule in step.RULES} <= found["optimisers"].keys()
    assert all(s["rounds"] == 2 and s["ratio"][1] > 0 for s in (*beside.values(), *found["optimisers"].values()))
    assert "mars inside: naive loop" in capsys.readouterr().out


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("state", STATES)
def test_all_ways_end_at_the_same_weights(setting, norm, state):
    ended = {}
    plain = setting.plain(norm, state)
    for name, action in {
        "ours": setting.constraint(norm, state).project,
        "naive": plain.naive,
        "foreach": plain.foreach,
    }.items():
        setting.move()
        action()
        ended[name] = [layer.weight.detach().clone() for layer in setting.layers]
    for way in ("naive", "foreach"):
        for ours, other in zip(ended["ours"], ended[way], strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-6)
    if state == "outside":
        assert not any(
            torch.equal(w, setting.moved[la.name]) for w, la in zip(ended["ours"], setting.layers, strict=True)
        )


@pytest.mark.parametrize("norm", NORMS)
def test_inside_and_outside_are_what_they_say(setting, norm):
    setting.move()
    loose = setting.constraint(norm, "inside").distances().values()
    assert all(d.value < d.radius for d in loose)
    # Measured before the projection: a radius of which less than 1.05 times is never reached.
    for layer in setting.layers:
        T = layer.rows.matrix(layer.weight.detach() - setting.reference[layer.name])
        sizes = tt.norms.row_sums(T) if norm == "mars" else tt.norms.frobenius(T)
        assert (sizes >= 1.049 * setting.radii(norm, "outside")[layer.name]).all()


def test_a_forced_backend_is_forced_for_one_call(step, monkeypatch):
    seen = []
    monkeypatch.setenv("TETHERTUNE_BACKEND", "native")
    step.on("chunked", lambda: seen.append(step.os.environ["TETHERTUNE_BACKEND"]))()
    assert seen == ["chunked"]
    assert step.os.environ["TETHERTUNE_BACKEND"] == "native"


TARGETS = {
    "mars inside: tethertune": 0.50,
    "mars outside: tethertune": 0.65,
    "frobenius inside: tethertune": 0.50,
    "frobenius outside: tethertune": 1.0,
    "mars outside, Euclidean: tethertune": 3.0,
    "l2-SP: tethertune": 1.5,
    "MARS-SP: tethertune": 1.5,
    **{f"{rule}: tethertune, {norm} inside": 1.10 for rule in ("Adam", "AMSGrad", "AdamW") for norm in NORMS},
    **{f"{rule}: tethertune, mars outside": 1.40 for rule in ("Adam", "AMSGrad", "AdamW")},
}
"""In multiples of the fused optimiser's step; what docs/performance.md aims at."""
SLACK = 1.5


@pytest.mark.slow
def test_the_ratios_hold(step, benchmark):
    """Within 1.5 times the targets, on a network of many small layers, where it is hardest; a second try counts."""
    torch.manual_seed(0)
    setting = benchmark("setting").Setting.of(benchmark("common").network("efficientnet_b0"))
    if setting.constraint("mars", "inside").backend != "native":
        pytest.skip("there is no C compiler here")
    missed = {}
    for _ in range(2):
        found = step.run(setting, Namespace(rounds=7, device="cpu", compile=False, threads=1))
        summaries = found["beside Adam"] | found["optimisers"]
        medians = {name: summaries[name]["ratio"][1] for name in TARGETS}
        missed = {name: (medians[name], target) for name, target in TARGETS.items() if medians[name] > SLACK * target}
        if not missed:
            return
    raise AssertionError(f"time / fused step, and the target: {missed}")
