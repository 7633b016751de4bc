import json

import pytest

from tethertune.lab import runs
from tethertune.lab.report.answer import answer, tether
from tethertune.lab.report.grouping import compare


def compared(folders):
    [comparison] = compare(runs.find([folders.root]))
    return comparison


def add_all(folders, method, accuracies, **options):
    for seed, accuracy in enumerate(accuracies, start=1):
        folders.add(accuracy, method=method, seed=seed, **options)


def test_the_headline_names_winner_gain_and_interval(demo):
    said = answer(compared(demo))

    assert said.headline == (
        "mars-pgm reached 75.6 ± 3.9 % test accuracy, "
        "+4.6 points over none on the same 3 seeds (95 % interval +3.0 to +6.5)."
    )
    assert said.clear
    assert said.method == "mars-pgm"


def test_the_details_say_what_the_headline_leaves_out(demo):
    details = answer(compared(demo)).details

    assert "one time in four" in details[0]
    assert details[1] == "Also better than none on these seeds: l2-pgm +4.0."
    assert details[2] == "Not distinguishable from none on these seeds: l2-sp +1.7; mars-sp +1.5; delta +0.8."
    assert details[3] == "Its lead over the next, l2-pgm, is +0.6 points (\N{MINUS SIGN}0.2 to +1.9): inside the noise."
    assert details[4].startswith("In another setting, none (head pool, learning rate 0.0003) reached 75.9 ± 3.2 %")
    assert details[4].endswith("inside the noise.")


def test_a_difference_inside_the_noise_is_said_to_be_so(folders):
    add_all(folders, "none", [0.70, 0.80, 0.70])
    add_all(folders, "mars-pgm", [0.75, 0.79, 0.80])

    said = answer(compared(folders))

    assert not said.clear
    assert "inside the noise" in said.details[0]


def test_five_seeds_that_agree_are_more_than_noise(folders):
    add_all(folders, "none", [0.70, 0.71, 0.72, 0.73, 0.74])
    add_all(folders, "mars-pgm", [0.75, 0.75, 0.78, 0.77, 0.80])

    said = answer(compared(folders))

    assert said.clear
    assert said.details[0] == "The interval leaves out 0: the difference is more than noise."


def test_one_seed_is_no_answer(folders):
    folders.add(0.7)
    folders.add(0.8, method="mars-pgm")

    said = answer(compared(folders))

    assert said.headline.endswith("+10.0 points over none on the one seed they share.")
    assert not said.clear
    assert said.details[0].startswith("One seed cannot tell")


def test_two_seeds_are_no_answer_either(folders):
    add_all(folders, "none", [0.70, 0.71])
    add_all(folders, "mars-pgm", [0.80, 0.80])

    said = answer(compared(folders))

    assert not said.clear
    assert said.details == [
        "Two seeds cannot tell either: their interval is the range of two differences. Run more seeds."
    ]


def test_a_winner_that_loses_where_it_can_be_compared_is_not_clear(folders):
    add_all(folders, "none", [0.70, 0.71, 0.72])
    add_all(folders, "mars-pgm", [0.60, 0.61, 0.62, 0.99, 0.99])

    assert not answer(compared(folders)).clear


def test_plain_fine_tuning_may_win(folders):
    add_all(folders, "none", [0.80, 0.81, 0.82])
    add_all(folders, "mars-pgm", [0.70, 0.72, 0.72])

    said = answer(compared(folders))

    assert said.headline == "No method beat plain fine-tuning: none reached 81.0 ± 1.0 % test accuracy."
    assert said.details == ["Worse than none on these seeds: mars-pgm \N{MINUS SIGN}9.7."]


def test_a_better_setting_is_not_hidden(demo):
    add_all(demo, "none", [0.9, 0.9, 0.9], lr=1e-3)

    details = answer(compared(demo)).details

    assert any("(head pool, learning rate 0.001) reached 90.0" in line and line.endswith("better.") for line in details)


def test_without_plain_fine_tuning_there_is_no_gain(folders):
    folders.add(0.8, method="mars-pgm")

    assert "no run of none in the same setting" in answer(compared(folders)).headline


def test_without_a_common_seed_there_is_no_gain(folders):
    folders.add(0.7, seed=1)
    folders.add(0.8, method="mars-pgm", seed=2)

    assert "no seed in common with none" in answer(compared(folders)).headline


