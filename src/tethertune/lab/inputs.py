"""What a configuration takes in: its network and its images, the same for training and for whatever looks later."""

from dataclasses import replace

from tethertune.lab import data, models
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.data import Dataset
from tethertune.lab.models import LoadedModel
from tethertune.lab.sources import Source

__all__ = ["dataset", "network"]


def network(config: FinetuneConfig, *, classes: int) -> LoadedModel:
    """The pre-trained network with its new head, and how its images are prepared.

    Args:
        config: The run.
        classes: Outputs of the head.

    Raises:
        ConfigurationError: See :func:`tethertune.lab.models.load`.
        CheckpointError: See there.
    """
    loaded = models.load(
        config.model,
        classes=classes,
        size=config.size,
        head=config.head,
        weights=config.weights,
        seed=config.seed,
    )
    loaded = replace(loaded, interpolation=config.interpolation or loaded.interpolation)
    if config.scaling == "raw":  # (x / 255 - 0) / (1 / 255) = x
        loaded = replace(loaded, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    return loaded


def dataset(config: FinetuneConfig, loaded: LoadedModel, source: Source | None = None) -> Dataset:
    """The images, in the network's size.

    Args:
        config: The run.
        loaded: Its network.
        source: Where they come from, if that was found before.

    Raises:
        ConfigurationError: See :func:`tethertune.lab.data.load`.
        DataError: See there.
    """
    return data.load(
        config.data if source is None else source,
        size=loaded.size,
        interpolation=loaded.interpolation,
        crop_fraction=loaded.crop,
        resize=config.resize,
        per_class=config.per_class,
        validation_per_class=config.validation_per_class,
        test_per_class=config.test_per_class,
        train_on=config.train_on,
        label_noise=config.label_noise,
        seed=config.seed,
        cache=config.cache,
    )
