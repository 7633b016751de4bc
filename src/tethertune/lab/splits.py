"""Which image belongs to which split, and which of them a run trains on: a pure function of labels and seed."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tethertune.errors import ConfigurationError, DataError
from tethertune.lab.randomness import generator

__all__ = ["HELD_OUT_PERCENT", "by_class", "complete", "in_proportion", "subset", "with_noise"]

HELD_OUT_PERCENT = 15
"""Share of each class that a split gets which the data does not come with."""


def complete(
    given: Mapping[str, NDArray[np.int64]], labels: NDArray[np.int64], classes: Sequence[str], seed: int
) -> dict[str, NDArray[np.int64]]:
    """Hold out of ``train`` whatever is missing of ``validation`` and ``test``, stratified.

    Each missing split gets 15 % of every class, rounded down, but at least one image.

    Args:
        given: Indices of the images of each split that there is; ``train`` at least.
        labels: (n,) the class of every image.
        classes: Names of the classes.
        seed: Another seed holds out other images.

    Returns:
        Ascending indices of ``train``, ``validation`` and ``test``, which share none.

    Raises:
        DataError: A class has too few images for one in every split.
    """
    missing = [split for split in ("validation", "test") if split not in given]
    if not missing:
        return dict(given)
    parts: dict[str, list[NDArray[np.int64]]] = {split: [] for split in ("train", *missing)}
    for label, shuffled in _shuffled("split", given["train"], labels, len(classes), seed):
        if len(shuffled) <= len(missing):
            raise DataError(
                f"class {classes[label]!r} has {len(shuffled)} images; "
                f"splitting it into {', '.join(parts)} takes at least {len(parts)}."
            )
        share = max(1, len(shuffled) * HELD_OUT_PERCENT // 100)
        for position, split in enumerate(missing):
            parts[split].append(shuffled[position * share : (position + 1) * share])
        parts["train"].append(shuffled[len(missing) * share :])
    return dict(given) | {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


def in_proportion(labels: NDArray[np.int64], sizes: Mapping[str, int], seed: int) -> dict[str, NDArray[np.int64]]:
    """Split images into splits of exactly these sizes, each with the share of every class that all images have.

    Shares are exact up to one image: the images are put into one order in which those of each class are evenly spaced,
    and the order is cut.

    Args:
        labels: (n,) the class of every image.
        sizes: Number of images in each split, n in all.
        seed: Another seed splits otherwise.

    Returns:
        Ascending indices of each split, which share none.
    """
    place = np.empty(len(labels))
    for label, shuffled in _shuffled("in proportion", np.arange(len(labels)), labels, labels.max() + 1, seed):
        start = generator("in proportion, start", seed, label).random()
        place[shuffled] = (np.arange(len(shuffled)) + start) / len(shuffled)
    parts = np.split(np.argsort(place, kind="stable"), np.cumsum(list(sizes.values()))[:-1])
    return {split: np.sort(part) for split, part in zip(sizes, parts, strict=True)}


def by_class(
    labels: NDArray[np.int64], counts: Mapping[str, int], rest: str, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Split images with so many of every class in each split, and whatever is left in the split ``rest``.

    Args:
        labels: (n,) the class of every image.
        counts: Images of each class in each split but ``rest``.
        rest: The split that gets the others.
        seed: Another seed splits otherwise.

    Returns:
        Ascending indices of each split, which share none.
    """
    names = (*counts, rest)
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in names}
    for _, shuffled in _shuffled("by class", np.arange(len(labels)), labels, labels.max() + 1, seed):
        for name, part in zip(names, np.split(shuffled, np.cumsum(list(counts.values()))), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def subset(
    members: NDArray[np.int64],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    per_class: int | None,
    seed: int,
    *,
    key: str = "per_class",
    kind: str = "training",
) -> NDArray[np.int64]:
    """Keep ``per_class`` of the members of every class, or all of them for None.

    With one seed, a smaller subset is part of a larger one.

    Args:
        members: Ascending indices of the images of a split.
        labels: (n,) the class of every image.
        classes: Names of the classes.
        per_class: How many to keep of each class.
        seed: Another seed keeps other images.
        key: What the number is called in the configuration.
        kind: What images of the split are called.

    Raises:
        ConfigurationError: ``per_class`` is below 1, or more than some class has.
    """
    if per_class is None:
        return members
    counts = np.bincount(labels[members], minlength=len(classes))
    scarcest = int(counts.argmin())
    if not 1 <= per_class <= counts[scarcest]:
        raise ConfigurationError(
            f"{key} = {per_class}, but class {classes[scarcest]!r} has {counts[scarcest]} {kind} images; "
            f"give a number from 1 to {counts[scarcest]}."
        )
    drawn = [shuffled[:per_class] for _, shuffled in _shuffled("subset", members, labels, len(classes), seed)]
    return np.sort(np.concatenate(drawn))


def with_noise(labels: NDArray[np.int64], classes: int, share: float, seed: int) -> NDArray[np.int64]:
    """Replace a share of the labels, each by another class, all others being equally likely.

    Args:
        labels: (n,) the true labels.
        classes: Number of classes, 2 or more.
        share: ``round(share * n)`` labels are replaced, 0 to below 1.
        seed: Another seed replaces others.

    Raises:
        ConfigurationError: ``share`` is not allowed.
    """
    if not 0 <= share < 1:
        raise ConfigurationError(f"label_noise = {share}; give the share of wrong labels, from 0 to below 1.")
    random = generator("label noise", seed)
    wrong = random.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + random.integers(1, classes, len(wrong))) % classes
    return noisy


def _shuffled(
    purpose: str, members: NDArray[np.int64], labels: NDArray[np.int64], classes: int, seed: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each class and its members in random order; the order in one class does not depend on the others."""
    for label in range(classes):
        yield label, generator(purpose, seed, label).permutation(members[labels[members] == label])
