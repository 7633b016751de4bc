from pathlib import Path

from tethertune.lab import runs
from tethertune.lab.report.grouping import compare
from tethertune.lab.report.records import Surroundings, context


def test_a_sheet_tells_how_to_repeat_its_runs(folders, tmp_path):
    folder = folders.add(0.75, method="mars-pgm", seed=2, radius=0.5)
    found = runs.find([folders.root])
    [comparison] = compare(found)
    surroundings = Surroundings(tmp_path / "demo", found)

    sheet = surroundings.sheet(comparison, comparison.groups[0])
    [record] = sheet.records

    assert record.command == "tethertune finetune lite0 fashion --method mars-pgm --radius 0.5 --epochs 4 --seed 2"
    assert record.label == "seed 2"
    assert record.folder == (Path("..") / folder.relative_to(tmp_path)).as_posix()
    assert dict(record.facts)["test"] == "75.0 %"
    assert dict(sheet.config)["radius"] == "0.5"
    assert "seed" not in dict(sheet.config)
    assert dict(sheet.facts)["2 classes"] == "bag, boot"
    assert surroundings.described == [
        (
            "tethertune 0.1.0, python 3.11.7, torch 2.15.0; "
            "platform Linux, processor x86, cores 2, threads 1, device cpu, memory 8.0 GiB"
        )
    ]


def test_machines_are_told_apart_once_each(folders, tmp_path):
    for seed in (1, 2, 3):
        info = folders.add(0.7, seed=seed) / "run.json"
        if seed == 3:
            info.write_text(info.read_text().replace('"cores": 2', '"cores": 64'))
    found = runs.find([folders.root])
    [comparison] = compare(found)
    surroundings = Surroundings(tmp_path, found)

    made_on = [dict(record.facts)["made on"] for record in surroundings.sheet(comparison, comparison.groups[0]).records]

    assert len(surroundings.described) == 2
    assert made_on == ["machine 1", "machine 1", "machine 2"]


def test_an_unfinished_run_says_how_far_it_came(folders, tmp_path):
    folders.add(0.7, status="running")
    [run] = runs.find([folders.root])

    record = Surroundings(tmp_path, [run]).record(run, "none, seed 1")

    assert dict(record.facts)["status"] == "unfinished after epoch 4 of 4; the same command resumes it"


def test_links_are_plain_relative_urls(folders):
    folders.add(0.7, place='javascript:"a b"')
    [run] = runs.find([folders.root])

    record = Surroundings(folders.root, [run]).record(run, "seed 1")

    assert record.link.startswith("javascript%3A%22a%20b%22/fashion/")


def test_context(folders):
    folders.add(0.7)
    [comparison] = compare(runs.find([folders.root]))

    assert context(comparison) == "2 classes; 100 training, 300 validation, 1,000 test images; 1 finished run"


def test_runs_that_are_no_results_are_counted(folders):
    folders.add(0.7)
    for number in range(2):
        folders.add(None, part={"kind": "trial", "study": "s", "number": number}, lr=1e-3 + number)
    folders.add(0.7, part={"kind": "sweep", "key": "lr", "value": 1e-2}, lr=1e-2)
    [comparison] = compare(runs.find([folders.root]))

    assert context(comparison).endswith(
        "1 finished run; 2 trials of searches, in no mean; 1 run of sweeps, in their figure alone"
    )


def test_a_run_that_diverged_says_so(folders, tmp_path):
    folders.add(None, status="diverged")
    [comparison] = compare(runs.find([folders.root]))
    group = comparison.groups[0]

    facts = dict(Surroundings(tmp_path, group.runs.values()).sheet(comparison, group).records[0].facts)

    assert facts["status"].startswith("diverged")
    assert facts["test"] == "NaN"


def test_a_validation_accuracy_of_images_that_were_trained_on_is_named_so(folders, tmp_path):
    folders.add(0.7, train_on="train+validation")
    [comparison] = compare(runs.find([folders.root]))
    group = comparison.groups[0]

    facts = dict(Surroundings(tmp_path, group.runs.values()).sheet(comparison, group).records[0].facts)

    assert facts["validation (trained on)"] == "70.0 %"
