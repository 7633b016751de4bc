import json
import math
import shutil

import pytest

from tethertune.lab import runs
from tethertune.lab.methods import METHODS
from tethertune.lab.report.grouping import compare


def compared(folders):
    [comparison] = compare(runs.find([folders.root]))
    return comparison


def test_runs_that_differ_in_their_seed_only_are_one_group(folders):
    for seed in (3, 1, 2):
        folders.add(0.1 * seed, seed=seed)

    [group] = compared(folders).groups

    assert group.accuracies == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert group.summary.mean == pytest.approx(0.2)


def test_methods_share_a_setting_and_stand_in_the_order_of_the_registry(demo):
    comparison = compared(demo)

    assert [group.method for group in comparison.settings[0].groups] == list(METHODS)
    assert comparison.settings[0].baseline.summary.mean == pytest.approx(0.71)
    assert comparison.settings[0].best.method == "mars-pgm"


def test_another_head_or_learning_rate_is_another_setting(demo):
    comparison = compared(demo)
    plain = comparison.groups[-1]

    assert len(comparison.settings) == 2
    assert comparison.varying == ["head", "lr"]
    assert comparison.labels[plain] == "none (head pool, learning rate 0.0003)"
    assert comparison.difference(plain) is None
    assert comparison.difference(comparison.groups[0]) is None


def test_differences_are_to_plain_fine_tuning_of_the_same_setting(demo):
    comparison = compared(demo)
    ball = next(group for group in comparison.groups if group.method == "mars-pgm")

    assert comparison.difference(ball).by_seed == pytest.approx({1: 0.044, 2: 0.065, 3: 0.03})


def test_radii_of_one_method_are_groups_of_one_setting(folders):
    for radius in (0.5, 2.0):
        folders.add(0.7, method="mars-pgm", radius=radius, head_radius=3.0)

    comparison = compared(folders)

    assert len(comparison.settings) == 1
    assert [comparison.labels[group] for group in comparison.groups] == [
        "mars-pgm (radius 0.5, head 3)",
        "mars-pgm (radius 2, head 3)",
    ]


def test_what_belongs_to_a_method_does_not_part_it_from_plain_fine_tuning(folders):
    folders.add(0.7)
    folders.add(0.8, method="mars-pgm", projection="euclidean", affine="frozen")

    comparison = compared(folders)

    assert len(comparison.settings) == 1
    assert comparison.groups[1].strengths["projection"] == "euclidean"


def test_other_images_are_another_setting(folders):
    folders.add(0.7, seed=1)
    folders.add(0.7, seed=2, fingerprint="sha256:fedcba9876543210")

    assert compared(folders).varying == ["images"]


def test_data_sets_are_compared_apart(folders):
    folders.add(0.7, data="pets")
    folders.add(0.7, data="fashion")

    assert [comparison.dataset for comparison in compare(runs.find([folders.root]))] == ["fashion", "pets"]


def test_threads_and_output_do_not_matter(folders):
    folders.add(0.7, seed=1, threads=1)
    folders.add(0.7, seed=2, threads=2, output="elsewhere")

    assert len(compared(folders).groups) == 1


def test_a_copied_run_counts_once(folders):
    folder = folders.add(0.7)
    shutil.copytree(folder, folders.root / "copy")

    comparison = compared(folders)

    assert len(comparison.groups[0].runs) == 1
    assert len(comparison.repeated) == 1


def test_unfinished_runs_are_in_no_group(folders):
    folders.add(0.7, seed=1)
    folders.add(None, seed=2, status="running")

    comparison = compared(folders)

    assert list(comparison.groups[0].runs) == [1]
    assert [run.info["config"]["seed"] for run in comparison.unfinished] == [2]


def test_a_diverged_run_takes_the_mean_with_it(folders):
    folders.add(0.9, method="l2-pgm", seed=1)
    folders.add(None, method="l2-pgm", seed=2)
    folders.add(0.5)

    comparison = compared(folders)

    assert math.isnan(comparison.groups[1].summary.mean)
    assert comparison.settings[0].best.method == "none"


def test_a_configuration_without_a_newer_option_has_its_default(folders):
    folders.add(0.7, seed=1)
    old = folders.add(0.7, seed=2) / "run.json"
    old.write_text(old.read_text().replace('"label_smoothing": 0.0, ', ""))

    assert len(compared(folders).groups) == 1


