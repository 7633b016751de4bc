import os
import signal
import sys
from types import SimpleNamespace

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tethertune.errors import ConfigurationError
from tethertune.lab.launch import Launch, start_processes


@pytest.fixture
def ended(monkeypatch):
    """``ended(error)`` lets torchrun end with an error, or well; gives the list of what it was given, with OMP."""

    def end(error=None):
        given = []

        def run(arguments):
            given.append((arguments, os.environ.get("OMP_NUM_THREADS")))
            if error is not None:
                raise error

        monkeypatch.setattr(torchrun, "run", run)
        return given

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return end


def failed(code):
    failure = ProcessFailure(local_rank=1, pid=123, exitcode=code, error_file="nowhere")
    return ChildFailedError("tethertune", {1: failure})


def test_every_flag_is_one_of_torchruns():
    launch = Launch("2", "1:3", 0, "here", 29501, "c10d", "here:1", "name", 3)
    parsed = vars(torchrun.parse_args([*launch.flags, "-m", "tethertune"]))
    assert {name: str(parsed[name]) for name in vars(launch)} == {n: str(v) for n, v in vars(launch).items()}


def test_starts_the_command_with_a_share_of_the_cores(ended):
    given = ended()
    assert start_processes(Launch(nproc_per_node="2"), ["finetune", "lite0", "photos", "--seed", "1"]) == 0
    ((arguments, threads),) = given
    assert (arguments.nproc_per_node, arguments.module, arguments.training_script) == ("2", True, "tethertune")
    assert arguments.training_script_args == ["finetune", "lite0", "photos", "--seed", "1"]
    assert threads == str(max(1, os.cpu_count() // 2))
    assert "OMP_NUM_THREADS" not in os.environ


def test_leaves_threads_that_were_chosen(ended, monkeypatch):
    given = ended()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    start_processes(Launch(nproc_per_node="2"), [])
    assert given[0][1] == os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (1, 1), (130, 130)])
def test_the_exit_code_is_that_of_the_first_that_failed(ended, capsys, code, expected):
    ended(failed(code))
    assert start_processes(Launch(nproc_per_node="2"), []) == expected
    assert capsys.readouterr().err == ""  # it has said why itself


def test_a_process_that_was_killed_cannot_say_so_itself(ended, capsys):
    ended(failed(-signal.SIGKILL))
    assert start_processes(Launch(nproc_per_node="2"), []) == 1
    assert capsys.readouterr().err == "Process 123 was ended by SIGKILL.\n"


def test_being_interrupted(ended):
    ended(SignalException("", signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        start_processes(Launch(nproc_per_node="2"), [])
    ended(SignalException("", signal.SIGTERM))
    assert start_processes(Launch(nproc_per_node="2"), []) == 143


def test_what_torchrun_refuses_is_told():
    with pytest.raises(ConfigurationError, match=r"does not take --nproc-per-node=two: Unsupported nproc_per_node"):
        start_processes(Launch(nproc_per_node="two"), [])


def test_one_of_several_processes_starts_none(tethertune, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    code, _, err = tethertune("finetune", "lite0", "fashion", "--nproc-per-node", "2")
    assert code == 2
    assert err.startswith("[process 1] --nproc-per-node=2 starts processes, but this is one of several")


def test_the_command_is_the_configuration_and_none_of_the_flags(tethertune, monkeypatch):
    called = SimpleNamespace()

    def start(launch, words):
        called.launch, called.words = launch, words
        return 3

    monkeypatch.setattr(sys.modules["tethertune.cli"], "start_processes", start)
    code, _, _ = tethertune(
        "finetune", "lite0", "my photos", "--nproc-per-node", "2", "--max-restarts", "1", "--radius", "8", "--fresh"
    )
    assert code == 3
    assert called.launch == Launch(nproc_per_node="2", max_restarts=1)
    assert called.words == ["finetune", "lite0", "my photos", "--method", "mars-pgm", "--radius", "8.0", "--fresh"]
