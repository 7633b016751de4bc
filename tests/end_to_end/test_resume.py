"""A run that is killed at any moment and started again ends as if it had never been killed."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from tethertune.lab import runs
from tethertune.lab.runs import RunFolder

DRIVER = '''
"""Run a configuration to its end in forked processes (so that the imports are paid once), killing the first ten."""
import os
import random
import signal
import sys
import time

import torch

from tethertune.lab.config import load_toml
from tethertune.lab.training import finetune

file, kills, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
config = load_toml(file)
chance = random.Random(0)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_rename(count, *, before):
    """Die right before or right after so many renames."""
    rename = os.replace

    def replace(source, target):
        nonlocal count
        count -= 1
        if count == 0 and before:
            die()
        rename(source, target)
        if count == 0:
            die()

    os.replace = replace


def run_in_child(prepare=lambda: None, die_after=None):
    """Fork, run, and return whether the run ended."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            finetune(config, quiet=True)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if die_after is not None:
        time.sleep(die_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


if kills == 0:
    began = time.monotonic()
    assert run_in_child()
    print(time.monotonic() - began)
    sys.exit()

done = 0
while done < kills:
    if done % 2:
        count, before = chance.randint(1, 6), chance.random() < 0.7
        ended = run_in_child(lambda: die_at_rename(count, before=before))
        print("rename", count, before, ended)
    else:
        ended = run_in_child(die_after=chance.uniform(0.3, 1) * seconds)
        print("time", ended)
    assert not ended, "the run ended before it could be killed so often"
    done += 1
starts = kills + 1
while not run_in_child():
    starts += 1
print("starts", starts)
'''


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_if_it_had_not_been(tiny, tmp_path):
    config = tiny(head_radius=0.1, epochs=6, batch_size=4, accumulate=2, augment=True, lr=1e-3, checkpoint_every=0)
    whole = replace(config, output=str(tmp_path / "whole"))
    (tmp_path / "driver.py").write_text(DRIVER)

    def drive(config, kills, seconds):
        (tmp_path / "run.toml").write_text(config.to_toml())
        command = [sys.executable, tmp_path / "driver.py", tmp_path / "run.toml", str(kills), str(seconds)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    seconds = float(drive(whole, 0, 0))
    story = drive(config, 10, seconds / 4)
    killed, whole = RunFolder(config).path, RunFolder(whole).path
    names = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    assert sorted(path.relative_to(killed) for path in killed.rglob("*")) == names
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(), story
    assert (killed / "distances.json").read_bytes() == (whole / "distances.json").read_bytes()
    assert result(killed) == result(whole)


def result(path):
    """All that a run says, but its times, its memory and its place."""
    run = runs.load(path)
    timings = ("seconds", "images_per_second", "peak_memory_bytes")
    outcome = {key: value for key, value in run.info["outcome"].items() if key not in timings}
    metrics = [{key: value for key, value in line.items() if key not in timings} for line in run.metrics]
    info = {key: run.info[key] for key in ("status", "hash", "versions", "machine", "data", "model", "constraint")}
    return json.dumps([info, outcome, metrics])
