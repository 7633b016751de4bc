"""What a constraint says that it costs, against what the system says, which measures this file as a program."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tethertune as tt
from tethertune.memory import Memory, readable

MIB = 1 << 20
SIDE = 2048
COPY = 2 * SIDE * SIDE * 4 / MIB  # of the body's weights in float32
SLACK = 1.5  # what the interpreter and the allocator take by themselves, in MiB


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(SIDE, SIDE), nn.LayerNorm(SIDE), nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 10), nn.Embedding(SIDE, SIDE)
    )


def status(key):
    line = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) / 1024


def trimmed():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def pss(path):
    """The share of a mapped file that is this process's, and all that it sees of it, in MiB."""
    of_file = Path("/proc/self/smaps").read_text().partition(str(path))[2]
    return [int(re.search(rf"{key}:\s+(\d+) kB", of_file)[1]) / 1024 for key in ("Pss", "Rss")]


@torch.no_grad()
def cost(model, **options):
    """MiB of private memory after two steps, the most in a third, and what the constraint says."""
    trimmed()
    before = status("RssAnon")
    constraint = tt.Constraint(model, head="3", head_radius=0.5, **{"radius": 0.5} | options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constraint.attach(optimizer)
    passing = 0.0
    for _ in range(3):
        for name in ("0", "2", "3"):
            model.get_submodule(name).weight.add_(0.001)
        trimmed()
        Path("/proc/self/clear_refs").write_text("5")
        at_rest = status("VmRSS")
        constraint.project()
    passing = status("VmHWM") - at_rest
    assert all(d.value <= d.radius for d in constraint.distances().values())
    told = constraint.memory()
    trimmed()
    return {
        "kept": status("RssAnon") - before,
        "passing": passing,
        "told": {name: getattr(told, name) / MIB for name in Memory.__annotations__},
        "pss": pss(options["reference"]) if "reference" in options else None,
    }


def program(path, backend):
    torch.set_num_threads(1)
    os.environ["TETHERTUNE_BACKEND"] = backend
    model = network()
    cost(model)  # what PyTorch loads at the first step of an optimiser is not the constraint's
    found = {"float32": cost(model), "frobenius": cost(model, norm="frobenius")}
    found["free"] = cost(model, exclude=["0", "2"])
    found["mapped"] = cost(model, reference=path)
    found["rounded"] = cost(model, reference_dtype=torch.bfloat16, radius=50.0)
    model = model.bfloat16().float()
    found["from bfloat16"] = cost(model)
    sys.stdout.write(json.dumps(found))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "reference.safetensors"
    save_file(network().state_dict(), path)
    return path


@pytest.fixture(scope="module", params=["native", "chunked"])
def costs(request, path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux to say what a process takes")
    from tethertune.kernels import backend

    if request.param == "native" and backend.choose(torch.device("cpu")) != "native":
        pytest.skip("needs a C compiler")
    ours = tt.Constraint(network(), radius=0.5, reference=path)  # a second process that maps the file
    ours.project()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(path), request.param],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("case", "copies"),
    [("float32", 1), ("frobenius", 1), ("free", 0), ("mapped", 0), ("rounded", 0.5), ("from bfloat16", 0.5)],
)
def test_the_reference_takes_one_copy_at_most_and_what_is_told_is_measured(costs, case, copies):
    found = costs[case]
    told = found["told"]
    assert told["reference"] == pytest.approx(copies * COPY, abs=0.1)
    assert told["mapped"] == pytest.approx(COPY if case == "mapped" else 0, abs=0.1)
    resident = told["reference"] + told["tables"] + told["scratch"]
    assert found["kept"] == pytest.approx(resident, abs=SLACK)
    assert found["passing"] <= told["passing"] + SLACK


def test_a_mapped_reference_is_shared_by_the_processes_that_map_it(costs):
    share, seen = costs["mapped"]["pss"]
    assert seen >= COPY
    assert share <= 0.6 * seen


def test_the_text_names_the_parts_that_there_are():
    memory = Memory(reference=3 * MIB, host=0, mapped=5 << 30, tables=100, scratch=0, passing=MIB)
    assert memory.peak == 4 * MIB + 100
    assert str(memory) == (
        "at most 4.0 MiB (3.0 MiB reference, 100 B tables, 1.0 MiB for a moment in a step); 5.0 GiB mapped from a file"
    )
    assert "7.0 MiB reference on the host" in str(Memory(0, 7 * MIB, 0, 0, 0, 0))
    assert readable(1 << 60) == "1048576.0 TiB"


def test_the_summary_tells_it():
    constraint = tt.Constraint(nn.Linear(64, 64), radius=1.0)
    assert "(16.0 KiB reference, " in constraint.summary()


if __name__ == "__main__":
    program(*sys.argv[1:])
