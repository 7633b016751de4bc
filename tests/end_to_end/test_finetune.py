"""A run by several processes: ``--nproc-per-node``, and as torchrun and accelerate start them."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tethertune.lab import runs
from tethertune.lab.runs import RunFolder
from tethertune.lab.training import finetune


def launched(launcher, config):
    """Let two processes do a run, started as a user would."""
    words = shlex.split(config.command())
    scripts = Path(sys.executable).parent
    command = {
        "tethertune": [scripts / words[0], *words[1:], "--nproc-per-node", "2"],
        "torchrun": [scripts / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", *words],
        "accelerate": [scripts / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "-m", *words],
    }[launcher]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"epoch {config.epochs}/{config.epochs}") == 1  # one process tells
    assert done.stdout.count("test accuracy") == 1
    return runs.load(RunFolder(config).path)


def require_the_same(both, alone):
    """Check that two processes found what one does, to 1e-5."""
    assert both.info["machine"]["processes"] == 2
    assert both.info["outcome"]["test_accuracy"] == alone.info["outcome"]["test_accuracy"]
    for one, other in zip(both.metrics, alone.metrics, strict=True):
        for key in ("step", "accuracy", "validation_accuracy", "lr"):
            assert one[key] == other[key], key
        for key in ("loss", "validation_loss", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), key
    weights = load_file(alone.path / "model.safetensors")
    for name, weight in load_file(both.path / "model.safetensors").items():
        assert torch.allclose(weight.float(), weights[name].float(), rtol=0, atol=1e-5), name


# Of 21 images, the last batch holds a single one for two processes.
CASES = {
    "tethertune": {"method": "mars-pgm", "radius": 0.05, "augment": True},
    "torchrun": {"method": "mars-sp", "strength": 0.01, "bn": "train", "size": 64, "optimizer": "sgd", "lr": 1e-2},
    "accelerate": {"method": "l2-pgm", "radius": 0.1, "accumulate": 2, "label_smoothing": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", CASES)
def test_two_processes_give_the_run_of_one(launcher, tiny, tmp_path):
    config = tiny(batch_size=10, **CASES[launcher])
    alone = finetune(replace(config, output=str(tmp_path / "alone")), quiet=True)
    require_the_same(launched(launcher, config), alone)


@pytest.mark.slow
def test_two_processes_go_back_as_far_as_one(retaining, tmp_path):
    config = retaining(keep=0.9, optimizer="sgd", lr=1.0, batch_size=10)
    both = launched("tethertune", config)
    alone = finetune(replace(config, output=str(tmp_path / "alone")), quiet=True)
    keys = ("alpha", "test_accuracy", "validation_accuracy", "train_accuracy")
    assert {key: both.info["outcome"][key] for key in keys} == {key: alone.info["outcome"][key] for key in keys}
    assert 0 < both.info["outcome"]["alpha"] < 1
    assert both.info["outcome"]["retention"]["share"] == alone.info["outcome"]["retention"]["share"] >= 0.9
    weights = load_file(alone.path / "model.safetensors")
    for name, weight in load_file(both.path / "model.safetensors").items():
        assert torch.allclose(weight.float(), weights[name].float(), atol=1e-5), name
