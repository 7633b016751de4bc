"""The configuration of one fine-tuning run: every option, its check, its TOML file and its identity.

Imports nothing heavy, because the command line reads it for ``--help``.
"""

import hashlib
import json
import math
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tethertune.errors import ConfigurationError, did_you_mean
from tethertune.lab import protocols
from tethertune.lab.methods import METHODS

__all__ = ["COUNT", "SEED", "FinetuneConfig", "Range", "faults_of_fields", "load_toml", "make_plain", "read_toml"]

_BYSTANDER = {"identity": False}
"""Marks a field that changes no result, only where, when or how fast it is made."""

Range = tuple[Callable[[Any], bool], str]
"""A test of a field's value, written so that NaN fails, and what to do when it fails."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that one run is made from. A value that is not allowed is a :exc:`ConfigurationError`.

    Numbers may be given as int or float; all faults are reported in one error. If none of a method's hyper-parameters
    is given, its defaults (:data:`~tethertune.lab.methods.METHODS`) are filled in, so that a configuration always
    holds the values that are used.
    """

    model: str
    """A timm name, ``torchvision:NAME``, a checkpoint file or folder, or ``lite0``."""

    data: str
    """A folder of images (``train/ val/ test/`` of class folders, or class folders to be split), ``fashion``,
    ``digits``, a published data set (``aircraft``, or ``aircraft:FOLDER`` for where it lies), or ``hf:NAME``."""

    method: str = "mars-pgm"
    """What holds the weights near the pre-trained ones: none, l2-sp, mars-sp, delta, l2-pgm, or mars-pgm."""

    weights: str | None = None
    """Checkpoint file or folder with weights of MODEL, in place of its published ones."""

    radius: float | None = None
    """Largest distance of each body layer, 0 or more; 0 freezes, inf frees. For mars-pgm and l2-pgm."""

    relative_radius: float | None = None
    """Largest distance of each body layer as a multiple of the norm of its own pre-trained weights, 0 or more."""

    head_radius: float | None = None
    """Largest distance of the new head from zero, 0 or more. Not given: the head is free."""

    strength: float | None = None
    """Factor of the body's penalty in the loss, 0 or more. For l2-sp, mars-sp and delta."""

    head_strength: float | None = None
    """Factor of the head's penalty in the loss, 0 or more. Not given: no penalty on the head."""

    projection: Literal["radial", "euclidean"] = "radial"
    """How mars-pgm projects: radial scales a row (the paper), euclidean finds the nearest point of the ball."""

    convention: Literal["operator", "authors"] = "operator"
    """How weights become rows: operator (the matrix of the linear map) or authors (as the paper's published code)."""

    affine: Literal["free", "frozen"] = "free"
    """Biases and normalisation layers of a constrained model: free, or frozen at their pre-trained values."""

    head_bias: Literal["free", "frozen"] = "free"
    """Bias of a constrained model's new head: free, or frozen at zero, so that the head's radius bounds all of it."""

    include: tuple[str, ...] = ()
    """Name patterns of parameters that are held too, though they are free by default (embeddings, biases)."""

    exclude: tuple[str, ...] = ()
    """Name patterns of parameters that are left free."""

    freeze: tuple[str, ...] = ()
    """Name patterns of the body's layers that stay exactly at their pre-trained values, whatever the radius."""

    attention: Literal["softmax", "zscore", "sigmoid", "none"] = "softmax"
    """How delta turns a channel's importance into its weight; softmax is the paper's formula."""

    epochs: int = 30
    """Passes over the training images, 1 or more."""

    batch_size: int = 32
    """Images in one forward pass, over all processes together, 1 or more."""

    accumulate: int = 1
    """Batches whose gradients make one optimiser step, 1 or more."""

    optimizer: str = "amsgrad"
    """amsgrad, adam, adamw, sgd (momentum 0.9), or the name of any timm or torch.optim optimiser."""

    lr: float = 3e-4
    """Learning rate, above 0."""

    head_lr: float | None = None
    """Learning rate of the new head, above 0. Not given: the same."""

    weight_decay: float = 0.0
    """Weight decay as the optimiser defines it, 0 or more."""

    schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning rate over the run: step (halved after two thirds), cosine (to zero), or constant."""

    label_smoothing: float = 0.0
    """Share of the target spread over all classes, from 0 to below 1."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations (mixed precision); weights stay float32. float16 needs an accelerator."""

    channels_last: bool = True
    """Memory format of images and convolutions; much faster on CPUs and on tensor cores."""

    compile: bool = False
    """Compile the model with torch.compile."""

    bn: Literal["frozen", "train"] = "frozen"
    """Batch-norm statistics: frozen at the pre-trained values, or train. Scale and shift are trained either way."""

    head: Literal["pool", "flatten"] = "pool"
    """New head: pool (zero-initialised, on pooled features) or flatten (Glorot, on the whole map, as the authors)."""

    size: int | None = None
    """Side of the images in pixels, 16 or more. Not given: the model's own."""

    interpolation: str | None = None
    """How images are resized: bilinear, bicubic, nearest, ... Not given: as the model's own configuration says."""

    resize: Literal["crop", "stretch"] = "crop"
    """How a picture becomes a square: crop cuts out its middle, stretch gives up its proportions (the authors)."""

    scaling: Literal["model", "raw"] = "model"
    """Values of the input: model (its own mean and standard deviation) or raw (0 to 255 as they are, the authors)."""

    per_class: int | None = None
    """Training images kept of each class, 1 or more, chosen by the seed. Not given: all."""

    validation_per_class: int | None = None
    """Validation images kept of each class, 1 or more, the same for every seed. Not given: all."""

    test_per_class: int | None = None
    """Test images kept of each class, 1 or more, the same for every seed. Not given: all."""

    label_noise: float = 0.0
    """Share of the training labels that are replaced by another class, chosen by the seed, from 0 to below 1."""

    train_on: Literal["train", "train+validation"] = "train"
    """What weights are fitted to; with train+validation, validation figures are of images that were trained on."""

    drop_last: bool = False
    """Leave out a last batch that is not full, in training and in every evaluation (as the authors)."""

    augment: bool = False
    """Random resized crops and flips of the training images."""

    eval_every: int = 1
    """Epochs between evaluations on the validation images, 1 or more; the last epoch is always evaluated."""

    gradients: bool = False
    """Measure the loss's gradient and the test accuracy at every evaluation (Figure 1); nothing is chosen by them."""

    retain: str | None = None
    """A folder of any unlabelled images: measure how many of the pre-trained network's answers on them stay."""

    retain_size: int | None = None
    """Side of those images in pixels, 16 or more. Not given: the size that the network was published for."""

    keep: float | None = None
    """End with the largest interpolation towards the reference that keeps this share of the answers, from 0 to 1."""

    seed: int = 0
    """Seed of the subset, the head, the order and everything else random, from 0 to 2^32 - 1."""

    threads: int | None = field(default=None, metadata=_BYSTANDER)
    """CPU threads of this process, 1 or more; results repeat bit for bit only with the same number."""

    task: str | None = field(default=None, metadata=_BYSTANDER)
    """Name of the task in reports and in the run folder. Not given: that of the data."""

    output: str = field(default="runs", metadata=_BYSTANDER)
    """Folder that the run folder is made in: OUTPUT/TASK/MODEL/METHOD/seed-N-HASH."""

    cache: str | None = field(default=None, metadata=_BYSTANDER)
    """Folder of decoded images, shared by runs. Not given: tethertune in the user's cache folder."""

    checkpoint_every: float = field(default=60.0, metadata=_BYSTANDER)
    """Seconds between saved states that a killed run resumes from, 0 or more; 0 saves after every step."""

    def __post_init__(self) -> None:
        """Check every field, and fill in the method's defaults.

        Raises:
            ConfigurationError: All faults, one a line.
        """
        make_plain(self)
        for name in _PATHS:
            value = getattr(self, name)
            if isinstance(value, str):  # a folder is the same run with a slash at its end
                object.__setattr__(self, name, value.rstrip("/") or value)
        faults = [*faults_of_fields(self, _RANGES), *_combination_faults(self)]
        if faults:
            raise ConfigurationError("\n".join(faults))
        self._fill_in_defaults()

    def _fill_in_defaults(self) -> None:
        method = METHODS[self.method]
        body = [key for key in method.accepts if not key.startswith("head_")]
        body_is_given = any(getattr(self, key) is not None for key in body)
        any_is_given = any(getattr(self, key) is not None for key in method.accepts)
        for key, value in method.defaults.items():
            if not (body_is_given if key in body else any_is_given):
                object.__setattr__(self, key, value)

    @property
    def hyper_parameters(self) -> dict[str, float]:
        """The hyper-parameters of the method that are set, by name."""
        given = {key: getattr(self, key) for key in METHODS[self.method].accepts}
        return {key: value for key, value in given.items() if value is not None}

    def having(self, **values: Any) -> "FinetuneConfig":
        """A copy with other values; if one is a hyper-parameter of the method, those that are not given are unset.

        Raises:
            ConfigurationError: A value is not allowed.
        """
        accepted = METHODS[self.method].accepts
        unset = dict.fromkeys(accepted) if values.keys() & set(accepted) else {}
        return replace(self, **{**unset, **values})

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that change the result, as plain JSON values."""
        return {
            item.name: _plain(getattr(self, item.name)) for item in fields(self) if item.metadata.get("identity", True)
        }

    @property
    def hash(self) -> str:
        """The first 8 hexadecimal digits of the SHA-256 of the identity as canonical JSON."""
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; an infinite radius is the string ``"inf"``."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def to_toml(self) -> str:
        """The effective configuration as a TOML file; fields that are not set are left out."""
        lines = (f"{key} = {_toml(value)}\n" for key, value in asdict(self).items() if value is not None)
        return "".join(lines)

    def command(self) -> str:
        """The shell command that repeats the run: MODEL, DATA, and each option that is not at its default."""
        words = ["tethertune", "finetune", self.model, self.data, "--method", self.method]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("model", "data", "method") and value != item.default:
                words += _flag(item.name, value)
        return shlex.join(words)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a TOML file.

    Raises:
        ConfigurationError: It cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: not a readable TOML file: {error}.") from error


def load_toml(path: str | Path, overrides: Mapping[str, Any] | None = None) -> FinetuneConfig:
    """Read a configuration from a TOML file of top-level keys, some of them overridden.

    The key ``protocol`` stands for the defaults of one of :data:`~tethertune.lab.protocols.PROTOCOLS`.

    Args:
        path: The file.
        overrides: Values that win over the file's.

    Raises:
        ConfigurationError: The file cannot be read, is not TOML, or holds unknown keys or values that are not
            allowed; all of them in one message that names the file.
    """
    given = read_toml(path)
    try:
        merged = protocols.under(given | dict(overrides or {}))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    known = {item.name: item for item in fields(FinetuneConfig)}
    allowed = {*known, "protocol"}
    faults = [f"{key} is not a key of the configuration.{did_you_mean(key, allowed)}" for key in given.keys() - allowed]
    values = {key: value for key, value in merged.items() if key in known}
    for name, item in known.items():
        if item.default is MISSING and name not in values:
            faults.append(f"{name} is missing: give it in the file or on the command line.")
            values[name] = "-"
    try:
        config = FinetuneConfig(**values)
    except ConfigurationError as error:
        faults += str(error).splitlines()
    if faults:
        raise ConfigurationError("\n".join(f"{path}: {fault}" for fault in sorted(faults)))
    return config


def make_plain(config: Any) -> None:
    """In a frozen dataclass of options, make float fields float and lists tuples, so that equal settings are equal."""
    for item, kinds in _kinds(config):
        value = getattr(config, item.name)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, item.name, float(value))
        elif isinstance(value, list | tuple):
            plain = (float(x) if float in get_args(kinds[0]) and isinstance(x, int) else x for x in value)
            object.__setattr__(config, item.name, tuple(plain))


def faults_of_fields(config: Any, ranges: Mapping[str, Range]) -> Iterator[str]:
    """What is wrong with the types and the numbers of a dataclass of options, a sentence each.

    Args:
        config: The dataclass.
        ranges: The tests of those fields whose type does not say all.
    """
    yield from _type_faults(config)
    yield from _range_faults(config, ranges)


def _kinds(config: Any) -> Iterator[tuple[Field[Any], tuple[Any, ...]]]:
    """Each field with the types that its annotation allows, e.g. ``(float, NoneType)``."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        hint = hints[item.name]
        yield item, get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _type_faults(config: Any) -> Iterator[str]:
    for item, kinds in _kinds(config):
        value = getattr(config, item.name)
        if not any(_fits(value, kind) for kind in kinds):
            yield f"{_quote(item.name, value)} is not allowed: {_wanted(kinds)}.{_suggest(value, kinds)}"


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        if not isinstance(value, (tuple, list)) or (rest != [...] and len(value) != 1 + len(rest)):
            return False
        return all(_fits(item, first) for item in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _wanted(kinds: tuple[Any, ...]) -> str:
    if get_origin(kinds[0]) is Literal:
        return f"use {', '.join(get_args(kinds[0]))}"
    if get_origin(kinds[0]) is tuple:
        return "use a list of name patterns" if get_args(kinds[0])[0] is str else "use two numbers"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "nothing"}
    return f"use {' or '.join(names[kind] for kind in kinds)}"


