from pathlib import Path

import pytest

from tethertune.errors import ConfigurationError
from tethertune.lab import comparison_file
from tethertune.lab.methods import METHODS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

SMALL = """
models = ["lite0"]
tasks = ["fashion", "photos/birds"]
methods = ["none", "l2-sp", "mars-pgm"]
seeds = 2
"""


@pytest.fixture
def load(tmp_path):
    def read(text, **overrides):
        path = tmp_path / "comparison.toml"
        path.write_text(text)
        return comparison_file.load(path, overrides)

    return read


def faults(load, text):
    with pytest.raises(ConfigurationError) as caught:
        load(text)
    lines = str(caught.value).splitlines()
    assert all("comparison.toml: " in line for line in lines)
    return [line.partition("comparison.toml: ")[2] for line in lines]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_is_a_comparison(path):
    found = comparison_file.load(path)
    assert found.cells
    for cell in found.cells:
        for values in cell.given or ({},):
            runs = found.final(cell, values)
            assert [run.seed for run in runs] == list(found.seeds)
            assert len({run.hash for run in runs}) == len(runs)
            found.swept(cell, values)


def test_the_paper_is_sixty_cells_of_twenty_trials_and_five_seeds():
    found = comparison_file.load("configs/paper.toml")
    assert len(found.cells) == 60
    assert {found.trials(cell) for cell in found.cells if cell.method != "none"} == {20}
    assert found.seeds == (1, 2, 3, 4, 5)
    assert found.retrain_on == "train+validation"


def test_the_authors_values_are_of_both_versions_where_they_differ():
    found = comparison_file.load("configs/paper-tuned.toml")
    cells = {(cell.model, cell.task, cell.method): cell for cell in found.cells}
    twice = sorted(key for key, cell in cells.items() if len(cell.given) == 2)
    assert twice == [
        ("efficientnet_b0", "butterfly", "mars-pgm"),
        ("efficientnet_b0", "pubfig", "mars-pgm"),
        ("resnet101", "aircraft", "mars-pgm"),
        ("resnet101", "pets", "mars-pgm"),
    ]
    first, last = cells["resnet101", "pets", "mars-pgm"].given
    assert round(first["radius"], 3) == 2.616
    assert round(last["radius"], 3) == 13.952


def test_the_demo_has_every_method_with_three_seeds_and_a_plain_good_head_beside_them():
    found = comparison_file.load("configs/demo.toml")
    runs = [run for cell in found.cells for values in cell.given for run in found.final(cell, values)]
    assert len({run.hash for run in runs}) == len(runs) == 21
    assert {run.method for run in runs if run.head == "flatten"} == set(METHODS)
    assert [(run.method, run.lr) for run in runs if run.head == "pool"] == [("none", 3e-4)] * 3


def test_lists_and_tables_are_the_same(load):
    short = load(SMALL)
    long = load(
        """
        methods = ["none", "l2-sp", "mars-pgm"]
        seeds = [1, 2]
        [models.lite0]
        [tasks.fashion]
        [tasks.birds]
        data = "photos/birds"
        """
    )
    assert short == long
    assert [cell.name for cell in short.cells][:4] == [
        "lite0 fashion none",
        "lite0 fashion l2-sp",
        "lite0 fashion mars-pgm",
        "lite0 birds none",
    ]
    assert [cell.base.data for cell in short.cells][3] == "photos/birds"


def test_options_of_tasks_win_over_those_of_networks_of_all_and_of_the_protocol(load):
    found = load(
        """
        protocol = "authors"
        methods = ["none"]
        [train]
        epochs = 7
        lr = 0.1
        size = 64
        [models.lite0]
        lr = 0.2
        size = 65
        [tasks.fashion]
        size = 66
        """
    )
    base = found.cells[0].base
    assert (base.batch_size, base.epochs, base.lr, base.size) == (128, 7, 0.2, 66)


def test_values_are_of_a_cell_or_of_a_method_and_unset_what_is_not_given(load):
    found = load(
        SMALL
        + """
        [values]
        mars-pgm = { radius = 2.0 }
        l2-sp = [{ strength = 1.0 }, { strength = 2.0, lr = 0.5 }]
        [values.lite0.birds]
        mars-pgm = { relative_radius = 0.5, head_radius = 3.0 }
        """
    )
    given = {(cell.task, cell.method): cell for cell in found.cells}
    fashion, birds = given["fashion", "mars-pgm"], given["birds", "mars-pgm"]
    run = found.final(fashion, fashion.given[0])[0]
    assert (run.radius, run.relative_radius, run.head_radius) == (2.0, None, None)
    run = found.final(birds, birds.given[0])[0]
    assert (run.radius, run.relative_radius, run.head_radius) == (None, 0.5, 3.0)
    cell = given["fashion", "l2-sp"]
    assert [(r.strength, r.lr) for v in cell.given for r in found.final(cell, v)] == [(1, 3e-4)] * 2 + [(2, 0.5)] * 2
    plain = given["fashion", "none"]
    assert not plain.given
    assert len(found.final(plain, {})) == 2


