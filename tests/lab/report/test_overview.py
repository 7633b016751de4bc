import pytest

from tethertune.lab import runs
from tethertune.lab.report.grouping import compare
from tethertune.lab.report.overview import overview, titles


def add_task(folders, task, *, seeds=3, **accuracies):
    """Runs of methods on a task; a method's accuracy is that of its first seed, and each seed is a point higher."""
    for method, accuracy in accuracies.items():
        for seed in range(seeds):
            folders.add(accuracy + 0.01 * seed, method=method.replace("_", "-"), seed=seed, place=task, task=task)


def seen(folders):
    return overview(compare(runs.find([folders.root])))


def row(found, method):
    return [cell.text for cell in next(row for row in found.table.rows if row[0].text == method)]


@pytest.fixture
def five(folders):
    """Five tasks where mars-pgm beats plain fine-tuning by 1 to 5 points, and l2-sp by 3.5 on three, losing on two."""
    for number in range(1, 6):
        ball, penalty = 0.7 + 0.01 * number, 0.735 if number > 2 else 0.69
        add_task(folders, f"task-{number}", none=0.7, l2_sp=penalty, mars_pgm=ball)
    return folders


def test_the_headline_names_winner_gain_and_interval(five):
    said = seen(five).answer

    assert said.headline.startswith(
        "Over 5 tasks, mars-pgm has the best mean rank 1.2 of 3, +3.0 points over none on the same 5 tasks "
        "(95 % interval +1."
    )
    assert said.method == "mars-pgm"
    assert said.clear
    assert said.details[0] == "The interval leaves out 0: the difference is more than noise."
    assert said.details[1].endswith("mars-pgm is better than none on 5 of 5 and worse on 0.")
    assert said.details[2].startswith("Its lead over the next, l2-sp (mean rank 2.")


def test_the_table_has_a_row_a_method_and_a_column_a_task(five):
    found = seen(five)

    assert list(found.table.columns) == [
        "Method",
        *(f"task-{number}" for number in range(1, 6)),
        "Mean rank",
        "Tasks better than none",
        "Tasks worse than none",
    ]
    assert row(found, "none") == ["none", *["71.0 ± 1.0 %"] * 5, "2.60", "-", "-"]
    assert row(found, "l2-sp")[-3:] == ["2.20", "3", "2"]
    assert row(found, "mars-pgm")[-3:] == ["1.20", "5", "0"]


def test_only_the_best_beyond_noise_is_strong(five):
    strong = [[cell.strong for cell in row] for row in seen(five).table.rows]

    assert strong[0] == [False] * 9
    assert strong[1] == [False, False, False, True, *[False] * 5]
    assert strong[2] == [False, True, True, False, True, True, *[False] * 3]


def test_equal_means_share_their_rank(folders):
    for task in ("a", "b"):
        add_task(folders, task, none=0.5, l2_sp=0.5, mars_pgm=0.6)

    found = seen(folders)

    assert [row(found, method)[-3] for method in ("none", "l2-sp", "mars-pgm")] == ["2.50", "2.50", "1.00"]


def test_a_task_without_a_method_is_not_ranked(folders):
    for task in ("a", "b", "c"):
        add_task(folders, task, none=0.5, mars_pgm=0.6)
    add_task(folders, "d", none=0.9)
    add_task(folders, "e", none=0.9)
    folders.add(None, method="mars-pgm", place="e", task="e", seed=0)

    found = seen(folders)

    assert found.answer.headline.startswith("Over 3 tasks, mars-pgm")
    assert found.answer.details[-1] == "Not ranked, because not every method has a mean there: d; e."
    assert row(found, "mars-pgm")[4:6] == ["-", "NaN"]


def test_differences_inside_the_noise_of_the_tasks_are_not_clear(folders):
    for task, ball in (("a", 0.9), ("b", 0.71), ("c", 0.6)):
        add_task(folders, task, none=0.7, mars_pgm=ball)

    said = seen(folders).answer

    assert not said.clear
    assert said.details[0].startswith("The interval includes 0: the difference is inside the noise")


def test_two_tasks_cannot_tell(folders):
    for task in ("a", "b"):
        add_task(folders, task, none=0.7, mars_pgm=0.9)

    said = seen(folders).answer

    assert not said.clear
    assert said.details[0].startswith("Two tasks cannot tell either")
    assert len(said.details) == 2


def test_the_lead_over_the_next_needs_three_tasks_too(folders):
    for task in ("a", "b"):
        add_task(folders, task, none=0.7, l2_sp=0.8, mars_pgm=0.9)

    assert seen(folders).answer.details[-1] == (
        "Its lead over the next, l2-sp (mean rank 2), is +10.0 points over the tasks: "
        "too few of them to tell it from noise."
    )


def test_plain_fine_tuning_may_rank_best(folders):
    for task in ("a", "b", "c"):
        add_task(folders, task, none=0.9, mars_pgm=0.8)

    said = seen(folders).answer

    assert said.headline == (
        "No method ranks better than plain fine-tuning. Over 3 tasks, none has the best mean rank 1 of 2."
    )
    assert not said.clear
    assert said.details == [
        (
            "Its lead over the next, mars-pgm (mean rank 2), is +10.0 points (+10.0 to +10.0) over the tasks: "
            "more than the scatter between the tasks."
        )
    ]


def test_without_plain_fine_tuning_there_is_no_gain(folders):
    for task in ("a", "b"):
        add_task(folders, task, l2_sp=0.7, mars_pgm=0.8)

    found = seen(folders)

    assert found.answer.headline.endswith("mars-pgm has the best mean rank 1 of 2; no run of none has its seeds.")
    assert found.table.columns[-1] == "Mean rank"


def test_one_method_is_not_compared(folders):
    for task in ("a", "b"):
        add_task(folders, task, none=0.7)

    assert "only none on them" in seen(folders).answer.headline


def test_no_task_with_every_method_gives_no_rank(folders):
    add_task(folders, "a", none=0.7)
    add_task(folders, "b", mars_pgm=0.7)

    found = seen(folders)

    assert "so no rank is given" in found.answer.headline
    assert row(found, "none")[-3] == "-"


def test_one_task_needs_no_overview(folders):
    add_task(folders, "a", none=0.7)
    folders.add(None, place="b", task="b", status="running")

    assert seen(folders) is None


def test_networks_are_told_apart(folders):
    for model in ("lite0", "resnet50"):
        folders.add(0.7, model=model, task="a")

    assert titles(compare(runs.find([folders.root]))) == ["a, lite0", "a, resnet50"]
