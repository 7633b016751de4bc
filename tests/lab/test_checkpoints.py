import argparse
import hashlib
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tethertune.errors import CheckpointError
from tethertune.lab import checkpoints

STATE = {"conv.weight": torch.arange(12.0).view(2, 3, 2), "fc.bias": torch.ones(3, dtype=torch.bfloat16)}


def same(loaded):
    return loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], STATE[name]) for name in STATE)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(STATE, path, {"base_model": "lite0", "method": "mars-pgm"})
    return path


class TestReading:
    def test_safetensors(self, saved):
        assert same(checkpoints.load_state_dict(saved))

    def test_safetensors_is_known_by_its_content_too(self, saved, tmp_path):
        assert same(checkpoints.load_state_dict(saved.rename(tmp_path / "weights.bin")))

    @pytest.mark.parametrize("zipped", [True, False])
    def test_torch_file_in_both_formats(self, tmp_path, zipped):
        torch.save(STATE, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
        assert same(checkpoints.load_state_dict(tmp_path / "weights.pth"))

    @pytest.mark.parametrize(
        "content",
        [
            {"state_dict": STATE, "epoch": 3, "arch": "resnet50"},
            {"model": STATE, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
            {"model_state_dict": STATE},
            {"model": {"state_dict": STATE}},
            {"state_dict": STATE, "state_dict_ema": {name: -tensor for name, tensor in STATE.items()}},
            {f"module.{name}": tensor for name, tensor in STATE.items()},
            {f"_orig_mod.module.{name}": tensor for name, tensor in STATE.items()},
            {**STATE, "epoch": 3},
        ],
        ids=["timm", "namespace", "model_state_dict", "twice", "ema beside", "ddp", "compiled", "flat"],
    )
    def test_unwraps_training_checkpoints(self, tmp_path, content):
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        assert same(checkpoints.load_state_dict(tmp_path / "checkpoint.pth.tar"))

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last/model.safetensors"])
    def test_folder(self, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".bin":
            torch.save(STATE, path)
        else:
            save_file(STATE, path)
        assert checkpoints.locate(tmp_path) == path
        assert same(checkpoints.load_state_dict(tmp_path))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestRefusing:
    """Every message names the file and what to do."""

    @staticmethod
    def refusal(path):
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load_state_dict(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_missing(self, tmp_path):
        assert "does not exist: give a checkpoint file" in self.refusal(tmp_path / "nothing.pth")

    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_empty(self, tmp_path, suffix):
        (tmp_path / f"weights.{suffix}").touch()
        assert "is empty: copy or download it again" in self.refusal(tmp_path / f"weights.{suffix}")

    @pytest.mark.parametrize("keep", [1, 9, 60, 150, -1])
    def test_truncated_safetensors(self, saved, keep):
        saved.write_bytes(saved.read_bytes()[:keep])
        assert "is damaged" in self.refusal(saved)

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("keep", [1, 2, 10, 100, 300, -1])
    def test_truncated_torch_file(self, tmp_path, zipped, keep):
        path = tmp_path / "weights.pth"
        torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:keep])
        assert "copy or download it again" in self.refusal(path)

    @pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(99), b"\x80\x04."])
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_foreign_content(self, tmp_path, content, suffix):
        path = tmp_path / f"weights.{suffix}"
        path.write_bytes(content)
        assert "must be a safetensors file, or a state dict written by torch.save" in self.refusal(path)

    def test_foreign_zip(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
            archive.writestr("photo.txt", "not a tensor")
        assert "no checkpoint" in self.refusal(tmp_path / "photos.pth")

    def test_git_lfs_pointer(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
        assert "Git LFS pointer" in self.refusal(path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_pickle_with_code_is_refused_and_not_run(self, tmp_path, zipped):
        path, trace = tmp_path / "evil.pth", tmp_path / "it-ran"
        torch.save({"state_dict": Evil(trace)}, path, _use_new_zipfile_serialization=zipped)
        message = self.refusal(path)
        assert "runs code to be read (posix.mkdir)" in message
        assert "safetensors.torch.save_file" in message
        assert not trace.exists()

    def test_plain_pickle_is_refused_and_not_run(self, tmp_path):
        path, trace = tmp_path / "evil.pkl", tmp_path / "it-ran"
        path.write_bytes(pickle.dumps(Evil(trace)))
        assert "not what torch.save writes" in self.refusal(path)
        assert not trace.exists()

    def test_whole_module(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
        assert "torch.nn.modules.linear.Linear" in self.refusal(tmp_path / "module.pt")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ({"state_dict_ema": STATE}, "averaged weights only ('state_dict_ema')"),
            ({"model_ema": STATE, "epoch": 1}, "averaged weights only ('model_ema')"),
            ({"state": {}, "param_groups": []}, "holds no weights (its entries: 'state', 'param_groups')"),
            ({}, "holds no weights (its entries: nothing)"),
            ([1, 2], "holds a list, not a state dict"),
            (torch.ones(2), "holds a Tensor, not a state dict"),
        ],
    )
    def test_other_content(self, tmp_path, content, reason):
        torch.save(content, tmp_path / "content.pt")
        assert reason in self.refusal(tmp_path / "content.pt")

    def test_folder_without_weights(self, tmp_path):
        assert "holds none of model.safetensors" in self.refusal(tmp_path)

    def test_unfinished_run(self, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        assert "is not finished: repeat its command" in self.refusal(tmp_path)

    def test_split_weights(self, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        assert "split over several files" in self.refusal(tmp_path)


class TestNotes:
    def test_metadata(self, saved, tmp_path):
        assert checkpoints.metadata(saved) == {"base_model": "lite0", "method": "mars-pgm"}
        torch.save(STATE, tmp_path / "weights.pth")
        assert checkpoints.metadata(tmp_path / "weights.pth") == {}

    def test_metadata_of_a_damaged_file(self, saved):
        saved.write_bytes(saved.read_bytes()[:20])
        with pytest.raises(CheckpointError, match=r"weights\.safetensors is no checkpoint, or is damaged"):
            checkpoints.metadata(saved)

    def test_base_model(self, saved, tmp_path):
        assert checkpoints.base_model(saved) == "lite0"
        torch.save(STATE, tmp_path / "pytorch_model.bin")
        assert checkpoints.base_model(tmp_path) is None
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 10}))
        assert checkpoints.base_model(tmp_path) == "resnet10t"
        (tmp_path / "config.json").write_text("[]")
        assert checkpoints.base_model(tmp_path) is None

    def test_sha256(self, saved):
        assert checkpoints.sha256(saved) == hashlib.sha256(saved.read_bytes()).hexdigest()


class TestDifference:
    def test_none_when_names_and_shapes_agree(self):
        assert checkpoints.difference(STATE, {name: -tensor for name, tensor in STATE.items()}) is None

    def test_names_the_first_keys(self):
        many = {f"layer{i}.weight": torch.ones(1) for i in range(9)}
        assert checkpoints.difference(STATE, {**STATE, **many}) == (
            "'layer0.weight', 'layer1.weight', 'layer2.weight' and 6 more are missing"
        )
        assert checkpoints.difference({**STATE, "fc.weigth": torch.ones(1)}, STATE) == "'fc.weigth' is unknown"
        assert checkpoints.difference({"a": torch.ones(1)}, {"b": torch.ones(1)}) == "'b' is missing and 'a' is unknown"

    def test_names_the_first_other_shape(self):
        other = {**STATE, "fc.bias": torch.ones(5)}
        assert checkpoints.difference(other, STATE) == "'fc.bias' has shape (5,) instead of (3,)"
