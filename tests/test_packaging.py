"""The wheel and the source archive: complete, and at work where nothing else of this repository is."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]

THREE_LINES = """
import torch, tethertune as tt
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
constraint = tt.Constraint(model, radius=0.5, head="2", head_radius=2.0)
constraint.attach(optimizer)
model(torch.ones(2, 4)).square().sum().backward()
optimizer.step()
assert all(found.value <= found.radius for found in constraint.distances().values())
print(tt.__file__)
print(constraint.backend)
print(constraint.summary())
"""


def files_in(folder):
    """What git would keep below a folder of the repository: paths from its root."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if not {"__pycache__", "_build"} & set(path.parts)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return built / f"tethertune-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def empty(tmp_path_factory, wheel):
    """An environment with the wheel installed, and what it requires linked from this one."""
    root = tmp_path_factory.mktemp("empty")
    venv.create(root, with_pip=False, symlinks=True)
    uv = Path(sys.executable).with_name("uv")
    install = [uv, "pip", "install", "-q", "--offline", "--no-deps", "--python", root / "bin/python", wheel]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    link(root, required())
    return root


def required(extra=""):
    """The names of the distributions that tethertune requires, at any depth; with those of an extra."""
    found, waiting = set(), [(Requirement(f"tethertune[{extra}]" if extra else "tethertune"))]
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name, frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        for line in distribution(requirement.name).requires or ():
            further = Requirement(line)
            extras = requirement.extras or {""}
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return {name for name, _ in found} - {"tethertune"}


def link(root, names):
    """Put distributions of this environment into another one."""
    (place,) = root.glob("lib/python*/site-packages")
    for name in names:
        of = distribution(name)
        for top in {file.parts[0] for file in of.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (place / top).exists():
                (place / top).symlink_to(of.locate_file(top))


def run_in(root, *words):
    """Run a program of an environment that knows of nothing but the system's programs, a C compiler among them."""
    words = [root / "bin" / words[0], *words[1:]]
    known = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(root / "cache")}
    return subprocess.run(words, cwd=root, capture_output=True, text=True, check=False, env=known)


def test_the_wheel_has_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.removeprefix("src/") for path in files_in("src/tethertune")}
    assert {name for name in names if name.startswith("tethertune/")} == package
    assert any(re.fullmatch(r"tethertune/kernels/c/\w+\.c", name) for name in names)
    assert "tethertune/lab/assets/fashion/train.png" in names
    assert all(name.startswith(("tethertune/", f"tethertune-{VERSION}.dist-info/")) for name in names)


def test_the_archive_has_all_that_its_tests_need(built):
    with tarfile.open(built / f"tethertune-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in (".ci", ".github", "benchmarks", "configs", "docs", "scripts", "src", "tests"):
        assert files_in(folder) <= names, folder
    single = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
    assert single | {"requirements.lock"} <= names
    assert not [name for name in names if re.search(r"__pycache__|\.venv|^runs/|^demo/|\.so$", name)]


def test_it_installs_and_runs_in_an_empty_environment(empty):
    done = run_in(empty, "python", "-W", "ignore", "-c", THREE_LINES)
    assert done.returncode == 0, done.stderr
    place, backend, summary = done.stdout.splitlines()[:3]
    assert Path(place).is_relative_to(empty)
    if platform.system() == "Linux" and shutil.which("cc"):  # compiled from the wheel's own sources
        assert backend == "native"
        assert list((empty / "cache").rglob("*.so"))
    assert summary.startswith("2 of 4 tensors constrained, head 2, norm mars")

    done = run_in(empty, "tethertune", "--help")
    assert done.returncode != 0
    assert "pip install 'tethertune[lab]'" in done.stderr

    link(empty, required("lab"))
    done = run_in(empty, "tethertune", "--help")
    assert done.returncode == 0, done.stderr
    assert "finetune" in done.stdout


class TestWorkflows:
    @pytest.fixture
    def workflows(self):
        return {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}

    def test_every_python_of_the_classifiers_is_tested_and_installed_on(self, workflows):
        classifiers = PROJECT["project"]["classifiers"]
        supported = [found[1] for line in classifiers if (found := re.search(r":: (3\.\d+)$", line))]
        assert supported == ["3.11", "3.12", "3.13"]
        assert workflows["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"] == supported
        assert workflows["release"]["jobs"]["install"]["strategy"]["matrix"]["python"] == supported

    def test_a_release_is_checked_then_published_without_a_token(self, workflows):
        jobs = workflows["release"]["jobs"]
        assert jobs["publish"]["needs"] == ["test", "install"]
        assert jobs["install"]["needs"] == "build"
        assert jobs["publish"]["permissions"] == {"id-token": "write"}
        assert any("scripts/release_notes.py" in step.get("run", "") for step in jobs["build"]["steps"])
        text = (ROOT / ".github/workflows/release.yml").read_text()
        assert not re.search(r"secrets\.|password|api-token", text)