def test_a_search_is_of_what_is_not_given(load):
    text = SMALL + "[values]\nmars-pgm = { radius = 2.0 }\n[search]\ntrials = 3\n"
    counts = {cell.method: (found := load(text)).trials(cell) for cell in load(text).cells}
    assert counts == {"none": 0, "l2-sp": 3, "mars-pgm": 0}
    found = load(text + "tune_lr = true\n")
    assert {cell.method: found.trials(cell) for cell in found.cells} == {"none": 3, "l2-sp": 3, "mars-pgm": 0}


def test_curves_are_of_the_chosen_values_and_of_what_a_method_has(load):
    found = load(SMALL + "[sweeps]\nlr = [0.1, 0.2]\nstrengths = [10]\nseeds = [4]\ntasks = ['birds']\n")
    cells = {(cell.task, cell.method): cell for cell in found.cells}
    assert found.swept(cells["fashion", "l2-sp"], {}) == []
    assert [part["value"] for _, part in found.swept(cells["birds", "none"], {})] == [0.1, 0.2]
    runs = found.swept(cells["birds", "l2-sp"], {"strength": 0.5, "head_strength": 0.25, "lr": 0.3})
    assert [(part["key"], part["value"]) for _, part in runs] == [("lr", 0.1), ("lr", 0.2), ("strengths", 10)]
    assert [(run.lr, run.strength, run.head_strength, run.seed) for run, _ in runs] == [
        (0.1, 0.5, 0.25, 4),
        (0.2, 0.5, 0.25, 4),
        (0.3, 5.0, 2.5, 4),
    ]


def test_processes_share_the_cores_unless_the_file_says_how(load, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert {cell.base.threads for cell in load(SMALL + "workers = 3\n").cells} == {4}
    assert {cell.base.threads for cell in load(SMALL + "workers = 40\n").cells} == {1}
    assert {cell.base.threads for cell in load(SMALL + "[train]\nthreads = 2\n").cells} == {2}
    assert {cell.base.threads for cell in load(SMALL, executor="local").cells} == {None}


def test_flags_win_over_the_file(load):
    found = load(SMALL + "workers = 3\n", workers=1, output="elsewhere")
    assert (found.workers, found.output) == (1, Path("elsewhere"))


def test_all_faults_are_told_at_once(load):
    told = faults(
        load,
        """
        model = ["lite0"]
        methods = ["mars"]
        protocol = "autors"
        executor = "ray"
        seeds = 0
        workers = 1.5
        retrain_on = "test"
        train = 3
        [sweeps]
        radius = [1]
        lr = [0]
        [interpolate]
        retain_size = 3
        """,
    )
    for start in (
        "model is not a key of a comparison. Did you mean 'models'?",
        "models names the networks to compare: give a list",
        "tasks names the tasks to compare: give a list",
        "methods: mars is not known: use none,",
        "protocol: autors is not known: use default, paper, authors. Did you mean 'authors'?",
        "executor: ray is not known: use local, processes.",
        "seeds = 0 is not allowed",
        "workers = 1.5 is not allowed: use a whole number",
        "retrain_on: test is not known",
        "train is a table: write [train].",
        "sweeps.radius is not known: use lr, strengths, seeds, tasks.",
        "sweeps.lr = [0] is not allowed: use a list of learning rates, each above 0.",
        "interpolate.retain_size = 3 is not allowed",
        "interpolate.alphas is missing",
    ):
        assert any(line.startswith(start) for line in told), (start, told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[train]\nepoch = 3", "lite0, fashion, none: epoch is not an option of finetune. Did you mean 'epochs'?"),
        ("[train]\nepochs = 0", "lite0, fashion, none: --epochs 0 is not allowed: use a whole number, 1 or more."),
        ("[train]\nseed = 3", "lite0, fashion, none: seed is set by the comparison itself: take it out."),
        ("[search]\ntrials = 0", "search: --trials 0 is not allowed: use a whole number, 1 or more."),
        ("[search]\ntrails = 1", "search: trails is not an option of search. Did you mean 'trials'?"),
        ("[values]\nmars-pgm = { strength = 1.0 }", "lite0, fashion, mars-pgm: --strength 1.0 goes with --method"),
        ("[values.lite1.fashion]\nnone = {}", "values.lite1 is neither a method nor a network"),
        ("[values.lite0.bird]\nnone = {}", "values.lite0.bird is not a task of this comparison"),
        ("[values.lite0.birds]\nmars = {}", "values.lite0.birds.mars is not a method"),
        (
            "[sweeps]\nlr = [1]\ntasks = ['bird']",
            "sweeps.tasks = ['bird'] is not allowed: use a list of fashion, birds.",
        ),
    ],
)
def test_each_fault_says_where_it_is_and_what_to_do(load, text, told):
    assert any(line.startswith(told) for line in faults(load, SMALL + text)), faults(load, SMALL + text)


@pytest.mark.parametrize("text", ["models = [", "\x00"])
def test_a_file_that_is_no_toml_is_named(load, text):
    with pytest.raises(ConfigurationError, match=r"comparison\.toml: not a readable TOML file"):
        load(text)
