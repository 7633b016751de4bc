import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tethertune import measure as measurement
from tethertune.errors import ConfigurationError, DataError, RunError
from tethertune.lab import checkpoints, distances, interpolation, models, runs
from tethertune.lab.training import finetune

BALLS = {
    "mars-pgm": {"method": "mars-pgm", "radius": 0.05, "head_radius": 1.0},
    "euclidean": {"method": "mars-pgm", "radius": 0.05, "head_radius": 1.0, "projection": "euclidean"},
    "l2-pgm": {"method": "l2-pgm", "radius": 0.05, "head_radius": 1.0},
    "authors": {"method": "mars-pgm", "radius": 0.05, "convention": "authors", "bn": "train"},
}


def train(config, **options):
    return finetune(config, quiet=True, **options)


def weights(path):
    return load_file(path)


def test_the_ends_are_the_run_and_the_reference(retaining):
    run = train(retaining())
    end, middle, start = interpolation.measure(run.path, [1, 0.5, 0])
    outcome = run.info["outcome"]

    assert (end.alpha, end.test_accuracy, end.validation_accuracy) == (
        1.0,
        outcome["test_accuracy"],
        outcome["validation_accuracy"],
    )
    assert end.retention.to_dict() == outcome["retention"]
    assert start.retention.share == 1.0
    assert end.retention.share < middle.retention.share <= 1.0
    assert end.retention.cross_entropy > middle.retention.cross_entropy > start.retention.cross_entropy


@pytest.mark.parametrize("options", BALLS.values(), ids=BALLS)
def test_saved_weights_are_inside_the_balls_of_the_run(retaining, knowing, options):
    run = train(retaining(**options))
    interpolation.measure(run.path, [0.9, 0.3], save=True)
    layers = run.distances["layers"]
    assert any(layer["active_rows"] for layer in layers.values() if layer["role"] == "body")

    for alpha in (0.9, 0.3):
        path = run.path / f"alpha-{alpha}.safetensors"
        model, head = models.assemble("test_efficientnet", weights(path))
        found = measurement.distances(
            model, weights(knowing / "base.safetensors"), head=head, convention=run.config.convention
        )
        norm = "frobenius" if options["method"] == "l2-pgm" else "mars"
        held = {name: layer["radius"] for name, layer in layers.items() if layer["radius"] is not None}
        assert all(getattr(found[name], norm) <= radius for name, radius in held.items())


def test_saved_weights_are_the_line_and_can_be_used_like_those_of_a_run(retaining, knowing, tmp_path):
    run = train(retaining(bn="train"))
    interpolation.measure(run.path, [0.5], save=True, output=tmp_path / "saved")
    path = tmp_path / "saved" / "alpha-0.5.safetensors"
    base, trained, found = (
        weights(file) for file in (knowing / "base.safetensors", run.path / "model.safetensors", path)
    )
    assert not list(run.path.glob("alpha-*"))
    for name, tensor in found.items():
        if name.startswith("classifier.") or not tensor.is_floating_point():
            assert torch.equal(tensor, trained[name])
        else:
            assert torch.allclose(tensor, (base[name] + trained[name]) / 2, atol=1e-7)
    assert any(not torch.equal(base[name], found[name]) for name in base if "running_var" in name)
    notes = checkpoints.metadata(path)
    assert notes.pop("alpha") == "0.5"
    assert notes == checkpoints.metadata(run.path)

    far, half = (distances.compare(file).layers["conv_stem.weight"].mars for file in (run.path, path))
    assert half == pytest.approx(far / 2, rel=1e-4)
    again = train(retaining(weights=str(path), epochs=1, retain=None, retain_size=None))
    assert again.complete
    assert interpolation.measure(run.path, [0.5])[0].test_accuracy == _accuracy(run, found)


def _accuracy(run, state):
    """Test accuracy of some weights, through a network that was built for them alone."""
    from accelerate import Accelerator

    from tethertune.lab.training import Training

    training = Training(run.config, Accelerator(cpu=True))
    training.network.load_state_dict(state)
    return training.evaluate(training.dataset.test)[1]


def test_what_is_found_is_merged_into_the_run_by_alpha(retaining, knowing):
    run = train(retaining(retain=None, retain_size=None))
    assert run.interpolations == []
    first = interpolation.measure(run.path, [0.25, 0.75], retain=str(knowing / "images"), retain_size=32)
    interpolation.measure(run.path, [0.5, 0.25])
    kept = runs.load(run.path).interpolations

    assert [entry["alpha"] for entry in kept] == [0.75, 0.5, 0.25]
    assert kept[0] == first[1].to_dict()
    assert kept[2] == first[0].to_dict()  # what was not measured again stays
    assert (kept[1]["retention"], kept[1]["retain"]) == (None, None)
    assert kept[0]["retention"]["images"] == 70
    assert kept == json.loads((run.path / "interpolations.json").read_text())
    assert {path.name for path in run.path.iterdir()} == {
        "README.md",
        "distances.json",
        "interpolations.json",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
    }


