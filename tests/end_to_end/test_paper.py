"""The paper's experiments as they are shipped, on small copies of its data sets, with random weights."""

import tomllib
from pathlib import Path

import pytest

from tethertune.lab import compare, comparison_file, runs
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.training import finetune

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = ("aircraft", "butterfly", "flowers", "pets", "pubfig")
METHODS = ("none", "l2-sp", "mars-sp", "delta", "l2-pgm", "mars-pgm")


@pytest.fixture(scope="module")
def paper(make_published, tmp_path_factory):
    """A folder with small copies of the data sets, and random weights of both networks in timm's own format."""
    import timm
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("paper")
    (root / "data").mkdir()
    make_published(root / "data")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for label, name in (("resnet101", "resnet101"), ("efficientnet_b0", "tf_efficientnet_b0")):
            save_file(timm.create_model(name).state_dict(), root / f"{label}.safetensors")
    return root


def small(name, root):
    """The shipped file with fewer trials, seeds and pixels: what is left out is time."""
    given = tomllib.loads((CONFIGS / name).read_text(encoding="utf-8"))
    models = {
        label: {**options, "weights": str(root / f"{label}.safetensors")} for label, options in given["models"].items()
    }
    least = {"size": 32, "epochs": 1, "batch_size": 3, "threads": 1, "cache": str(root / "cache")}
    overrides = {
        "models": models,
        "seeds": 1,
        "output": str(root / Path(name).stem),
        "train": {**given["train"], **least},
    }
    if "search" in given:
        overrides["search"] = {"trials": 1}
    if "sweeps" in given:
        overrides["sweeps"] = {**given["sweeps"], "strengths": given["sweeps"]["strengths"][:1]}
    return comparison_file.load(CONFIGS / name, overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_tables_and_both_figures_come_of_the_shipped_file(paper, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_DATA", str(paper / "data"))
    comparison = small("paper.toml", paper)
    page = compare.run(comparison, quiet=True).read_text(encoding="utf-8")
    made = runs.find([comparison.output / "runs"])
    cells = {(run.info["model"]["name"], run.info["task"], run.info["config"]["method"]) for run in made}
    names = ("resnet101.tv_in1k", "tf_efficientnet_b0.aa_in1k")
    assert cells == {(name, task, method) for name in names for task in DATA for method in METHODS}
    assert all(run.complete and run.info["config"]["train_on"] == "train+validation" for run in made)
    for words in ("Table 2", "Table 3", "gradient", "How far the layers moved", "multiplier"):
        assert words in page, words
    for printed in ("51.8", "91.4"):  # the paper's own figures beside ours
        assert printed in page
    assert len(runs.find([comparison.output / "trials"])) == 50
    assert len(runs.find([comparison.output / "sweeps"])) == 10


def test_the_authors_protocol_runs_as_their_code_did(paper, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_DATA", str(paper / "data"))
    comparison = small("paper-tuned.toml", paper)
    (cell,) = (
        cell for cell in comparison.cells if (cell.place, cell.method) == (("efficientnet_b0", "pets"), "l2-pgm")
    )
    config: FinetuneConfig = comparison.final(cell, cell.given[0])[0]
    run = finetune(config, quiet=True)
    assert run.complete
    assert run.info["model"]["mean"] == [0, 0, 0]
    assert run.info["model"]["std"] == [1 / 255] * 3
    assert run.info["model"]["interpolation"] == "nearest"
    held = {name: layer for name, layer in run.distances["layers"].items() if layer["radius"] is not None}
    assert all(layer["value"] <= layer["radius"] for layer in held.values())
    depthwise = [layer for name, layer in held.items() if "conv_dw" in name]
    assert {layer["rows"] for layer in depthwise} == {1}  # the authors' convention
    (line,) = run.metrics
    assert line["data_gradient"] > 0
    assert line["penalty_gradient"] == 0
