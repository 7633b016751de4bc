import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/make_performance.py")))


def summary(median):
    return {"ratio": [median - 0.1, median, median + 0.1], "milliseconds": 1.0, "rounds": 3}


def network(parameters, **beside):
    found = {"mars inside: tethertune": summary(0.4), "frobenius inside: tethertune": summary(0.45), **beside}
    return {"parameters": parameters, "dtype": "float32", "beside Adam": found, "optimisers": {}}


def test_the_page_holds_the_recorded_numbers(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.render(page, script.read()) == page


def test_every_table_has_its_place(script):
    page = script.PAGE.read_text(encoding="utf-8")
    for name in script.tables(script.read()):
        assert f"<!-- {name}: begin -->" in page


def test_networks_are_put_side_by_side_by_their_size(script):
    results = {
        "step-a": {"large": network(2e6), "narrow": {**network(1e6), "dtype": "bfloat16"}},
        "step-b": {"small": network(1e6)},
        "rivals": {},
    }
    assert list(script.networks(results, "float32")) == ["small", "large"]
    assert list(script.networks(results, "bfloat16")) == ["narrow"]
    lines = list(script.side_by_side(script.networks(results, "float32"), "beside Adam"))
    assert lines[0] == "| time / fused Adam step | small (1.0 M) | large (2.0 M) |"
    assert lines[2] == "| mars inside: tethertune | 0.40 (0.30-0.50) | 0.40 (0.30-0.50) |"


def test_what_misses_its_aim_is_bold(script):
    names = {name for _, _, variants in script.AIMS for name in variants}
    kept = {name: summary(0.2) for name in names}
    missed = {**kept, "frobenius inside: tethertune": summary(0.51)}
    lines = list(script.aims({"kept": network(1e6, **kept), "missed": network(2e6, **missed)}))
    assert lines[2] == "| hook, inside | 0.50 | 0.20 | **0.51** |"
    assert lines[3] == "| hook, MARS outside | 0.65 | 0.20 | 0.20 |"


def test_bytes_on_paper_become_times(script):
    lines = list(script.on_paper())
    adam = next(line for line in lines if line.startswith("| Adam "))
    assert adam == "| Adam | 14 B, 21.94 ms | 28 B, 43.88 ms | 28 B, 0.69 ms |"
    assert "| the reference | 2 B, 13.48 GB | 2 B, 13.48 GB | 2 B, 0.21 GB |" in lines


def test_whole_training_is_told_as_a_share_of_the_bare_loop(script):
    found = {"none, steps": {"speed": [0.9, 0.95, 1.0], "images_per_second": 1.0, "by_hand": 1.0, "rounds": 3}}
    lines = list(script.training({"train-small": found, "train-large": found}))
    assert lines[0] == "| speed / bare loop | small | large |"
    assert lines[2] == "| none, steps | 0.95 (0.90-1.00) | 0.95 (0.90-1.00) |"
