import json

from tethertune.lab import runs
from tethertune.lab.report import charts, drawing
from tethertune.lab.report.grouping import compare


def figures(folders):
    [comparison] = compare(runs.find([folders.root]))
    return {figure.title: figure for figure in charts.figures(comparison)}


def rows(spec):
    """The data of each layer of a spec, which Altair moves up where all layers share them."""
    return [spec["datasets"][layer.get("data", spec.get("data"))["name"]] for layer in spec["layer"]]


def test_every_figure_has_charts_a_description_and_a_table(demo):
    found = figures(demo)

    assert list(found) == [
        "Accuracy of every run",
        "Learning curves",
        "How far the layers moved",
        "Layers at their radius",
    ]
    for figure in found.values():
        assert figure.table.rows
        assert all(len(row) == len(figure.table.columns) for row in figure.table.rows)
        for chart in figure.charts:
            assert chart.spec["width"] == "container"
            assert chart.spec["description"]


def test_accuracies_are_drawn_as_they_are(demo):
    accuracy, difference = figures(demo)["Accuracy of every run"].charts
    spans, seeds, means = rows(accuracy.spec)

    assert {"series": "mars-pgm", "seed": 2, "value": 78.1} in seeds
    assert [row["mean"] for row in means if row["series"] == "mars-pgm"] == [75.63]
    assert len(spans) == 7
    assert [row for row in rows(difference.spec)[2] if row["series"] == "mars-pgm"] == [
        {"series": "mars-pgm", "seed": 1, "value": 4.4},
        {"series": "mars-pgm", "seed": 2, "value": 6.5},
        {"series": "mars-pgm", "seed": 3, "value": 3.0},
    ]


def test_a_radius_is_a_dashed_line_that_no_bar_crosses(demo):
    charts_by_method = {chart.title: chart for chart in figures(demo)["How far the layers moved"].charts}
    spec = charts_by_method["mars-pgm, radius 0.02"].spec
    bars, rules = rows(spec)

    assert rules == [{"radius": 0.02}]
    assert spec["layer"][1]["mark"]["strokeDash"]
    assert max(bar["to"] for bar in bars) == 0.02
    assert sum(bar["layers"] for bar in bars) == 12
    assert len(rows(charts_by_method["none"].spec)) == 1
    assert max(bar["to"] for bar in rows(charts_by_method["none"].spec)[0]) >= 0.1


def test_histograms_share_their_axis(demo):
    found = figures(demo)["How far the layers moved"].charts

    scales = [chart.spec["layer"][0]["encoding"]["x"]["scale"] for chart in found]
    assert scales[0]["type"] == "log"
    assert all(scale == scales[0] for scale in scales)


def test_methods_keep_their_colour_and_groups_of_one_method_differ_in_dashes(demo):
    legend = figures(demo)["Learning curves"].legend

    assert [key.colour for key in legend].count(drawing.colour("none")) == 2
    assert len({(key.colour, tuple(key.dash)) for key in legend}) == len(legend)


def test_what_has_no_data_is_not_drawn(folders):
    folder = folders.add(None)
    (folder / "metrics.jsonl").write_text("")
    document = json.loads((folder / "distances.json").read_text())
    for record in document["layers"].values():
        record["mars"] = None
    (folder / "distances.json").write_text(json.dumps(document))

    assert figures(folders) == {}


def test_specs_are_json_and_repeat(demo):
    first, second = ([chart.spec for figure in figures(demo).values() for chart in figure.charts] for _ in range(2))

    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
