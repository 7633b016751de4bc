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
    assert rows[0] == [
        "none",
        "-",
        "flatten",
        "0.0005",
        "1, 2, 3",
        "71.0 ± 4.0 %",
        "-",
        "\N{MINUS SIGN}4.6 (\N{MINUS SIGN}6.5 to \N{MINUS SIGN}3.0) to mars-pgm",
        "-",
        "22 s",
    ]
    assert rows[5] == [
        "mars-pgm",
        "relative radius 0.02",
        "flatten",
        "0.0005",
        "1, 2, 3",
        "75.6 ± 3.9 %",
        "+4.6 (+3.0 to +6.5)",
        "+0.6 (\N{MINUS SIGN}0.2 to +1.9) to l2-pgm",
        "+4.4, +6.5, +3.0",
        "22 s",
    ]
    assert rows[6][:6] == ["none", "-", "pool", "0.0003", "1, 2, 3", "75.9 ± 3.2 %"]


def test_only_what_is_more_than_noise_is_strong(demo):
    table = tables.results(compared(demo))
    strong = [[table.columns[place] for place, cell in enumerate(row) if cell.strong] for row in table.rows]
    to_none, to_best = "Difference to none (95 % interval)", "To the best other (95 % interval)"

    assert strong == [[to_best], [to_best], [to_best], [to_best], [to_none], ["Test accuracy", to_none], []]


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


def test_the_best_other_is_of_another_method(folders):
    for accuracy, radius in ((0.9, 0.5), (0.8, 1.0)):
        folders.add(accuracy, method="mars-pgm", radius=radius)
    folders.add(0.7)

    assert [row[7] for row in texts(tables.results(compared(folders)))] == [
        "\N{MINUS SIGN}20.0 to mars-pgm",
        "+20.0 to none",
        "+10.0 to none",
    ]


def test_learning_rates_that_a_search_chose_stand_in_their_rows(folders):
    folders.add(0.7, lr=1e-3)
    folders.add(0.8, method="mars-pgm", lr=3e-4, head_lr=1e-3)

    rows = texts(tables.results(compared(folders)))

    assert [row[3] for row in rows] == ["0.001", "0.0003, head 0.001"]
    assert rows[1][6] == "+10.0"
