"""What runs where, and that a backend that is asked for either runs or says why it cannot."""

import pytest
import torch

from tethertune.errors import ConfigurationError
from tethertune.kernels import backend, library

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("TETHERTUNE_BACKEND", raising=False)
    backend._why_not.cache_clear()
    yield
    backend._why_not.cache_clear()


def no_compiler():
    raise library.CannotCompileError("there is none")


def test_the_best_of_a_device_is_chosen():
    assert [backend.choose(device) for device in (CPU, CUDA, META)] == ["native", "triton", "chunked"]


def test_what_is_not_there_is_not_chosen(monkeypatch, caplog):
    monkeypatch.setattr(library, "load", no_compiler)
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    caplog.set_level("INFO", "tethertune")
    assert [backend.choose(device) for device in (CPU, CUDA, CPU, CUDA)] == ["chunked"] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "the native kernels cannot run (there is none); the slower PyTorch ones do the same",
        "the triton kernels cannot run (Triton is not installed); the slower PyTorch ones do the same",
    ]


@pytest.mark.parametrize("device", [CPU, CUDA, META])
def test_chunked_can_be_forced_anywhere_and_compiles_nothing(device, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_BACKEND", "chunked")
    monkeypatch.setattr(library, "load", no_compiler)
    assert backend.choose(device) == "chunked"


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("native", CUDA, "not for weights on cuda"),
        ("native", META, "not for weights on meta"),
        ("triton", CPU, "not for weights on cpu"),
        ("native", CPU, "there is none"),
        ("triton", CUDA, "Triton is not installed"),
    ],
)
def test_forcing_what_cannot_run_is_an_error(name, device, reason, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_BACKEND", name)
    monkeypatch.setattr(library, "load", no_compiler)
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=f"TETHERTUNE_BACKEND={name} cannot run: .*{reason}"):
        backend.choose(device)


def test_a_name_that_is_none(monkeypatch):
    monkeypatch.setenv("TETHERTUNE_BACKEND", "nativ")
    with pytest.raises(ConfigurationError, match=r"'nativ' is not known: use triton, native, chunked.*native"):
        backend.choose(CPU)
