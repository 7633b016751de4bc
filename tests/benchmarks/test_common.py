import json
import sys

import pytest
import torch


@pytest.fixture
def common(benchmark):
    return benchmark("common")


def test_every_variant_is_timed_beside_the_base_after_what_comes_before(common):
    calls = []
    timings = common.measure(
        lambda: calls.append("base"),
        {name: lambda name=name: calls.append(name) for name in "ab"},
        rounds=2,
        warm_up=1,
        before=lambda: calls.append("before"),
    )
    assert calls == ["before", "base", "a", "before", "base", "b"] * 3
    assert all(len(timing.ratios) == 2 and min(timing.seconds) >= 0 for timing in timings.values())


def test_ratios_are_taken_within_a_round(common):
    timing = common.Timing([2.0, 6.0, 1.0], [1.0, 2.0, 1.0])
    assert timing.ratios == [2.0, 3.0, 1.0]
    assert timing.summary() == {"ratio": [1.5, 2.0, 2.5], "milliseconds": 2000.0, "rounds": 3}
    assert common.quartiles([4.0]) == (4.0, 4.0, 4.0)


def test_a_table_is_aligned_markdown(common):
    assert list(common.table(["what", "ms"], [["a", "1.00"], ["longer", "10.00"]])) == [
        "| what   |    ms |",
        "| ------ | ----: |",
        "| a      |  1.00 |",
        "| longer | 10.00 |",
    ]


def test_a_record_names_the_command_and_the_machine(common, tmp_path, monkeypatch):
    file = tmp_path / "results" / "record.json"
    monkeypatch.setattr(sys, "argv", ["/somewhere/step.py", "--rounds", "3", "--json", str(file)])
    arguments = common.parser("About.").parse_args(sys.argv[1:])
    common.record(arguments, {"x": 1})
    found = json.loads(file.read_text())
    assert found["command"] == "python benchmarks/step.py --rounds 3"
    assert found["results"] == {"x": 1}
    assert found["machine"]["cores"] >= 1
    assert torch.__version__.startswith(found["versions"]["torch"])


def test_a_block_of_a_language_model_has_its_size(common):
    with torch.device("meta"):
        assert common.millions(common.network("1b-block")) == "44.0 M parameters"
        assert common.millions(common.network("1b-block:22")) == "968.9 M parameters"
