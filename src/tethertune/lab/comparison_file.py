"""The TOML file of a comparison, checked whole before anything runs.

::

    protocol = "default"                defaults of everything below: default, paper or authors
    models = ["lite0"]                  or [models.LABEL] tables: model = "lite0", and any option of finetune
    tasks = ["fashion"]                 or [tasks.NAME] tables: data = "fashion", methods = [...], and any option
    methods = ["none", "mars-pgm"]
    seeds = 5                           seeds 1 to 5, or a list of seeds
    retrain_on = "train+validation"     what the runs that count are trained on, once the values are chosen
    executor = "processes"              local or processes
    workers = 2                         processes

    [train]                             any option of finetune, for all runs
    [search]                            options of search; without this table nothing is searched
    [values]                            METHOD = { radius = 1.0 }: given, so not searched; a list: each of them
    [values.MODEL.TASK]                 the same for one network and one task
    [sweeps]                            lr = [...], strengths = [...]: curves around the chosen values
    [interpolate]                       alphas = [...], retain = FOLDER, retain_size = ...: runs on the way back

The last two tables take ``tasks = [...]`` and ``seeds``, where not all are meant.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tethertune.errors import ConfigurationError, did_you_mean
from tethertune.lab import protocols
from tethertune.lab.comparison import Cell, Comparison, Interpolate, Scope, Sweep
from tethertune.lab.config import FinetuneConfig, read_toml
from tethertune.lab.executors import EXECUTORS
from tethertune.lab.methods import METHODS
from tethertune.lab.space import SearchConfig

__all__ = ["load"]

_SWEPT: tuple[Literal["lr", "strengths"], ...] = ("lr", "strengths")
_RETRAIN = ("train", "train+validation")
_PLAN = {"seed", "task", "output", "train_on", "method"}
"""Options of finetune that the comparison sets itself, so that its tables may not."""


@dataclass(frozen=True)
class _File:
    """The keys of a comparison's file."""

    models: Any = None
    tasks: Any = None
    methods: Any = tuple(METHODS)
    protocol: Any = "default"
    seeds: Any = 5
    retrain_on: Any = "train+validation"
    executor: Any = "processes"
    workers: Any = 2
    output: Any = "comparison"
    storage: Any = None
    train: Any = field(default_factory=dict)
    search: Any = None
    values: Any = field(default_factory=dict)
    sweeps: Any = field(default_factory=dict)
    interpolate: Any = field(default_factory=dict)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Comparison:
    """Read a comparison from its TOML file.

    Args:
        path: The file.
        overrides: Top-level keys that win over the file's.

    Raises:
        ConfigurationError: The file cannot be read, is not TOML, or holds unknown keys or values that are not
            allowed; all of them in one message that names the file.
    """
    given = read_toml(path)
    known = [item.name for item in fields(_File)]
    faults = [f"{key} is not a key of a comparison.{did_you_mean(key, known)}" for key in given.keys() - set(known)]
    file = _File(**{key: value for key, value in (given | dict(overrides or {})).items() if key in known})
    faults += _faults(file)
    comparison = None
    if not faults:
        comparison, faults = _build(file)
    if faults or comparison is None:
        raise ConfigurationError("\n".join(f"{path}: {fault}" for fault in dict.fromkeys(faults)))
    return comparison


def _faults(file: _File) -> Iterator[str]:
    """What is wrong with the file before a single run is configured."""
    for key, what in (("models", "networks"), ("tasks", "tasks")):
        value = getattr(file, key)
        if not value or not isinstance(value, (list, tuple, dict)):
            yield f"{key} names the {what} to compare: give a list of names, or a table for each."
    for key in ("train", "search", "values", "sweeps", "interpolate"):
        if not isinstance(getattr(file, key), dict | None):
            yield f"{key} is a table: write [{key}]."
    yield from _choice_faults(file)
    for key, allowed, advice in (
        ("workers", _is_count, "a whole number, 1 or more"),
        ("seeds", _seeds, "a number of seeds, 1 or more, or a list of seeds"),
    ):
        value = getattr(file, key)
        if not allowed(value):
            yield f"{key} = {value!r} is not allowed: use {advice}."
    for key in ("sweeps", "interpolate"):
        yield from _extra_faults(key, getattr(file, key), file.tasks)