def _suggest(value: object, kinds: tuple[Any, ...]) -> str:
    return did_you_mean(str(value), get_args(kinds[0])) if get_origin(kinds[0]) is Literal else ""


def _range_faults(config: Any, ranges: Mapping[str, Range]) -> Iterator[str]:
    for item, kinds in _kinds(config):
        value = getattr(config, item.name)
        if item.name in ranges and value is not None and any(_fits(value, kind) for kind in kinds):
            allowed, advice = ranges[item.name]
            if not allowed(value):
                yield f"{_quote(item.name, value)} is not allowed: {advice}."


_RADIUS = (lambda value: value >= 0, "a radius is 0 or more (inf leaves the layers free)")
_FACTOR = (lambda value: 0 <= value < math.inf, "use a finite number, 0 or more")
_RATE = (lambda value: 0 < value < math.inf, "use a finite number above 0")
COUNT: Range = (lambda value: value >= 1, "use a whole number, 1 or more")
SEED: Range = (lambda value: 0 <= value < 2**32, f"use a whole number from 0 to {2**32 - 1}")
_RANGES: dict[str, Range] = {
    **dict.fromkeys(("radius", "relative_radius", "head_radius"), _RADIUS),
    **dict.fromkeys(("strength", "head_strength", "weight_decay", "checkpoint_every"), _FACTOR),
    **dict.fromkeys(("lr", "head_lr"), _RATE),
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "eval_every", "threads"), COUNT),
    **dict.fromkeys(("per_class", "validation_per_class", "test_per_class"), COUNT),
    **dict.fromkeys(("size", "retain_size"), (lambda value: value >= 16, "images have 16 pixels a side or more")),
    **dict.fromkeys(
        ("label_smoothing", "label_noise"), (lambda value: 0 <= value < 1, "use a number from 0 to below 1")
    ),
    "keep": (lambda value: 0 <= value <= 1, "use a share from 0 to 1"),
    "seed": SEED,
}
"""The numbers that each field allows, written so that NaN fails, and what to do otherwise."""


