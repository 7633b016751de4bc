"""What README and docs show is true: code runs, commands parse, links lead somewhere, versions agree."""

import re
import shlex
import tomllib
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tethertune as tt
from tethertune.cli import app
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.launch import Launch

ROOT = Path(__file__).parents[1]
PROGRAMS = [ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]  # run by test_pages.py
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SHOWING_COMMANDS = [*DOCUMENTS, ROOT / "Makefile", ROOT / "src/tethertune/cli.py"]
COMMAND = re.compile(
    r"tethertune (?:finetune|search|compare|distances|interpolate|prepare|report|certify|bounds|export|config)\b"
    r"[^`#>&;|\n]*"
)

TORCHRUN = {item.name for item in fields(Launch)}  # what `finetune` hands on
OTHERS = {"--help", "--debug", "--multi_gpu", "--cpu"}  # of every command, and of `accelerate launch`

name_of = {"ids": lambda path: str(path.relative_to(ROOT)) if isinstance(path, Path) else ""}


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(code, namespace):
    """Run a block of a document, with a real loop where it says ``...``."""
    exec(compile(code.replace("\n...", "\ntrain()"), "block of a document", "exec"), namespace)


def trainer(namespace, images):
    """A training loop of three steps with the ``model`` and ``optimizer`` of a namespace."""

    def train():
        for _ in range(3):
            namespace["optimizer"].zero_grad()
            namespace["model"](images).square().sum().backward()
            namespace["optimizer"].step()

    return train


# ---------------------------------------------------------------------------------------------------------- code


def test_every_block_of_python_is_run_below_or_as_a_doctest():
    plain = {path: [block for block in python_blocks(path) if not block.startswith(">>> ")] for path in DOCUMENTS}
    counts = {
        str(path.relative_to(ROOT)): len(blocks) for path, blocks in plain.items() if blocks and path not in PROGRAMS
    }
    assert counts == {"README.md": 1, "docs/certificates.md": 1, "docs/guide.md": 3}


def test_the_lines_of_the_readme(capsys):
    (block,) = python_blocks(ROOT / "README.md")
    namespace = {}
    namespace["train"] = trainer(namespace, torch.rand(2, 3, 64, 64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert "pretrained=True" in block
        run(block.replace("pretrained=True", "pretrained=False"), namespace)  # nothing is downloaded
    printed = capsys.readouterr().out.splitlines()[0]
    shown = re.search(r"print\(constraint\.summary\(\)\) +# (.*)", block)[1]
    form = r"(\d+ of \d+ tensors constrained, head fc, norm mars), (\d+) at their radius"
    counted, at_radius = re.fullmatch(form, printed).groups()
    assert counted == re.fullmatch(form, shown)[1]
    assert 0 < int(at_radius) <= int(counted.split()[0])
    assert all(distance.value <= distance.radius for distance in namespace["constraint"].distances().values())


def test_the_lines_of_the_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    attach, resume, one_pass = python_blocks(ROOT / "docs" / "guide.md")

    def network():
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), fc=nn.Linear(4 * 6 * 6, 2)))

    model = network()
    save_file(model.state_dict(), "pretrained.safetensors")
    namespace = {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.1)}
    namespace["train"] = trainer(namespace, torch.rand(8, 3, 8, 8))
    run(attach, namespace)
    assert capsys.readouterr().out.startswith("2 of 4 tensors constrained, head fc, norm mars, 2 at their radius\n")
    trained = namespace["constraint"]

    resumed = {"model": network(), "tt": tt}
    resumed["checkpoint"] = {"model": model.state_dict(), "constraint": trained.state_dict()}
    run(resume, resumed)
    assert resumed["constraint"].distances() == trained.distances()
    run(one_pass, resumed)
    assert isinstance(resumed["optimizer"], torch.optim.AdamW)

    save_file(model.state_dict(), "pretrained.safetensors")  # the mistake that the guide warns of
    with pytest.raises(tt.TethertuneError, match="the original pre-trained weights"):
        run(resume, resumed)


@pytest.mark.parametrize("path", DOCUMENTS, **name_of)
def test_names_of_the_library_are_public(path):
    assert set(re.findall(r"\btt\.([A-Za-z]\w*)", path.read_text(encoding="utf-8"))) <= set(dir(tt))


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs dataset-fashion-mnist")
def test_the_split_of_the_certificate(tmp_path, monkeypatch):
    from tethertune.lab import sources

    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(ROOT / "docs" / "certificates.md")
    exec(compile(block, "split.py", "exec"), {})
    assert (tmp_path / "random.safetensors").is_file()
    assert [len(sources.find(part).splits["train"]) for part in ("base", "fresh")] == [20_000, 40_000]


# ------------------------------------------------------------------------------------------------------ commands


def commands(path):
    """The command lines that a document, the Makefile, or the help of a module shows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = "\n".join(re.findall(r"^ *Example: (.*)", text, re.MULTILINE))
    text = re.sub(r"\\\n\s*", "", text)
    return [shlex.split(line)[1:] for line in COMMAND.findall(text)]


@pytest.mark.parametrize("path", SHOWING_COMMANDS, **name_of)
def test_commands_are_understood(path):
    for words in commands(path):
        if len(words) == 1:  # a mention in a sentence
            assert words[0] in list(app)
            continue
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        if words[0] == "finetune" and {"model", "data"} <= bound.arguments.keys():
            FinetuneConfig(**{name: value for name, value in bound.arguments.items() if name not in TORCHRUN})


def test_every_command_is_shown():
    shown = {words[0] for path in SHOWING_COMMANDS for words in commands(path)}
    assert shown == {name for name in app if not name.startswith("-")}


@pytest.mark.parametrize("path", DOCUMENTS, **name_of)
def test_flags_are_there(path):
    flags = {f"--{item.name.replace('_', '-')}" for item in fields(FinetuneConfig)}
    flags |= {name for command in app if not command.startswith("-") for name in names_of_options(app[command])}
    shown = re.findall(r"`(--[a-z_-]+)[^`]*`", path.read_text(encoding="utf-8"))
    assert set(shown) <= flags | OTHERS


def names_of_options(command):
    return {name for argument in command.assemble_argument_collection() for name in argument.names}


def test_targets_of_make_are_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        named = re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= targets, path


# ---------------------------------------------------------------------------------------------- links, versions


@pytest.mark.parametrize("path", DOCUMENTS, **name_of)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, **name_of)
def test_nothing_is_left_to_fill_in(path):
    assert re.findall(r"@@\w*|TODO|TBD", path.read_text(encoding="utf-8")) == []


def test_the_newest_version_of_the_changelog_is_that_of_the_package():
    versions = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert versions[0] == tt.__version__ == project["version"]


def test_extras_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for path in DOCUMENTS:
        assert set(re.findall(r"tethertune\[(\w+)\]", path.read_text(encoding="utf-8"))) <= set(
            project["optional-dependencies"]
        )
