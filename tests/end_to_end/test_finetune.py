"""A run by several processes, as ``torchrun`` starts them."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tethertune.lab import runs
from tethertune.lab.runs import RunFolder
from tethertune.lab.training import finetune

PROGRAM = """
import sys
from tethertune.lab.config import load_toml
from tethertune.lab.training import finetune
finetune(load_toml(sys.argv[1]))
"""


def by_two(config, tmp_path):
    """Let two processes do a run."""
    (tmp_path / "run.toml").write_text(config.to_toml())
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, tmp_path / "program.py", tmp_path / "run.toml"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes_give_the_run_of_one_up_to_rounding(tiny, tmp_path):
    # Of 21 images, the last batch holds a single one for two processes.
    config = tiny(method="mars-pgm", radius=0.05, augment=True, batch_size=10, optimizer="sgd", lr=1e-2)
    done = by_two(config, tmp_path)
    assert done.stderr.count("epoch 2/2") == 1  # one process tells
    both = runs.load(RunFolder(config).path)
    alone = finetune(replace(config, output=str(tmp_path / "alone")), quiet=True)
    assert both.info["machine"]["processes"] == 2
    assert both.info["outcome"]["test_accuracy"] == alone.info["outcome"]["test_accuracy"]
    for one, other in zip(both.metrics, alone.metrics, strict=True):
        for key in ("step", "accuracy", "validation_accuracy", "lr"):
            assert one[key] == other[key], key
        for key in ("loss", "validation_loss", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    weights = load_file(alone.path / "model.safetensors")
    for name, weight in load_file(both.path / "model.safetensors").items():
        assert torch.allclose(weight.float(), weights[name].float(), atol=1e-5), name


@pytest.mark.slow
def test_two_processes_go_back_as_far_as_one(retaining, tmp_path):
    config = retaining(keep=0.9, optimizer="sgd", lr=1.0, batch_size=10)
    by_two(config, tmp_path)
    both = runs.load(RunFolder(config).path)
    alone = finetune(replace(config, output=str(tmp_path / "alone")), quiet=True)
    keys = ("alpha", "test_accuracy", "validation_accuracy", "train_accuracy")
    assert {key: both.info["outcome"][key] for key in keys} == {key: alone.info["outcome"][key] for key in keys}
    assert 0 < both.info["outcome"]["alpha"] < 1
    assert both.info["outcome"]["retention"]["share"] == alone.info["outcome"]["retention"]["share"] >= 0.9
    weights = load_file(alone.path / "model.safetensors")
    for name, weight in load_file(both.path / "model.safetensors").items():
        assert torch.allclose(weight.float(), weights[name].float(), atol=1e-5), name
