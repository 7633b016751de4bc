import json
import math

import pytest

from tethertune.lab import runs
from tethertune.lab.report import learning
from tethertune.lab.report.grouping import compare


def figure(folders):
    [comparison] = compare(runs.find([folders.root]))
    return learning.figure(comparison)


def rows(spec):
    """The data of each layer of a spec, which Altair moves up where all layers share them."""
    return [spec["datasets"][layer.get("data", spec.get("data"))["name"]] for layer in spec["layer"]]


def test_curves_are_means_with_a_band(folders):
    folders.add(0.6, seed=1)
    folders.add(0.8, seed=2)
    training, validation = figure(folders).charts
    bands, lines, _ = rows(validation.spec)

    # validation accuracies of epoch 1 are half of 60 % and of 80 %
    deviation = math.sqrt(2 * 5**2)
    assert lines[0] == {"series": "none", "place": 1, "mean": 35.0, "low": pytest.approx(35 - deviation, abs=0.01),
                        "high": pytest.approx(35 + deviation, abs=0.01)}  # fmt: skip
    assert len(bands) == len(lines) == 4
    assert [row["mean"] for row in rows(training.spec)[1]] == [30, 60, 90, 100]


def test_one_seed_has_no_band(folders):
    folders.add(0.6)

    spec = figure(folders).charts[1].spec

    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["line", "circle"]


def test_epochs_that_were_not_evaluated_are_left_out(folders):
    folder = folders.add(0.6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0]["validation_accuracy"] = lines[1]["validation_accuracy"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = figure(folders)

    assert [row["place"] for row in rows(found.charts[1].spec)[0]] == [3, 4]
    assert [cell.text for cell in found.table.rows[0]] == ["1", "30.0", "-"]


def test_the_test_accuracy_by_epoch_is_drawn_where_it_was_measured(folders):
    folders.add(0.6, gradients=(2.0, None))

    found = figure(folders)

    assert found.charts[2].title == "Test accuracy"
    assert [row["mean"] for row in rows(found.charts[2].spec)[0]] == [15.0, 30.0, 45.0, 60.0]
    assert "nothing was chosen by it" in found.text


def test_the_gradients_of_data_and_penalty_are_drawn_apart(folders):
    folders.add(0.6, gradients=(2.0, None))
    folders.add(0.7, method="mars-sp", gradients=(2.0, 0.5))

    found = figure(folders)
    charts = {chart.title: chart for chart in found.charts[3:]}

    assert list(charts) == ["Gradient of the data's loss", "Gradient of the penalty", "Gradient of both"]
    line, _ = rows(charts["Gradient of the penalty"].spec)
    assert [(row["series"], row["mean"]) for row in line] == [("mars-sp", 0.5 / 2**epoch) for epoch in range(4)]
    assert charts["Gradient of both"].spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"
    assert "divided the data's part by the batch size of 128" in found.text


def test_without_a_penalty_the_whole_is_the_datas_gradient(folders):
    folders.add(0.6, gradients=(2.0, 0.0))

    assert [chart.title for chart in figure(folders).charts][3:] == ["Gradient of the data's loss"]


def test_a_gradient_of_zero_has_no_place_on_a_log_axis(folders):
    folder = folders.add(0.6, gradients=(2.0, None))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["data_gradient"] = 0.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert [row["place"] for row in rows(figure(folders).charts[3].spec)[0]] == [1, 2, 3]


def test_the_paper_is_not_explained_where_no_gradient_was_measured(folders):
    folders.add(0.6)

    assert "paper" not in figure(folders).text


def test_validation_images_that_were_trained_on_are_told(folders):
    folders.add(0.6, train_on="train+validation")

    assert "says nothing of unseen images" in figure(folders).text


def test_retention_is_a_curve(folders):
    folders.add(0.6, retention=0.6)

    [retention] = [chart for chart in figure(folders).charts if chart.title == "Retention"]

    assert [row["mean"] for row in rows(retention.spec)[0]] == pytest.approx([90, 80, 70, 60])


def test_ticks_are_whole_epochs(folders):
    folders.add(0.6)

    axis = figure(folders).charts[0].spec["layer"][0]["encoding"]["x"]["axis"]

    assert axis["values"] == [1, 2, 3, 4]
