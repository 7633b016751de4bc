import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from tethertune.errors import RunError
from tethertune.lab import runs
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.runs import RunFolder


@pytest.fixture
def config(tmp_path):
    return FinetuneConfig("lite0", "fashion", output=str(tmp_path / "runs"))


@pytest.fixture
def folder(config):
    return RunFolder(config)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def info(config, status="complete"):
    return {"schema": 1, "status": status, "hash": config.hash}


def test_the_path_says_data_model_method_seed_and_hash(config, tmp_path):
    assert RunFolder(config).path == tmp_path / f"runs/fashion/lite0/mars-pgm/seed-0-{config.hash}"
    other = FinetuneConfig("torchvision:resnet18", str(tmp_path), "none", seed=7, output="o")
    assert RunFolder(other).path.parts[:4] == ("o", tmp_path.name, "torchvision-resnet18", "none")
    checkpoint = tmp_path / "my weights.safetensors"
    checkpoint.touch()
    assert RunFolder(FinetuneConfig(str(checkpoint), "../..", output="o")).path.parts[2] == "my-weights"


def test_nothing_is_written_before_the_folder_is_owned(folder):
    assert folder.status() == "absent"
    assert not folder.has_leftovers()
    folder.require_space(1)
    assert not folder.path.parent.exists()


def test_a_run_is_read_as_it_was_written(folder, config):
    with folder.own():
        folder.write_info(info(config, "running"))
        folder.write_metrics([{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.05}])
        assert folder.status() == "running"
        folder.write_distances({"fc.weight": {"mars": 1.5}})
        folder.write_info(info(config))
    run = runs.load(folder.path)
    assert run.complete
    assert folder.status() == "complete"
    assert run.metrics == [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.05}]
    assert run.distances == {"layers": {"fc.weight": {"mars": 1.5}}}
    assert names(folder.path) == ["distances.json", "metrics.jsonl", "run.json"]


