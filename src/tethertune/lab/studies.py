"""An Optuna study that any number of processes work on, killed or not, each of its trials by one of them at a time.

A trial is added to the study as running, with the place where it will be made: a folder, known by a random mark in it.
Whoever shares that folder may take a running trial whose lock is free, whether its process has not begun, or has died.
The lock is the system's, which frees it when its process ends, however it ends; what the trial proposes is asked, what
it yields is told, while the lock is held. So a trial is never at work twice, and never lost.
"""

import json
import secrets
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tethertune.errors import ConfigurationError, MissingExtraError, RunInUseError
from tethertune.lab import files
from tethertune.lab.randomness import generator
from tethertune.lab.runs import locked

__all__ = [
    "DIVERGED",
    "SharedStudy",
    "SteadySampler",
    "connect",
    "diverged",
    "finished_trials",
    "open_study",
    "short",
    "shown",
]

optuna.logging.set_verbosity(optuna.logging.ERROR)

_BUSY_SECONDS = 120
"""How long SQLite waits for other processes."""
_ATTEMPTS = 5
"""At making the tables, which processes that start together make at the same time."""
DIVERGED = "diverged"
"""The attribute of a trial whose training diverged: what was said of it."""


class SteadySampler(BaseSampler):
    """A sampler whose proposal is a pure function of a seed, of the trial's number and of the trials so far.

    Optuna's own samplers go on from what they were used for before, so that one that is started again with its seed
    proposes what it did at first. This one makes a new sampler for each proposal.

    Args:
        name: ``"tpe"``, ``"random"`` or ``"gp"``.
        startup: The first trials, which are random.
        seed: The seed.
    """

    def __init__(self, name: Literal["tpe", "random", "gp"], *, startup: int, seed: int) -> None:
        self._name, self._startup, self._seed = name, startup, seed

    def _sampler(self, trial: FrozenTrial, purpose: str = "all") -> BaseSampler:
        seed = int(generator(f"search {purpose}", self._seed, trial.number).integers(2**32))
        if self._name == "random" or trial.number < self._startup:
            return RandomSampler(seed)
        if self._name == "gp":
            return GPSampler(seed=seed, n_startup_trials=self._startup, warn_independent_sampling=False)
        return TPESampler(seed=seed, n_startup_trials=self._startup)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What is proposed together."""
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose it; what was proposed before is left to :meth:`sample_independent`, which is random in gp."""
        for key in trial.system_attrs:
            if "relative_params" in key:  # noted by a process that was killed; gp takes it for another trial's
                study._storage.set_trial_system_attr(trial._trial_id, key, "")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Clip non-finite values")  # the loss of trials that diverged
            proposal = self._sampler(trial).sample_relative(study, trial, search_space)
        others = (other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number)
        return {} if short(proposal) in map(short, others) else proposal

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Propose one value by itself; which others have been proposed before makes no difference."""
        return self._sampler(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


def connect(url: str) -> RDBStorage:
    """The storage of a URL, with its tables.

    Raises:
        ConfigurationError: It is no such URL, or cannot be reached.
        MissingExtraError: The package that speaks to such a database is not installed.
    """
    options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS}} if url.startswith("sqlite") else {}
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except ImportError as error:
            raise MissingExtraError(
                f"--storage {shown(url)} needs a package that is not installed ({error.__cause__ or error}): pip"
                " install it. For PostgreSQL: 'psycopg[binary]'."
            ) from error
        except (ArgumentError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"--storage {shown(url)} is no database URL: use sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME."
            ) from error
        except (SQLAlchemyError, RuntimeError) as error:
            if attempt == _ATTEMPTS:
                (reason, *_) = str(error.__cause__ or error).splitlines()
                raise ConfigurationError(f"--storage {shown(url)} cannot be used: {reason}") from error
            time.sleep(0.2 * attempt)
    raise AssertionError


def diverged(trial: FrozenTrial) -> bool:
    """Whether the training of a trial diverged; such a trial is complete, with the worst value."""
    return DIVERGED in trial.user_attrs


def shown(url: str) -> str:
    """A URL without its password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def open_study(
    storage: RDBStorage, name: str, settings: Mapping[str, Any], *, direction: Literal["maximize", "minimize"]
) -> optuna.Study:
    """A study, made if there is none of that name.

    Raises:
        ConfigurationError: It was begun with other settings.
    """
    study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
    wanted = json.loads(json.dumps(settings))
    then = study.user_attrs.get("settings")
    if then is None:
        study.set_user_attr("settings", wanted)
        then = study.user_attrs["settings"]
    if then != wanted:
        apart = [
            f"{key} {then.get(key, '-')}, now {wanted.get(key, '-')}"
            for key in sorted({**then, **wanted})
            if then.get(key) != wanted.get(key)
        ]
        raise ConfigurationError(
            f"--study {name} was begun with other settings ({'; '.join(apart)}): give those, or another --study."
        )
    return study


