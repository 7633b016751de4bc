import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file

from tethertune import cli
from tethertune.errors import DataError, NonFiniteWeightError
from tethertune.lab.config import FinetuneConfig, load_toml

COMMANDS = [
    "finetune",
    "search",
    "distances",
    "certify",
    "bounds",
    "interpolate",
    "compare",
    "report",
    "export",
    "config",
]


def processor_seconds_of_children():
    times = os.times()
    return times.children_user + times.children_system


class TestHelp:
    @pytest.mark.parametrize("words", [[], ["finetune"]])
    def test_is_there_in_less_than_a_second_without_torch(self, words):
        program = (
            f"import sys; from tethertune.__main__ import main; sys.argv = ['tethertune', *{words}, '--help'];"
            " code = main(); heavy = {'torch', 'timm', 'torchvision', 'numpy'} & sys.modules.keys();"
            " sys.exit(code or (f'imports {heavy}' if heavy else 0))"
        )
        seconds = []
        for _ in range(3):
            began = processor_seconds_of_children()
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
            seconds.append(processor_seconds_of_children() - began)
            assert done.returncode == 0, done.stderr
        assert min(seconds) < 1.0  # of one thread: the wall time on a machine that does nothing else

    def test_names_every_command_in_one_line(self, tethertune):
        code, out, _ = tethertune("--help")
        assert code == 0
        assert all(f"│ {command}" in out for command in COMMANDS)
        assert "0 done, 1 failed, 2 bad input" in out

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_each_command(self, tethertune, command):
        code, out, err = tethertune(command, "--help")
        assert (code, err) == (0, "")
        assert f"Usage: tethertune {command}" in out

    def test_shows_every_option_in_its_panel_with_its_words_and_default(self, tethertune, monkeypatch):
        monkeypatch.setattr(cli.app, "console", Console(width=300))
        _, out, _ = tethertune("finetune", "--help")
        panels = out.split("╭─ ")
        for panel, keys in cli.PANELS.items():
            (text,) = (text for text in panels if text.startswith(f"{panel} ─"))
            for key in keys:
                flag = key.upper() if key in ("model", "data") else f"--{key.replace('_', '-')}"
                (line,) = (line for line in text.splitlines() if f"{flag} " in line.split("  ")[0] + " ")
                default = FinetuneConfig.__dataclass_fields__[key].default
                if isinstance(default, str | int | float):
                    assert f"[default: {default}]" in line
        assert "Largest distance of each body layer, 0 or more; 0 freezes, inf frees." in out
        assert "``" not in out

    def test_panels_hold_every_key_once(self):
        keys = [key for panel in cli.PANELS.values() for key in panel]
        assert sorted(keys) == sorted(item.name for item in fields(FinetuneConfig))


