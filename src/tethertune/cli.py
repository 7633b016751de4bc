"""The command line: parses, calls the library, and says in one plain message what went wrong.

Imports only what ``--help`` needs; each command imports what it runs. Exit codes: 0 done, 1 failed, 2 bad input,
130 interrupted.
"""

import ast
import errno
import inspect
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from json import dumps
from pathlib import Path
from traceback import print_exception
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, get_origin, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter

from tethertune import __version__
from tethertune.errors import ConfigurationError, NonFiniteWeightError, TethertuneError
from tethertune.lab import protocols
from tethertune.lab.config import FinetuneConfig, load_toml
from tethertune.lab.launch import Launch, start_processes
from tethertune.lab.space import SearchConfig, require_free

if TYPE_CHECKING:
    from tethertune.lab.distances import Comparison

_Command = Callable[..., int | None]
"""What a command is: it gives an exit code, or nothing when it is done."""

__all__ = ["app", "run"]

PANELS = {
    "Model": ("model", "weights", "head", "size", "interpolation", "resize", "scaling", "bn"),
    "Data": (
        *("data", "per_class", "validation_per_class", "test_per_class", "label_noise", "train_on", "augment", "cache"),
    ),
    "Method": (
        *("method", "radius", "relative_radius", "head_radius", "strength", "head_strength"),
        *("projection", "convention", "affine", "head_bias", "include", "exclude", "freeze"),
        "attention",
    ),
    "Training": (
        *("epochs", "batch_size", "accumulate", "optimizer", "lr", "head_lr", "weight_decay", "schedule"),
        *("label_smoothing", "drop_last", "eval_every", "gradients", "seed"),
    ),
    "Forgetting": ("retain", "retain_size", "keep"),
    "Speed": ("precision", "channels_last", "compile", "threads"),
    "Output": ("task", "output", "checkpoint_every"),
}
"""The panels of ``tethertune finetune --help``, and the configuration keys shown in each."""

SEARCH_PANELS = {
    "Search": ("trials", "sampler", "startup", "space", "tune_lr", "lr_range", "objective", "prune", "seed"),
}
"""The panel that ``tethertune search --help`` has besides; ``--seed`` is one option, of the runs and of the search."""

PROCESS_PANELS = {"Several processes": tuple(item.name for item in fields(Launch))}
"""The panel that ``tethertune finetune --help`` has besides: flags of torchrun."""

_BAD_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}
"""What the operating system says of a disk that is full or read-only, and of a path that cannot be used."""

app = App(
    name="tethertune",
    help="Fine-tune on a tether: every layer's weights stay inside a ball around the pre-trained weights.",
    help_epilogue="Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.",
    help_format="plaintext",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
)


def run(tokens: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        tokens: The words after ``tethertune``; those of this process if ``None``.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if tokens is None else tokens
    return app.meta(words, result_action="return_value") or 0


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(negative=(), show_default=False, help="Show where an error comes from.")] = False,
) -> int:
    try:
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last place that can say it plainly
        if debug:
            print_exception(error)
        code, message = _explain(error)
        process = os.environ.get("RANK", "0")
        _say(message if process == "0" else f"[process {process}] {message}", file=sys.stderr)
    return code or 0


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what the user is told."""
    if isinstance(error, CycloptsError):
        return 2, f"{error} See --help."
    if isinstance(error, TethertuneError):
        return 1 if isinstance(error, NonFiniteWeightError) else 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted. The same command again resumes an unfinished run."
    if isinstance(error, OSError) and error.errno in _BAD_PLACE:
        return 2, f"{error.filename or 'A file'} cannot be read or written: {error.strerror}. Choose another place."
    return 1, f"{type(error).__name__}: {error} (this should not happen; --debug shows where it comes from)"


def _say(text: str, file: TextIO | None = None) -> None:
    print(text, file=file or sys.stdout)


def _notes(config: type) -> dict[str, str]:
    """The text under each field of a dataclass, without mark-up."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: inspect.cleandoc(str(note.value.value)).replace("``", "")
        for field, note in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
    }


