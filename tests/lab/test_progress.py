import pytest

from tethertune.lab.comparison import Cell
from tethertune.lab.progress import Plan, View


@pytest.fixture
def cells(tiny):
    return [Cell(model, "pets", tiny(method="none"), ()) for model in ("small", "large")]


def test_the_time_left_is_judged_by_like_runs(cells):
    small, large = cells
    with View([Plan(small, trial=0, run=3, sweep=0), Plan(large, 0, 3, 0)], workers=2, quiet=True) as view:
        assert view.left() == "time left not known yet"
        view.done(small, "run", "", 10.0)
        assert view.left() == "about 25 s left"  # five of 10 s, two at a time
        view.done(large, "run", "", 100.0)
        view.done(large, "run", "", 200.0)
        assert view.left() == "about 1 min 25 s left"  # two of 10 s and one of 150 s
        view.skip(small, "run", 2)
        view.skip(large, "run")
        assert view.left() == "nothing left"


def test_each_run_is_a_line_where_there_is_no_terminal(cells, capfd):
    with View([Plan(cells[0], trial=1, run=2, sweep=1)], workers=1) as view:
        view.skip(cells[0], "trial")
        view.done(cells[0], "run", "seed 1, test accuracy 75.0%", 5.0)
    told = capfd.readouterr().err.splitlines()
    assert told == ["[2/4, 0 s, about 10 s left] small pets none: seed 1, test accuracy 75.0%"]
