"""What a checkpoint's training images prove of it: from a run folder or a file to a certificate.

A run says by its configuration which balls it declared, which images it trained on and what it started from. A bare
checkpoint says none of that: its distances are measured, and what is not declared is paid for on the grid.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from tethertune import rows, theory
from tethertune.errors import CheckpointError, ConfigurationError, ReferenceMismatchError, RunError
from tethertune.lab import (
    architectures,
    batches,
    checkpoints,
    data,
    distances,
    files,
    inputs,
    machine,
    models,
    regularisers,
    runs,
    sources,
)
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.methods import METHODS
from tethertune.lab.models import LoadedModel
from tethertune.lab.runs import Run
from tethertune.reference import Reference
from tethertune.theory import Certificate, Check, ClippedCrossEntropy, Facts, LayerMeasurement, NotCoveredError, Ramp

__all__ = ["Finding", "LossName", "ModeName", "certify"]

LossName = Literal["ramp", "clipped-ce"]
ModeName = Literal["declared", "grid"]

_BATCH = 64
"""Images in one forward pass."""
_ANOTHER_CENTRE = Check(
    "the run's configuration declares every radius",
    "fail",
    "its balls are around other weights than --reference: all distances are paid for on the grid",
)


@dataclass(frozen=True)
class Finding:
    """What was found of a checkpoint.

    Attributes:
        checkpoint: What was certified.
        reference: What its distances are from.
        data: The images.
        certificate: The certificate; ``None`` where no bound is proven for the network.
        refusal: The node that no bound covers, and why; ``None`` where there is a certificate.
        measurements: Of each layer of a network that no bound covers.
    """

    checkpoint: str
    reference: str
    data: str
    certificate: Certificate | None
    refusal: str | None = None
    measurements: tuple[LayerMeasurement, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": 1,
            "checkpoint": self.checkpoint,
            "reference": self.reference,
            "data": self.data,
            "certificate": None if self.certificate is None else self.certificate.as_dict(),
            "refusal": self.refusal,
            "measurements": [asdict(layer) for layer in self.measurements],
        }


@dataclass(frozen=True)
class _Declared:
    """What a run's configuration says of the balls, before any image was seen."""

    radii: Mapping[str, float]
    norm: Literal["mars", "frobenius"] = "mars"
    affine: Literal["free", "frozen"] = "free"
    held: frozenset[str] = frozenset()  # parameters that stay at the reference exactly, and statistics
    check: Check | None = None


@dataclass(frozen=True)
class _Subject:
    """A trained network, what it was trained from and on, and what was declared."""

    trained: LoadedModel
    reference: Mapping[str, Tensor]
    source: str
    declared: _Declared
    run: Run | None
    seen: frozenset[str]  # fingerprints of images that the reference learned from, as far as runs tell


