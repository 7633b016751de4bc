import shutil

import pytest

from tethertune.errors import ConfigurationError, RunError
from tethertune.lab import report


@pytest.mark.parametrize("output_format", ["html", "markdown"])
def test_the_same_runs_make_the_same_bytes(demo, tmp_path, output_format):
    folders = sorted(demo.root.rglob("seed-*"))

    one = report.write([demo.root], tmp_path / "one", output_format)
    other = report.write(reversed(folders), tmp_path / "other", output_format)

    assert one == tmp_path / "one"
    assert one.read_bytes() == other.read_bytes()


def test_a_report_moves_with_its_runs(demo, tmp_path):
    here = report.write([demo.root], tmp_path / "report.html").read_bytes()
    shutil.copytree(demo.root, tmp_path / "there" / "runs")

    assert report.write([tmp_path / "there"], tmp_path / "there" / "report.html").read_bytes() == here


def test_an_earlier_report_is_replaced(folders, tmp_path):
    folders.add(0.7)
    (tmp_path / "report.md").write_text("old")

    report.write([folders.root], tmp_path / "report.md", "markdown")

    assert (tmp_path / "report.md").read_text().startswith("# Fine-tuning")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "runs"]


def test_no_path_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="No path was given"):
        report.write([], tmp_path / "report.html")


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        report.write([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_unknown_format_is_refused(folders, tmp_path):
    folders.add(0.7)
    with pytest.raises(ConfigurationError, match="'pdf' is not known: use html, markdown, json"):
        report.write([folders.root], tmp_path / "report.pdf", "pdf")


def test_a_folder_as_output_is_refused(folders, tmp_path):
    folders.add(0.7)
    with pytest.raises(ConfigurationError, match="is a folder: name the file"):
        report.write([folders.root], tmp_path)
