"""Experiment trackers, through accelerate's: every number of the logs, under the adapter's name."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from loraplex.errors import ConfigError
from loraplex.extras import require_extra
from loraplex.validation import quoted

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
_PROJECT = "loraplex"  # W&B's project, MLflow's experiment
_URI = "MLFLOW_TRACKING_URI"
_DATABASE = "mlflow.db"

Settings = Mapping[str, Any]


class _Tracker(Protocol):
    """What is used of accelerate's trackers (`accelerate.tracking.GeneralTracker`)."""

    tracker: Any

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None) -> None: ...

    def finish(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown tracker, MissingExtraError for one that isn't installed."""
    known = get_args(TrackerName)
    unknown = [name for name in names if name not in known]
    if isinstance(names, str) or unknown or len(set(names)) < len(names):
        raise ConfigError(f"trackers is {quoted(names)}; give each of {list(known)} once at most.")
    for name in names:
        require_extra(name, f"the tracker {name!r}")


class Trackers:
    """The trackers of one run, on the process that writes; without any, nothing happens."""

    def __init__(self, started: Mapping[str, _Tracker] | None = None) -> None:
        self._started = started or {}

    def log(self, name: str, entry: Mapping[str, Any]) -> None:
        """Pass on the numbers of a line of the log of `name`; what are no numbers stay in the log."""
        numbers = {f"{name}/{key}": value for key, value in _flat(entry).items() if isinstance(value, int | float)}
        step = numbers.pop(f"{name}/step", None)
        if not numbers or step is None:
            return
        for kind, tracker in self._started.items():
            # W&B drops steps that go back, as those of a job that begins anew do: there each adapter has an axis.
            is_wandb = kind == "wandb"
            tracker.log(numbers | ({f"{name}/step": step} if is_wandb else {}), None if is_wandb else int(step))


@contextmanager
def tracking(
    names: Sequence[str], output: Path, adapters: Sequence[str], settings: Settings, *, enabled: bool, first_step: int
) -> Iterator[Trackers]:
    """Inside the block trackers take what is logged of `adapters`; they end with it, whatever happens.

    `first_step`: the step that a resumed run begins with; what TensorBoard has of later ones is then hidden.
    """
    if not (names and enabled):
        yield Trackers()
        return
    taken = [adapter for adapter in adapters if adapter.partition("/")[0] in {*names, _DATABASE}]
    if taken:
        raise ConfigError(f"{taken[0]!r} is the folder of a tracker in the output folder. Choose another name.")
    started: dict[str, _Tracker] = {}
    with ExitStack() as stack:
        for name in names:
            started[name] = _start(name, output, first_step)
            stack.callback(started[name].finish)
            started[name].store_init_configuration({key: _plain(value) for key, value in _flat(settings).items()})
        if "wandb" in started:
            for adapter in adapters:
                started["wandb"].tracker.define_metric(f"{adapter}/*", step_metric=f"{adapter}/step")
        yield Trackers(started)


def _start(name: str, output: Path, first_step: int) -> _Tracker:
    from accelerate import tracking as trackers  # it imports every tracker that is installed: seconds

    tracker: _Tracker
    if name == "tensorboard":
        tracker = trackers.TensorBoardTracker(name, output, purge_step=first_step)
    elif name == "wandb":
        tracker = trackers.WandBTracker(_PROJECT, name=output.name, dir=str(output))
    else:
        import mlflow

        if not os.environ.get(_URI):
            mlflow.set_tracking_uri(f"sqlite:///{(output / _DATABASE).resolve()}")
        tracker = trackers.MLflowTracker(experiment_name=_PROJECT, run_name=output.name)
    tracker.start()
    return tracker


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names joined by a slash."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        inner = {f"{key}/{name}": one for name, one in _flat(value).items()} if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else inner
    return flat


def _plain(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