def _with_options(command: _Command) -> _Command:
    """Give a command, in place of its ``**options``, one parameter for each key of the configuration.

    The words under a key are its help. Parameters default to ``None``, not given, so that a file's values count, and
    the configuration checks them, all at once.
    """
    return _with_fields(command, FinetuneConfig, PANELS)


def _with_launch_options(command: _Command) -> _Command:
    """The same, and one parameter for each of the flags that go through to torchrun."""
    return _with_options(_with_fields(command, Launch, PROCESS_PANELS))


def _with_search_options(command: _Command) -> _Command:
    """The same, and one parameter for each key of a search."""
    return _with_options(_with_fields(command, SearchConfig, SEARCH_PANELS))


def _with_fields(command: _Command, config: type[Any], shown_in: Mapping[str, Sequence[str]]) -> _Command:
    """Give a command one keyword parameter for each field of a dataclass, shown in panels, and no ``**options``."""
    groups = {panel: Group.create_ordered(panel) for panel in shown_in}
    panels = {key: groups[panel] for panel, keys in shown_in.items() for key in keys}
    hints, notes = get_type_hints(config), _notes(config)
    parameters = {name: p for name, p in inspect.signature(command).parameters.items() if name != "options"}
    for item in fields(config):
        hint = str if get_origin(hints[item.name]) is Literal else hints[item.name]
        default = False if item.default in (MISSING, None, ()) else str(item.default)
        about = Parameter(help=notes[item.name], group=panels[item.name], show_default=default)
        own = parameters.get(item.name, inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None))
        parameters[item.name] = own.replace(annotation=Annotated[hint | None, about])
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return command


@app.command(usage="Usage: tethertune finetune MODEL DATA [OPTIONS]")
@_with_launch_options
def finetune(
    model: str | None = None,
    data: str | None = None,
    /,
    *,
    config: Annotated[
        Path | None, Parameter(help="TOML file with any of these options as keys; flags override it.")
    ] = None,
    protocol: Annotated[
        str | None, Parameter(help="Defaults of these options: default, paper or authors; see docs/experiments.md.")
    ] = None,
    fresh: Annotated[
        bool, Parameter(help="Delete what an earlier run of this configuration left.", negative=(), show_default=False)
    ] = False,
    **options: Any,
) -> int | None:
    """Fine-tune MODEL on DATA, and leave a run folder.

    A run that was stopped goes on where it was when the same command is given again; a finished one is left as it is.

    Example: tethertune finetune lite0 photos/ --method mars-pgm --radius 8 --head-radius 12 --epochs 30 --seed 0
    """
    launch = Launch(**{item.name: options.pop(item.name, None) for item in fields(Launch)})
    given = {"protocol": protocol, "model": model, "data": data, **options}
    settings = _settings(config, _present(given))
    if launch != Launch():
        return start_processes(launch, [*shlex.split(settings.command())[1:], *(["--fresh"] if fresh else [])])
    from tethertune.lab import training

    run = training.finetune(settings, fresh=fresh)
    if os.environ.get("RANK", "0") == "0":
        outcome = run.info["outcome"]
        _say(str(run.path))
        _say(
            f"test accuracy {outcome['test_accuracy']:.2%}, validation accuracy {outcome['validation_accuracy']:.2%},"
            f" {outcome['epochs']} epochs, {outcome['seconds']:.0f} s"
        )
        if outcome.get("retention"):
            _say(f"{_kept(outcome['retention'])}, alpha {outcome['alpha']}")
    return None


def _kept(retention: Mapping[str, Any]) -> str:
    """What a network has kept, in words."""
    return f"{retention['share']:.2%} of {retention['confident']} confident pre-trained answers kept"


