"""Bad input: exit code 2, one line that says what was given and what to do; nothing written, nothing lost."""

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tethertune.lab import runs
from tethertune.lab.runs import RunFolder

DISK_MEGABYTES = 32
"""More than a run of the tiny network asks for."""


@pytest.fixture
def finetune(tethertune, tiny):
    """``finetune(radius=-1)`` is the tiny run with ``--radius=-1``; gives exit code, stdout and stderr."""
    usual = tiny(method="none")
    keys = ("model", "data", "weights", "size", "epochs", "batch_size", "threads", "output", "cache")

    def call(*flags, **changes):
        options = {key: getattr(usual, key) for key in keys} | changes
        words = [options.pop("model"), options.pop("data")]
        given = {key.replace("_", "-"): value for key, value in options.items() if value is not None}
        return tethertune("finetune", *words, *(f"--{key}={value}" for key, value in given.items()), *flags)

    return call


@pytest.fixture
def refused(tmp_path):
    """``refused(finetune, radius=-1)`` makes a call that must be refused, and gives what was told."""

    def call(command, *words, **options):
        before = contents(tmp_path)
        code, out, err = command(*words, **options)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert contents(tmp_path) == before
        return err

    return call


@pytest.fixture
def run_folder(tiny):
    """Where ``finetune(method="none", output=output, ...)`` puts its run."""
    return lambda output, **values: RunFolder(tiny(method="none", output=str(output), **values)).path


