"""What the runs say, in plain words generated from their numbers, and no more than they say."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tethertune.lab.methods import METHODS
from tethertune.lab.report import formats, movement
from tethertune.lab.report.grouping import BASELINE, Comparison, Group, Setting
from tethertune.lab.report.statistics import ENOUGH, Difference

__all__ = ["Answer", "answer", "gap", "over", "tether", "verdict"]

_FEW = 5  # seeds below which a bootstrap interval is too narrow to be taken at its word
# That of three values is their range, and three values all lie on one side of their median with probability 2 / 2^3.
_RANGE = " (of three differences it is the range, which misses the truth about one time in four)"


@dataclass(frozen=True)
class Answer:
    """The answer of one comparison.

    Attributes:
        headline: Which method reached most, by how much over plain fine-tuning.
        clear: Whether that lead is more than noise, so that the headline may be set in bold.
        details: What else must be said with it.
        method: The winner; None when there is none.
    """

    headline: str
    clear: bool
    details: Sequence[str]
    method: str | None


def answer(comparison: Comparison) -> Answer:
    """Which method won in the main setting, by how much, and whether that is more than noise."""
    best = comparison.settings[0].best if comparison.settings else None
    if best is None:
        done = "No run has a finite test accuracy" if comparison.settings else "No run is complete"
        told = f"{done}, so there is nothing to compare yet."
        return Answer(told, clear=False, details=[*_lost(comparison)], method=None)
    setting = comparison.settings[0]
    reached = f"{comparison.labels[best]} reached {formats.spread(best.summary)} test accuracy"
    difference = comparison.difference(best)
    if best is setting.baseline:
        headline = f"No method beat plain fine-tuning: {reached}."
    elif setting.baseline is None:
        headline = f"{reached}; there is no run of {BASELINE} in the same setting to compare it with."
    elif difference is None:
        headline = f"{reached}; it has no seed in common with {BASELINE}, so the difference is not known."
    else:
        headline = f"{reached}, {over(difference, BASELINE)}."
    details = [
        *_own_rates(setting),
        *verdict(difference),
        *_others(comparison, best),
        *_rival(comparison, best),
        *_beside(comparison, best),
        *_left_out(comparison),
    ]
    return Answer(headline, comparison.is_clear_winner(best), details, best.method)


def tether(comparison: Comparison) -> list[str]:
    """What the ball bought in these runs, and what it did not."""
    if not comparison.settings:
        return []
    return [*_guarantee(comparison), *_robustness(comparison)]


def verdict(difference: Difference | None, unit: str = "seed") -> Iterator[str]:
    """Whether a difference is more than noise, in words.

    Args:
        difference: The difference; nothing is said of None.
        unit: What it is the mean over.
    """
    if difference is None:
        return
    count = len(difference.by_seed)
    if difference.interval is None:
        yield f"One {unit} cannot tell a difference from noise: run more {unit}s."
    elif count < ENOUGH:
        yield f"Two {unit}s cannot tell either: their interval is the range of two differences. Run more {unit}s."
    elif not difference.beyond_noise:
        yield "The interval includes 0: the difference is inside the noise, and these runs name no winner."
    elif count < _FEW:
        yield (
            f"The interval leaves out 0: the difference is more than the scatter between the {unit}s. But they are "
            f"only {count}, and such an interval is then too narrow{_RANGE if count == ENOUGH else ''}: "
            "a good hint, no proof."
        )
    else:
        yield "The interval leaves out 0: the difference is more than noise."


def over(difference: Difference, other: str, unit: str = "seed") -> str:
    """A difference with what it is to, over how many seeds (or tasks), and its interval."""
    count = len(difference.by_seed)
    words = f"{formats.points(difference.mean)} points {'over' if difference.mean > 0 else 'against'} {other}"
    if count == 1:
        return f"{words} on the one {unit} they share"
    return f"{words} on the same {count} {unit}s (95 % interval {formats.interval(difference)})"


def gap(difference: Difference) -> str:
    """A difference and its interval, in points."""
    return f"{formats.points(difference.mean)} points ({formats.interval(difference)})"


def _own_rates(setting: Setting) -> Iterator[str]:
    """That methods are compared each at its own learning rate, where they are."""
    if "lr" not in setting.fields:
        yield "Each method has a learning rate of its own here, as a search that tunes it leaves."


def _others(comparison: Comparison, best: Group) -> Iterator[str]:
    """The other methods of the main setting, sorted into better than, worse than and like plain fine-tuning."""
    verdicts: dict[str, list[str]] = {"Also better than": [], "Worse than": [], "Not distinguishable from": []}
    for group in comparison.settings[0].groups:
        difference = comparison.difference(group)
        if group is best or difference is None or difference.interval is None:
            continue
        verdict = "Not distinguishable from"
        if difference.beyond_noise:
            verdict = "Also better than" if difference.mean > 0 else "Worse than"
        verdicts[verdict].append(f"{comparison.labels[group]} {formats.points(difference.mean)}")
    if best.method == BASELINE:
        verdicts = {verdict.replace("Also better", "Better"): labels for verdict, labels in verdicts.items()}
    for verdict, labels in verdicts.items():
        if labels:
            yield f"{verdict} {BASELINE} on these seeds: {'; '.join(labels)}."


def _rival(comparison: Comparison, best: Group) -> Iterator[str]:
    """The lead over the next best method that is not plain fine-tuning."""
    rivals = [
        group
        for group in comparison.settings[0].groups
        if group is not best and group.method != BASELINE and math.isfinite(group.summary.mean)
    ]
    rival = max(rivals, key=lambda group: group.summary.mean, default=None)
    difference = best.minus(rival) if rival and best.method != BASELINE else None
    if rival and difference and difference.interval:
        noise = "more than the scatter between the seeds" if difference.beyond_noise else "inside the noise"
        yield f"Its lead over the next, {comparison.labels[rival]}, is {gap(difference)}: {noise}."


def _beside(comparison: Comparison, best: Group) -> Iterator[str]:
    """The best group of the other settings, which must not be forgotten when it is as good as the winner."""
    finite = [setting.best for setting in comparison.settings[1:] if setting.best]
    other = max(finite, key=lambda group: group.summary.mean, default=None)
    if other is None:
        return
    difference = other.minus(best)
    reached = f"In another setting, {comparison.labels[other]} reached {formats.spread(other.summary)}"
    if difference is None or difference.interval is None:
        yield f"{reached}."
    else:
        yield f"{reached}, {over(difference, comparison.labels[best])}: {_likeness(difference)}."


def _left_out(comparison: Comparison) -> Iterator[str]:
    """What the means do not hold, which matters when runs are missing because they diverged."""
    unfinished = [f"{run.info['config']['method']} seed {run.info['config']['seed']}" for run in comparison.unfinished]
    if unfinished:
        yield f"Unfinished, and in no mean: {', '.join(unfinished)}."
    yield from _lost(comparison)
    failed = [comparison.labels[group] for group in comparison.groups if not math.isfinite(group.summary.mean)]
    if failed:
        yield f"With a run whose accuracy is not finite, and so without a mean: {'; '.join(failed)}."


def _lost(comparison: Comparison) -> Iterator[str]:
    """The methods for which a search found nothing that trains."""
    if comparison.lost:
        yield f"Without a result, because every trial of its search diverged: {'; '.join(comparison.lost)}."


def _likeness(difference: Difference) -> str:
    if not difference.beyond_noise:
        return "inside the noise"
    return "better" if difference.mean > 0 else "worse"


def _guarantee(comparison: Comparison) -> Iterator[str]:
    """What each constraint held, and how far plain fine-tuning moved the same layers."""
    setting = comparison.settings[0]
    balls = {group: held for group in setting.groups if (held := movement.held(group))}
    if balls and all(held.fullest <= 1 for held in balls.values()):
        yield "A ball buys a hard guarantee, layer by layer."
    for group, held in balls.items():
        label = comparison.labels[group]
        if held.fullest > 1:
            yield f"{label} broke its promise: a layer ended at {formats.number(held.fullest, '.6g')} times its radius."
            continue
        runs = {1: "the run", 2: "both runs"}.get(len(group.runs), f"all {len(group.runs)} runs")
        free = _excess(setting, group)
        beyond = (
            f"; plain fine-tuning moved such a layer as far as {formats.number(free, '.2g')} radii" if free > 1 else ""
        )
        yield (
            f"In {runs} of {label} each of the {held.layers} constrained body layers ended inside its radius, "
            f"{formats.share(held.at_radius)} % of them at it{beyond}."
        )


def _excess(setting: Setting, group: Group) -> float:
    """The largest distance of a layer under plain fine-tuning, in radii of the same layer in a constrained group."""
    if setting.baseline is None:
        return math.nan
    radii = {layer.name: layer for run in group.runs.values() for layer in movement.body(run) if layer.is_held}
    ratios = [
        layer.distances[norm] / radius
        for run in setting.baseline.runs.values()
        for layer in movement.body(run)
        if layer.name in radii and (norm := radii[layer.name].norm) and (radius := radii[layer.name].radius) > 0
    ]
    return max((ratio for ratio in ratios if math.isfinite(ratio)), default=math.nan)


def _robustness(comparison: Comparison) -> Iterator[str]:
    """Whether a better head or learning rate does without the ball what the ball did."""
    main = comparison.settings[0]
    constrained = [
        group for group in main.groups if group.method in METHODS and METHODS[group.method].kind == "constraint"
    ]
    plain = [setting.baseline for setting in comparison.settings[1:] if setting.baseline]
    plain = [group for group in plain if math.isfinite(group.summary.mean)]
    if not constrained:
        return
    best = max(constrained, key=lambda group: _or_lowest(group.summary.mean))
    other = max(plain, key=lambda group: group.summary.mean, default=None)
    difference = other.minus(best) if other else None
    if other is None or difference is None or difference.interval is None:
        yield _at_a_good_head(comparison, best)
    elif difference.beyond_noise and difference.mean < 0:
        yield (
            f"Another head or learning rate did not do the same: {comparison.labels[other]} stayed "
            f"{formats.number(-100 * difference.mean)} points below {comparison.labels[best]}."
        )
    else:
        equal = "better" if difference.beyond_noise else "not to be told from it"
        yield (
            f"It did not buy accuracy that nothing else can: without any ball {comparison.labels[other]} is {equal}, "
            f"at {gap(difference)} against {comparison.labels[best]}."
        )
        gained = comparison.difference(best)
        if gained and gained.beyond_noise and gained.mean > 0:
            yield (
                f"What it bought is robustness: its {formats.points(gained.mean)} points over {BASELINE} came without "
                "touching head or learning rate."
            )


def _at_a_good_head(comparison: Comparison, best: Group) -> str:
    """What a ball gains with a pooled head and tuned learning rates, or that the runs do not test it."""
    gained = comparison.difference(best)
    is_tested = comparison.settings[0].fields.get("head") == "pool" and comparison.has_tuned_rates
    if is_tested and gained and gained.interval:
        return (
            "These runs test it where plain fine-tuning is hard to beat, with a pooled, zero-initialised head and a "
            f"learning rate chosen for each method: {comparison.labels[best]} is at {gap(gained)} against {BASELINE}, "
            f"{_likeness(gained)}."
        )
    return (
        "It does not replace a good head and a tuned learning rate: with a pooled, zero-initialised head plain "
        "fine-tuning is hard to beat, and these runs do not test whether it is here."
    )


def _or_lowest(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