def finished_trials(url: str, name: str) -> int:
    """The trials of a study that are finished; 0 where there is no such study, and nothing is made."""
    file = sqlalchemy.make_url(url).database if url.startswith("sqlite") else None
    if file is not None and not Path(file).is_file():
        return 0
    try:
        study = optuna.load_study(storage=connect(url), study_name=name, sampler=RandomSampler())
    except KeyError:
        return 0
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def short(params: Mapping[str, float]) -> dict[str, float]:
    """Four significant digits of what was proposed: what is printed is what is used."""
    return {key: float(f"{value:.4g}") for key, value in params.items()}


class SharedStudy:
    """The first so many trials of a study that have not failed, as one of the processes that work on them sees them.

    Args:
        study: The study.
        limit: How many there are to be.
        folder: The folder that this process shares with those whose trials it can take over.
    """

    def __init__(self, study: optuna.Study, limit: int, folder: Path) -> None:
        self.study = study
        self.limit = limit
        self._folder = folder
        self._place = _mark(folder)

    def trials(self) -> list[FrozenTrial]:
        """The trials, those at work included, by number."""
        states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
        found = self.study.get_trials(deepcopy=False, states=states)
        return sorted(found, key=lambda trial: trial.number)[: self.limit]

    def finished(self) -> list[FrozenTrial]:
        """Those that have ended."""
        return [trial for trial in self.trials() if trial.state.is_finished()]

    def elsewhere(self) -> list[FrozenTrial]:
        """Those at work that only another machine can take over."""
        return [trial for trial in self.trials() if not (trial.state.is_finished() or self._is_here(trial))]

    def best(self) -> FrozenTrial | None:
        """The first of those with the best value; ``None`` while there is none with a result."""
        complete = [t for t in self.finished() if t.state == TrialState.COMPLETE and not diverged(t)]
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return min(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)

    @contextmanager
    def claim(self) -> Iterator[Trial | None]:
        """Hold one unfinished trial, added if there are too few; ``None`` if others hold all of them."""
        with ExitStack() as held:
            trial = self._take(held)
            if trial is None and len(self.trials()) < self.limit:
                self._add()
                trial = self._take(held)
            yield trial

    def tell(self, trial: Trial, value: float | None, state: TrialState) -> None:
        """End a trial that this process holds."""
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # someone has ended it by hand
            self.study.tell(trial, value, state, skip_if_finished=True)

    def _take(self, held: ExitStack) -> Trial | None:
        """Lock the first unfinished trial that is free."""
        for trial in self.trials():
            if not trial.state.is_finished() and self._is_here(trial) and self._lock(trial, held):
                return Trial(self.study, trial._trial_id)
        return None

    def _lock(self, trial: FrozenTrial, held: ExitStack) -> bool:
        """Lock a trial, if it is free and, now that it is locked, still unfinished."""
        with ExitStack() as lock:
            try:
                lock.enter_context(locked(self._folder / str(trial.number)))
            except RunInUseError:
                return False
            running = {other.number for other in self.trials() if not other.state.is_finished()}
            if trial.number in running:
                held.push(lock.pop_all())
                return True
        return False

    def _add(self) -> None:
        """Add a trial. One too many, because another process did so at the same time, fails."""
        token = secrets.token_hex(8)
        marks = {"place": self._place, "host": socket.gethostname(), "folder": str(self._folder.resolve())}
        self.study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=marks | {"token": token}))
        (mine,) = (trial for trial in self.study.get_trials(deepcopy=False) if trial.user_attrs.get("token") == token)
        if mine.number not in {trial.number for trial in self.trials()}:
            with suppress(RunInUseError), locked(self._folder / str(mine.number)):
                self.study.tell(mine.number, state=TrialState.FAIL, skip_if_finished=True)

    def _is_here(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs.get("place") == self._place)


def _mark(folder: Path) -> str:
    """The random mark that a folder is known by, on whatever machine; made by the first process that asks."""
    path = folder / "mark"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"mark-{secrets.token_hex(8)}"
        files.write_text(own, own.name)
        with suppress(FileExistsError):
            path.hardlink_to(own)
        own.unlink()
    return path.read_text(encoding="utf-8")
