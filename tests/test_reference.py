import hashlib
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tethertune import rows
from tethertune.errors import ReferenceMismatchError, TethertuneError
from tethertune.reference import Reference

torch.set_num_threads(1)


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        parameter.add_(1.0)


def load(source, model, **options):
    return Reference.load(source, rows.layers(model, **options))


def saved(model, path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


SOURCES = {
    "state dict": lambda model, _: model.state_dict(),
    "parameters": lambda model, _: dict(model.named_parameters()),
    "module": lambda model, _: model,
    "reference": lambda model, _: Reference.of(model),
    "file": lambda model, folder: saved(model, folder / "weights.safetensors"),
    "file by string": lambda model, folder: str(saved(model, folder / "weights.safetensors")),
    "folder": lambda model, folder: saved(model, folder / "model.safetensors").parent,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_is_taken_and_none_follows_the_training(kind, tmp_path):
    model = network()
    before = snapshot(model)
    reference = load(SOURCES[kind](model, tmp_path), model)
    train(model)
    assert set(reference) == {name for name, _ in model.named_parameters()}
    assert len(reference) == 6
    for name in reference:
        assert torch.equal(reference[name], before[name])
        assert not reference[name].requires_grad


def test_a_snapshot_of_chosen_parameters():
    model = network()
    assert set(Reference.of(model, ["3.weight"])) == {"3.weight"}
    assert {"0.weight", "1.running_var"} <= set(Reference.of(model))
    assert "1.running_mean" not in Reference.of(model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix, tmp_path):
    model = network()
    state = {prefix + name: tensor for name, tensor in snapshot(model).items()}
    save_file(state, tmp_path / "weights.safetensors")
    for source in (state, tmp_path / "weights.safetensors"):
        assert torch.equal(load(source, model)["0.weight"], model[0].weight)
    assert torch.equal(load(snapshot(model), torch.compile(model))["0.weight"], model[0].weight)


def test_a_tied_weight_is_found_under_any_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "output": nn.Linear(3, 5, bias=False)})
    model["output"].weight = model["embedding"].weight
    weight = model["output"].weight.detach()
    for name in ("embedding.weight", "output.weight"):
        reference = load({name: weight.clone()}, model)
        assert list(reference) == ["output.weight"]
        assert torch.equal(reference["output.weight"], weight)


def test_what_differs_is_listed():
    model = network()
    state = snapshot(model)
    del state["0.weight"]
    state["3.weight"] = torch.ones(2, 5)
    with pytest.raises(ReferenceMismatchError) as caught:
        load(state, model)
    message = str(caught.value)
    assert "0.weight is missing" in message
    assert "3.weight has shape (2, 5), the model's (2, 4)" in message
    assert "1.weight" not in message


def test_a_long_list_of_what_differs_is_cut():
    with pytest.raises(ReferenceMismatchError, match="and 3 more"):
        load({}, network())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", b"\x80\x02}q\x00.", "truncated"])
def test_an_unreadable_file_is_named(content, tmp_path):
    model = network()
    path = tmp_path / "weights.safetensors"
    if content == "truncated":
        content = saved(model, path).read_bytes()[:-10]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReferenceMismatchError, match=re.escape(str(path))):
        load(path, model)
    with pytest.raises(TethertuneError, match="safetensors"):
        load(tmp_path / "nothing", model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to list what is mapped")
def test_a_file_is_mapped_not_read(tmp_path):
    model = nn.Linear(1024, 1024, bias=False)
    path = saved(model, tmp_path / "weights.safetensors")
    reference = load(path, model)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert torch.equal(reference["weight"], model.weight)


def test_the_running_variance_comes_along_for_the_authors_convention(tmp_path):
    model = network()
    model[1].running_var.fill_(3.0)
    for source in (None, model.state_dict(), saved(model, tmp_path / "weights.safetensors")):
        reference = load(source or model, model, convention="authors")
        assert "1.running_var" in reference
        assert reference["1.running_var"].tolist() == [3.0] * 4
    model[1].running_var.fill_(9.0)
    assert reference["1.running_var"].tolist() == [3.0] * 4
    assert "1.running_var" not in load(model, model)
    state = {name: tensor for name, tensor in snapshot(model).items() if "running_var" not in name}
    with pytest.raises(ReferenceMismatchError, match=r"1\.running_var is missing, which convention='authors' needs"):
        load(state, model, convention="authors")


TENSORS = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.0]])}


def test_the_fingerprint_is_of_the_content_alone():
    fingerprint = Reference(TENSORS).fingerprint()
    assert re.fullmatch("sha256:[0-9a-f]{64}", fingerprint)
    content = b"a (2,) torch.float32\n" + struct.pack("<2f", 1, -2) + b"b (1, 1) torch.float32\n" + struct.pack("<f", 0)
    assert fingerprint == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert Reference(dict(reversed(TENSORS.items()))).fingerprint() == fingerprint
    strided = torch.tensor([[1.0, 7.0], [-2.0, 7.0]])[:, 0]
    assert Reference(TENSORS | {"a": strided}).fingerprint() == fingerprint