def _present(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def _settings(file: Path | None, given: dict[str, Any], command: str = "finetune") -> FinetuneConfig:
    """The configuration of a TOML file, if there is one, with what was given on the command line instead of it."""
    if file is not None:
        return load_toml(file, given)
    for name in ("model", "data"):
        if name not in given:
            raise ConfigurationError(f"{name.upper()} is missing: tethertune {command} MODEL DATA, or --config FILE.")
    return FinetuneConfig(**protocols.under(given))


@app.command(usage="Usage: tethertune search MODEL DATA [OPTIONS]")
@_with_search_options
def search(
    model: str | None = None,
    data: str | None = None,
    /,
    *,
    config: Annotated[
        Path | None, Parameter(help="TOML file with options of tethertune finetune as keys; flags override it.")
    ] = None,
    protocol: Annotated[
        str | None, Parameter(help="Defaults of these options: default, paper or authors; see docs/experiments.md.")
    ] = None,
    study: Annotated[
        str | None, Parameter(help="Name of the study. Not given: one of data, model, method and a hash.")
    ] = None,
    storage: Annotated[
        str | None,
        Parameter(help="URL of a database for the study, any that Optuna takes. Not given: OUTPUT/search.db."),
    ] = None,
    workers: Annotated[int, Parameter(help="Processes that make trials; several commands may share a study too.")] = 1,
    json: Annotated[bool, Parameter(negative=(), show_default=False, help="Print JSON instead of text.")] = False,
    **options: Any,
) -> None:
    """Choose the hyper-parameters of a method by trials, each a run of MODEL on DATA that is not tested.

    A search that was stopped goes on where it was when the same command is given again.

    Example: tethertune search lite0 photos/ --method mars-pgm --trials 20 --tune-lr --epochs 30
    """
    from_file = set() if config is None else set(_settings_keys(config))
    given = _present({"model": model, "data": data, **options})
    of_search = {item.name: given[item.name] for item in fields(SearchConfig) if item.name in given}
    of_runs = {item.name: given[item.name] for item in fields(FinetuneConfig) if item.name in given}
    of_protocol = _present({"protocol": protocol})
    runs = _settings(config, of_protocol | of_runs, "search")
    settings = SearchConfig(**{**protocols.find(protocol or "default").search, **of_search, "seed": runs.seed})
    require_free(from_file | of_runs.keys(), runs.method, settings)
    from tethertune.lab import search as searching
    from tethertune.lab.story import result

    found = searching.run(runs, settings, storage=storage, study=study, workers=workers)
    _say(dumps(found.to_dict(), indent=2, allow_nan=False) if json else result(found))


def _settings_keys(file: Path) -> list[str]:
    """The keys in a TOML file."""
    load_toml(file, {"model": "-", "data": "-"})  # tells what is wrong with it
    return [*tomllib.loads(file.read_text(encoding="utf-8"))]


@app.command
def distances(
    checkpoint: str,
    *,
    reference: str | None = None,
    arch: str | None = None,
    convention: Literal["operator", "authors"] = "operator",
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Show how far each layer of CHECKPOINT lies from the same layer of another checkpoint.

    Example: tethertune distances runs/fashion/lite0/mars-pgm/seed-0-1a2b3c4d

    Args:
        checkpoint: A run folder, a safetensors file, or a file written by torch.save.
        reference: Another checkpoint, or the name of a network for its published weights. Not given: what the run
            was trained from.
        arch: Name of the network, whose modules tell what a row is. Not given: what the checkpoint says.
        convention: What a row is: operator (of the matrix of the linear map) or authors (as the paper's code).
        json: Print JSON instead of a table.
    """
    from tethertune.lab.distances import compare

    comparison = compare(checkpoint, reference, arch=arch, convention=convention)
    _say(dumps(comparison.to_dict(), indent=2, allow_nan=False)) if json else _show(comparison)


def _show(comparison: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    for column in ("rows", "MARS", "relative", "Frobenius", "relative"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, layer in comparison.to_dict()["layers"].items():
        numbers = (layer[key] for key in ("mars", "relative_mars", "frobenius", "relative_frobenius"))
        label = f"{name} (head, from 0)" if layer["role"] == "head" else name
        table.add_row(label, str(layer["rows"]), *("-" if number is None else f"{number:.4g}" for number in numbers))
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False)
    console.print(f"{comparison.checkpoint}\nfrom {comparison.reference}")
    console.print(table)
    console.print(f"Rows: {comparison.rows}.\nRelative: as a multiple of the reference's own norm of that layer.")


@app.command
def certify(
    checkpoint: str,
    *,
    data: str | None = None,
    reference: str | None = None,
    arch: str | None = None,
    delta: float = 0.05,
    loss: Literal["ramp", "clipped-ce"] = "ramp",
    margin: float | None = None,
    mode: Literal["declared", "grid"] | None = None,
    cache: Path | None = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Certify CHECKPOINT on the images it was trained on: how far its expected loss can be from its training loss.

    The certificate of a run is kept in its folder, where tethertune report finds it.

    Example: tethertune certify runs/fashion/lite0/mars-pgm/seed-0-1a2b3c4d

    Args:
        checkpoint: A run folder, a safetensors file, or a file written by torch.save.
        data: The training images, as in tethertune finetune. Not given: what the run says.
        reference: Another checkpoint, or the name of a network for its published weights. Not given: what the run
            was trained from.
        arch: Name of the network. Not given: what the checkpoint says.
        delta: The probability, at most, that the certificate fails.
        loss: ramp (of the margin) or clipped-ce (cross-entropy, clipped at log 2); each is 1 on every mistake.
        margin: Margin of the ramp, if it was fixed before the images were seen. Not given: the best of a grid, which
            is paid for.
        mode: declared (the radii of the run's configuration) or grid (the distances as they are, rounded up to a grid
            that is paid for). Not given: declared where the run declares radii.
        cache: Folder of decoded images. Not given: that of the run, or tethertune in the user's cache folder.
        json: Print JSON instead of tables.
    """
    from tethertune.lab import certify as certification

    found = certification.certify(
        checkpoint,
        data,
        reference=reference,
        arch=arch,
        delta=delta,
        loss=loss,
        margin=margin,
        mode=mode,
        cache=cache,
    )
    if json:
        _say(dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        from tethertune.lab.certificate_text import show

        show(found)


@app.command
def interpolate(
    run: Path,
    *,
    alpha: tuple[float, ...] = (0.75, 0.5, 0.25),
    retain: str | None = None,
    retain_size: int | None = None,
    output: Path | None = None,
) -> None:
    """Measure and save RUN on its way back to the weights that it was trained from (WiSE-FT).

    Less is forgotten on the way, and every network on it is inside the run's balls. What is measured is kept in
    RUN/interpolations.json, where tethertune report finds it.

    Example: tethertune interpolate runs/fashion/lite0/mars-pgm/seed-0-1a2b3c4d --alpha 0.5 --retain photos/

    Args:
        run: The folder of a finished run.
        alpha: A place on the way, from 0 (the pre-trained weights under the trained head) to 1 (the run); repeatable.
        retain: A folder of any unlabelled images, as in tethertune finetune. Not given: that of the run, if any.
        retain_size: Side of those images in pixels. Not given: that of the run, or the network's own for other images.
        output: Folder for the weights, alpha-ALPHA.safetensors. Not given: RUN.
    """
    from tethertune.lab import interpolation

    for found in interpolation.measure(run, alpha, retain=retain, retain_size=retain_size, save=True, output=output):
        kept = "" if found.retention is None else f", {_kept(found.retention.to_dict())}"
        _say(
            f"alpha {found.alpha}: test accuracy {found.test_accuracy:.2%}, validation accuracy"
            f" {found.validation_accuracy:.2%}{kept}"
        )


@app.command
def export(
    run: Path,
    *,
    to: Literal["safetensors", "timm", "torchvision", "huggingface", "onnx"],
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    output: Path | None = None,
) -> None:
    """Write RUN in the form that others load without tethertune, with a model card.

    The weights are inside the run's balls in the dtype of the file.

    Example: tethertune export runs/fashion/lite0/mars-pgm/seed-0-1a2b3c4d --to timm --dtype bfloat16

    Args:
        run: The folder of a finished run.
        to: safetensors (weights alone), timm and huggingface (a folder each), torchvision (a state dict) or onnx.
        dtype: Of the numbers in the file.
        output: Folder to write. Not given: export-TO, or export-TO-DTYPE, in RUN.
    """
    from tethertune.lab.export import export as write

    _say(str(write(run, to, dtype=dtype, output=output)))


@app.command
def report(
    *runs: Path,
    output: Path = Path("report.html"),
    format: Literal["html", "markdown", "json"] = "html",  # noqa: A002 - the flag is --format
) -> None:
    """Write a report of RUNS: which method won, by how much, whether that is noise, and what each run did.

    Example: tethertune report runs/ --output report.html

    Args:
        runs: Run folders, or folders above them such as runs/.
        output: The file to write. An HTML page is complete in itself: it opens without a network.
        format: html, markdown, or json for the numbers alone.
    """
    from tethertune.lab.report import write

    _say(str(write(runs, output, format)))


@app.command
def bounds(
    model: str | None = None,
    /,
    *,
    output: Path | None = None,
    seed: int = 0,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Compare how generalisation bounds grow with depth, width, input resolution and distance.

    On ResNets with random weights, which takes one to two minutes on two cores and needs no network.

    Example: tethertune bounds --output bounds.html

    Args:
        model: The network of the comparisons by resolution and distance, with its published weights, as in tethertune
            finetune. Not given: a ResNet-18 with random weights.
        output: HTML file to write the figures to. Not given: only tables are printed.
        seed: Seed of the random weights.
        json: Print JSON instead of tables.
    """
    from tethertune.lab import growth
    from tethertune.lab.report import growth as figures

    if output is not None:
        figures.check_output(output)
    found = growth.measure(model, seed=seed)
    if json:
        _say(dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        from tethertune.lab.growth_text import show

        show(found)
    if output is not None:
        _say(str(figures.write(found, output)), file=sys.stderr if json else None)


@app.command
def compare(
    config: Path,
    *,
    output: Path | None = None,
    executor: str | None = None,
    workers: int | None = None,
    storage: str | None = None,
    task: tuple[str, ...] = (),
    dry_run: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Make the comparison that CONFIG describes: networks x tasks x methods, searched, trained once a seed, reported.

    A comparison that was stopped goes on where it was when the same command is given again.

    Example: tethertune compare configs/demo.toml

    Args:
        config: A TOML file; docs/experiments.md lists its keys.
        output: The folder of everything. Not given: what the file says, or comparison.
        executor: Where runs are made: local (in this process) or processes. Not given: what the file says.
        workers: Processes. Not given: what the file says.
        storage: URL of an Optuna database for the searches. Not given: search.db in the output folder.
        task: Only this task of the file; repeatable.
        dry_run: Print the plan, and what it will cost, and make nothing.
    """
    from tethertune.lab import comparison_file

    given = {"output": output, "executor": executor, "workers": workers, "storage": storage}
    wanted = comparison_file.load(config, _present(given)).only(task)
    if dry_run:
        from tethertune.lab import forecast

        forecast.show(wanted)
    else:
        from tethertune.lab import compare as comparing
        from tethertune.lab.report.terminal import show

        written = comparing.run(wanted)
        show(comparing.folders(wanted))
        _say(f"\nThe report, with curves and what each layer did: {written}")
        lost = comparing.lost(wanted)
        if lost:
            raise NonFiniteWeightError("\n".join(lost))


@app.command
def prepare(
    data: str,
    *,
    model: str | None = None,
    size: int | None = None,
    interpolation: str | None = None,
    resize: Literal["crop", "stretch"] = "crop",
    cache: Path | None = None,
) -> None:
    """Find or download DATA, check every image, and decode them once for all runs.

    Example: tethertune prepare aircraft --model tf_efficientnet_b0.aa_in1k

    Args:
        data: What tethertune finetune takes: a folder, fashion, digits, aircraft, ...
        model: The network that images are decoded for. Not given, and no size either: images are only checked.
        size: Side of the images in pixels. Not given: the network's own.
        interpolation: How pixels are interpolated. Not given: the network's own, or bilinear without a network.
        resize: How photos become square: crop (the centre) or stretch (everything, out of shape).
        cache: Folder of decoded images. Not given: tethertune in the user's cache folder.
    """
    from tethertune.lab.prepare import prepare as make_ready

    _say(str(make_ready(data, model=model, size=size, interpolation=interpolation, resize=resize, cache=cache)))


@app.command
def config(file: Path | None = None) -> None:
    """Print the complete configuration that FILE stands for, defaults included, as TOML.

    Example: tethertune config > my.toml; tethertune finetune --config my.toml --seed 1

    Args:
        file: A TOML file with any of the options of tethertune finetune. Not given: lite0 on fashion, all defaults.
    """
    settings = load_toml(file) if file else FinetuneConfig("lite0", "fashion")
    _say(settings.to_toml().rstrip())
