import json
import math
import shlex
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from tethertune.errors import ConfigurationError
from tethertune.lab.config import FinetuneConfig, load_toml
from tethertune.lab.methods import METHODS


def config(**values):
    return FinetuneConfig(**{"model": "lite0", "data": "fashion"} | values)


def faults(**values):
    with pytest.raises(ConfigurationError) as caught:
        config(**values)
    return str(caught.value).splitlines()


def test_importing_it_does_not_import_torch():
    program = "import sys, tethertune.lab.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_field_is_documented_below_its_line():
    from docstring_parser import parse_from_object

    documented = {entry.arg_name for entry in parse_from_object(FinetuneConfig).params if entry.description}
    assert documented == {item.name for item in fields(FinetuneConfig)}


def test_a_method_without_hyper_parameters_gets_its_defaults():
    for name, method in METHODS.items():
        made = config(method=name)
        assert {key: getattr(made, key) for key in method.defaults} == method.defaults


def test_defaults_never_stand_beside_what_is_given():
    given = config(method="mars-pgm", radius=8, head_radius=12)
    assert (given.radius, given.relative_radius, given.head_radius) == (8.0, None, 12.0)
    head_only = config(method="mars-pgm", head_radius=3)
    assert (head_only.relative_radius, head_only.head_radius) == (0.02, 3.0)
    body_only = config(method="l2-sp", strength=0.5)
    assert (body_only.strength, body_only.head_strength) == (0.5, None)


def test_a_configuration_with_its_defaults_filled_in_is_the_same_configuration():
    assert replace(config()) == config()
    assert config(method="mars-pgm", relative_radius=0.02).hash == config(method="mars-pgm").hash


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"radius": -1}, "--radius -1.0 is not allowed"),
        ({"radius": math.nan}, "--radius nan is not allowed"),
        ({"head_radius": -0.5}, "--head-radius -0.5 is not allowed"),
        ({"method": "l2-sp", "strength": math.inf}, "--strength inf is not allowed"),
        ({"lr": 0}, "--lr 0.0 is not allowed"),
        ({"head_lr": math.nan}, "--head-lr nan is not allowed"),
        ({"epochs": 0}, "--epochs 0 is not allowed"),
        ({"epochs": 1.5}, "--epochs 1.5 is not allowed: use a whole number"),
        ({"epochs": True}, "--epochs True is not allowed"),
        ({"size": 8}, "--size 8 is not allowed"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0 is not allowed"),
        ({"seed": -1}, "--seed -1 is not allowed"),
        ({"threads": 0}, "--threads 0 is not allowed"),
        ({"bn": "frosen"}, "Did you mean 'frozen'?"),
        ({"method": "mars-pgn"}, "Did you mean 'mars-pgm'"),
        ({"method": 3}, "--method 3 is not allowed: use text"),
        ({"include": "fc"}, "use a list of name patterns"),
        ({"radius": 1, "relative_radius": 0.1}, "--radius 1.0 and --relative-radius 0.1: give one"),
        ({"method": "none", "radius": 1}, "--radius 1.0 goes with --method l2-pgm, mars-pgm, not with none"),
        ({"method": "mars-pgm", "strength": 1}, "--strength 1.0 goes with --method l2-sp, mars-sp, delta"),
        ({"method": "l2-pgm", "projection": "euclidean"}, "--projection euclidean goes with --method mars-pgm"),
        ({"method": "l2-sp", "affine": "frozen"}, "--affine frozen goes with"),
        ({"method": "none", "head_bias": "frozen"}, "--head-bias frozen goes with"),
        ({"method": "l2-sp", "attention": "none"}, "--attention none goes with --method delta"),
        ({"method": "delta", "exclude": ("fc",)}, "--exclude fc goes with"),
    ],
)
def test_a_fault_quotes_the_flag_and_the_value(values, told):
    (fault,) = faults(**values)
    assert told in fault


def test_all_faults_are_told_at_once():
    assert len(faults(method="l2-sp", radius=1, lr=-1, epochs="many", bn="off")) == 4


def test_a_radius_may_be_zero_or_infinite():
    assert config(radius=0).radius == 0
    assert config(radius=math.inf).radius == math.inf


def test_the_hash_depends_on_what_changes_the_result_and_on_nothing_else():
    base = config()
    assert len(base.hash) == 8
    assert int(base.hash, 16) >= 0
    same = config(output="elsewhere", threads=2, cache="c", checkpoint_every=0)
    assert same.hash == base.hash
    values = {"seed": 1, "lr": 1e-3, "epochs": 29, "method": "none", "data": "other", "include": ("a",)}
    assert len({base.hash, *(config(**{key: value}).hash for key, value in values.items())}) == len(values) + 1


def test_the_hash_is_the_same_in_every_process_and_for_ints_and_floats():
    assert config(radius=8, seed=3).hash == config(radius=8.0, seed=3).hash
    program = "from tethertune.lab.config import *; print(FinetuneConfig('lite0', 'fashion', include=['a']).hash)"
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
    assert other == config(include=("a",)).hash


def test_a_slash_at_the_end_of_a_folder_makes_no_other_run():
    for key in ("model", "data", "weights", "retain"):
        assert config(**{key: "some/folder/"}).hash == config(**{key: "some/folder"}).hash
    assert config(data="/").data == "/"


def test_plain_values_are_json_even_for_an_infinite_radius():
    plain = config(radius=math.inf, include=("a", "b")).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["radius"] == "inf"
    assert plain["include"] == ["a", "b"]


def test_toml_round_trip(tmp_path):
    made = config(
        data='a "quoted" \\ path', radius=math.inf, head_radius=12, include=("a.*", "b"), augment=True, lr=1e-7, size=64
    )
    for config_ in (made, config(method="delta")):
        (tmp_path / "run.toml").write_text(config_.to_toml(), encoding="utf-8")
        assert load_toml(tmp_path / "run.toml") == config_


def test_toml_values_are_overridden_before_they_are_checked(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('model = "lite0"\nmethod = "l2-sp"\nstrength = 0.1\n')
    made = load_toml(file, {"data": "fashion", "strength": 0.2})
    assert (made.data, made.method, made.strength) == ("fashion", "l2-sp", 0.2)


def test_all_faults_of_a_toml_file_are_told_at_once_with_its_name(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('model = "lite0"\nraduis = 8\nlr = -1.0\nbatchsize = 3\n')
    with pytest.raises(ConfigurationError) as caught:
        load_toml(file)
    told = str(caught.value).splitlines()
    assert len(told) == 4
    assert all(line.startswith(f"{file}: ") for line in told)
    assert "raduis is not a key of the configuration. Did you mean 'radius'" in str(caught.value)
    assert "Did you mean 'batch_size'" in str(caught.value)
    assert "data is missing" in str(caught.value)


@pytest.mark.parametrize("content", [b"model = ", b"\xff\xfe", None])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"run\.toml: not a readable TOML file"):
        load_toml(file)


def test_the_command_says_what_is_not_default_and_can_be_pasted_into_a_shell():
    made = config(data="my images", radius=8, head_radius=12, channels_last=False, augment=True, include=("a.*", "b"))
    words = shlex.split(made.command())
    assert words[:6] == ["tethertune", "finetune", "lite0", "my images", "--method", "mars-pgm"]
    assert " ".join(words[6:]) == (
        "--radius 8.0 --head-radius 12.0 --include a.* --include b --no-channels-last --augment"
    )