def _choice_faults(file: _File) -> Iterator[str]:
    """Names that are not known."""
    for key, allowed in (
        ("methods", METHODS),
        ("protocol", protocols.PROTOCOLS),
        ("executor", EXECUTORS),
        ("retrain_on", _RETRAIN),
    ):
        value = getattr(file, key)
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if name not in allowed:
                yield f"{key}: {name} is not known: use {', '.join(allowed)}.{did_you_mean(str(name), allowed)}"


def _extra_faults(table: str, given: Any, tasks: Any) -> Iterator[str]:
    """What is wrong with ``[sweeps]`` or ``[interpolate]``."""
    allowed = {
        **_EXTRA[table],
        "seeds": (_seeds, "a number of seeds, or a list of seeds"),
        "tasks": (
            lambda value: set(value) <= set(map(_label, tasks)),
            f"a list of {', '.join(map(_label, tasks or ()))}",
        ),
    }
    for key, value in given.items() if isinstance(given, dict) else ():
        if key not in allowed:
            yield f"{table}.{key} is not known: use {', '.join(allowed)}.{did_you_mean(key, allowed)}"
        elif not allowed[key][0](value):
            yield f"{table}.{key} = {value!r} is not allowed: use {allowed[key][1]}."
    if table == "interpolate" and given and "alphas" not in given:
        yield "interpolate.alphas is missing: give a list of numbers from 0 to 1."


def _build(file: _File) -> tuple[Comparison | None, list[str]]:
    """The comparison, or the faults that its runs' configurations have."""
    protocol, faults = protocols.find(file.protocol), list[str]()
    search = None
    if file.search is not None:
        allowed = {item.name for item in fields(SearchConfig)}
        unknown = sorted(file.search.keys() - allowed)
        faults += [f"search: {key} is not an option of search.{did_you_mean(key, allowed)}" for key in unknown]
        try:
            search = SearchConfig(**{k: v for k, v in {**protocol.search, **file.search}.items() if k in allowed})
        except ConfigurationError as error:
            faults += [f"search: {fault}" for fault in str(error).splitlines()]
    cells = []
    models, tasks = _tables(file.models, "model"), _tables(file.tasks, "data")
    for task, of_task in tasks.items():
        for model, of_model in models.items():
            for method in of_task.get("methods", file.methods):
                options = {**_threads(file), **protocol.training, **file.train, **of_model, **of_task}
                options.pop("methods", None)
                try:
                    cells.append(_cell(model, task, method, options, _values(file.values, model, task, method)))
                except ConfigurationError as error:
                    faults += [f"{model}, {task}, {method}: {fault}" for fault in str(error).splitlines()]
    faults += _unused(file.values, models, tasks)
    sweeps = tuple(
        Sweep(key, tuple(map(float, file.sweeps[key])), _scope(file.sweeps, 1)) for key in _SWEPT if key in file.sweeps
    )
    comparison = Comparison(
        cells=tuple(cells),
        search=search,
        seeds=_seeds(file.seeds),
        retrain_on=file.retrain_on,
        sweeps=sweeps,
        interpolate=_interpolate(file) if file.interpolate else None,
        executor=file.executor,
        workers=file.workers,
        output=Path(file.output),
        storage=file.storage,
    )
    return comparison, faults


