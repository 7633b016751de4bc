import numpy as np

from tethertune.lab.randomness import generator


def test_the_same_keys_give_the_same_numbers():
    assert np.array_equal(generator("shuffle", 1, 2).random(8), generator("shuffle", 1, 2).random(8))


def test_other_purposes_and_keys_give_other_numbers():
    keys = [("shuffle", 1, 2), ("shuffle", 2, 1), ("shuffle", 1, 3), ("augment", 1, 2), ("augment", 1, 2, 1)]
    assert len({tuple(generator(*key).random(8)) for key in keys}) == len(keys)