def test_a_run_made_anew_forgets_its_interpolations(retaining):
    config = retaining(retain=None, retain_size=None)
    run = train(config)
    interpolation.measure(run.path, [0.5], save=True)
    run = train(config, fresh=True)
    assert run.interpolations == []
    assert not list(run.path.glob("alpha-*"))


def test_other_images_can_be_retained_than_those_of_the_run(retaining, knowing, tmp_path):
    shutil.copytree(knowing / "images" / "some", tmp_path / "half")
    run = train(retaining())
    (other,) = interpolation.measure(run.path, [1], retain=str(tmp_path / "half"), retain_size=48)
    (own,) = interpolation.measure(run.path, [1], retain_size=48)
    assert (other.retention.images, own.retention.images) == (35, 70)
    assert own.retention.cross_entropy != run.info["outcome"]["retention"]["cross_entropy"]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_an_alpha_outside_of_the_line(tmp_path, alpha):
    with pytest.raises(ConfigurationError, match=r"--alpha .* is not allowed: give numbers from 0"):
        interpolation.measure(tmp_path, [0.5, alpha])


def test_no_alpha(tmp_path):
    with pytest.raises(ConfigurationError, match="no alpha is not allowed"):
        interpolation.measure(tmp_path, [])


def test_a_run_that_is_not_complete(retaining):
    run = train(retaining(retain=None, retain_size=None))
    info = run.info | {"status": "running"}
    (run.path / "run.json").write_text(json.dumps(info))
    (run.path / "model.safetensors").unlink()
    with pytest.raises(RunError, match="is not complete: give the command of the run again"):
        interpolation.measure(run.path)


def test_a_trial_of_a_search(retaining):
    run = train(retaining(retain=None, retain_size=None), part={"kind": "trial", "study": "s", "number": 0})
    with pytest.raises(RunError, match="keeps no weights"):
        interpolation.measure(run.path)


def test_images_and_weights_must_be_those_of_the_run(retaining, knowing, tiny_inputs, tmp_path):
    shutil.copytree(tiny_inputs / "colours", tmp_path / "colours")
    shutil.copy(knowing / "base.safetensors", tmp_path / "base.safetensors")
    config = retaining(
        data=str(tmp_path / "colours"), weights=str(tmp_path / "base.safetensors"), retain=None, retain_size=None
    )
    run = train(config)
    state = weights(tmp_path / "base.safetensors")
    save_file(state | {"conv_stem.weight": state["conv_stem.weight"] + 1}, tmp_path / "base.safetensors")
    with pytest.raises(RunError, match="other pre-trained weights than there are now"):
        interpolation.measure(run.path)
    shutil.copy(knowing / "base.safetensors", tmp_path / "base.safetensors")
    (tmp_path / "colours" / "test" / "red" / "0.png").unlink()
    with pytest.raises(RunError, match="other images than there are now"):
        interpolation.measure(run.path)
    assert not (run.path / "interpolations.json").exists()


def test_a_size_needs_images(retaining):
    run = train(retaining(retain=None, retain_size=None))
    with pytest.raises(ConfigurationError, match="--retain-size 32 goes with --retain FOLDER"):
        interpolation.measure(run.path, retain_size=32)
    with pytest.raises(DataError, match="is not a folder"):
        interpolation.measure(run.path, retain="nowhere")


