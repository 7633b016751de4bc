import pytest

from tethertune.lab import runs
from tethertune.lab.report.grouping import compare
from tethertune.lab.report.paper_tables import notes, paper_tables

MINUS = "\N{MINUS SIGN}"
PETS = (2000, 2000, 3390)


def comparisons(folders):
    return compare(runs.find([folders.root]))


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


@pytest.fixture
def pets(folders):
    """Two methods on pets and one on flowers, of ResNet-101."""
    for seed, gain in enumerate((0.0, 0.01, 0.02)):
        folders.add(0.84 + gain, seed=seed, data="pets", model="resnet101.tv_in1k", sizes=PETS)
        folders.add(0.87 + gain, seed=seed, method="mars-pgm", data="pets", model="resnet101.tv_in1k", sizes=PETS)
    folders.add(0.75, data="flowers", model="resnet101.tv_in1k", sizes=(1020, 1020, 6149))
    return folders


def test_each_figure_stands_beside_that_of_the_paper(pets):
    [table] = paper_tables(comparisons(pets))

    assert table.caption == "Table 2, ResNet-101: resnet101.tv_in1k beside the paper"
    assert list(table.columns) == ["Method", "What", "flowers", "pets"]
    assert texts(table) == [
        ["none", "here", "75.0 %", "85.0 ± 1.0 %"],
        ["none", "paper", "76.7 ± 1.1 %", "84.2 ± 0.3 %"],
        ["none", "difference", f"{MINUS}1.7", "+0.8"],
        ["mars-pgm", "here", "-", "88.0 ± 1.0 %"],
        ["mars-pgm", "paper", "87.4 ± 0.4 %", "88.4 ± 0.3 %"],
        ["mars-pgm", "difference", "-", f"{MINUS}0.4"],
    ]


def test_only_the_best_beyond_noise_is_strong(pets):
    [table] = paper_tables(comparisons(pets))

    assert [cell.text for row in table.rows for cell in row if cell.strong] == ["88.0 ± 1.0 %"]


def test_networks_have_tables_in_the_order_of_the_paper(pets):
    for model in ("tf_efficientnet_b0.aa_in1k", "torchvision:efficientnet_b0"):
        pets.add(0.9, data="pets", model=model, sizes=PETS)

    assert [table.caption.split(" beside")[0] for table in paper_tables(comparisons(pets))] == [
        "Table 2, ResNet-101: resnet101.tv_in1k",
        "Table 3, EfficientNet-B0: tf_efficientnet_b0.aa_in1k",
        "Table 3, EfficientNet-B0: torchvision:efficientnet_b0",
    ]


def test_a_task_of_another_name_is_still_the_data_set(folders):
    folders.add(0.8, data="pets", task="pets, authors' head", model="resnet101", sizes=PETS)

    [table] = paper_tables(comparisons(folders))

    assert table.columns[2] == "pets, authors' head"


def test_other_networks_and_data_have_no_table(folders):
    folders.add(0.8, data="pets")
    folders.add(0.8, data="dtd", model="resnet101")
    folders.add(None, data="pets", model="resnet101", status="running")

    assert paper_tables(comparisons(folders)) == []
    assert notes(comparisons(folders)) == []


def test_other_sizes_are_told(folders):
    folders.add(0.8, data="pets", model="resnet101", sizes=(20, 20, 40))

    assert notes(comparisons(folders)) == [
        (
            "Not the paper's sizes: pets has 20 training, 20 validation, 40 test images here "
            "and 2,000 training, 2,000 validation, 3,390 test in the paper."
        )
    ]


@pytest.mark.parametrize(("train_on", "train"), [("train", 2000), ("train+validation", 4000)])
def test_the_papers_own_sizes_need_no_note(folders, train_on, train):
    folders.add(0.8, data="pets", model="resnet101", sizes=(train, 2000, 3390), train_on=train_on)

    assert notes(comparisons(folders)) == []
