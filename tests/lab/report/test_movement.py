import json

import pytest

from tethertune.lab import runs
from tethertune.lab.report import movement
from tethertune.lab.report.grouping import compare


def groups(folders):
    [comparison] = compare(runs.find([folders.root]))
    return {group.method: group for group in comparison.groups}


def change_layers(folder, change):
    document = json.loads((folder / "distances.json").read_text())
    for place, record in enumerate(document["layers"].values()):
        change(place, record)
    (folder / "distances.json").write_text(json.dumps(document))


def test_the_head_is_no_body_layer(folders):
    folders.add(0.7)

    names = [layer.name for layer in movement.layers(groups(folders)["none"])]

    assert names == [f"blocks.{place}.weight" for place in range(12)]


def test_one_absolute_radius_is_drawn_on_an_absolute_axis(folders):
    folders.add(0.7)
    folders.add(0.7, method="mars-pgm", radius=0.5)
    found = groups(folders)

    assert not movement.is_relative(found.values())
    assert movement.radii(found["mars-pgm"], relative=False) == [0.5]
    assert movement.radii(found["none"], relative=False) == []


def test_a_relative_radius_is_drawn_on_a_relative_axis(folders):
    folders.add(0.7, method="mars-pgm", relative_radius=0.02)
    found = groups(folders)

    assert movement.is_relative(found.values())
    assert movement.radii(found["mars-pgm"], relative=True) == pytest.approx([0.02])


def test_too_many_radii_are_not_drawn(folders):
    folder = folders.add(0.7, method="mars-pgm", radius=0.5)
    change_layers(folder, lambda place, record: record.update(radius=1.0 + place))
    found = groups(folders)

    assert not movement.is_relative(found.values())
    assert movement.radii(found["mars-pgm"], relative=False) == []


def test_a_frobenius_radius_is_no_line_among_mars_distances(folders):
    folders.add(0.7, method="l2-pgm", radius=0.1)

    assert movement.radii(groups(folders)["l2-pgm"], relative=False) == []


def test_bins_by_hand():
    bins = movement.bins([0.2, 1.0, 20.0], anchor=2.0)

    assert bins.per_decade == 12
    assert bins.edges[bins.place(2.0) + 1] == pytest.approx(2.0)  # at the radius is below it
    assert bins.edges[bins.place(2.01)] == pytest.approx(2.0)
    assert bins.edges[0] < 0.2 <= bins.edges[1]
    assert bins.edges[-2] < 20 <= bins.edges[-1] * (1 + 1e-9)
    assert bins.place(0.0) is None
    assert bins.place(float("nan")) is None


def test_bins_without_a_value_that_moved():
    assert movement.bins([0.0, float("nan")]) is None


def test_histogram_averages_over_the_runs(folders):
    folders.add(0.7, seed=1)
    folder = folders.add(0.7, seed=2)
    change_layers(folder, lambda _, record: record.update(mars=0.0))
    group = groups(folders)["none"]
    bins = movement.bins(layer.distance(relative=False) for layer in movement.layers(group))

    histogram = movement.histogram(group, bins, relative=False)

    assert sum(histogram.counts) == 6
    assert histogram.still == 6


def test_a_layer_is_binned_where_its_distance_lies(folders):
    folder = folders.add(0.7)
    change_layers(folder, lambda place, record: record.update(mars=0.5 if place < 9 else 3.0))
    group = groups(folders)["none"]
    bins = movement.bins([0.5, 3.0])

    counts = movement.histogram(group, bins, relative=False).counts

    assert counts[0] == 9
    assert counts[-1] == 3
    assert sum(counts) == 12


def test_held_counts_layers_and_rows(folders):
    folder = folders.add(0.7, method="mars-pgm", radius=1.0)
    change_layers(folder, lambda place, record: record.update(active_rows=4 if place < 3 else 0, value=0.5))

    held = movement.held(groups(folders)["mars-pgm"])

    assert held.layers == 12
    assert held.at_radius == pytest.approx(3 / 12)
    assert held.rows_at_radius == pytest.approx(12 / 96)
    assert held.fullest == pytest.approx(0.5)


def test_a_frozen_layer_that_moved_is_beyond_its_radius(folders):
    folder = folders.add(0.7, method="mars-pgm", radius=0.0)
    assert movement.held(groups(folders)["mars-pgm"]).fullest == 0

    change_layers(folder, lambda place, record: record.update(value=1e-9 * (place == 3)))
    assert movement.held(groups(folders)["mars-pgm"]).fullest == float("inf")


@pytest.mark.parametrize("method", ["none", "l2-sp"])
def test_without_a_ball_nothing_is_held(folders, method):
    folders.add(0.7, method=method)

    assert movement.held(groups(folders)[method]) is None