def test_runs_are_found_at_any_depth_once(tmp_path):
    configs = [FinetuneConfig("lite0", "fashion", method, output=str(tmp_path)) for method in ("none", "l2-sp")]
    for config in configs:
        with RunFolder(config).own():
            RunFolder(config).write_info(info(config, "running"))
    paths = sorted(RunFolder(config).path for config in configs)
    assert [run.path for run in runs.find([tmp_path])] == paths
    assert [run.path for run in runs.find([tmp_path / "fashion", *paths])] == paths
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no run"):
        runs.find([tmp_path / "empty"])


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2, "status": "complete"}'])
def test_a_run_of_another_schema_or_a_damaged_one_is_refused_by_name(folder, content):
    folder.path.mkdir(parents=True)
    (folder.path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        runs.load(folder.path)
    with pytest.raises(RunError, match=r"run\.json"):
        runs.load(folder.path / "nothing")


def test_a_folder_of_another_configuration_is_refused(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "run.json").write_text(json.dumps({"schema": 1, "status": "running", "hash": "00000000"}))
    with pytest.raises(RunError, match="another configuration"):
        folder.status()
    with pytest.raises(RunError, match="another configuration"), folder.own():
        pytest.fail("owned")
    with folder.own(fresh=True):
        assert folder.status() == "absent"


def test_a_second_process_is_refused_and_told_who_is_there(folder):
    program = (
        "import sys\n"
        "from tethertune.lab.config import FinetuneConfig\n"
        "from tethertune.lab.runs import RunFolder\n"
        "with RunFolder(FinetuneConfig('lite0', 'fashion', output=sys.argv[1])).own():\n"
        "    print('owned', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, folder.config.output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "owned\n"
        with pytest.raises(RunError, match=f"in use by process {other.pid}"), folder.own():
            pytest.fail("owned twice")
        other.kill()  # the lock goes with the process, however it ends
    with folder.own():
        pass
    assert names(folder.path) == []


def test_a_lock_file_that_its_owner_removes_while_it_is_waited_for_does_not_count(folder, monkeypatch):
    folder.path.mkdir(parents=True)
    real, removed = fcntl.flock, []

    def flock(file, operation):
        real(file, operation)
        if not removed:
            removed.append(True)
            (folder.path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.own():
        assert (folder.path / ".lock").exists()
        with pytest.raises(RunError, match="in use"), RunFolder(folder.config).own():
            pytest.fail("owned twice")


def test_owning_clears_what_a_killed_process_left(folder):
    for stray in (folder.path / ".tmp-0-run.json", folder.states / ".tmp-0-step-3.pt"):
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("half")
    folder.save_state({"value": 1}, step=2)
    with folder.own():
        assert sorted(path.name for path in folder.path.rglob("*")) == [".lock", "resume", "step-2.pt"]


def test_the_newest_state_is_kept_and_read(folder):
    assert folder.load_state() is None
    for step in (9, 10):
        folder.save_state({"weights": {"a": torch.arange(3.0)}, "step": step}, step)
    assert names(folder.states) == ["step-10.pt"]
    state = folder.load_state()
    assert state["step"] == 10
    assert state["weights"]["a"].tolist() == [0, 1, 2]
    (folder.states / "step-10.pt").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"step-10\.pt cannot be read"):
        folder.load_state()
    folder.drop_states()
    assert not folder.states.exists()


def test_equal_weights_make_equal_files(folder):
    weights = {"b": torch.arange(6.0).reshape(2, 3).t(), "a": torch.ones(2, 3, 4, 4)}
    weights["a"] = weights["a"].to(memory_format=torch.channels_last)
    weights["tied"] = weights["a"]
    metadata = {name: f"ü{name}" for name in "qwertyuiop"}  # the library writes them in a random order
    contents = set()
    for _ in range(5):
        folder.write_weights(weights, metadata)
        contents.add((folder.path / "model.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(folder.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} | metadata
        assert file.get_tensor("b").tolist() == [[0, 3], [1, 4], [2, 5]]
        assert torch.equal(file.get_tensor("tied"), torch.ones(2, 3, 4, 4))


def test_too_little_space_is_told_before_anything_is_written(folder):
    with pytest.raises(RunError, match="MB free, and this run needs up to"):
        folder.require_space(10**18)
    assert not folder.path.parent.exists()


@contextmanager
def files_of_at_most(size):
    """The system refuses larger files with an error, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: folder.save_state({"a": torch.zeros(10_000)}, 1),
        lambda folder: folder.write_weights({"a": torch.zeros(10_000)}, {}),
        lambda folder: folder.write_card("x" * 10_000),
    ],
    ids=["state", "weights", "card"],
)
def test_a_full_disk_is_told_plainly_and_leaves_no_half_file(folder, write):
    with pytest.raises(RunError, match="the run resumes"), folder.own(), files_of_at_most(4096):
        write(folder)
    assert [path for path in folder.path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_plainly_whatever_reports_it(folder, code):
    with pytest.raises(RunError, match="the run resumes"), folder.own():
        raise OSError(code, os.strerror(code))


def test_an_output_that_cannot_be_written_is_told_plainly(unprivileged_path):
    unprivileged_path.chmod(0o500)
    folder = RunFolder(FinetuneConfig("lite0", "fashion", output=str(unprivileged_path / "runs")))
    with pytest.raises(RunError, match="cannot be written"), folder.own():
        pytest.fail("owned")
    unprivileged_path.chmod(0o700)
    (unprivileged_path / "file").touch()
    folder = RunFolder(FinetuneConfig("lite0", "fashion", output=str(unprivileged_path / "file")))
    with pytest.raises(RunError, match="cannot be written"), folder.own():
        pytest.fail("owned")


def test_other_errors_pass_unchanged(folder):
    with pytest.raises(ZeroDivisionError), folder.own():
        raise ZeroDivisionError
