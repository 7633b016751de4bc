import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tethertune.errors import ConfigurationError, MissingExtraError
from tethertune.lab import onnx_file

torch.set_num_threads(1)


def network(seed=0):
    """A convolution before batch normalisation that has statistics, which an exporter would like to fold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
        )
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_file_alone_holds_each_weight_under_its_name_bit_for_bit(path, dtype):
    model = network().to(dtype)
    onnx_file.write(path, model, 6, {})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    held = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
        for item in onnx.load(path).graph.initializer
    }
    for name, parameter in model.named_parameters():
        assert held[name].dtype == dtype
        assert torch.equal(held[name], parameter)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_images_gives_what_pytorch_gives(path, count):
    model = network()
    onnx_file.write(path, model, 6, {})
    images = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-5, atol=1e-5)


def test_the_notes_are_in_the_file(path):
    notes = {"mean": "[0.5]", "classes": '["große Katze", "dog"]'}
    onnx_file.write(path, network(), 6, notes)
    assert {item.key: item.value for item in onnx.load(path).metadata_props} == notes


def test_writing_leaves_the_network_as_it_was(path):
    model, same = network().half(), network().half()
    onnx_file.write(path, model, 6, {})
    assert not model.training
    for (name, tensor), wanted in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize(("change", "told"), [(0.01, "0.01"), (torch.nan, "nan")])
def test_a_file_of_another_network_is_told_by_its_logits_and_by_its_weights(path, change, told):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    onnx_file.write(path, model, 2, {})
    with torch.no_grad():
        model[1].bias.add_(change)
    with pytest.raises(ConfigurationError, match=f"gives logits that differ by {told} from PyTorch's"):
        onnx_file._require_equal(path, model, torch.rand(3, 3, 2, 2))
    with pytest.raises(ConfigurationError, match=r"exporter does not write 1.bias as it is"):
        onnx_file._require_weights(onnx.load(path), model)


def test_a_network_that_the_runtime_cannot_run_in_its_dtype(path):
    with pytest.raises(ConfigurationError, match=r"--dtype bfloat16: onnxruntime [\d.]+ cannot run .*: use --dtype"):
        onnx_file.write(path, network().bfloat16(), 6, {})


def test_packages_that_are_missing_are_named(path, monkeypatch):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(MissingExtraError, match="--to onnx needs onnxscript: pip install"):
        onnx_file.write(path, nn.Linear(2, 2), 8, {})
