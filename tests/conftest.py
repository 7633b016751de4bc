"""One thread a process, because tests run side by side; and the smallest inputs that a real run takes."""

from pathlib import Path

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


@pytest.fixture(scope="session")
def make_published():
    """``make_published(root)`` writes small copies of the published data sets; gives the folder of each by name.

    They are in the layouts of the originals, ``root/aircraft/fgvc-aircraft-2013b/...``, so that ``root`` can be
    ``$TETHERTUNE_DATA``. Three classes, told apart by colour, with a third of their images in each split.
    """

    def make(root, per_class=6):
        for write in (_aircraft, _butterfly, _flowers, _pets, _pubfig, _caltech256, _dtd):
            write(root, range(1, per_class + 1))
        folders = {path.name: path for path in sorted(root.iterdir())}
        for path in folders.values():
            (path / "small-copy.txt").write_text("made by a test\n")
        return folders

    return make


def _aircraft(root, numbers):
    base = root / "aircraft/fgvc-aircraft-2013b/data"
    variants = ("707-320", "A340-600", "Boeing 737-700")
    images = [[f"{label}{number:06}" for number in numbers] for label in range(3)]
    _save(images, base / "images", ".jpg")
    (base / "variants.txt").write_text("\n".join(variants) + "\n")
    _list(images, f"{base}/images_variant_{{}}.txt", lambda image, label: f"{image} {variants[label]}")
    halves = [(base / f"images_variant_{split}.txt").read_text() for split in ("train", "val")]
    (base / "images_variant_trainval.txt").write_text("".join(halves))


def _butterfly(root, numbers):
    base = root / "butterfly/Butterfly200"
    species = ("001.Achillides_bianor", "002.Papilio_xuthus", "003.Danaus_chrysippus")
    images = [[f"{name}/{number:03}.jpg" for number in numbers] for name in species]
    _save(images, base / "images")
    _list(images, f"{base}/Butterfly200_{{}}_release.txt", lambda image, label: f"{image} {label + 1} 1 1 1")


def _flowers(root, numbers):
    from scipy.io import savemat

    base = root / "flowers/flowers-102"
    count = len(numbers)
    images = [[f"image_{3 * number - 2 + label:05}.jpg" for number in numbers] for label in range(3)]
    _save(images, base / "jpg")
    thirds = np.split(np.arange(1, 3 * count + 1), [count // 3 * 3, 2 * count // 3 * 3])
    savemat(base / "imagelabels.mat", {"labels": np.tile([1, 2, 3], count)})
    savemat(base / "setid.mat", dict(zip(("trnid", "valid", "tstid"), thirds, strict=True)))


def _pets(root, numbers):
    base = root / "pets/oxford-iiit-pet"
    images = [
        [f"{breed}_{number}" for number in numbers] for breed in ("Abyssinian", "american_bulldog", "Egyptian_Mau")
    ]
    _save(images, base / "images", ".jpg")
    (base / "annotations").mkdir()
    lines = [f"{image} {label + 1} 1 1" for label, of_label in enumerate(images) for image in of_label[1:]]
    for list_, part in (("trainval", lines[::2]), ("test", lines[1::2]), ("list", ["#Image CLASS-ID ...", *lines])):
        (base / f"annotations/{list_}.txt").write_text("\n".join(part) + "\n")


def _pubfig(root, numbers):
    people = ("Adam Sandler", "Adriana Lima", "Alec Baldwin")
    _save([[f"{name}/{number}.jpg" for number in numbers] for name in people], root / "pubfig/pubfig83")


def _caltech256(root, numbers):
    categories = ("001.ak47", "002.american-flag", "003.backpack", "257.clutter")
    images = [[f"{name}/{name[:3]}_{number:04}.jpg" for number in numbers] for name in categories]
    _save(images, root / "caltech256/256_ObjectCategories")


def _dtd(root, numbers):
    base = root / "dtd/dtd"
    images = [[f"{name}/{name}_{number:04}.jpg" for number in numbers] for name in ("banded", "dotted", "zigzagged")]
    _save(images, base / "images")
    (base / "labels").mkdir()
    _list(images, f"{base}/labels/{{}}1.txt", lambda image, _: image)


def _save(images, folder, suffix=""):
    """Write the images of each label, in its colour."""
    from PIL import Image

    random = np.random.default_rng(2)
    for label, of_label in enumerate(images):
        for image in of_label:
            pixels = random.integers(0, 128, (30, 40, 3))
            pixels[:, :, label % 3] += 127
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}{suffix}")


def _list(images, pattern, line):
    """Write a list of each split, a third of the images of each label; ``line(image, label)`` is a line of it."""
    for position, split in enumerate(("train", "val", "test")):
        lines = []
        for label, of_label in enumerate(images):
            third = slice(position * len(of_label) // 3, (position + 1) * len(of_label) // 3)
            lines += [line(image, label) for image in of_label[third]]
        Path(pattern.format(split)).write_text("\n".join(lines) + "\n")


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


@pytest.fixture(scope="session")
def knowing(tmp_path_factory):
    """Weights of a tiny network with a classifier of ten classes that is often confident, and 70 images to ask it."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("knowing")
    random = np.random.default_rng(3)
    for number in range(70):
        folder = root / "images" / ("some" if number % 2 else "others/deeper")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = timm.create_model("test_efficientnet", num_classes=10).state_dict()
    state["classifier.weight"] *= 150
    save_file(state, root / "base.safetensors")
    return root


@pytest.fixture
def retaining(tiny, knowing):
    """``retaining(**values)`` configures a tiny run that measures what is forgotten; it forgets some."""

    def configure(**values):
        usual = {"weights": str(knowing / "base.safetensors"), "retain": str(knowing / "images"), "retain_size": 32}
        return tiny(**usual | {"method": "none", "lr": 3e-3, "cache": str(knowing / "cache")} | values)

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