def test_missing_runs_are_named(folders):
    add_all(folders, "none", [0.7, 0.8])
    add_all(folders, "l2-pgm", [0.7, None])
    folders.add(None, method="mars-pgm", seed=4, status="running")

    details = answer(compared(folders)).details

    assert "Unfinished, and in no mean: mars-pgm seed 4." in details
    assert "With a run whose accuracy is not finite, and so without a mean: l2-pgm." in details


@pytest.mark.parametrize(
    ("status", "said"), [("running", "No run is complete"), ("complete", "No run has a finite test accuracy")]
)
def test_nothing_to_compare(folders, status, said):
    folders.add(None, status=status)

    assert answer(compared(folders)).headline.startswith(said)
    assert answer(compared(folders)).method is None


def test_the_ball_bought_a_guarantee_and_robustness_but_no_other_accuracy(demo):
    said = " ".join(tether(compared(demo)))

    # layer 12 moved by 0.1 of its norm without a ball: 5 radii of 0.02
    assert (
        "In all 3 runs of mars-pgm each of the 12 constrained body layers ended inside its radius, "
        "41.7 % of them at it; plain fine-tuning moved such a layer as far as 5 radii." in said
    )
    assert (
        "without any ball none (head pool, learning rate 0.0003) is not to be told from it, "
        "at +0.3 points (\N{MINUS SIGN}0.6 to +1.2) against mars-pgm." in said
    )
    assert said.endswith("its +4.6 points over none came without touching head or learning rate.")


def test_robustness_is_not_claimed_where_the_gain_is_noise(folders):
    add_all(folders, "none", [0.70, 0.80, 0.70])
    add_all(folders, "mars-pgm", [0.75, 0.79, 0.80])
    add_all(folders, "none", [0.75, 0.79, 0.80], lr=1e-4)

    said = " ".join(tether(compared(folders)))

    assert "not to be told from it" in said
    assert "robustness" not in said


def test_another_setting_that_stays_below_is_said_to(folders):
    add_all(folders, "none", [0.70, 0.70, 0.70])
    add_all(folders, "mars-pgm", [0.80, 0.81, 0.82])
    add_all(folders, "none", [0.75, 0.75, 0.75], lr=1e-4)

    assert "none (learning rate 0.0001) stayed 6.0 points below mars-pgm" in " ".join(tether(compared(folders)))


def test_what_was_not_tested_is_not_claimed(folders):
    add_all(folders, "none", [0.70, 0.70])
    add_all(folders, "mars-pgm", [0.80, 0.81])

    assert "these runs do not test" in " ".join(tether(compared(folders)))


def test_a_broken_promise_is_said(folders):
    folder = folders.add(0.7, method="mars-pgm", radius=1.0)
    document = json.loads((folder / "distances.json").read_text())
    document["layers"]["blocks.3.weight"]["value"] = 1.01
    (folder / "distances.json").write_text(json.dumps(document))

    said = " ".join(tether(compared(folders)))

    assert "mars-pgm broke its promise: a layer ended at 1.01 times its radius." in said
    assert "guarantee" not in said


def test_without_a_ball_there_is_nothing_to_say_of_it(folders):
    folders.add(0.7)
    folders.add(0.7, method="l2-sp")

    assert tether(compared(folders)) == []


def test_learning_rates_of_their_own_are_told(folders):
    add_all(folders, "none", [0.70, 0.70, 0.70], lr=1e-3)
    add_all(folders, "mars-pgm", [0.75, 0.79, 0.80], lr=3e-4)

    said = answer(compared(folders))

    assert said.headline.startswith("mars-pgm reached 78.0 ± 2.6 % test accuracy, +8.0 points over none")
    assert said.details[0].startswith("Each method has a learning rate of its own")


def test_a_pooled_head_and_tuned_rates_are_the_fair_test_of_a_ball(folders):
    add_all(folders, "none", [0.70, 0.71, 0.72], lr=1e-3, head="pool")
    add_all(folders, "mars-pgm", [0.71, 0.70, 0.72], lr=3e-4, head="pool")

    assert tether(compared(folders))[-1] == (
        "These runs test it where plain fine-tuning is hard to beat, with a pooled, zero-initialised head and a "
        "learning rate chosen for each method: mars-pgm is at +0.0 points (\N{MINUS SIGN}1.0 to +1.0) against none, "
        "inside the noise."
    )


def test_the_authors_head_does_not_test_that(folders):
    add_all(folders, "none", [0.70, 0.71, 0.72], lr=1e-3, head="flatten")
    add_all(folders, "mars-pgm", [0.71, 0.70, 0.72], lr=3e-4, head="flatten")

    assert tether(compared(folders))[-1].endswith("these runs do not test whether it is here.")
