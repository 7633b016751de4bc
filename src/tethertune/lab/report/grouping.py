"""Which runs belong together: comparisons of settings, settings of groups, groups of runs.

::

    Comparison   one task and one model                         a section of the report
    └── Setting  everything else but the method                 within it, differences to `none` are fair
        └── Group  one method with its radii or strengths       a row of the table
            └── Run  one seed

Trials of a search and the runs of a sweep are no results: a comparison keeps them apart, and no mean holds them.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

from tethertune.lab.config import FinetuneConfig
from tethertune.lab.methods import METHODS
from tethertune.lab.report import formats
from tethertune.lab.report.statistics import Difference, Summary, paired, summarise
from tethertune.lab.runs import Run

__all__ = [
    "BASELINE",
    "FOREMOST",
    "STRENGTHS",
    "Comparison",
    "Group",
    "Setting",
    "compare",
    "data_name",
    "identity",
    "is_over",
    "outcome",
    "part",
    "rank",
    "seedless",
]

BASELINE = "none"
"""The method that all others are compared with: plain fine-tuning."""

FOREMOST = ("head", "lr", "head_lr")
"""The configuration names that a reader looks for first."""

_DEFAULTS = {item.name: item.default for item in fields(FinetuneConfig) if item.default is not MISSING}
_RATES = ("lr", "head_lr")

STRENGTHS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.accepts))
"""The configuration names of radii and strengths."""

_VARIANTS = ("projection", "convention", "affine", "head_bias", "include", "exclude", "attention", "keep")
_METHOD = ("method", *STRENGTHS, *_VARIANTS)
_BYSTANDERS = tuple(item.name for item in fields(FinetuneConfig) if not item.metadata.get("identity", True))
_PREFIX = len("sha256:") + 12  # of a fingerprint, enough to tell two apart
_MEASURES = ("gradients", "retain", "retain_size")  # what is looked at changes nothing
_NEUTRAL = ("seed", "model", "weights", "data", *_MEASURES, *_BYSTANDERS)  # weights and data count by fingerprint


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that are over and differ in their seed only.

    Attributes:
        method: Name of the method.
        strengths: Its radii or strengths, and what else of the method is not as usual; by configuration name.
        rates: Its learning rates, by configuration name.
        runs: By seed.
    """

    method: str
    strengths: Mapping[str, Any]
    rates: Mapping[str, Any]
    runs: Mapping[int, Run]

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy (fraction) by seed; NaN where the run has none."""
        return {seed: outcome(run, "test_accuracy") for seed, run in self.runs.items()}

    @cached_property
    def summary(self) -> Summary:
        """Mean and deviation of the test accuracies."""
        return summarise(list(self.accuracies.values()))

    def minus(self, other: "Group") -> Difference | None:
        """Test accuracy minus that of another group on the common seeds."""
        return paired(self.accuracies, other.accuracies)


@dataclass(frozen=True, eq=False)
class Setting:
    """Groups that share all of their configuration but the method.

    Attributes:
        fields: The shared configuration, by name; without the learning rates where each method has its own.
        groups: In the order of the methods.
    """

    fields: Mapping[str, Any]
    groups: Sequence[Group]

    @property
    def baseline(self) -> Group | None:
        """Plain fine-tuning in this setting, as it ended by itself."""
        plain = (group for group in self.groups if group.method == BASELINE and "keep" not in group.strengths)
        return next(plain, None)

    @property
    def best(self) -> Group | None:
        """The group of the highest mean test accuracy; None when no mean is finite."""
        return _highest(self.groups)

    def rival(self, group: Group) -> Group | None:
        """The best group of another method; None when there is none with a finite mean."""
        return _highest(other for other in self.groups if other.method != group.method)

    def best_of(self, method: str) -> Group | None:
        """The group of a method with the highest mean test accuracy; None when no mean is finite."""
        return _highest(group for group in self.groups if group.method == method)


@dataclass(frozen=True, eq=False)
class Comparison:
    """All runs of one model on one task.

    Attributes:
        dataset: Name of the task: that of the data set, unless the runs were given another.
        model: Name of the model.
        settings: The main one first: that with the most methods, then the most runs.
        unfinished: Runs that are not complete.
        repeated: Runs that repeat the seed of another run of their group, which counts once.
        trials: Runs of a search, which never looked at the test images.
        sweeps: Runs with a radius, strength or learning rate away from that of the results.
    """

    dataset: str
    model: str
    settings: Sequence[Setting]
    unfinished: Sequence[Run]
    repeated: Sequence[Run]
    trials: Sequence[Run] = ()
    sweeps: Sequence[Run] = ()

    @property
    def groups(self) -> list[Group]:
        """All groups, those of the main setting first."""
        return [group for setting in self.settings for group in setting.groups]

    @cached_property
    def lost(self) -> list[str]:
        """The methods without a result all of whose trials diverged."""
        with_result = {group.method for group in self.groups} | {
            run.info["config"]["method"] for run in self.unfinished
        }
        numbered = [run for run in self.trials if part(run).get("number") is not None]  # but for the probe of a space
        tried = {run.info["config"]["method"] for run in numbered}
        trained = {run.info["config"]["method"] for run in numbered if not run.diverged}
        return sorted(tried - trained - with_result, key=rank)

    @cached_property
    def varying(self) -> list[str]:
        """The configuration names in which the settings differ: head and learning rates, then the others."""
        names = dict.fromkeys([*FOREMOST, *(name for setting in self.settings for name in setting.fields)])
        return [name for name in names if len({_key(setting.fields.get(name)) for setting in self.settings}) > 1]

    def setting(self, group: Group) -> Setting:
        """The setting of a group."""
        return next(setting for setting in self.settings if group in setting.groups)

    def difference(self, group: Group) -> Difference | None:
        """Difference of a group to plain fine-tuning in its own setting; None for plain fine-tuning itself."""
        baseline = self.setting(group).baseline
        return None if baseline is None or baseline is group else group.minus(baseline)

    def is_clear_winner(self, group: Group) -> bool:
        """Whether a group reached most in the main setting, and beat plain fine-tuning by more than noise."""
        difference = self.difference(group)
        return (
            group is self.settings[0].best
            and difference is not None
            and difference.beyond_noise
            and difference.mean > 0
        )

    @property
    def has_tuned_rates(self) -> bool:
        """Whether the learning rate was chosen for each method of the main setting."""
        rates = {run.info["config"].get("lr") for run in self.trials}
        return "lr" not in self.settings[0].fields or len(rates) > 1

    @cached_property
    def labels(self) -> dict[Group, str]:
        """A short name for each group: the method, and what tells it from the others of that method."""
        labels = {}
        for setting in self.settings:
            apart = {name: setting.fields[name] for name in self.varying if name in setting.fields}
            for group in setting.groups:
                rivals = [other for other in setting.groups if other.method == group.method]
                words = [formats.fields(group.strengths)] if len(rivals) > 1 else []
                words += [formats.fields(apart)] if setting is not self.settings[0] else []
                told = ", ".join(filter(None, words))
                labels[group] = f"{group.method} ({told})" if told else group.method
        return labels


def compare(runs: Iterable[Run]) -> list[Comparison]:
    """Sort runs into comparisons; neither the order of the runs nor their place on disk changes the result."""
    places: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (str(run.info.get("hash")), str(run.path))):
        places[str(run.info.get("task") or data_name(run)), str(run.info["model"]["name"])].append(run)
    return [_comparison(dataset, model, places[dataset, model]) for dataset, model in sorted(places)]


def data_name(run: Run) -> str:
    """Name of the data set, whatever the task is called."""
    return str(run.info["data"]["name"])


def part(run: Run) -> Mapping[str, Any]:
    """What a run is part of, a search or a sweep, with its ``kind``; empty for a result."""
    return run.info.get("part") or {}


def outcome(run: Run, name: str) -> float:
    """A number of the outcome of a run; NaN where it is missing or was not finite."""
    value = (run.info.get("outcome") or {}).get(name)
    return math.nan if value is None else float(value)


def seedless(run: Run) -> dict[str, Any]:
    """The configuration of a run that it shares with the other runs of its group."""
    return {name: value for name, value in run.info["config"].items() if name != "seed" and name not in _BYSTANDERS}


def is_over(run: Run) -> bool:
    """Whether a run ended, with a result or because it diverged, which makes its accuracy NaN."""
    return run.complete or run.diverged


def identity(run: Run) -> dict[str, Any]:
    """All that makes the result of a run but its seed, by configuration name; data and weights by fingerprint."""
    config = _DEFAULTS | run.info["config"]
    return {name: config[name] for name in _METHOD} | _shared(config) | _fingerprints(run)


def rank(method: str) -> tuple[int, str]:
    """The place of a method in the order of the registry; those of a later version come last, by name."""
    order = list(METHODS)
    return (order.index(method) if method in METHODS else len(order)), method


def _comparison(dataset: str, model: str, runs: Sequence[Run]) -> Comparison:
    trials = [run for run in runs if part(run).get("kind") == "trial"]
    sweeps = [run for run in runs if part(run).get("kind") == "sweep"]
    results = [run for run in runs if not part(run)]
    unfinished = [run for run in results if not is_over(run)]
    unfinished.sort(key=lambda run: (rank(run.info["config"]["method"]), run.info["config"]["seed"]))
    settings, repeated = _settings(run for run in results if is_over(run))
    return Comparison(dataset, model, settings, unfinished, repeated, trials, sweeps)


def _settings(runs: Iterable[Run]) -> tuple[list[Setting], list[Run]]:
    """Runs that are over in settings, the main one first, and those that repeat the seed of another."""
    shared: dict[str, dict[str, Any]] = {}
    grouped: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    repeated = []
    for run in runs:
        config = _DEFAULTS | run.info["config"]
        apart = _shared(config) | _fingerprints(run)
        key = _key(apart)
        shared[key] = apart
        seeds = grouped[key][_key({name: config[name] for name in _METHOD})]
        if config["seed"] in seeds:
            repeated.append(run)
        else:
            seeds[config["seed"]] = run
    settings = [Setting(shared[key], _groups(groups.values())) for key, groups in sorted(grouped.items())]
    return sorted(_with_tuned_rates(settings), key=_weight, reverse=True), repeated


def _groups(seeds: Iterable[Mapping[int, Run]]) -> list[Group]:
    groups = []
    for runs in seeds:
        config = _DEFAULTS | next(iter(runs.values())).info["config"]
        rates = {name: config[name] for name in _RATES}
        groups.append(Group(config["method"], _strengths(config), rates, dict(sorted(runs.items()))))
    return _in_order(groups)


def _in_order(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (rank(group.method), len(group.strengths), _key(group.strengths)))


def _with_tuned_rates(settings: Sequence[Setting]) -> list[Setting]:
    """Settings that differ in their learning rates alone, and have no method in common, as one.

    That is what a search leaves that tunes the learning rate of every method.
    """
    families: dict[str, list[Setting]] = defaultdict(list)
    for setting in settings:
        families[_key(_without_rates(setting))].append(setting)
    merged = []
    for family in families.values():
        methods = [method for setting in family for method in {group.method for group in setting.groups}]
        if len(family) > 1 and len(methods) == len(set(methods)):
            groups = _in_order(group for setting in family for group in setting.groups)
            merged.append(Setting(_without_rates(family[0]), groups))
        else:
            merged += family
    return merged


def _without_rates(setting: Setting) -> dict[str, Any]:
    return {name: value for name, value in setting.fields.items() if name not in _RATES}


def _highest(groups: Iterable[Group]) -> Group | None:
    finite = [group for group in groups if math.isfinite(group.summary.mean)]
    return max(finite, key=lambda group: group.summary.mean, default=None)


def _strengths(config: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: config[name] for name in STRENGTHS if config[name] is not None}
    return given | {name: config[name] for name in _VARIANTS if _key(config[name]) != _key(_DEFAULTS[name])}


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What does not belong to the method, the seed, or the place where a run was made."""
    return {name: value for name, value in config.items() if name not in _METHOD + _NEUTRAL}


def _fingerprints(run: Run) -> dict[str, Any]:
    """Which images and which pre-trained weights a run really used."""
    images, weights = run.info["data"].get("fingerprint"), run.info["model"].get("weights_sha256")
    return {"images": images and images[:_PREFIX], "weights": weights and weights[:_PREFIX]}


def _weight(setting: Setting) -> tuple[int, int]:
    return len({group.method for group in setting.groups}), sum(len(group.runs) for group in setting.groups)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