def _threads(file: _File) -> dict[str, int]:
    """Processes share the cores, unless the file says how many threads each takes."""
    return {"threads": max(1, (os.cpu_count() or 1) // file.workers)} if file.executor == "processes" else {}


def _scope(table: Mapping[str, Any], seeds: Any) -> Scope:
    return Scope(tuple(table.get("tasks", ())), _seeds(table.get("seeds", seeds)))


def _interpolate(file: _File) -> Interpolate:
    table = file.interpolate
    alphas = tuple(map(float, table["alphas"]))
    return Interpolate(alphas, table.get("retain"), table.get("retain_size"), _scope(table, file.seeds))


def _cell(model: str, task: str, method: str, options: Mapping[str, Any], given: Sequence[Mapping[str, Any]]) -> Cell:
    """One cell, with every configuration that is known of it tried.

    Raises:
        ConfigurationError: An option is unknown or not allowed.
    """
    known = {item.name for item in fields(FinetuneConfig)}
    keys = {*options, *(key for values in given for key in values)}
    faults = [f"{key} is not an option of finetune.{did_you_mean(key, known)}" for key in keys - known]
    faults += [f"{key} is set by the comparison itself: take it out." for key in keys & _PLAN]
    if faults:
        raise ConfigurationError("\n".join(sorted(faults)))
    base = FinetuneConfig(**{**options, "task": task, "method": method})
    for values in given:
        base.having(**values)
    return Cell(model, task, base, tuple(given))


def _tables(given: Any, key: str) -> dict[str, dict[str, Any]]:
    """A list of names as tables: label -> options, of which ``key`` says what the label stands for."""
    if isinstance(given, dict):
        return {label: {key: label, **options} for label, options in given.items()}
    return {_label(name): {key: name} for name in given}


def _label(name: str) -> str:
    """``aircraft`` for ``aircraft:/data/fgvc``; the last part of a path."""
    head, colon, _ = name.partition(":")
    return head if colon and not Path(name).exists() and head != "torchvision" else Path(name).name or name


def _values(values: Mapping[str, Any], model: str, task: str, method: str) -> list[Mapping[str, Any]]:
    """What is given for a cell: for it alone, or for its method everywhere."""
    found = values.get(model, {}).get(task, {}).get(method, values.get(method))
    return [] if found is None else list(found) if isinstance(found, list) else [found]


def _unused(values: Mapping[str, Any], models: Mapping[str, Any], tasks: Mapping[str, Any]) -> Iterator[str]:
    """Values of networks, tasks and methods that there are not."""
    for key, table in values.items():
        if key in METHODS:
            continue
        if key not in models:
            yield f"values.{key} is neither a method nor a network of this comparison: use {', '.join(models)}."
            continue
        for task, methods in table.items():
            if task not in tasks:
                yield f"values.{key}.{task} is not a task of this comparison: use {', '.join(tasks)}."
            yield from (
                f"values.{key}.{task}.{name} is not a method: use {', '.join(METHODS)}."
                for name in methods
                if name not in METHODS
            )


def _seeds(given: Any) -> tuple[int, ...]:
    """1 to n for a number; the list itself; empty if it is neither."""
    if _is_count(given):
        return tuple(range(1, given + 1))
    if isinstance(given, (list, tuple)) and all(isinstance(seed, int) and seed >= 0 for seed in given):
        return tuple(given)
    return ()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_shares(value: Any) -> bool:
    return _is_numbers(value) and all(0 <= number <= 1 for number in value)


def _is_rates(value: Any) -> bool:
    return _is_numbers(value) and all(number > 0 for number in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) for number in value
    )


_EXTRA: dict[str, dict[str, tuple[Callable[[Any], Any], str]]] = {
    "sweeps": {
        "lr": (_is_rates, "a list of learning rates, each above 0"),
        "strengths": (_is_rates, "a list of factors of both hyper-parameters, each above 0"),
    },
    "interpolate": {
        "alphas": (lambda value: value and _is_shares(value), "a list of numbers from 0 to 1"),
        "retain": (lambda value: isinstance(value, str), "the path of a folder"),
        "retain_size": (lambda value: _is_count(value) and value >= 16, "a whole number of pixels, 16 or more"),
    },
}
"""The keys of the tables of what is measured around the results, what they allow, and the words for it."""