def test_a_task_has_a_name_of_its_own(folders):
    folders.add(0.7, data="fashion", task="fashion-10", per_class=10)
    folders.add(0.7, data="fashion", task="fashion-50", per_class=50)

    assert [item.dataset for item in compare(runs.find([folders.root]))] == ["fashion-10", "fashion-50"]


def test_trials_and_sweeps_are_no_results(folders):
    folders.add(0.7)
    folders.add(None, validation=0.9, part={"kind": "trial", "study": "s", "number": 0}, lr=1e-3)
    folders.add(0.9, part={"kind": "sweep", "key": "lr", "value": 1e-2}, lr=1e-2)

    comparison = compared(folders)

    assert [group.accuracies for group in comparison.groups] == [{1: 0.7}]
    assert len(comparison.trials) == len(comparison.sweeps) == 1
    assert not comparison.unfinished


def test_what_is_measured_besides_does_not_matter(folders):
    folders.add(0.7, seed=1)
    folders.add(0.7, seed=2, gradients=(1.0, None), retain="pictures", retain_size=64)

    assert len(compared(folders).groups) == 1


def test_a_share_to_keep_belongs_to_the_method(folders):
    folders.add(0.7)
    folders.add(0.7, keep=0.9, retain="pictures")

    comparison = compared(folders)

    assert len(comparison.settings) == 1
    assert comparison.labels[comparison.groups[1]] == "none (keep 0.9)"
    assert comparison.settings[0].baseline is comparison.groups[0]


def test_learning_rates_that_were_tuned_for_each_method_are_one_setting(folders):
    for method, rate in (("none", 1e-3), ("l2-sp", 1e-3), ("mars-pgm", 3e-4)):
        folders.add(0.7, method=method, lr=rate)

    comparison = compared(folders)

    assert [group.method for group in comparison.settings[0].groups] == ["none", "l2-sp", "mars-pgm"]
    assert comparison.varying == []
    assert [group.rates["lr"] for group in comparison.groups] == [1e-3, 1e-3, 3e-4]
    assert comparison.has_tuned_rates
    assert comparison.difference(comparison.groups[2]).mean == 0


def test_two_learning_rates_of_one_method_are_two_settings(folders):
    for method, rate in (("none", 1e-3), ("none", 3e-4), ("mars-pgm", 3e-4)):
        folders.add(0.7, method=method, lr=rate)

    comparison = compared(folders)

    assert len(comparison.settings) == 2
    assert comparison.varying == ["lr"]
    assert not comparison.has_tuned_rates


def test_a_search_that_finds_one_learning_rate_has_tuned_it_too(folders):
    folders.add(0.7)
    for number, rate in enumerate((1e-4, 1e-3)):
        folders.add(None, validation=0.6, lr=rate, part={"kind": "trial", "study": "s", "number": number})

    assert compared(folders).has_tuned_rates


def test_a_run_that_ended_without_a_result_takes_the_mean_with_it(folders):
    folders.add(0.9, method="l2-pgm", seed=1)
    folders.add(None, method="l2-pgm", seed=2, status="diverged")

    comparison = compared(folders)

    assert math.isnan(comparison.groups[0].summary.mean)
    assert not comparison.unfinished


def test_the_best_rival_is_of_another_method(folders):
    for accuracy, radius in ((0.9, 0.5), (0.8, 1.0)):
        folders.add(accuracy, method="mars-pgm", radius=radius)
    folders.add(0.7)

    setting = compared(folders).settings[0]

    assert [setting.rival(group).summary.mean for group in setting.groups] == [0.9, 0.7, 0.7]
    assert setting.best_of("mars-pgm").strengths["radius"] == 0.5


def test_runs_of_an_earlier_version_are_read(folders):
    for seed in (1, 2):
        folder = folders.add(0.7, seed=seed)
        info = json.loads((folder / "run.json").read_text())
        if seed == 2:
            for key in ("task", "part"):
                del info[key]
            for key in ("retain", "retain_size", "keep", "task", "train_on", "label_noise", "gradients"):
                del info["config"][key]
            for key in ("retention", "alpha", "before_interpolation"):
                del info["outcome"][key]
        (folder / "run.json").write_text(json.dumps(info))

    assert len(compared(folders).groups) == 1
