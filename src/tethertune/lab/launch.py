"""One run by several processes: ``--nproc-per-node`` and its like, which go through to torchrun as it names them.

Imports nothing heavy, because the command line reads it for ``--help``.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tethertune.errors import ConfigurationError

__all__ = ["Launch", "start_processes"]


@dataclass(frozen=True)
class Launch:
    """How torchrun is to start the processes; nothing given: there is one process, this one."""

    nproc_per_node: str | None = None
    """Processes that share the run on this machine: a number, or gpu, cpu or auto. The results stay those of one."""

    nnodes: str | None = None
    """Machines, on each of which the command is given: a number, or MIN:MAX."""

    node_rank: int | None = None
    """Which of the machines this is, from 0; where no rendezvous is given."""

    master_addr: str | None = None
    """Address of machine 0; where no rendezvous is given."""

    master_port: int | None = None
    """A free port of machine 0; where no rendezvous is given."""

    rdzv_backend: str | None = None
    """Rendezvous of the machines, such as c10d."""

    rdzv_endpoint: str | None = None
    """Where they meet, HOST:PORT."""

    rdzv_id: str | None = None
    """Name of the run at the rendezvous."""

    max_restarts: int | None = None
    """How often processes that failed are started again; the run goes on from its last saved state."""

    @property
    def flags(self) -> list[str]:
        """What torchrun is given."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def start_processes(launch: Launch, words: Sequence[str]) -> int:
    """Have torchrun start ``python -m tethertune WORDS`` in every process, and wait for all of them.

    A process that fails says why itself.

    Args:
        launch: How many, and where.
        words: What each is to do.

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        ConfigurationError: This is one of several processes already, or torchrun refuses a flag.
        KeyboardInterrupt: The user stopped it.
    """
    if "LOCAL_RANK" in os.environ:
        raise ConfigurationError(
            f"{' '.join(launch.flags)} starts processes, but this is one of several that torchrun or accelerate has"
            " started: leave it out here, or start the command by itself."
        )
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = torch.distributed.run  # without types
    try:
        with _quiet(), _shared_cores(launch.nproc_per_node):
            torchrun.run(torchrun.parse_args([*launch.flags, "-m", "tethertune", *words]))
    except ValueError as error:
        raise ConfigurationError(f"torchrun does not take {' '.join(launch.flags)}: {error}") from error
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.stderr.write(f"Process {failure.pid} was ended by {failure.signal_name()}.\n")
        return max(failure.exitcode, 1)
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from stopped
        return 128 + stopped.sigval
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchrun from telling at length what its processes have said already."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _shared_cores(processes: str | None) -> Iterator[None]:
    """Share the cores among so many processes, where nobody has said otherwise; torchrun gives each one thread."""
    is_ours = "OMP_NUM_THREADS" not in os.environ and processes is not None and processes.isdecimal()
    if is_ours:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // max(1, int(processes or 1))))
    try:
        yield
    finally:
        if is_ours:
            del os.environ["OMP_NUM_THREADS"]