def certify(
    checkpoint: str | Path,
    images: str | None = None,
    *,
    reference: str | None = None,
    arch: str | None = None,
    delta: float = 0.05,
    loss: LossName = "ramp",
    margin: float | None = None,
    mode: ModeName | None = None,
    cache: str | Path | None = None,
) -> Finding:
    """Certify a run or a checkpoint on its training images; the certificate of a run is kept in its folder.

    Args:
        checkpoint: A run folder, or a checkpoint (see :func:`tethertune.lab.checkpoints.load_state_dict`).
        images: The data that it was trained on, as in ``tethertune finetune``; ``None``: what the run says.
        reference: The weights that it was trained from, where the run or the checkpoint does not say: another
            checkpoint, or the name of a network for its published weights.
        arch: Name of the network, where the checkpoint does not say.
        delta: The probability, at most, that the certificate fails.
        loss: ``"ramp"`` or ``"clipped-ce"``.
        margin: The ramp's margin, if it was fixed before the data; ``None``: the best of a grid, which is paid for.
        mode: ``"declared"``: the radii of the run's configuration. ``"grid"``: the distances as they are, rounded up to
            a grid that is paid for; what a radius of 0 froze stays frozen. ``None``: declared where the run declares
            radii.
        cache: Folder of decoded images; see :func:`tethertune.lab.data.load`.

    Raises:
        ConfigurationError: Something that is not allowed, in one sentence.
        CheckpointError: The weights cannot be read, or are of another network.
        ReferenceMismatchError: The reference is of another network.
        RunError: The run is not complete, or its folder cannot be written.
        DataError: The images cannot be used.
    """
    theory.certificate.confidence(1, delta)
    if margin is not None and loss != "ramp":
        raise ConfigurationError(f"--margin {margin} goes with --loss ramp, not with {loss}: leave it out.")
    bounded = Ramp(margin) if loss == "ramp" else ClippedCrossEntropy()
    path = Path(checkpoint)
    is_run = (path / "run.json").is_file()
    run = runs.load(path) if is_run else None
    if run is None and images is None:
        raise ConfigurationError(f"{checkpoint} does not say what it was trained on: give --data DATA.")
    name = images if images is not None else run.config.data if run else ""
    subject = _of_run(run, reference) if run else _of_checkpoint(path, name, reference, arch)
    if mode == "declared" and not subject.declared.radii:
        raise ConfigurationError(f"{checkpoint} declares no radii that a certificate can use: give --mode grid.")
    mode = mode or ("declared" if subject.declared.radii else "grid")
    dataset = _images(name, subject, cache)
    described = f"{dataset.name} ({len(dataset.train)} training images, {dataset.fingerprint[:15]})"
    finding = Finding(str(checkpoint), subject.source, described, None)
    try:
        found = _certify(subject, dataset, bounded, delta, mode)
    except NotCoveredError as error:
        measured = theory.measurements(subject.trained.model, reference=subject.reference, head=subject.trained.head)
        return replace(finding, refusal=str(error), measurements=measured)
    finding = replace(finding, certificate=found)
    if run is not None:
        files.write_json(run.path / runs.CERTIFICATE, finding.to_dict())
    return finding


def _images(name: str, subject: _Subject, cache: str | Path | None) -> data.Dataset:
    """The images as the run took them, its choice among them and its wrong labels included."""
    loaded = subject.trained
    if subject.run is None:
        shape = {"size": loaded.size, "interpolation": loaded.interpolation, "crop_fraction": loaded.crop}
        return data.load(name, **shape, cache=cache)  # type: ignore[arg-type]
    config = subject.run.config
    return inputs.dataset(replace(config, data=name, cache=config.cache if cache is None else str(cache)), loaded)


def _certify(
    subject: _Subject, dataset: data.Dataset, loss: Ramp | ClippedCrossEntropy, delta: float, mode: ModeName
) -> Certificate:
    machine.keep_memory()
    loaded, declared = subject.trained, subject.declared
    bound = max(max(mean, 1 - mean) / std for mean, std in zip(loaded.mean, loaded.std, strict=True))
    radii = {name: radius for name, radius in declared.radii.items() if mode == "declared" or radius == 0}
    found = theory.certify(
        loaded.model,
        _stream(dataset.train, loaded),
        reference=subject.reference,
        head=loaded.head,
        delta=delta,
        loss=loss,
        mode=mode,
        radii=radii,
        norm=declared.norm,
        affine=declared.affine,
        frozen=_frozen(loaded, declared),
        input_bound=bound,
        facts=_facts(subject, dataset),
    )
    shown = mode == "declared" or declared.check is _ANOTHER_CENTRE
    checks = [declared.check] if shown and declared.check is not None else []
    if subject.run is not None and subject.run.config.label_noise:
        noise = f"--label-noise {subject.run.config.label_noise:g}: it is about images with as many wrong labels"
        checks.append(Check("the labels are those of new images", "fail", noise))
    return replace(found, checks=(*found.checks, *checks))


