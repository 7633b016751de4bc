import json

import pytest

from tethertune.lab import runs
from tethertune.lab.report import frontier
from tethertune.lab.report.grouping import compare

from .conftest import retained

ALL = frontier.Images(439, 411)


def compared(folders):
    [comparison] = compare(runs.find([folders.root]))
    return comparison


def interpolate(folder, *entries):
    found = [
        {"alpha": alpha, "test_accuracy": accuracy, "validation_accuracy": 0.5, "retention": retained(share)}
        for alpha, accuracy, share in entries
    ]
    (folder / "interpolations.json").write_text(json.dumps(found))


@pytest.fixture
def interpolated(folders):
    """Two seeds of plain fine-tuning with two interpolations, and a ball with none."""
    for seed, gain in enumerate((0.0, 0.02)):
        folder = folders.add(0.8 + gain, seed=seed, retention=0.4)
        interpolate(folder, (0.5, 0.78 + gain, 0.6), (0.25, 0.7 + gain, 0.8))
    folders.add(0.9, method="mars-pgm", retention=0.5)
    return folders


def test_points_go_from_the_run_to_its_reference(interpolated):
    none, ball = (frontier.points(group, ALL) for group in compared(interpolated).groups)

    assert [point.alpha for point in none] == [1, 0.5, 0.25]
    assert [point.accuracy.mean for point in none] == pytest.approx([0.81, 0.79, 0.71])
    assert [point.retention.mean for point in none] == pytest.approx([0.4, 0.6, 0.8])
    assert none[0].accuracy.count == 2
    assert [point.alpha for point in ball] == [1]


def test_the_figure_and_its_table(interpolated):
    [figure] = frontier.figures(compared(interpolated))
    [table] = frontier.tables(compared(interpolated))

    assert table == figure.table
    assert [cell.text for cell in table.rows[1]] == ["none", "0.5", "2", "79.0 ± 1.4 %", "60.0 ± 0.0 %", "1.90"]
    assert len(table.rows) == 4
    line = figure.charts[0].spec["layer"][0]
    assert line["encoding"]["order"]["field"] == "alpha"
    assert "none 81.0 % at a retention of 40.0 % (alpha 1)" in figure.charts[0].spec["description"]


def test_a_run_that_kept_a_share_has_a_point_before_and_one_after(folders):
    before = {"test_accuracy": 0.82, "validation_accuracy": 0.8, "retention": retained(0.4)}
    for seed, alpha in enumerate((0.5, 0.7)):
        folder = folders.add(
            0.8, seed=seed, retention=0.9, alpha=alpha, before_interpolation=before, retain="pictures", keep=0.9
        )
        interpolate(folder, (1.0, 0.8, 0.9), (0.5, 0.6, 0.95))

    found = frontier.points(compared(folders).groups[0], ALL)

    assert [point.alpha for point in found] == pytest.approx([1, 0.6, 0.3])
    assert [point.accuracy.mean for point in found] == pytest.approx([0.82, 0.8, 0.6])


def test_measurements_on_other_images_are_not_mixed_in(interpolated):
    folder = interpolated.add(0.5, method="l2-sp", strength=0.1, retention=0.9)
    info = json.loads((folder / "run.json").read_text())
    info["outcome"]["retention"] |= {"images": 10, "confident": 7}
    (folder / "run.json").write_text(json.dumps(info))
    comparison = compared(interpolated)

    [figure] = frontier.figures(comparison)

    assert frontier.images(comparison.groups) == ALL
    assert [key.label for key in figure.legend] == ["none", "mars-pgm"]
    assert figure.text.endswith("It was measured on 411 confident answers about 439 images.")


def test_what_has_no_retention_has_no_point(folders):
    folder = folders.add(0.8)
    interpolate(folder, (0.5, 0.7, None))
    folders.add(None, method="mars-pgm", retention=0.5)

    assert frontier.figures(compared(folders)) == []
    assert frontier.tables(compared(folders)) == []