class TestKeep:
    """Fine-tuning that ends with the largest interpolation that keeps a share of the answers."""

    @pytest.mark.parametrize("options", [{}, BALLS["mars-pgm"] | {"radius": 1.0}], ids=["none", "mars-pgm"])
    def test_ends_with_the_largest_that_keeps_the_share(self, retaining, options):
        plain = train(retaining(**options))
        alphas = [step / 20 for step in range(20, -1, -1)]
        line = interpolation.measure(plain.path, alphas, save=True)
        share = (line[0].retention.share + line[10].retention.share) / 2
        expected = next(place for place in line if place.retention.share >= share)
        kept = train(retaining(keep=share, **options))
        outcome = kept.info["outcome"]

        assert 0 < expected.alpha < 1
        assert outcome["alpha"] == expected.alpha
        assert outcome["retention"] == expected.retention.to_dict()
        for key in ("test_accuracy", "validation_accuracy"):
            assert outcome[key] == getattr(expected, key)
        before = outcome["before_interpolation"]
        assert before == {key: plain.info["outcome"][key] for key in before}
        assert before.keys() >= {"test_accuracy", "validation_accuracy", "train_accuracy", "retention"}
        assert kept.metrics[-1]["validation_accuracy"] == before["validation_accuracy"]
        found, wanted = (
            weights(path)
            for path in (kept.path / "model.safetensors", plain.path / f"alpha-{expected.alpha}.safetensors")
        )
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert checkpoints.metadata(kept.path)["alpha"] == str(expected.alpha)
        measured = distances.compare(kept.path).layers
        assert all(measured[name].mars == layer["mars"] for name, layer in kept.distances["layers"].items())
        assert f"going back to {expected.alpha} of the way" in (kept.path / "README.md").read_text()

    def test_what_is_kept_anyway_is_not_touched(self, retaining):
        plain, kept = (train(retaining(**options)) for options in ({}, {"keep": 0.0}))
        assert (kept.path / "model.safetensors").read_bytes() == (plain.path / "model.safetensors").read_bytes()
        assert kept.info["outcome"]["alpha"] == 1.0
        assert kept.info["outcome"]["before_interpolation"] is None

    def test_all_can_be_kept(self, retaining):
        run = train(retaining(keep=1.0, lr=0.03))
        assert run.info["outcome"]["retention"]["share"] == 1.0
        assert run.info["outcome"]["alpha"] < 1

    def test_the_validation_accuracy_of_a_trial_is_of_what_is_kept(self, retaining):
        config = retaining(keep=0.9)
        result, trial = (
            train(config),
            train(replace(config, output=config.output + "-trials"), part={"kind": "trial", "study": "s", "number": 0}),
        )
        keys = ("validation_accuracy", "validation_loss", "retention", "alpha")
        assert {key: trial.info["outcome"][key] for key in keys} == {key: result.info["outcome"][key] for key in keys}
        assert trial.info["outcome"]["test_accuracy"] is None
        assert trial.info["outcome"]["before_interpolation"]["test_accuracy"] is None
        assert trial.info["outcome"]["alpha"] < 1


class TestMetrics:
    """What a run says of what it forgets while it trains."""

    def test_evaluated_epochs_have_it_and_the_outcome_is_the_last(self, retaining):
        run = train(retaining(epochs=3, eval_every=2))
        shares = [line["retention"] for line in run.metrics]
        entropies = [line["retention_cross_entropy"] for line in run.metrics]
        kept = run.info["outcome"]["retention"]

        assert (shares[0], entropies[0]) == (None, None)
        assert 0 < shares[1] < 1
        assert (kept["share"], kept["cross_entropy"], kept["images"]) == (shares[2], entropies[2], 70)
        assert run.info["outcome"]["alpha"] == 1.0

    def test_measuring_changes_no_result(self, retaining):
        with_, without = (train(retaining(**options)) for options in ({}, {"retain": None, "retain_size": None}))
        first, second = (weights(run.path / "model.safetensors") for run in (with_, without))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert "retention" not in without.metrics[0]
        assert without.info["outcome"]["retention"] is None

    def test_a_run_is_not_resumed_with_other_images_to_retain(self, retaining, knowing, tmp_path):
        shutil.copytree(knowing / "images", tmp_path / "images")
        config = retaining(retain=str(tmp_path / "images"))

        def stop(_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(config, on_epoch=stop)
        (tmp_path / "images" / "some" / "01.png").unlink()
        with pytest.raises(RunError, match="other images to retain than there are now"):
            train(config)


class TestCommand:
    def test_prints_a_line_for_each_place(self, tethertune, retaining):
        run = train(retaining())
        code, out, err = tethertune("interpolate", run.path, "--alpha", "1", "--alpha", "0.5")
        assert (code, err) == (0, "")
        first, second = out.splitlines()
        outcome = run.info["outcome"]
        assert first.startswith(f"alpha 1.0: test accuracy {outcome['test_accuracy']:.2%}, validation accuracy")
        assert f"{outcome['retention']['share']:.2%} of {outcome['retention']['confident']} confident" in first
        assert second.startswith("alpha 0.5: ")
        assert {path.name for path in run.path.glob("alpha-*")} == {"alpha-1.0.safetensors", "alpha-0.5.safetensors"}

    def test_says_in_one_sentence_what_is_wrong(self, tethertune, tmp_path):
        code, out, err = tethertune("interpolate", tmp_path)
        assert (code, out) == (2, "")
        assert "is not a run folder" in err

    def test_finetune_says_what_was_kept(self, tethertune, retaining, tmp_path):
        (tmp_path / "run.toml").write_text(retaining(keep=1.0, lr=0.03).to_toml())
        code, out, _ = tethertune("finetune", "--config", tmp_path / "run.toml")
        assert code == 0
        assert out.splitlines()[-1].startswith("100.00% of ")
        assert ", alpha 0." in out.splitlines()[-1]