def _frozen(loaded: LoadedModel, declared: _Declared) -> list[str]:
    """Parameters of the linear maps all of whose tensors, a folded batch norm's too, were held at the reference."""
    if declared.affine == "frozen" or not any(radius == 0 for radius in declared.radii.values()):
        return []
    network = theory.trace(loaded.model, torch.zeros(2, 3, loaded.size, loaded.size), head=loaded.head)
    still = (node for node in network.linears.values() if declared.held.issuperset(node.parameters))
    return [name for node in still for name in node.parameters]


def _stream(split: data.Split, loaded: LoadedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of a split once, in their order, as the network sees them when it is evaluated."""
    indices: Iterable[Tensor] = batches.batches(split, _BATCH)
    quiet = not sys.stderr.isatty()
    for batch in track(
        list(indices), f"{len(split)} images", console=Console(stderr=True), disable=quiet, transient=True
    ):
        images = batches.normalise(split.batch(batch), loaded.mean, loaded.std)
        yield images.contiguous(), torch.from_numpy(split.labels[batch.numpy()])


def _facts(subject: _Subject, dataset: data.Dataset) -> Facts:
    """What runs know of how it was made. That examples are independent, only whoever drew them can know."""
    independent = False if dataset.fingerprint in subject.seen else None
    run = subject.run
    if run is None:
        return Facts(independent_reference=independent)
    told = run.info["data"]
    return Facts(
        independent_reference=independent,
        same_data=told["fingerprint"] == dataset.fingerprint and told["sizes"]["train"] == len(dataset.train),
        same_preprocessing=True,
    )


def _seen(place: str | None) -> frozenset[str]:
    """Fingerprints of the images of a run, given by its folder or a file in it, and of the runs it was trained from."""
    if place is None:
        return frozenset()
    path = Path(place)
    folder = path.parent if path.is_file() else path
    if not (folder / "run.json").is_file():
        return frozenset()
    info = runs.load(folder).info
    return frozenset({info["data"]["fingerprint"]}) | _seen(info["config"]["weights"] or info["config"]["model"])


def _of_run(run: Run, reference: str | None) -> _Subject:
    """The network of a run, around the weights that the run was trained from."""
    if not run.complete:
        raise RunError(f"{run.path} is not complete: give the command of the run again, it resumes.")
    config, told = run.config, run.info["model"]
    loaded = inputs.network(replace(config, size=told["size"]), classes=len(run.info["data"]["classes"]))
    source, same = loaded.source, loaded.weights_sha256 == told["weights_sha256"]
    if reference is not None:
        before = _copy(loaded.model)
        centre, source = distances.centre(run.path, reference, loaded.name)
        _take(loaded, centre, source, with_head=False)
        same = same and all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())
        same = same or _is_file_of(reference, told["weights_sha256"])
    elif not same:
        raise CheckpointError(
            f"{run.path} was trained from {told['source']} (SHA-256 {(told['weights_sha256'] or 'none')[:8]}), not from"
            f" {loaded.source}: give the weights it was trained from with --reference."
        )
    pretrained = _copy(loaded.model)
    declared = _declared(config, loaded) if same else _Declared({}, check=_ANOTHER_CENTRE)
    _take(loaded, checkpoints.load_state_dict(run.path), str(run.path), with_head=True)
    return _Subject(loaded, pretrained, source, declared, run, _seen(reference or config.weights or config.model))


def _is_file_of(reference: str, sha256: str | None) -> bool:
    """Whether a checkpoint is the very file that a run was trained from."""
    return Path(reference).exists() and checkpoints.sha256(checkpoints.locate(reference)) == sha256


def _of_checkpoint(path: Path, images: str, reference: str | None, arch: str | None) -> _Subject:
    """The network of a checkpoint that nothing is declared of."""
    state, noted = checkpoints.load_state_dict(path), checkpoints.metadata(path)
    arch = arch or checkpoints.base_model(path)
    if arch is None:
        raise ConfigurationError(f"{path} does not say which network it is of: add --arch NAME.")
    centre, source = distances.centre(path, reference, arch)
    weights = architectures.find(arch).native(state)
    size = int(noted["size"]) if "size" in noted else None
    classes = len(sources.find(images).classes)
    loaded = models.load(arch, classes=classes, size=size, pretrained=False)
    weight = f"{loaded.head}.weight"
    if weight in weights and weights[weight][0].numel() != loaded.model.get_parameter(weight)[0].numel():
        loaded = models.load(arch, classes=classes, size=size, head="flatten", pretrained=False)
    _take(loaded, centre, source, with_head=False)
    pretrained = _copy(loaded.model)
    _take(loaded, weights, str(path), with_head=True)
    return _Subject(loaded, pretrained, source, _Declared({}), None, _seen(reference))


def _take(loaded: LoadedModel, state: Mapping[str, Tensor], source: str, *, with_head: bool) -> None:
    """Load weights into the network, in eval mode from then on.

    Raises:
        ReferenceMismatchError: The reference, of which the head is not taken, is of another network.
        CheckpointError: The checkpoint is of another network, or of another number of classes.
    """
    model = loaded.model.eval()
    own = {name: value for name, value in model.state_dict().items() if with_head or not _of_head(name, loaded)}
    given = state if with_head else {name: value for name, value in state.items() if not _of_head(name, loaded)}
    fault = checkpoints.difference(given, own)
    if fault:
        if not with_head:
            raise ReferenceMismatchError(f"{source} is of another network than {loaded.name}: {fault}.")
        raise CheckpointError(f"{source} is not of {loaded.name} with the classes of this data: {fault}.")
    model.load_state_dict(given, strict=False)


def _of_head(name: str, loaded: LoadedModel) -> bool:
    return name.startswith(f"{loaded.head}.")


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _declared(config: FinetuneConfig, loaded: LoadedModel) -> _Declared:
    """The balls that a configuration declares, for a network that has its pre-trained weights."""
    method = METHODS[config.method]
    if method.kind != "constraint" or method.norm is None:
        return _Declared({})
    constraint = regularisers.build(config, loaded, Reference.of(loaded.model)).constraint
    assert constraint is not None
    balls = {name: found.radius for name, found in constraint.distances().items()}
    layers = rows.layers(loaded.model, head=loaded.head, convention=config.convention)
    maps = {layer.name for layer in layers if layer.rows.kind == "map"}
    kinds = ("bias", "normalisation", "scale")
    affine = {layer.name for layer in layers if layer.role == "body" and layer.rows.kind in kinds}
    bias = f"{loaded.head}.bias"
    radii = {name: radius for name, radius in balls.items() if name in maps or name == bias}
    if config.convention != "operator":
        radii = {name: 0.0 for name, radius in radii.items() if radius == 0}
    norms = [module for module in loaded.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    still = config.bn == "frozen" or not norms
    held = {name for name, radius in balls.items() if radius == 0}
    if still:
        held |= {name for name, _ in loaded.model.named_buffers()}
    frozen = still and affine <= held
    free = sorted(layer.name for layer in layers if layer.rows.kind == "map" and layer.name not in radii)
    bias_is_free = bias not in radii and any(layer.name == bias for layer in layers)
    check = _declaration(config, free, still=still, frozen=frozen, bias_is_free=bias_is_free)
    return _Declared(radii, method.norm, "frozen" if frozen else "free", frozenset(held), check)


def _declaration(config: FinetuneConfig, free: list[str], *, still: bool, frozen: bool, bias_is_free: bool) -> Check:
    """Whether the configuration declares all that a class needs; what it does not, the grid has covered."""
    faults = []
    if config.convention != "operator":
        faults.append(f"--convention {config.convention} bounds other rows than the linear map's")
    if free:
        faults.append(f"{len(free)} layers have no radius, {free[0]} first")
    if not still:
        faults.append("--bn train moves the statistics")
    elif not frozen:
        faults.append("--affine free moves biases and batch norm")
    detail = f"{'; '.join(faults)}: paid for on the grid" if faults else "those of the weights and of the head's bias"
    if bias_is_free and not faults:
        detail = "the head's bias aside, which the grid covers (--head-bias frozen declares it)"
    return Check("the run's configuration declares every radius", "fail" if faults else "pass", detail)
