import json
import subprocess
import sys

import numpy as np
import pytest

from tethertune.lab.files import atomic_path, remove_strays, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def half_written(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def half_made(path):
    with atomic_path(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        temporary.mkdir()


def test_the_file_appears_whole_under_its_name_and_nothing_else_stays(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file.txt"]


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(KeyboardInterrupt):
        half_written(target)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_is_renamed_whole_and_removed_on_an_error(tmp_path):
    with atomic_path(tmp_path / "state") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "a").write_text("1")
    assert (tmp_path / "state" / "inner" / "a").read_text() == "1"
    with pytest.raises(FileExistsError):
        half_made(tmp_path / "other")
    assert names(tmp_path) == ["state"]


def test_the_temporary_name_keeps_the_suffix_for_writers_that_look_at_it(tmp_path):
    with atomic_path(tmp_path / "images.npy") as temporary:
        np.save(temporary, np.arange(3))
    assert np.load(tmp_path / "images.npy").tolist() == [0, 1, 2]


def test_text_and_json_are_utf8_and_json_refuses_what_it_has_no_word_for(tmp_path):
    write_text(tmp_path / "a.txt", "Müller\n")
    assert (tmp_path / "a.txt").read_bytes() == "Müller\n".encode()
    write_json(tmp_path / "a.json", {"class": "Schäferhund", "value": 0.1})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"class": "Schäferhund", "value": 0.1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert json.loads((tmp_path / "a.json").read_bytes())["value"] == 0.1


def test_a_process_killed_before_the_rename_leaves_the_old_file_and_a_stray_that_can_be_removed(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    program = (
        "import os, signal, sys\n"
        "from tethertune.lab.files import write_text\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_text(sys.argv[1], 'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", program, target], check=False).returncode == -9
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2
    remove_strays(tmp_path)
    assert names(tmp_path) == ["file.txt"]