class TestErrors:
    """One plain message on stderr, nothing on stdout, exit code 2."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["fintune"], 'Unknown command "fintune". Did you mean "finetune"?'),
            (["finetune", "a", "b", "--radus", "8"], "Unknown option: --radus. Did you mean --radius?"),
            (["finetune", "a", "b", "--radius", "x"], 'Invalid value for --radius: unable to convert "x" into float.'),
            (["finetune", "lite0"], "DATA is missing: tethertune finetune MODEL DATA, or --config FILE."),
            (["finetune", "a", "b", "c"], "Unused Tokens: ['c']."),
            (["config", "nothing.toml"], "nothing.toml: not a readable TOML file"),
            (["report"], "No path was given: name run folders"),
            (["report", "nowhere"], "nowhere holds no run"),
            (["distances"], "--checkpoint requires an argument"),
            (["distances", "nowhere"], "nowhere does not exist: give a checkpoint file"),
            (["certify"], "--checkpoint requires an argument"),
            (["certify", "nowhere"], "nowhere does not say what it was trained on: give --data DATA"),
            (["certify", "nowhere", "--data", "fashion"], "nowhere does not exist: give a checkpoint file"),
            (["certify", "x", "--delta", "1"], "delta"),
            (["certify", "x", "--margin", "0"], "margin"),
            (["certify", "x", "--loss", "cross-entropy"], "ramp"),
            (["certify", "x", "--loss", "clipped-ce", "--margin", "1"], "--margin 1.0 goes with --loss ramp"),
            (["certify", "x", "--mode", "measured"], "declared"),
            (["bounds", "--output", "bounds.svg"], "--output bounds.svg is no HTML file: name the file to write"),
            (["bounds", "--seed", "-1"], "--seed -1 is not allowed: use a whole number from 0"),
            (["bounds", "resnet19"], "'resnet19' is neither a known network nor a file or folder."),
        ],
    )
    def test_bad_input(self, tethertune, words, message):
        code, out, err = tethertune(*words)
        assert (code, out) == (2, "")
        assert err.startswith(message) or message in err
        assert err.count("\n") == 1

    def test_all_faults_of_the_options_at_once(self, tethertune):
        code, _, err = tethertune("finetune", "lite0", "fashion", "--radius", -1, "--lr", "nan", "--head", "pol")
        assert code == 2
        assert [line.split(" is not allowed")[0] for line in err.splitlines()] == [
            "--head pol",
            "--radius -1.0",
            "--lr nan",
        ]
        assert "Did you mean 'pool'?" in err

    def test_all_faults_of_a_file_and_the_flags_at_once(self, tethertune, tmp_path):
        file = tmp_path / "my.toml"
        file.write_text("model = 'lite0'\ndata = 'fashion'\nepoch = 3\nlr = -1\n")
        code, _, err = tethertune("finetune", "--config", file, "--seed", "-1")
        assert code == 2
        assert all(line.startswith(f"{file}: ") for line in err.splitlines())
        assert "epoch is not a key of the configuration. Did you mean 'epochs'?" in err
        assert "--lr -1.0 is not allowed" in err
        assert "--seed -1 is not allowed" in err

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (DataError("photo.jpg is empty."), 2, "photo.jpg is empty.\n"),
            (NonFiniteWeightError("conv1.weight holds a NaN."), 1, "conv1.weight holds a NaN.\n"),
            (KeyboardInterrupt(), 130, "Interrupted. The same command again resumes an unfinished run.\n"),
            (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "runs/a cannot be read or written: No"),
            (OSError(errno.EROFS, "Read-only file system", "runs/a"), 2, "runs/a cannot be read or written: Read-only"),
            (
                OSError(errno.EIO, "Input/output error", "runs/a"),
                1,
                "OSError: [Errno 5] Input/output error: 'runs/a' (",
            ),
            (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (this should not happen"),
        ],
    )
    def test_exit_codes(self, tethertune, monkeypatch, error, code, message):
        def fail(*_):
            raise error

        monkeypatch.setattr("tethertune.cli.load_toml", fail)
        result, out, err = tethertune("config", "any.toml")
        assert (result, out) == (code, "")
        assert err.startswith(message)
        assert "Traceback" not in err

    def test_debug_adds_the_traceback(self, tethertune):
        code, _, err = tethertune("report", "nowhere", "--debug")
        assert code == 2
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1].startswith("nowhere holds no run")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
    def test_a_full_disk_under_stdout(self):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "tethertune", "config"], stdout=full, stderr=subprocess.PIPE, check=False
            )
        assert done.returncode == 2
        assert b"No space left on device" in done.stderr


class TestConfig:
    def test_prints_a_file_that_gives_the_same_configuration(self, tethertune, tmp_path):
        code, out, _ = tethertune("config")
        assert code == 0
        (tmp_path / "all.toml").write_text(out)
        assert load_toml(tmp_path / "all.toml") == FinetuneConfig("lite0", "fashion")
        assert "epochs = 30\n" in out

    def test_fills_in_a_file(self, tethertune, tmp_path):
        (tmp_path / "my.toml").write_text("model = 'resnet50'\ndata = 'photos'\nmethod = 'l2-pgm'\nradius = 8\n")
        _, out, _ = tethertune("config", tmp_path / "my.toml")
        assert "radius = 8.0\n" in out
        assert 'optimizer = "amsgrad"\n' in out


class TestFinetune:
    def test_from_the_words_to_the_distances(self, tethertune, tmp_path):
        torch.set_num_threads(1)
        torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
        words = [
            "finetune",
            "test_resnet",
            "fashion",
            "--weights",
            tmp_path / "weights.pth",
            "--output",
            tmp_path / "runs",
        ]
        words += ["--per-class", 1, "--size", 32, "--epochs", 2, "--batch-size", 5, "--lr", 0.01, "--no-channels-last"]
        words += ["--method", "mars-pgm", "--radius", 0.01, "--head-radius", 1, "--threads", 1]
        code, out, _ = tethertune(*words)
        assert code == 0
        folder, outcome = out.splitlines()
        assert Path(folder).parent == tmp_path / "runs" / "fashion" / "test_resnet" / "mars-pgm"
        assert re.fullmatch(r"test accuracy [\d.]+%, validation accuracy [\d.]+%, 2 epochs, \d+ s", outcome)
        assert tethertune(*words)[1] == out

        code, out, _ = tethertune("distances", folder, "--reference", tmp_path / "weights.pth", "--json")
        assert code == 0
        layers = json.loads(out)["layers"].values()
        assert {layer["role"] for layer in layers} == {"body", "head"}
        assert all(0 < layer["mars"] <= (0.01 if layer["role"] == "body" else 1) for layer in layers)


class TestDistances:
    @pytest.fixture
    def checkpoints(self, tmp_path):
        save_file({"fc.weight": torch.eye(2), "fc.bias": torch.ones(2)}, tmp_path / "before.safetensors")
        save_file({"fc.weight": 3 * torch.eye(2), "fc.bias": torch.ones(2)}, tmp_path / "after.safetensors")
        return tmp_path / "after.safetensors", "--reference", tmp_path / "before.safetensors"

    def test_table(self, tethertune, checkpoints):
        code, out, err = tethertune("distances", *checkpoints)
        assert (code, err) == (0, "")
        (row,) = (line for line in out.splitlines() if line.startswith("fc.weight"))
        assert row.split() == ["fc.weight", "2", "2", "2", "2.828", "2"]
        assert "Rows: axis 0 of every weight with two or more axes" in out

    def test_long_names_are_whole_in_a_pipe(self, tethertune, tmp_path):
        name = "stages.3.blocks.2." * 12 + "weight"
        save_file({name: torch.eye(2)}, tmp_path / "a.safetensors")
        _, out, _ = tethertune("distances", tmp_path / "a.safetensors", "--reference", tmp_path / "a.safetensors")
        assert name in out

    def test_json(self, tethertune, checkpoints):
        _, out, _ = tethertune("distances", *checkpoints, "--json")
        layer = json.loads(out)["layers"]["fc.weight"]
        assert (layer["mars"], layer["relative_mars"], layer["role"], layer["rows"]) == (2.0, 2.0, "body", 2)

    def test_truncated_checkpoint(self, tethertune, checkpoints):
        checkpoints[0].write_bytes(checkpoints[0].read_bytes()[:-3])
        code, out, err = tethertune("distances", *checkpoints)
        assert (code, out) == (2, "")
        assert "after.safetensors is no checkpoint, or is damaged" in err

    def test_another_network(self, tethertune, checkpoints, tmp_path):
        save_file({"conv.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
        code, _, err = tethertune("distances", checkpoints[0], "--reference", tmp_path / "other.safetensors")
        assert code == 2
        assert "'fc.bias', 'fc.weight' are missing and 'conv.weight' is unknown" in err


class TestCertify:
    @pytest.fixture
    def run(self, tiny):
        from tethertune.lab.training import finetune

        def train(**options):
            return finetune(tiny(epochs=1, **options), quiet=True).path

        return train

    @pytest.fixture
    def certified(self, run, tmp_path):
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
        return run(
            model="test_resnet",
            weights=str(tmp_path / "weights.safetensors"),
            method="mars-pgm",
            radius=0.1,
            head_radius=1.0,
            affine="frozen",
        )

    def test_tables_then_json_then_report(self, tethertune, certified, tmp_path):
        code, out, err = tethertune("certify", certified, "--margin", "2")
        assert (code, err) == (0, "")
        for words in (
            "Certificate, declared mode, fails with probability at most 0.05",
            "Loss: ramp (margin 2); 21 training images, 3 classes",
            "VACUOUS: the gap alone reaches the range of the loss.",
            " of the body's 15 linear maps may move.",
            "Radii to shrink first",
            "layer1.0.conv1",
            "Theorem 2 (as printed)",
            "as printed, not a valid bound",
            "distance bound",
            "pass     these are the examples that the network was trained on",
        ):
            assert words in out

        code, out, _ = tethertune("certify", certified, "--margin", "2", "--json")
        assert code == 0
        found = json.loads(out)
        assert found == json.loads((certified / "certificate.json").read_text())
        assert found["certificate"]["vacuous"]

        code, _, _ = tethertune("report", certified, "--output", tmp_path / "report.html")
        assert code == 0
        assert "Certificate: mars-pgm" in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_measurements_of_a_network_that_is_not_covered(self, tethertune, run):
        code, out, _ = tethertune("certify", run())
        assert code == 0
        assert "No certificate: blocks.3.0.se" in out
        assert "conv_head.weight" in out


class TestBounds:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        """Two points in place of all, which take a minute."""
        from tethertune.lab import growth

        measure = growth.measure
        few = {"samples": 2, "depths": (), "widths": (0.125,), "resolutions": (), "distances": (0.02,)}
        monkeypatch.setattr(growth, "measure", lambda model, *, seed: measure(model, seed=seed, **few))

    def test_tables_and_a_page(self, tethertune, tmp_path):
        code, out, err = tethertune("bounds", "--output", tmp_path / "bounds.html", "--seed", 3)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == str(tmp_path / "bounds.html")
        for words in ("random weights, seed 3", "width 0.125", "distance 0.02", "Theorem 2 (as", "(2,1)"):
            assert words in out
        assert "How each bound grows" in (tmp_path / "bounds.html").read_text(encoding="utf-8")

    def test_json(self, tethertune):
        code, out, _ = tethertune("bounds", "--json")
        found = json.loads(out)
        assert code == 0
        assert [point["sweep"] for point in found["points"]] == ["width", "distance"]
        assert found["points"][0]["bounds"]["Theorem 2 (as printed)"] > 20
