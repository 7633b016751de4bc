import json

import pytest

import tethertune as tt
from tethertune.lab import inputs, record


@pytest.fixture
def taken_in(tiny):
    config = tiny(method="mars-pgm", radius=2.0, task="mine")
    loaded = inputs.network(config, classes=3)
    return config, loaded, inputs.dataset(config, loaded)


def test_a_run_is_described_in_plain_values(taken_in):
    config, loaded, _ = taken_in
    told = record.described(*taken_in)
    assert json.loads(json.dumps(told)) == told
    assert (told["hash"], told["task"], told["command"]) == (config.hash, "mine", config.command())
    assert told["data"]["sizes"] == {"train": 21, "validation": 9, "test": 9}
    assert told["model"]["parameters"] == sum(weight.numel() for weight in loaded.model.parameters())
    assert told["model"]["license"] is None  # the weights are the user's


def test_layers_are_told_with_their_ball_where_they_have_one(taken_in):
    _, loaded, _ = taken_in
    moved = tt.distances(loaded.model, loaded.model, head=loaded.head)
    free = record.layers(moved, None)
    assert {layer["radius"] for layer in free.values()} == {None}
    held = record.layers(
        moved, tt.Constraint(loaded.model, norm="mars", radius=2.0, head=loaded.head, exclude=["conv_stem*"])
    )
    assert held["conv_stem.weight"]["norm"] is None
    others = [layer for name, layer in held.items() if not name.startswith(("conv_stem", loaded.head))]
    assert {(layer["norm"], layer["radius"], layer["value"]) for layer in others} == {("mars", 2.0, 0.0)}


def test_the_weights_file_says_what_the_method_was(taken_in):
    told = record.metadata(*taken_in, alpha=1)
    assert told["method"] == "mars-pgm"
    assert told["radius"] == "2.0"
    assert "head_radius" not in told
    assert "alpha" not in told
    assert json.loads(told["classes"]) == ["blue", "green", "red"]
    assert all(isinstance(value, str) for value in told.values())
    assert record.metadata(*taken_in, alpha=0.5)["alpha"] == "0.5"
