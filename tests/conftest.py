"""One thread a process, because tests run side by side; and the smallest inputs that a real run takes."""

import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory):
    """A folder of little images in three classes, told apart by colour, and random weights of a tiny network."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        for split, count in (("train", 7), ("val", 3), ("test", 3)):
            (root / "colours" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (32, 32, 3))
                pixels[:, :, channel] += 127
                Image.fromarray(pixels.astype(np.uint8)).save(root / "colours" / split / name / f"{number}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_efficientnet").state_dict(), root / "base.safetensors")
    return root


@pytest.fixture
def tiny(tiny_inputs, tmp_path):
    """``tiny(method="none")`` configures a run that takes less than a second."""
    from tethertune.lab.config import FinetuneConfig

    def configure(**values):
        usual = {
            "model": "test_efficientnet",
            "data": str(tiny_inputs / "colours"),
            "weights": str(tiny_inputs / "base.safetensors"),
            "size": 32,
            "epochs": 2,
            "batch_size": 8,
            "threads": 1,
            "output": str(tmp_path / "runs"),
            "cache": str(tiny_inputs / "cache"),
        }
        return FinetuneConfig(**usual | values)

    return configure


@pytest.fixture
def tethertune(capsys):
    """``tethertune("distances", file)`` runs a command in this process; gives its exit code, stdout and stderr."""
    from tethertune import cli

    def call(*words):
        capsys.readouterr()
        code = cli.run([str(word) for word in words])
        return code, *capsys.readouterr()

    return call
