import json
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tethertune.errors import (
    AttachError,
    CheckpointError,
    ConfigurationError,
    DataError,
    NonFiniteWeightError,
    PatternError,
    RunError,
)
from tethertune.lab.methods import METHODS
from tethertune.lab.runs import RunFolder, load
from tethertune.lab.training import Training, finetune

TIMINGS = ("seconds", "images_per_second")
FILES = ["README.md", "distances.json", "metrics.jsonl", "model.safetensors", "run.json"]


@pytest.fixture
def base(tiny_inputs):
    return load_file(tiny_inputs / "base.safetensors")


def train(config, **options):
    return finetune(config, quiet=True, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weights(run):
    return load_file(run.path / "model.safetensors")


def untimed(metrics):
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in metrics]


def test_what_a_radius_of_0_freezes_needs_no_gradient(tiny, base):
    config = tiny(method="mars-pgm", radius=0, affine="frozen")
    training = Training(config, Accelerator(cpu=True))
    assert {name for name, p in training.network.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    trained = weights(train(config))
    assert all(torch.equal(trained[name], base[name]) for name in base if not name.startswith("classifier."))
    assert trained["classifier.weight"].any()


def test_a_run_in_which_nothing_may_move(tiny, base):
    trained = weights(train(tiny(method="mars-pgm", radius=0, head_radius=0, affine="frozen")))
    assert all(torch.equal(trained[name], base[name]) for name in base if not name.startswith("classifier."))
    assert not trained["classifier.weight"].any()


def test_a_run_leaves_exactly_these_files_with_these_contents(tiny):
    config = tiny(head_radius=3)
    run = train(config)
    assert run.path == RunFolder(config).path
    assert names(run.path) == FILES
    assert run.info["schema"] == 1
    assert run.info["config"] == config.to_dict()
    assert run.info["command"] == config.command()
    assert run.info["data"]["classes"] == ["blue", "green", "red"]
    assert run.info["data"]["sizes"] == {"train": 21, "validation": 9, "test": 9}
    assert run.info["model"]["head"] == "classifier"
    assert run.info["model"]["license"] is None  # the weights are not the published ones
    assert "head classifier, norm mars" in run.info["constraint"]["summary"]
    outcome = run.info["outcome"]
    assert (outcome["epochs"], outcome["steps"]) == (2, 6)
    assert 0 <= outcome["test_accuracy"] <= 1
    assert outcome["validation_accuracy"] == run.metrics[-1]["validation_accuracy"]
    assert outcome["train_accuracy"] == run.metrics[-1]["accuracy"]
    assert outcome["seconds"] >= sum(line["seconds"] for line in run.metrics)
    assert outcome["peak_memory_bytes"] > 1e6
    assert [(line["epoch"], line["step"]) for line in run.metrics] == [(1, 3), (2, 6)]
    assert list(run.metrics[0]["distance"]) == ["min", "q25", "median", "q75", "max"]
    head = run.distances["layers"]["classifier.weight"]
    assert (head["role"], head["rows"], head["norm"], head["radius"]) == ("head", 3, "mars", 3.0)
    with safe_open(run.path / "model.safetensors", framework="pt") as file:
        notes = file.metadata()
    assert {key: notes[key] for key in ("base_model", "head", "size", "method", "relative_radius", "head_radius")} == {
        "base_model": "test_efficientnet",
        "head": "classifier",
        "size": "32",
        "method": "mars-pgm",
        "relative_radius": "0.02",
        "head_radius": "3.0",
    }
    assert notes["base_sha256"] == run.info["model"]["weights_sha256"]
    assert json.loads(notes["classes"]) == ["blue", "green", "red"]
    card = (run.path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "timm"\n')
    assert config.command() in card
    assert run.info["data"]["fingerprint"] in card
    assert run.info["data"]["split"] == "as the data comes"


def test_it_learns_what_can_be_learnt(tiny):
    run = train(tiny(method="none", epochs=8, lr=3e-3, bn="train"))
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"] / 2
    assert run.info["outcome"]["test_accuracy"] >= 8 / 9


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_says_how_far_it_went(tiny, base, method):
    run = train(tiny(method=method))
    after, layers = weights(run), run.distances["layers"]
    stem = after["conv_stem.weight"].double() - base["conv_stem.weight"].double()
    assert stem.abs().sum() > 0
    assert layers["conv_stem.weight"]["mars"] == pytest.approx(stem.abs().sum((1, 2, 3)).max().item(), rel=1e-12)
    assert layers["conv_stem.weight"]["frobenius"] == pytest.approx(stem.norm().item(), rel=1e-12)
    assert layers["classifier.weight"]["frobenius"] == pytest.approx(after["classifier.weight"].double().norm().item())
    penalised = METHODS[method].kind in ("penalty", "features")
    assert all((line["penalty"] > 0) == penalised for line in run.metrics)
    assert all((line["at_radius"] is None) == (METHODS[method].kind != "constraint") for line in run.metrics)


@pytest.mark.parametrize(("method", "radius"), [("mars-pgm", 0.02), ("l2-pgm", 0.01)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_stored_weights_keep_the_promise_in_float64(tiny, base, method, radius, precision):
    run = train(tiny(method=method, radius=radius, head_radius=0.05, lr=1e-2, precision=precision))
    after = weights(run)
    assert run.info["outcome"]["at_radius"] > 0.5
    for name, layer in run.distances["layers"].items():
        moved = after[name].double() - (base[name].double() if layer["role"] == "body" else 0)
        rows = moved.flatten(1).abs().sum(1)
        value = rows.max() if method == "mars-pgm" else moved.norm()
        assert value <= layer["radius"] == (radius if layer["role"] == "body" else 0.05)


def test_the_same_configuration_gives_the_same_bytes_wherever_and_after_whatever(tiny, tmp_path):
    first = train(tiny(augment=True))
    torch.manual_seed(12345)
    second = train(tiny(augment=True, output=str(tmp_path / "elsewhere")))
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()
    assert untimed(first.metrics) == untimed(second.metrics)
    assert first.distances == second.distances
    other = train(tiny(augment=True, seed=1))
    assert other.metrics[0]["loss"] != first.metrics[0]["loss"]


def test_the_callers_settings_are_left_as_they_were(tiny):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    torch.set_num_threads(2)
    train(tiny(method="none", epochs=1))
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(2), expected)
    torch.set_num_threads(1)


def test_a_complete_run_is_skipped_and_fresh_repeats_it(tiny):
    first = train(tiny())
    times = {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()}
    (first.path / "resume").mkdir()  # killed after the last file, before tidying up
    again = train(tiny())
    assert again.metrics == first.metrics
    assert {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()} == times
    before = (first.path / "model.safetensors").read_bytes()
    train(tiny(), fresh=True)
    assert (first.path / "model.safetensors").stat().st_mtime_ns > times["model.safetensors"]
    assert (first.path / "model.safetensors").read_bytes() == before


def test_accumulating_batches_is_one_larger_batch(tiny):
    whole = train(tiny(method="l2-sp", batch_size=8, optimizer="sgd", lr=1e-2))
    parts = train(tiny(method="l2-sp", batch_size=4, accumulate=2, optimizer="sgd", lr=1e-2))
    for one, other in zip(untimed(whole.metrics), untimed(parts.metrics), strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    for name, weight in weights(whole).items():
        assert torch.allclose(weight.float(), weights(parts)[name].float(), atol=1e-4)


def test_the_gradient_norm_is_that_of_the_whole_gradient_penalty_included(tiny, base):
    config = tiny(method="l2-sp", strength=0.1, epochs=2, batch_size=21, optimizer="sgd", schedule="constant", lr=1e-2)
    one, two = train(replace(config, epochs=1)), train(config)
    moved = {name: weights(one)[name] - base[name] for name in base if not name.startswith("classifier")}
    head = weights(one)["classifier.weight"].norm() ** 2 + weights(one)["classifier.bias"].norm() ** 2
    norm = (sum(delta.float().norm() ** 2 for delta in moved.values()) + head).sqrt() / 1e-2
    assert two.metrics[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert two.metrics[0]["penalty"] == pytest.approx(
        0.1 * sum(layer["frobenius"] ** 2 for layer in one.distances["layers"].values() if layer["role"] == "body"),
        rel=1e-5,
    )


@pytest.mark.parametrize("bn", ["frozen", "train"])
def test_batch_norm_statistics_are_frozen_or_trained_and_its_scale_is_trained(tiny, base, bn):
    after = weights(train(tiny(method="none", bn=bn)))
    assert torch.equal(after["bn1.running_mean"], base["bn1.running_mean"]) == (bn == "frozen")
    assert torch.equal(after["bn1.running_var"], base["bn1.running_var"]) == (bn == "frozen")
    assert not torch.equal(after["bn1.weight"], base["bn1.weight"])


def test_the_learning_rates_follow_the_schedule(tiny):
    run = train(tiny(method="none", epochs=3, lr=1e-3, head_lr=1e-2))
    assert [line["lr"] for line in run.metrics] == [1e-3, 1e-3, 5e-4]
    assert [line["head_lr"] for line in run.metrics] == [1e-2, 1e-2, 5e-3]


def test_validation_is_looked_at_when_asked_and_at_the_end(tiny):
    run = train(tiny(method="none", epochs=3, eval_every=2))
    assert [line["validation_accuracy"] is None for line in run.metrics] == [True, False, False]


@pytest.mark.parametrize("name", ["amsgrad", "AdamW", "sgd", "lion", "Rprop"])
def test_optimisers_of_torch_and_timm_train_by_name(tiny, name):
    run = train(tiny(optimizer=name, epochs=1))
    assert run.info["outcome"]["steps"] == 3


def test_the_network_of_a_run_can_be_fine_tuned_again(tiny):
    first = train(tiny(method="none"))
    second = train(replace(tiny(method="mars-pgm"), model=str(first.path), weights=None))
    assert second.info["model"]["name"] == "test_efficientnet"
    reference, after = weights(first)["conv_stem.weight"].double(), weights(second)["conv_stem.weight"].double()
    expected = (after - reference).abs().sum((1, 2, 3)).max().item()
    assert second.distances["layers"]["conv_stem.weight"]["mars"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "error", "told"),
    [
        ({"model": "test_eficientnet"}, ConfigurationError, "Did you mean"),
        ({"data": "fasion"}, DataError, "Did you mean 'fashion'"),
        ({"per_class": 100}, ConfigurationError, "per_class"),
        ({"include": ("nothing.*",)}, PatternError, "nothing"),
        ({"optimizer": "amsgrd"}, ConfigurationError, "Did you mean 'amsgrad'"),
        ({"optimizer": "lookahead_adam"}, AttachError, "Lookahead"),
        ({"optimizer": "lbfgs"}, ConfigurationError, "cannot be used in a plain training loop"),
        ({"optimizer": "sparseadam"}, ConfigurationError, "dense gradients"),
        ({"precision": "float16"}, ConfigurationError, "needs an accelerator"),
        ({"weights": "missing.safetensors"}, CheckpointError, "missing.safetensors"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_and_nothing_is_written(tiny, values, error, told):
    with pytest.raises(error, match=told):
        train(tiny(**values))
    assert not Path(tiny().output).exists()


def test_a_loss_that_is_not_finite_ends_the_run_for_good(tiny, monkeypatch):
    config = tiny(method="none", lr=1e38, optimizer="sgd", epochs=3)
    with pytest.raises(NonFiniteWeightError, match=r"Lower --lr|holds a NaN") as first:
        train(config)
    folder = RunFolder(config)
    assert folder.status() == "diverged"
    assert load(folder.path).diverged
    assert not folder.states.exists()
    monkeypatch.setattr(Training, "run", None)  # it is not even begun
    with pytest.raises(NonFiniteWeightError) as again:
        train(config)
    assert str(again.value) == str(first.value)


def test_a_trial_is_not_tested_and_leaves_no_weights(tiny):
    part = {"kind": "trial", "study": "s", "number": 3}
    run = train(tiny(), part=part)
    assert names(run.path) == ["distances.json", "metrics.jsonl", "run.json"]
    assert run.info["part"] == part
    assert run.info["outcome"]["test_accuracy"] is None
    assert run.info["outcome"]["test_loss"] is None
    assert run.info["outcome"]["validation_accuracy"] == run.metrics[-1]["validation_accuracy"]


def test_each_line_of_metrics_is_shown_and_what_is_raised_ends_a_run_that_resumes(tiny):
    class StopError(Exception):
        pass

    config, seen = tiny(epochs=3, checkpoint_every=0), []

    def stop(line):
        seen.append(line)
        if len(seen) == 2:
            raise StopError

    with pytest.raises(StopError):
        train(config, on_epoch=stop)
    assert RunFolder(config).status() == "running"
    run = train(config, on_epoch=seen.append)
    assert [line["epoch"] for line in seen] == [1, 2, 3]
    assert seen == run.metrics


def test_the_task_names_the_folder_and_changes_nothing_else(tiny):
    plain, named = train(tiny()), train(tiny(task="my task"))
    assert named.path.parts[-4] == "my-task"
    assert plain.path.parts[-4] == "colours"
    assert plain.info["hash"] == named.info["hash"]
    assert untimed(plain.metrics) == untimed(named.metrics)


def test_batches_that_are_not_full_are_dropped_where_that_is_asked_for(tiny):
    # 21 training, 9 validation and 9 test images in batches of 8
    run = train(tiny(drop_last=True, epochs=1))
    (line,) = run.metrics
    assert line["step"] == 2
    for accuracy in (line["accuracy"] * 16, line["validation_accuracy"] * 8, run.info["outcome"]["test_accuracy"] * 8):
        assert accuracy == pytest.approx(round(accuracy))


def test_dropping_all_there_is_is_refused(tiny):
    with pytest.raises(ConfigurationError, match="--drop-last leaves nothing of the 9 validation images"):
        train(tiny(drop_last=True, batch_size=10))


def test_raw_input_is_0_to_255(tiny):
    training = Training(tiny(scaling="raw", interpolation="nearest"), Accelerator(cpu=True))
    images, _ = training._load(training.dataset.train, torch.arange(21))
    pixels = training.dataset.train.batch(torch.arange(21))
    assert torch.allclose(images, pixels.to(torch.float32))
    assert training.loaded.interpolation == "nearest"


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_over_all_images_is_measured_at_every_evaluation(tiny, method):
    run = train(tiny(method=method, gradients=True, epochs=2, eval_every=2))
    first, last = run.metrics
    assert "data_gradient" not in first
    assert last["data_gradient"] > 0
    assert last["test_accuracy"] == run.info["outcome"]["test_accuracy"]
    penalised = METHODS[method].kind in ("penalty", "features")
    assert (last["penalty_gradient"] > 0) == penalised
    total, parts = last["full_gradient"], (last["data_gradient"], last["penalty_gradient"])
    assert abs(parts[0] - parts[1]) <= total * (1 + 1e-5)
    assert total <= sum(parts) * (1 + 1e-5)


def test_measuring_gradients_changes_no_weight(tiny):
    plain, measured = train(tiny(method="delta")), train(tiny(method="delta", gradients=True))
    assert all(torch.equal(weights(plain)[name], tensor) for name, tensor in weights(measured).items())


def interrupted(config, monkeypatch, *, after_states):
    """Begin the run and stop it when so many states have been saved."""
    real, saved = RunFolder.save_state, []

    def save_state(self, state, step):
        real(self, state, step)
        saved.append(step)
        if len(saved) == after_states:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_state", save_state)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(RunFolder, "save_state", real)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(tiny, tmp_path, monkeypatch, method):
    config = tiny(method=method, epochs=3, augment=True, checkpoint_every=0)
    interrupted(config, monkeypatch, after_states=6)  # three steps, the end of the epoch, two steps
    assert RunFolder(config).status() == "running"
    resumed = train(config)
    assert names(resumed.path) == FILES
    whole = train(replace(config, output=str(tmp_path / "whole")))
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert untimed(resumed.metrics) == untimed(whole.metrics)
    assert resumed.distances == whole.distances


def test_a_run_is_not_resumed_on_other_weights(tiny, tiny_inputs, tmp_path, monkeypatch):
    own = tmp_path / "base.safetensors"
    own.write_bytes((tiny_inputs / "base.safetensors").read_bytes())
    config = tiny(weights=str(own), checkpoint_every=0)
    interrupted(config, monkeypatch, after_states=1)
    changed = load_file(own)
    changed["conv_stem.weight"][0, 0, 0, 0] += 1
    save_file(changed, own)
    with pytest.raises(RunError, match="begun with other pre-trained weights"):
        train(config)
    assert train(config, fresh=True).complete


def test_a_compiled_model_keeps_the_promise_too(tiny, base, monkeypatch):
    # Captured as ever, but not handed to the C++ compiler, which takes minutes.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    run = train(tiny(radius=0.02, compile=True, lr=1e-2))
    assert run.info["outcome"]["at_radius"] > 0.5
    after = weights(run)
    assert set(after) == set(base)
    for name, layer in run.distances["layers"].items():
        if layer["role"] == "body":
            assert (after[name].double() - base[name].double()).flatten(1).abs().sum(1).max() <= 0.02


def test_a_compiled_model_shows_its_features_too(tiny, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    plain, compiled = train(tiny(method="delta", epochs=1)), train(tiny(method="delta", epochs=1, compile=True))
    for key in ("loss", "penalty", "gradient_norm"):
        assert compiled.metrics[0][key] == pytest.approx(plain.metrics[0][key], rel=1e-3)
