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


@pytest.fixture(scope="session")
def make_idx():
    """``make_idx(folder)`` writes 30 training and 9 test images of three classes as MNIST comes; gives pixels, labels.

    A class has a bright third, so that a network can learn it.
    """
    import gzip

    def pack(path, values):
        header = bytes((0, 0, 8, values.ndim)) + b"".join(length.to_bytes(4, "big") for length in values.shape)
        path.write_bytes(gzip.compress(header + values.tobytes()))

    def make(folder, images=30, test_labels=(0, 1, 2) * 3):
        folder.mkdir(exist_ok=True)
        random = np.random.default_rng(1)
        labels = {"train": np.arange(30, dtype=np.uint8) % 3, "t10k": np.array(test_labels, np.uint8)}
        pixels = {"train": random.integers(0, 128, (images, 12, 12)), "t10k": random.integers(0, 128, (9, 12, 12))}
        for split, of_split in pixels.items():
            for image, label in zip(of_split, labels[split], strict=False):
                image[:, 4 * (label % 3) : 4 * (label % 3) + 4] += 127
            pixels[split] = of_split.astype(np.uint8)
            pack(folder / f"{split}-images-idx3-ubyte.gz", pixels[split])
            pack(folder / f"{split}-labels-idx1-ubyte.gz", labels[split])
        return pixels, {split: of_split.tolist() for split, of_split in labels.items()}

    return make


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
