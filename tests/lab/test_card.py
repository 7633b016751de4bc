import re
from dataclasses import replace
from statistics import median

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tethertune.lab import card
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.training import finetune

torch.set_num_threads(1)

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1)
lengths = st.floats(1e-6, 1e6)
layers = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["body", "head"]),
        "mars": lengths,
        "frobenius": lengths,
        "radius": st.none() | st.just(1.0),
    }
)


@pytest.fixture(scope="module")
def run(tiny_inputs, tmp_path_factory):
    """A real run, in the folder's own model card."""
    return finetune(
        FinetuneConfig(
            model="test_efficientnet",
            data=str(tiny_inputs / "colours"),
            weights=str(tiny_inputs / "base.safetensors"),
            method="mars-pgm",
            radius=0.3,
            size=32,
            epochs=2,
            seed=7,
            threads=1,
            output=str(tmp_path_factory.mktemp("card")),
            cache=str(tiny_inputs / "cache"),
        ),
        quiet=True,
    )


def written(run, *, config=None, layers=None, library="timm", file="", **changes):
    """The card of a run of which some things are otherwise; ``outcome={...}`` changes a part of the outcome."""
    info = run.info | {key: run.info[key] | value for key, value in changes.items()}
    return card.write(config or run.config, info, layers or run.distances["layers"], library=library, file=file)


def section(text, title):
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def test_the_card_beside_the_weights_is_this_one(run):
    assert (run.path / "README.md").read_text(encoding="utf-8") == written(run)


def test_the_hub_reads_what_the_model_is(run):
    found = ModelCard(written(run, library="transformers", model={"license": "apache-2.0"}))
    assert found.data.library_name == "transformers"
    assert found.data.base_model == "test_efficientnet"
    assert found.data.datasets == ["colours"]
    assert found.data.license == "apache-2.0"
    assert "mars-pgm" in found.data.tags
    assert found.text.lstrip().startswith("# test_efficientnet fine-tuned on colours with mars-pgm\n")


def test_a_licence_that_is_not_known_is_not_made_up(run):
    found = ModelCard(written(run, model={"license": None}))
    assert found.data.license is None
    assert "licence not known: see their source" in found.text


@settings(deadline=None)
@given(names)
@example("yes: 'no' # \N{CAT FACE}")
def test_the_hub_reads_names_as_they_are_whatever_they_mean_in_yaml(run, name):
    assert ModelCard(written(run, data={"name": name})).data.datasets == [name]


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), layers, min_size=1, max_size=9))
def test_medians_and_maxima_are_those_of_the_layers(run, layers):
    told = section(written(run, layers=layers), "Measured distances")
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in told.splitlines() if line[:1] == "|"]
    wanted = []
    for role, where in (("body", "body, from pre-trained weights"), ("head", "head, from zero")):
        of_role = [layer for layer in layers.values() if layer["role"] == role]
        for norm in ("mars", "frobenius") if of_role else ():
            values = [layer[norm] for layer in of_role]
            wanted.append((where, norm, f"{median(values):.4g}", f"{max(values):.4g}"))
    assert rows[2:] == wanted
    held = sum(layer["radius"] is not None for layer in layers.values())
    assert f"{held} of {len(layers)} layers were held within a radius" in told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "none"}, "none: Plain fine-tuning: nothing holds the weights."),
        ({"method": "l2-sp", "strength": 0.5}, "weights. strength 0.5."),
        ({"method": "l2-pgm", "radius": 2, "head_radius": 3}, "radius. radius 2.0, head_radius 3.0."),
        ({"method": "mars-pgm"}, "radius. relative_radius 0.02."),
    ],
)
def test_the_method_is_told_with_the_values_that_it_was_given(run, values, told):
    text = written(run, config=FinetuneConfig("lite0", "fashion", **values))
    assert section(text, "Method").rstrip().endswith(told)


def test_only_what_was_measured_is_a_result(run):
    told = section(written(run, outcome={"test_accuracy": 0.5, "train_accuracy": None, "retention": None}), "Results")
    assert "- test accuracy: 50.00%\n" in told
    assert "train accuracy" not in told
    assert "answers kept" not in told
    assert "one run, seed 7, 2 epochs, 2 steps" in told


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_answers_that_were_kept_are_told_with_the_way_back(run, alpha):
    kept = {"retention": {"share": 0.75, "confident": 40}, "alpha": alpha}
    told = section(written(run, outcome=kept), "Results")
    assert "- answers kept: 75.00% of the base network's 40 confident ones" in told
    assert ("going back" in told) == ("after going back to 0.25 of the way" in told) == (alpha < 1)


def test_what_no_radius_bounds_is_among_the_limits(run):
    def limits(**values):
        return section(written(run, config=replace(run.config, **values)), "Limits")

    free, frozen = limits(affine="free"), limits(affine="frozen")
    assert "biases and normalisation layers were trained without a bound" in free
    assert "without a bound" not in frozen
    assert "Batch-norm statistics moved" in limits(bn="train")
    assert "Batch-norm statistics moved" not in free
    assert "Only 3 classes" in free
    assert "without a bound" not in limits(method="l2-sp", radius=None, strength=1.0)


def test_a_section_on_the_file_comes_before_the_method(run):
    text = written(run, file="## This file\n\nIt is small.\n")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[:2] == ["This file", "Method"]
    assert section(text, "This file") == "It is small.\n\n"
    assert titles[1:] == re.findall(r"^## (.*)$", written(run), re.MULTILINE)
    assert run.info["command"] in section(text, "Repeat it")
    assert run.info["data"]["fingerprint"] in section(text, "Data")
