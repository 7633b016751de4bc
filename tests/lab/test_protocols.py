from dataclasses import fields

import pytest

from tethertune.errors import ConfigurationError
from tethertune.lab import protocols
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.protocols import PROTOCOLS
from tethertune.lab.space import SearchConfig


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_each_is_made_of_real_options(protocol):
    config = FinetuneConfig("lite0", "fashion", **protocol.training)
    assert {key: getattr(config, key) for key in protocol.training} == protocol.training
    settings = SearchConfig(**protocol.search)
    assert {key: getattr(settings, key) for key in protocol.search} == protocol.search
    assert protocol.description.endswith(".")


def test_the_default_is_that_of_each_option():
    given = protocols.under({"model": "lite0", "data": "fashion"})
    assert FinetuneConfig(**given) == FinetuneConfig("lite0", "fashion")


def test_the_authors_did_what_their_code_says():
    config = FinetuneConfig(**protocols.under({"model": "resnet101", "data": "pets", "protocol": "authors"}))
    assert (config.optimizer, config.lr, config.schedule, config.batch_size, config.epochs) == (
        *("amsgrad", 1e-4, "step"),
        *(128, 30),
    )
    assert (config.head, config.size, config.interpolation, config.resize) == ("flatten", 224, "nearest", "stretch")
    assert (config.scaling, config.augment, config.drop_last, config.bn) == ("raw", False, True, "train")
    assert config.convention == "authors"
    assert PROTOCOLS["authors"].search["objective"] == "accuracy"
    assert PROTOCOLS["paper"].search["objective"] == "loss"


def test_what_is_given_wins():
    given = protocols.under({"protocol": "authors", "lr": 0.5, "model": "m"})
    assert given["lr"] == 0.5
    assert given["batch_size"] == 128
    assert "protocol" not in given


def test_an_unknown_one_is_named_with_those_there_are():
    with pytest.raises(ConfigurationError, match=r"authers is not known: use default, paper, authors\. Did you mean"):
        protocols.find("authers")


def test_the_table_of_the_docs_names_every_option_of_every_protocol(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "experiments.md").read_text(encoding="utf-8")
    known = {item.name for item in fields(FinetuneConfig)} | {item.name for item in fields(SearchConfig)}
    for protocol in PROTOCOLS.values():
        for key in (*protocol.training, *protocol.search):
            assert key in known
            assert f"`{key}`" in page