def contents(folder):
    """Every file with its bytes, and every folder."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "resnet5", "weights": None}, "'resnet5' is neither a known network.*Did you mean 'resnet50'"),
        ({"model": "litte0"}, "'litte0' is neither.*Did you mean 'lite0'.*Give a timm name"),
        ({"model": "torchvision:resnet19"}, "Did you mean 'torchvision:resnet18'"),
        ({"model": "no/such/folder"}, "'no/such/folder' is neither a known network nor a file or folder"),
        ({"radius": -1}, "--radius -1.0 is not allowed: a radius is 0 or more"),
        ({"radius": "nan"}, "--radius nan is not allowed: a radius is 0 or more"),
        ({"relative_radius": -0.1}, "--relative-radius -0.1 is not allowed: a radius is 0 or more"),
        ({"relative_radius": "nan"}, "--relative-radius nan is not allowed: a radius is 0 or more"),
        ({"method": "l2-pgm", "head_radius": -3}, "--head-radius -3.0 is not allowed: a radius is 0 or more"),
        ({"method": "l2-pgm", "head_radius": "nan"}, "--head-radius nan is not allowed: a radius is 0 or more"),
        ({"radius": "wide"}, '--radius: unable to convert "wide" into float'),
        ({"include": "stem.*"}, r"include='stem\.\*' matches no parameter.*named like 'conv_stem\.weight'"),
        ({"exclude": "stem.*"}, r"exclude='stem\.\*' matches no parameter.*named like 'conv_stem\.weight'"),
        ({"method": "l2-sp", "exclude": "stem.*"}, r"exclude='stem\.\*' matches no parameter"),
        *(
            ({"method": method, "optimizer": "lookahead_adam"}, "Lookahead does not call step hooks.*train with the")
            for method in ("mars-pgm", "l2-pgm", "mars-sp", "l2-sp")
        ),
        ({"optimizer": "adma"}, r"--optimizer adma is not known.* Did you mean 'adamax' or 'adan'"),
        ({"per_class": 99}, "per_class = 99, but class 'blue' has 7 training images; give a number from 1 to 7"),
    ],
    ids=lambda value: " ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_used(refused, finetune, options, told):
    assert re.search(told, refused(finetune, **options))


# ---------------------------------------------------------------------------------------------------------- data


def _cut(file):
    file.write_bytes(file.read_bytes()[:900])


def _only(folder, name):
    for other in folder.glob("*/*"):
        if other.name != name:
            shutil.rmtree(other)


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda data: (data / "val/red/0.png").write_text("no image"), "val/red/0.png as an image: it is in no image"),
        (lambda data: _cut(data / "train/red/0.png"), "train/red/0.png as an image: .*truncated. Repair it"),
        (lambda data: (data / "test/red/0.png").write_bytes(b""), "test/red/0.png as an image: the file is empty"),
        (lambda data: shutil.rmtree(data / "val/red"), "class 'red' is missing from .*/val; every split needs"),
        (lambda data: _empty(data / "test/red"), "class 'red' has no images: .*/test/red holds none"),
        (lambda data: _only(data, "red"), "photos/train holds 1 class folders; two or more are needed"),
        (_empty, "photos holds 0 class folders; two or more are needed"),
        (shutil.rmtree, "photos' is not a folder; give a folder of images, hf:NAME, or one of fashion"),
    ],
    ids=["no image", "truncated", "empty file", "class missing", "class empty", "one class", "empty", "absent"],
)
def test_data_that_cannot_be_used(refused, finetune, tiny_inputs, tmp_path, harm, told):
    data = shutil.copytree(tiny_inputs / "colours", tmp_path / "photos")
    harm(data)
    assert re.search(told, refused(finetune, data=data))


# --------------------------------------------------------------------------------------------------- checkpoints


class _Program:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


BROKEN = {
    "truncated.safetensors": (
        lambda file, good, _: file.write_bytes(good[: len(good) // 2]),
        "is no checkpoint, or is damaged .*: copy or download it again",
    ),
    "empty.safetensors": (lambda file, *_: file.touch(), "is empty: copy or download it again"),
    "text.safetensors": (
        lambda file, *_: file.write_text("404: Not Found"),
        "is no checkpoint, .*: copy or download it again; it must be a safetensors file",
    ),
    "text.bin": (
        lambda file, *_: file.write_text("hello, this is not a checkpoint"),
        r"is no checkpoint, or is damaged \(it is not what torch.save writes\): copy",
    ),
    "code.pkl": (
        lambda file, _, code: file.write_bytes(pickle.dumps(code)),
        r"is no checkpoint, or is damaged \(it is not what torch.save writes\): copy",
    ),
    "code.pth": (
        lambda file, _, code: torch.save({"state_dict": code}, file),
        r"is a pickle that runs code to be read \(posix.mkdir\), and is refused: load it yourself",
    ),
}
"""How to write each (to a file, given good bytes and an object whose unpickling runs code), and what is told of it."""


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("use", ["weights", "checkpoint", "reference"])
def test_checkpoints_that_cannot_be_read(refused, finetune, tethertune, tiny_inputs, tmp_path, name, use):
    make, told = BROKEN[name]
    base, file = tiny_inputs / "base.safetensors", tmp_path / name
    make(file, base.read_bytes(), _Program(tmp_path / "was here"))
    if use == "weights":
        err = refused(finetune, weights=file)
    else:
        pair = (file, base) if use == "checkpoint" else (base, file)
        err = refused(tethertune, "distances", pair[0], "--reference", pair[1])
    assert re.match(f"{re.escape(str(file))} {told}", err)
    assert not (tmp_path / "was here").exists()


@pytest.fixture
def others(tiny_inputs, tmp_path):
    """Checkpoints that do not fit the tiny network: one with a weight of another shape, and one of another network."""
    state = load_file(tiny_inputs / "base.safetensors")
    save_file(state | {"conv_stem.weight": torch.ones(24, 1, 3, 3)}, tmp_path / "shape.safetensors")
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "network.safetensors")
    return {"shape": tmp_path / "shape.safetensors", "network": tmp_path / "network.safetensors"}


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ("shape", r"conv_stem\.weight'? has shape \(24, 1, 3, 3\)"),
        ("network", r"conv_stem\.weight.* (is|are) missing|fc\.weight' is unknown"),
    ],
)
class TestAnotherNetwork:
    def test_as_reference(self, refused, tethertune, tiny_inputs, others, other, fault):
        base = tiny_inputs / "base.safetensors"
        err = refused(tethertune, "distances", base, "--reference", others[other])
        assert err.startswith(f"{others[other]} is not of the same network as {base}: ")
        assert re.search(fault, err)

    def test_as_reference_of_a_named_network(self, refused, tethertune, tiny_inputs, others, other, fault):
        base = tiny_inputs / "base.safetensors"
        words = ("distances", base, "--reference", others[other], "--arch", "test_efficientnet")
        err = refused(tethertune, *words)
        assert err.startswith(f"{base}, measured from {others[other]}: The reference is not of this network: ")
        assert re.search(fault, err)
        assert "Give the weights that this model was loaded from." in err

    def test_as_weights(self, refused, finetune, others, other, fault):
        err = refused(finetune, weights=others[other])
        assert err.startswith(f"{others[other]}: These weights are not those of test_efficientnet: ")
        assert re.search(fault, err)


# --------------------------------------------------------------------------------------------------- run folders


def _edit_hash(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hash": "0badc0de"}))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_edit_hash, "holds a run of another configuration .0badc0de, .* choose another --output, or start anew with"),
        (lambda file: file.write_text("{"), "run.json cannot be read .*: make the run anew with --fresh"),
        (lambda file: file.write_text('{"schema": 7}'), "run.json is not of a schema that this version reads"),
    ],
    ids=["hash", "damaged", "schema"],
)
def test_a_run_folder_of_something_else(refused, finetune, run_folder, tmp_path, harm, told):
    assert finetune(method="none")[0] == 0
    harm(run_folder(tmp_path / "runs") / "run.json")
    assert re.search(told, refused(finetune, method="none"))
    assert finetune("--fresh", method="none")[0] == 0
    assert runs.load(run_folder(tmp_path / "runs")).complete


def test_a_saved_state_that_is_damaged(refused, finetune, run_folder, tmp_path, monkeypatch):
    options = {"method": "none", "checkpoint_every": 0}
    real = RunFolder.save_state

    def save_and_stop(self, state, step):
        real(self, state, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", save_and_stop)
        assert finetune(**options)[0] == 130
    state = run_folder(tmp_path / "runs") / "resume" / "step-1.pt"
    _cut(state)
    assert f"{state} cannot be read" in (err := refused(finetune, **options))
    assert "start the run anew with --fresh" in err


def test_a_second_process(refused, finetune, tiny, run_folder, tmp_path):
    """The folder is held by another process; when that ends, the same command does the run."""
    program = (
        "import sys\n"
        "from tethertune.lab.config import load_toml\n"
        "from tethertune.lab.runs import RunFolder\n"
        "with RunFolder(load_toml(sys.argv[1])).own():\n"
        "    print('owned', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    folder = run_folder(tmp_path / "runs")
    (tmp_path / "run.toml").write_text(tiny(method="none").to_toml())
    command = [sys.executable, "-c", program, tmp_path / "run.toml"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "owned\n"
        err = refused(finetune, method="none")
        assert err.startswith(f"{folder} is in use by process {other.pid} on ")
        assert "wait for it, or give another --seed or --output" in err
    assert finetune(method="none")[0] == 0


# --------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def mount(tmp_path):
    """``mount("size=32m")``: a disk of its own, for who may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def call(options):
        command = [shutil.which("mount") or pytest.skip("there is no mount here"), "-t", "tmpfs", "-o", options]
        done = subprocess.run([*command, "tmpfs", place], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield call
    for _ in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


class _Disk:
    """A disk of its own that is filled by a file."""

    full = "is full: free some space"
    again = "MB free, and this run needs up to"

    def __init__(self, path):
        self.path = path

    def fill(self):
        with (self.path / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.path).free)

    def empty(self):
        (self.path / "ballast").unlink()


