import subprocess
import sys
from pathlib import Path

import pytest

import tethertune
from tethertune.__main__ import main

SOURCE = Path(tethertune.__file__).parent


def test_without_the_extra_it_says_which_line_to_run(tmp_path):
    (tmp_path / "tethertune").symlink_to(SOURCE)  # alone, wherever it is installed
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tethertune.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cyclopts" in done.stderr
    assert done.stderr.endswith("pip install 'tethertune[lab]'\n")


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["--no-such-flag"], 2)])
def test_takes_the_arguments_of_the_process_and_gives_the_exit_code(monkeypatch, capsys, words, code):
    monkeypatch.setattr(sys, "argv", ["tethertune", *words])
    assert main() == code
    if code == 0:
        assert capsys.readouterr().out.strip() == tethertune.__version__


def test_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "tethertune", "finetune"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "MODEL is missing: tethertune finetune MODEL DATA, or --config FILE.\n"
