"""Accuracy, retention and the gradient of the training loss, epoch by epoch."""

import math
from collections.abc import Mapping

from tethertune.lab.report import curves, drawing
from tethertune.lab.report.curves import Axis, Measure, Path
from tethertune.lab.report.drawing import Figure
from tethertune.lab.report.grouping import Comparison, Group
from tethertune.lab.report.statistics import summarise

__all__ = ["figure"]

_EPOCH = Axis("epoch")
_MEASURES = {
    "accuracy": Measure("Training accuracy"),
    "validation_accuracy": Measure("Validation accuracy"),
    "test_accuracy": Measure("Test accuracy"),
    "retention": Measure("Retention"),
    "data_gradient": Measure("Gradient of the data's loss", is_share=False),
    "penalty_gradient": Measure("Gradient of the penalty", is_share=False),
    "full_gradient": Measure("Gradient of both", is_share=False),
}
_TEXT = "Mean over the seeds; the band is one standard deviation each way. A button of the legend brings out its line."
_SEEN = (
    "In these runs the validation images were trained on as well, so that their accuracy says nothing of unseen images."
)
_TESTED = "The test accuracy by epoch is for this figure alone: nothing was chosen by it."
_GRADIENTS = (
    "A gradient is that of the loss over all training images by all trained weights, and its Euclidean norm is drawn. "
    "The paper's Figure 1 draws the whole alone, in which its code had divided the data's part by the batch size of "
    "128 and the penalty's part not: its curves are flat because what is left is mostly the penalty's own gradient, "
    "and that of MARS-SP is as large however far the weights have moved."
)


def figure(comparison: Comparison) -> Figure | None:
    """A chart for each measure that was taken; None where nothing was."""
    paths = {
        name: {
            comparison.labels[group]: path
            for group in comparison.groups
            if (path := _path(group, name)) and any(map(measure.is_drawn, path.values()))
        }
        for name, measure in _MEASURES.items()
    }
    if not paths["penalty_gradient"]:
        paths["full_gradient"] = {}  # it is that of the data
    drawn = {name: found for name, found in paths.items() if found}
    if not drawn:
        return None
    keys = drawing.legend({comparison.labels[group]: group.method for group in comparison.groups})
    charts = [
        chart
        for name, found in drawn.items()
        if (chart := curves.curve(_EPOCH, _MEASURES[name], found, keys, _ends(_MEASURES[name], found)))
    ]
    columns = [
        (f"{_MEASURES[name].name}, {label}", _MEASURES[name], path)
        for name, found in drawn.items()
        for label, path in found.items()
    ]
    table = curves.table("By epoch, shares in percent, mean ± standard deviation", _EPOCH, columns)
    return Figure("Learning curves", _text(comparison, drawn), charts, table, keys)


def _text(comparison: Comparison, drawn: Mapping[str, Mapping[str, Path]]) -> str:
    seen = any(setting.fields.get("train_on") == "train+validation" for setting in comparison.settings)
    said = {_SEEN: seen, _TESTED: "test_accuracy" in drawn, _GRADIENTS: "data_gradient" in drawn}
    return " ".join([_TEXT, *(text for text, holds in said.items() if holds)])


def _path(group: Group, name: str) -> Path:
    """Summary over the seeds of a measure at each epoch where a seed has a finite value."""
    values: dict[float, list[float]] = {}
    for run in group.runs.values():
        for line in run.metrics:
            value = line.get(name)
            if value is not None and math.isfinite(value):
                values.setdefault(line["epoch"], []).append(value)
    return {epoch: summarise(values[epoch]) for epoch in sorted(values)}


def _ends(measure: Measure, paths: Mapping[str, Path]) -> str:
    unit = " %" if measure.is_share else ""
    return "; ".join(f"{label} ends at {measure.text(path[max(path)])}{unit}" for label, path in paths.items())
