from tethertune.lab import runs
from tethertune.lab.report import tables
from tethertune.lab.report.grouping import compare


def compared(folders):
    [comparison] = compare(runs.find([folders.root]))
    return comparison


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_results(demo):
    table = tables.results(compared(demo))
    rows = texts(table)

    assert len(rows) == 7
    assert all(len(row) == len(table.columns) for row in rows)
    assert rows[0] == ["none", "-", "flatten", "0.0005", "1, 2, 3", "71.0 ± 4.0 %", "-", "-", "22 s"]
    assert rows[5] == [
        "mars-pgm",
        "relative radius 0.02",
        "flatten",
        "0.0005",
        "1, 2, 3",
        "75.6 ± 3.9 %",
        "+4.6 (+3.0 to +6.5)",
        "+4.4, +6.5, +3.0",
        "22 s",
    ]
    assert rows[6][:6] == ["none", "-", "pool", "0.0003", "1, 2, 3", "75.9 ± 3.2 %"]


def test_only_what_is_more_than_noise_is_strong(demo):
    strong = [[cell.text for cell in row if cell.strong] for row in tables.results(compared(demo)).rows]

    assert strong[5] == ["75.6 ± 3.9 %", "+4.6 (+3.0 to +6.5)"]
    assert strong[4] == ["+4.0 (+3.2 to +4.6)"]
    assert not any(strong[:4] + strong[6:])


def test_a_winner_inside_the_noise_is_not_strong(folders):
    for method, accuracies in {"none": (0.7, 0.8), "mars-pgm": (0.69, 0.9)}.items():
        for seed, accuracy in enumerate(accuracies):
            folders.add(accuracy, method=method, seed=seed)

    assert not any(cell.strong for row in tables.results(compared(folders)).rows for cell in row)


def test_other_differences_between_settings_get_a_column(folders):
    folders.add(0.7)
    folders.add(0.7, epochs=8, head_lr=1e-3)

    table = tables.results(compared(folders))

    assert table.columns[4] == "Else"
    assert sorted(row[4] for row in texts(table)) == ["epochs 4", "epochs 8"]
    assert sorted(row[3] for row in texts(table)) == ["0.0003", "0.0003, head 0.001"]


def test_a_diverged_run_is_told(folders):
    folders.add(0.7, seed=1)
    folders.add(None, seed=2)

    assert texts(tables.results(compared(folders)))[0][5] == "NaN (1 of 2 not finite)"


def test_held(demo):
    assert texts(tables.held(compared(demo))) == [
        ["l2-pgm", "12", "33.3 %", "8.3 %", "1.000000"],
        ["mars-pgm", "12", "41.7 %", "10.4 %", "1.000000"],
    ]


def test_held_without_a_ball(folders):
    folders.add(0.7)

    assert tables.held(compared(folders)) is None