@pytest.mark.parametrize(
    "other",
    [
        TENSORS | {"a": torch.tensor([1.0, -2.0]).nextafter(torch.tensor(9.0))},
        TENSORS | {"b": torch.tensor([[-0.0]])},
        TENSORS | {"a": TENSORS["a"].double()},
        TENSORS | {"b": torch.tensor([0.0])},
        TENSORS | {"c": torch.ones(0)},
        {"a": TENSORS["a"]},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"b": TENSORS["a"], "a": TENSORS["b"]},
    ],
)
def test_the_fingerprint_changes_with_any_bit_name_shape_or_dtype(other):
    assert Reference(other).fingerprint() != Reference(TENSORS).fingerprint()


def test_the_fingerprint_is_the_same_from_every_source(tmp_path):
    model = network().to(memory_format=torch.channels_last)
    prints = {kind: load(make(model, tmp_path), model).fingerprint() for kind, make in SOURCES.items()}
    assert len(set(prints.values())) == 1, prints


def test_one_fingerprint_of_a_16_bit_checkpoint_and_the_float32_model_loaded_from_it(tmp_path):
    model = network().bfloat16()
    low = snapshot(model)
    save_file(low, tmp_path / "weights.safetensors")
    prints = {load(source, model).fingerprint() for source in (low, tmp_path / "weights.safetensors", model.float())}
    assert len(prints) == 1
    given = hashlib.sha256(b"a (2,) torch.bfloat16\n" + struct.pack("<2H", 0x3F80, 0xC000)).hexdigest()
    reference = Reference({"a": TENSORS["a"].bfloat16()})
    assert reference.fingerprint() == Reference({"a": TENSORS["a"]}).fingerprint() == reference.keep().fingerprint()
    assert reference.fingerprint(as_given=True) == f"sha256:{given}"


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (torch.randn(300, 40, generator=torch.Generator().manual_seed(0)), torch.float32),
        (torch.tensor([1.0, -0.0, 3.3895e38]).bfloat16().float(), torch.bfloat16),
        (torch.tensor([1.0009765625, 6e-8]).half().float(), torch.float16),
        (torch.tensor([1.0, 1.0 + 2.0**-23]).double(), torch.float32),
        (torch.tensor([1.0, 1.0 + 2.0**-52], dtype=torch.float64), torch.float64),
        (torch.tensor([1.0, float("nan")]), torch.float32),
        (torch.ones(2, 3).half(), torch.float16),
        (torch.ones(()), torch.bfloat16),
    ],
)
def test_a_copy_takes_the_narrowest_dtype_that_changes_no_bit(values, stored):
    kept = Reference({"a": values}).keep()
    assert kept.stored("a").dtype == stored
    assert kept.stored("a").data_ptr() != values.data_ptr()
    assert kept["a"].dtype == values.dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    assert torch.equal(kept["a"].view(bits), values.view(bits))
    assert kept.nbytes() == {"mapped": 0, "cpu": values.numel() * stored.itemsize}
    assert not kept.rounded


def test_one_odd_weight_among_many_is_found():
    values = torch.ones(1 << 20)
    values[-1] = 1.001
    assert Reference({"a": values}).keep().stored("a").dtype == torch.float32


def test_a_rounded_copy_remembers_the_exact_fingerprint():
    exact = Reference({"a": torch.tensor([1.0, 1.001]), "b": torch.tensor([1.0])})
    kept = exact.keep(dtype=torch.bfloat16)
    assert kept.rounded
    assert kept.fingerprint() == exact.fingerprint()
    assert kept.stored("a").dtype == kept.stored("b").dtype == torch.bfloat16
    assert kept["a"].dtype == torch.float32
    assert not exact.keep(dtype=torch.float64).rounded


def test_beside_takes_the_form_of_the_weight_and_leaves_no_second_copy():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 2))
    found = rows.layers(model)
    values = model[0].weight.detach().clone()
    reference = load(model, model)
    model.to(memory_format=torch.channels_last)
    beside = reference.beside(found[0])
    assert beside.stride() == model[0].weight.stride()
    assert torch.equal(beside, values)
    assert reference.stored("0.weight") is reference.beside(found[0]) is beside
    assert torch.equal(reference["0.weight"], values)


def test_beside_leaves_a_mapped_reference_in_its_file(tmp_path):
    model = nn.Conv2d(3, 4, 2)
    reference = load(saved(model, tmp_path / "weights.safetensors"), model)
    model.to(memory_format=torch.channels_last)
    layer = rows.layers(model)[0]
    assert reference.beside(layer).data_ptr() == reference.stored("weight").data_ptr()
    assert reference.nbytes() == {"mapped": 4 * (48 + 4)}
    assert reference.keep(copy=False, device=torch.device("meta")).nbytes()["mapped"] == 0
