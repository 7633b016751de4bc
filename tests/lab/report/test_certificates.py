import json

import pytest

from tethertune.lab import report, runs
from tethertune.lab.report import certificates
from tethertune.lab.report.grouping import compare


def figures(folders):
    [comparison] = compare(runs.find([folders.root]))
    return certificates.figures(comparison)


def values(chart):
    [rows] = chart.spec["datasets"].values()
    return rows


def test_only_certified_runs_have_a_figure(certified):
    [figure] = figures(certified)

    assert figure.title == "Certificate: mars-pgm, seed 1"
    for words in ("0.95", "34006", "0.2500 plus a gap of 0.4321: 0.6821", "It is not vacuous", "not a valid bound"):
        assert words in figure.text


def test_runs_without_a_certificate_have_none(demo):
    assert figures(demo) == []


def test_bounds_are_on_one_axis_of_log10(certified):
    bounds, _ = figures(certified)[0].charts

    assert [(row["bound"], row["log10"]) for row in values(bounds)] == [
        ("Theorem 2 (as printed)", 4.25),
        ("distance bound", -0.5),
    ]
    assert [row["kind"] for row in values(bounds)] == ["as printed, not a valid bound", "certificate"]
    assert "as printed, not a valid bound" in bounds.title


def test_layers_are_in_the_order_of_what_they_add(certified):
    _, layers = figures(certified)[0].charts
    assert [row["layer"] for row in values(layers)] == ["blocks.2", "blocks.1"]


def test_the_table_has_what_no_axis_can_hold(certified):
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in figures(certified)[0].table.rows}

    assert rows["Theorem 3 (as printed)"] == ["−∞ (0)", "as printed, not a valid bound"]  # noqa: RUF001
    assert rows["blocks.2"] == ["0.0909", "66.7 % of the sum; elasticity 0.500"]
    assert "blocks.0" not in rows


@pytest.mark.parametrize(("gap", "words"), [(3.5, "3.5"), (None, "more than 10^300")])
def test_a_vacuous_certificate_says_so(certified, gap, words):
    [path] = certified.root.rglob("certificate.json")
    found = json.loads(path.read_text())
    found["certificate"] |= {"gap": gap, "total": gap, "vacuous": True}
    path.write_text(json.dumps(found))

    [figure] = figures(certified)
    assert "It is vacuous" in figure.text
    assert f"a gap of {words}" in figure.text


def test_a_gap_that_leaves_no_room_above_the_empirical_loss_is_vacuous_too(certified):
    [path] = certified.root.rglob("certificate.json")
    found = json.loads(path.read_text())
    found["certificate"] |= {"total": 1.0, "vacuous": True}
    path.write_text(json.dumps(found))

    assert "It is vacuous" in figures(certified)[0].text


def test_a_network_that_is_not_covered_has_no_figure(certified):
    [path] = certified.root.rglob("certificate.json")
    path.write_text(json.dumps({"schema": 1, "certificate": None}))
    assert figures(certified) == []


def test_the_page_has_it(certified, tmp_path):
    page = report.write([certified.root], tmp_path / "page").read_text(encoding="utf-8")
    assert "Certificate: mars-pgm, seed 1" in page
