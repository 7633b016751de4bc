import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tethertune.errors import DataError
from tethertune.lab import sources
from tethertune.lab.sources.source import SPLIT_OF_WORD, check_classes


@given(st.integers(0, 5), st.data())
def test_every_class_must_have_a_training_image_and_there_must_be_two(count, data):
    classes = [f"class {label}" for label in range(count)]
    labels = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=12)) if count else [], np.int64)
    train = data.draw(st.lists(st.sampled_from(range(len(labels))), unique=True)) if len(labels) else []
    splits = {"train": np.array(train, np.int64), "test": np.arange(len(labels))}
    without = [name for label, name in enumerate(classes) if label not in labels[splits["train"]]]
    if count < 2:
        with pytest.raises(DataError, match=f"pets has {count} classes; two or more are needed"):
            check_classes("pets", classes, labels, splits)
    elif without:
        with pytest.raises(DataError, match=f"class '{without[0]}' of pets has no training images"):
            check_classes("pets", classes, labels, splits)
    else:
        check_classes("pets", classes, labels, splits)


def test_every_word_for_a_split_is_how_its_name_begins_and_a_folder_of_it_is_read_as_that_split(make_images, tmp_path):
    assert set(SPLIT_OF_WORD) >= {"train", "val", "valid", "validation", "test"}
    assert list(dict.fromkeys(SPLIT_OF_WORD.values())) == ["train", "validation", "test"]
    for word, split in SPLIT_OF_WORD.items():
        assert split.startswith(word)
        root = make_images(tmp_path / word, {f"{name}/{label}": 1 for name in {"train", word} for label in "ab"})
        assert list(sources.find(str(root)).splits) == list(dict.fromkeys(("train", split)))