def _combination_faults(config: FinetuneConfig) -> Iterator[str]:
    if not isinstance(config.method, str):
        return  # a type fault
    if config.method not in METHODS:
        yield (
            f"{_quote('method', config.method)} is not known: use {', '.join(METHODS)}."
            f"{did_you_mean(config.method, METHODS)}"
        )
        return
    for item in fields(config):
        value = getattr(config, item.name)
        if value != item.default and config.method not in _TAKEN_BY.get(item.name, METHODS):
            takers = ", ".join(_TAKEN_BY[item.name])
            yield f"{_quote(item.name, value)} goes with --method {takers}, not with {config.method}: leave it out."
    if config.radius is not None and config.relative_radius is not None:
        yield f"{_quote('radius', config.radius)} and {_quote('relative_radius', config.relative_radius)}: give one."
    for key in ("keep", "retain_size"):
        value = getattr(config, key)
        if value is not None and config.retain is None:
            yield f"{_quote(key, value)} goes with --retain FOLDER: give that too, or leave it out."


_PATHS = ("model", "data", "weights", "retain")
"""Fields that may be the path of a folder."""


def _methods(*kinds: str) -> tuple[str, ...]:
    return tuple(method.name for method in METHODS.values() if method.kind in kinds)


_TAKEN_BY = {
    **dict.fromkeys(("radius", "relative_radius", "head_radius"), _methods("constraint")),
    **dict.fromkeys(("affine", "head_bias", "freeze"), _methods("constraint")),
    **dict.fromkeys(("strength", "head_strength"), _methods("penalty", "features")),
    **dict.fromkeys(("include", "exclude"), _methods("constraint", "penalty")),
    "projection": ("mars-pgm",),
    "attention": _methods("features"),
}
"""The methods that take a field, where not all do."""


def _dashed(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _quote(key: str, value: object) -> str:
    """The option as it would be typed: ``--head-radius -1.0``."""
    return f"{_dashed(key)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _flag(key: str, value: object) -> list[str]:
    """The words of one option on the command line."""
    if isinstance(value, bool):
        return [_dashed(key) if value else f"--no-{key.replace('_', '-')}"]
    if isinstance(value, tuple):
        return [word for item in value for word in (_dashed(key), item)]
    return [_dashed(key), str(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
