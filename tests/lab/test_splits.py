import numpy as np
import pytest

from tethertune.errors import ConfigurationError, DataError
from tethertune.lab import splits

CLASSES = ("ant", "bee", "cow")
LABELS = np.repeat([0, 1, 2], [3, 20, 100])
ALL = {"train": np.arange(len(LABELS))}


def counts(members):
    return np.bincount(LABELS[members], minlength=3).tolist()


def test_class_folders_are_split_70_15_15_class_by_class():
    parts = splits.complete(ALL, LABELS, CLASSES, seed=0)
    assert counts(parts["train"]) == [1, 14, 70]
    assert counts(parts["validation"]) == counts(parts["test"]) == [1, 3, 15]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(LABELS)))


def test_validation_comes_out_of_train_when_test_is_given():
    labels = np.repeat([0, 1, 0, 1], [10, 20, 5, 5])
    parts = splits.complete({"train": np.arange(30), "test": np.arange(30, 40)}, labels, CLASSES[:2], seed=0)
    assert np.bincount(labels[parts["validation"]]).tolist() == [1, 3]
    assert np.bincount(labels[parts["train"]]).tolist() == [9, 17]
    assert parts["test"].tolist() == list(range(30, 40))


def test_given_splits_are_kept():
    given = {name: np.array([number]) for number, name in enumerate(("train", "validation", "test"))}
    assert splits.complete(given, LABELS, CLASSES, seed=0) == given


def test_the_seed_decides():
    first, again, other = (splits.complete(ALL, LABELS, CLASSES, seed)["test"].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_one_class_does_not_disturb_the_others():
    more = np.concatenate([LABELS, np.zeros(50, np.int64)])
    before = splits.complete(ALL, LABELS, CLASSES, seed=0)["test"]
    after = splits.complete({"train": np.arange(len(more))}, more, CLASSES, seed=0)["test"]
    assert before[LABELS[before] > 0].tolist() == after[more[after] > 0].tolist()


def test_a_class_with_too_few_images_is_named():
    labels = np.repeat([0, 1], [5, 2])
    with pytest.raises(DataError, match=r"class 'bee' has 2 images; .* takes at least 3"):
        splits.complete({"train": np.arange(7)}, labels, CLASSES[:2], seed=0)


def test_a_subset_is_balanced_ascending_and_drawn_by_seed():
    bees_and_cows = np.arange(3, 123)
    drawn = [splits.subset(bees_and_cows, LABELS - 1, CLASSES[1:], 7, seed) for seed in (1, 1, 2)]
    assert all(counts(members) == [0, 7, 7] for members in drawn)
    assert all((np.diff(members) > 0).all() for members in drawn)
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()


def test_subsets_are_nested():
    small, large = (splits.subset(ALL["train"], LABELS, CLASSES, number, seed=0) for number in (1, 3))
    assert set(small) < set(large)


def test_no_number_keeps_everything():
    assert splits.subset(ALL["train"], LABELS, CLASSES, None, seed=0) is ALL["train"]


@pytest.mark.parametrize("per_class", [0, -1, 4])
def test_a_subset_that_cannot_be_is_refused(per_class):
    with pytest.raises(ConfigurationError, match=f"per_class = {per_class}.*'ant' has 3 .*from 1 to 3"):
        splits.subset(ALL["train"], LABELS, CLASSES, per_class, seed=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_in_proportion_have_exactly_their_sizes_and_every_class_its_share(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(180, 210, 37)
    labels = random.permutation(np.repeat(np.arange(37), counts))
    sizes = {"train": 2000, "validation": 2000, "test": len(labels) - 4000}
    parts = splits.in_proportion(labels, sizes, seed=0)
    assert {split: len(members) for split, members in parts.items()} == sizes
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    for split, members in parts.items():
        assert (np.diff(members) > 0).all()
        shares = counts * sizes[split] / len(labels)
        assert abs(np.bincount(labels[members], minlength=37) - shares).max() < 2
    assert parts["test"].tolist() != splits.in_proportion(labels, sizes, seed=1)["test"].tolist()


def test_splits_by_class_have_so_many_of_each():
    labels = np.repeat([0, 1, 2], [13, 20, 100])
    parts = splits.by_class(labels, {"validation": 5, "test": 7}, "train", seed=0)
    assert {split: np.bincount(labels[members]).tolist() for split, members in parts.items()} == {
        "validation": [5, 5, 5],
        "test": [7, 7, 7],
        "train": [1, 8, 88],
    }
    assert sorted(np.concatenate(list(parts.values()))) == list(range(133))
    again, other = (splits.by_class(labels, {"validation": 5, "test": 7}, "train", seed) for seed in (0, 1))
    assert parts["test"].tolist() == again["test"].tolist() != other["test"].tolist()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.99])
def test_noise_replaces_exactly_its_share_by_any_other_class(share):
    labels = np.repeat([0, 1, 2, 3], 500)
    noisy = splits.with_noise(labels, 4, share, seed=0)
    moved = (noisy - labels)[noisy != labels] % 4
    assert len(moved) == round(share * 2000)
    if share > 0.3:
        assert np.bincount(moved, minlength=4)[1:].min() > len(moved) / 3 * 0.85
    assert labels.tolist() == np.repeat([0, 1, 2, 3], 500).tolist()


def test_two_classes_are_exchanged_by_noise():
    labels = np.zeros(10, np.int64)
    assert splits.with_noise(labels, 2, 0.5, seed=3).sum() == 5
