import json

import pytest


@pytest.mark.slow
def test_epochs_of_both_by_turns(benchmark, tmp_path, capsys):
    train = benchmark("train")
    file = tmp_path / "train.json"
    words = ["--model", "test_efficientnet", "--size", "32", "--per-class", "4", "--rounds", "2", "--augment"]
    train.main([*words, "--methods", "none", "--json", str(file)])
    found = json.loads(file.read_text())["results"]
    assert list(found) == ["none, steps", "none, epochs"]
    for speed in found.values():
        assert speed["rounds"] == 2
        assert 0.3 < speed["speed"][1] < 3
    assert "| none, steps" in capsys.readouterr().out


def test_the_bare_loop_learns(benchmark, tiny):
    train = benchmark("train")
    bare = train.BareLoop(tiny(method="none", lr=1e-3, augment=True), train.torch.device("cpu"))
    losses = [bare.train_epoch() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert 0 <= bare.evaluate() <= 1