class _FileLimit:
    """Files above 64 KB are refused by the system, as by a full disk; any user may set that."""

    full = again = "takes no file that large: raise the limit (ulimit -f)"

    def __init__(self, path):
        self.path = path
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, self.limits[1]))

    def empty(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.fixture(params=["disk", "file limit"])
def disk(request, tmp_path):
    if request.param == "disk":
        yield _Disk(request.getfixturevalue("mount")(f"size={DISK_MEGABYTES}m"))
    else:
        yield (limit := _FileLimit(tmp_path / "disk"))
        limit.empty()


def test_a_disk_that_fills_up_during_a_run_loses_nothing(disk, finetune, run_folder, tmp_path, monkeypatch):
    real = RunFolder.write_metrics

    def write_and_fill(self, metrics):
        real(self, metrics)
        if len(metrics) == 2:
            disk.fill()

    options = {"method": "none", "epochs": 3, "checkpoint_every": 0, "output": disk.path}
    folder = run_folder(disk.path, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_metrics", write_and_fill)
        code, _, err = finetune(**options)
    assert code == 2
    told = err.splitlines()[-1]
    assert told.startswith(f"The disk of {folder} {disk.full} and give the same command again; the run resumes")
    assert sorted(map(str, contents(folder))) == ["metrics.jsonl", "resume", "resume/step-6.pt", "run.json"]
    saved, first_epoch = contents(folder / "resume"), runs.load(folder).metrics[0]

    code, _, err = finetune(**options)  # there is still no room
    assert code == 2
    assert disk.again in err.splitlines()[-1]
    assert contents(folder / "resume") == saved

    disk.empty()
    assert finetune(**options)[0] == 0
    assert runs.load(folder).complete
    assert runs.load(folder).metrics[0] == first_epoch  # down to its seconds: it was not run again
    assert finetune(**options | {"output": tmp_path / "whole"})[0] == 0
    whole = run_folder(tmp_path / "whole", epochs=3)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_disk_that_is_full_before_a_run(refused, finetune, mount):
    disk = mount("size=1m")
    told = refused(finetune, output=disk)
    assert f"The disk of {disk} has 1 MB free, and this run needs up to" in told
    assert "free some, or choose another --output" in told


def test_a_full_disk_under_the_cache(refused, finetune, mount):
    disk = _Disk(mount("size=1m"))
    for folder in ("fingerprints", "images"):
        (disk.path / folder).mkdir()
    disk.fill()
    told = refused(finetune, cache=disk.path)
    assert f"cannot keep decoded images in {disk.path}: No space left on device. Name a folder with --cache" in told


def test_a_full_disk_under_the_report(refused, finetune, tethertune, mount, tmp_path):
    assert finetune(method="none")[0] == 0
    disk = _Disk(mount("size=1m"))
    disk.fill()
    told = refused(tethertune, "report", tmp_path / "runs", "--output", disk.path / "report.html")
    assert told.startswith(f"{disk.path / 'report.html'} cannot be read or written: No space left on device. Choose")


class TestReadOnly:
    def test_output(self, refused, finetune, mount):
        disk = mount(f"size={DISK_MEGABYTES}m,ro")
        told = refused(finetune, output=disk / "runs")
        assert told.startswith(f"{disk / 'runs'}")
        assert "cannot be written (Read-only file system): choose another --output" in told

    def test_cache(self, refused, finetune, mount):
        disk = mount("size=1m,ro")
        told = refused(finetune, cache=disk)
        assert f"cannot keep decoded images in {disk}: Read-only file system. Name a folder with --cache" in told

    def test_report(self, refused, finetune, tethertune, mount, tmp_path):
        assert finetune(method="none")[0] == 0
        page = mount("size=1m,ro") / "report.html"
        told = refused(tethertune, "report", tmp_path / "runs", "--output", page)
        assert told.startswith(f"{page} cannot be read or written: Read-only file system. Choose another place.")

    def test_a_complete_run_is_left_as_it_is(self, finetune, mount):
        disk = mount(f"size={DISK_MEGABYTES}m")
        made = finetune(method="none", output=disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert finetune(method="none", output=disk)[:2] == made[:2]

    @pytest.mark.parametrize("output", ["file", "file/runs"])
    def test_an_output_below_a_file(self, refused, finetune, tmp_path, output):
        (tmp_path / "file").write_text("mine")
        told = refused(finetune, output=tmp_path / output)
        assert told.startswith(f"{tmp_path / output}")
        assert "cannot be written (Not a directory): choose another --output" in told
