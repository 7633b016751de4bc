"""The C kernels are compiled once on a machine; where that cannot be, the constraint works without and says why."""

import os
import subprocess
import sys

import pytest

CONSTRAIN = """
import logging, sys
import torch
import tethertune as tt
logging.basicConfig(level=logging.INFO)
model = torch.nn.Linear(40, 3)
constraint = tt.Constraint(model, radius=0.5)
with torch.no_grad():
    model.weight.add_(1)
constraint.project()
constraint.project()
assert constraint.distances()["weight"].value <= 0.5
print(constraint.backend)
"""

LOAD = """
import sys
from pathlib import Path
from tethertune.kernels import library
library.SOURCES = Path(sys.argv[1])
print(library.load().answer())
"""


def start(script, tmp_path, *arguments, **environment):
    """A process with a cache of its own and no compiler but what it is given."""
    keep = {k: v for k, v in os.environ.items() if k not in ("CC", "TETHERTUNE_BACKEND")}
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=keep | cache | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), err


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "answer.c").write_text("int answer(void) { return 42; }\n")
    return folder


@pytest.fixture
def failing(tmp_path):
    compiler = tmp_path / "failing-cc"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return compiler


def test_without_a_compiler_the_chunked_path_runs_and_the_log_says_why_once(tmp_path):
    code, out, err = run(CONSTRAIN, tmp_path, PATH="")
    assert (code, out) == (0, "chunked"), err
    assert err.count("no C compiler was found") == 1


def test_a_failing_compiler_is_as_none(tmp_path, failing):
    code, out, err = run(CONSTRAIN, tmp_path, CC=str(failing))
    assert (code, out) == (0, "chunked"), err
    assert err.count("no such instruction") == 1
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_forcing_what_cannot_be_compiled_is_an_error_that_says_why(tmp_path, failing):
    code, _, err = run(CONSTRAIN, tmp_path, CC=str(failing), TETHERTUNE_BACKEND="native")
    assert code
    assert "TETHERTUNE_BACKEND=native cannot run" in err
    assert "no such instruction" in err


def test_a_second_process_only_loads(tmp_path, sources):
    assert run(LOAD, tmp_path, sources) == (0, "42", "")
    library = next((tmp_path / "cache").rglob("*.so"))
    before = library.stat().st_mtime_ns
    assert run(LOAD, tmp_path, sources) == (0, "42", "")
    assert library.stat().st_mtime_ns == before


def test_other_sources_are_another_library(tmp_path, sources):
    run(LOAD, tmp_path, sources)
    (sources / "answer.c").write_text("int answer(void) { return 43; }\n")
    assert run(LOAD, tmp_path, sources)[1] == "43"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, sources):
    (tmp_path / "file").write_text("")
    assert run(LOAD, tmp_path, sources, XDG_CACHE_HOME=str(tmp_path / "file"))[:2] == (0, "42")


def test_several_processes_may_compile_at_once(tmp_path, sources):
    processes = [start(LOAD, tmp_path, sources) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in results] == ["42"] * 3, results
    assert len(list((tmp_path / "cache" / "tethertune" / "kernels").iterdir())) == 1
