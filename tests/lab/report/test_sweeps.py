from tethertune.lab import runs
from tethertune.lab.report import sweeps
from tethertune.lab.report.grouping import compare


def compared(folders):
    [comparison] = compare(runs.find([folders.root]))
    return comparison


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def strengths(value):
    return {"part": {"kind": "sweep", "key": "strengths", "value": value}, "place": "sweeps"}


def rate(value):
    return {"part": {"kind": "sweep", "key": "lr", "value": value}, "place": "sweeps", "lr": value}


def test_factors_stand_around_the_results(folders):
    for seed, accuracy in enumerate((0.8, 0.9)):
        folders.add(accuracy, seed=seed, method="mars-pgm", radius=0.3, head_radius=3.0)
    for value in (0.1, 10.0, 1e4):
        folders.add(0.7, method="mars-pgm", radius=0.3 * value, head_radius=3.0 * value, **strengths(value))

    [table] = sweeps.tables(compared(folders))

    assert list(table.columns) == ["Multiplier of the chosen values", "mars-pgm"]
    assert texts(table) == [["0.1", "70.0"], ["1", "85.0 ± 7.1"], ["10", "70.0"], ["10000", "70.0"]]


def test_only_the_result_that_was_multiplied_is_at_one(folders):
    for accuracy, radius in ((0.8, 0.5), (0.9, 2.0)):
        folders.add(accuracy, method="mars-pgm", radius=radius)
    folders.add(0.7, method="mars-pgm", radius=20.0, **strengths(10.0))

    [table] = sweeps.tables(compared(folders))

    assert list(table.columns)[1:] == ["mars-pgm (radius 2)"]
    assert texts(table) == [["1", "90.0"], ["10", "70.0"]]


def test_learning_rates_of_every_method_are_a_curve_with_the_results_on_it(folders):
    folders.add(0.8, lr=1e-3)
    folders.add(0.9, lr=3e-4, method="mars-pgm", radius=1.0)
    for value in (1e-4, 1e-2):
        folders.add(0.5, **rate(value))
        folders.add(0.6, method="mars-pgm", radius=1.0, **rate(value))

    [figure] = sweeps.figures(compared(folders))
    spec = figure.charts[0].spec

    assert texts(figure.table) == [
        ["0.0001", "50.0", "60.0"],
        ["0.0003", "-", "90.0"],
        ["0.001", "80.0", "-"],
        ["0.01", "50.0", "60.0"],
    ]
    assert [layer["encoding"]["x"]["scale"]["type"] for layer in spec["layer"]] == ["log", "log"]
    assert [key.label for key in figure.legend] == ["none", "mars-pgm"]


def test_a_run_that_was_made_twice_counts_once(folders):
    folders.add(0.8, lr=1e-3)
    folders.add(0.7, **rate(1e-3))
    folders.add(0.5, **rate(1e-2))

    [table] = sweeps.tables(compared(folders))

    assert texts(table) == [["0.001", "80.0"], ["0.01", "50.0"]]


def test_a_point_whose_runs_diverged_is_in_the_table_alone(folders):
    folders.add(0.8, lr=1e-3)
    folders.add(None, **rate(1.0), status="diverged")

    [figure] = sweeps.figures(compared(folders))

    assert texts(figure.table)[1] == ["1", "NaN"]
    assert [row["place"] for rows in figure.charts[0].spec["datasets"].values() for row in rows] == [0.001]


def test_where_every_run_diverged_there_is_a_table_alone(folders):
    folders.add(None, **rate(1.0), status="diverged")

    [figure] = sweeps.figures(compared(folders))

    assert figure.charts == []
    assert texts(figure.table) == [["1", "NaN"]]


def test_configurations_of_one_method_are_lines_of_their_own(folders):
    for head in ("pool", "flatten"):
        folders.add(0.5, head=head, **rate(1e-2))

    [table] = sweeps.tables(compared(folders))

    assert list(table.columns)[1:] == ["none", "none #2"]


def test_unfinished_runs_are_on_no_line(folders):
    folders.add(0.8)
    folders.add(None, **rate(1e-2), status="running")

    assert sweeps.figures(compared(folders)) == []


def test_no_sweep_no_figure(demo):
    assert sweeps.figures(compared(demo)) == []
    assert sweeps.tables(compared(demo)) == []
