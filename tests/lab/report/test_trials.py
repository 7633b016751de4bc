import pytest

from tethertune.lab import runs
from tethertune.lab.report import trials
from tethertune.lab.report.grouping import compare


def compared(folders):
    [comparison] = compare(runs.find([folders.root]))
    return comparison


def trial(number, study="s"):
    return {"part": {"kind": "trial", "study": study, "number": number}, "place": "trials"}


@pytest.fixture
def searched(folders):
    """Three trials of mars-pgm, one of them unfinished, and two of plain fine-tuning, whose learning rate is tuned."""
    for number, (radius, accuracy) in enumerate(((0.5, 0.7), (2.0, 0.9))):
        folders.add(None, validation=accuracy, method="mars-pgm", radius=radius, head_radius=3.0, **trial(number))
    folders.add(None, method="mars-pgm", radius=9.0, head_radius=3.0, status="running", **trial(2))
    for number, rate in enumerate((1e-4, 1e-3)):
        folders.add(None, validation=0.6, lr=rate, **trial(number))
    return folders


def test_the_best_trial_of_each_search(searched):
    [table] = trials.tables(compared(searched))

    assert [[cell.text for cell in row] for row in table.rows] == [
        ["none", "2", "60.0 %", "learning rate 0.0001", "s"],
        ["mars-pgm", "3 (1 unfinished)", "90.0 %", "radius 2", "s"],
    ]


def test_a_chart_for_each_value_that_was_tuned(searched):
    [figure] = trials.figures(compared(searched))

    assert [chart.title for chart in figure.charts] == ["Radius", "Learning rate"]
    [dots] = figure.charts[0].spec["datasets"].values()
    assert dots == [
        {"series": "mars-pgm", "value": 0.5, "accuracy": 70.0, "trial": 0},
        {"series": "mars-pgm", "value": 2.0, "accuracy": 90.0, "trial": 1},
    ]


def test_trials_are_no_results(searched):
    searched.add(0.8)

    comparison = compared(searched)

    assert len(comparison.groups) == 1
    assert len(comparison.trials) == 5
    assert comparison.unfinished == []


def test_no_trial_no_figure(demo):
    assert trials.figures(compared(demo)) == []
    assert trials.tables(compared(demo)) == []
