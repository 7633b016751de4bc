"""Pages that are programs: their blocks are run in order, and print what they show, up to the numbers.

What is marked as ``console`` is not run.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shape(line):
    """A line of output without its numbers, hashes and spacing."""
    return " ".join(re.sub(r"\b[0-9a-f]{8}\b|[\d.]+(e-?\d+)?", "#", line).split())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }

    def output(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    printed = []
    for kind, text in blocks:
        if kind == "sh" and "pip install" not in text:
            printed.append(output("bash", "-euc", text))
    program = "".join(text for kind, text in blocks if kind == "python")
    if program:
        (tmp_path / "page.py").write_text(program, encoding="utf-8")
        printed.append(output(sys.executable, "page.py"))
    lines = {shape(line) for line in "\n".join(printed).splitlines()}
    shown = [
        line
        for (before, _), (kind, text) in itertools.pairwise(blocks)
        if kind == "text" and before != "text"
        for line in text.splitlines()
    ]
    assert [line for line in shown if shape(line) not in lines] == []
