"""Figures of a run for trackers: TensorBoard, MLflow, Weights & Biases (setting ``track``).

A tracker hears of each phase when it ends: losses by client and epoch, accuracies by client,
seconds and bytes; in the end of the run's accuracies and λ, and it gets the results. It also gets
the settings, without paths, and the names of clients. One that fails does not end the run.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from fedcompo.errors import ConfigError

Row = tuple[str, float, int]
"""Name of a figure, its value, and how many of that name there are by now."""
Settings = Mapping[str, Any]
PROJECT = "fedcompo"
"""Name of the project, or experiment, unless the environment has another."""
logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes event files into ``tensorboard`` in the run's folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {k} = {v}" for k, v in settings.items()))

    def figures(self, rows: Sequence[Row]) -> None:
        """Write them to disk."""
        for row in rows:
            self._writer.add_scalar(*row)
        self._writer.flush()

    def finish(self, files: Iterable[Path], *, failed: bool) -> None:
        """Close the file of events; TensorBoard takes no other files."""
        self._writer.close()


class MLflow:
    """Writes to where ``MLFLOW_TRACKING_URI`` says, else into ``mlruns`` in the run's folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.x asks for it
            uri = (folder / "mlruns").as_uri()
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # minutes otherwise
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(uri), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        params = [Param(key, str(value)) for key, value in settings.items() if value != ""]
        for at in range(0, len(params), 100):
            self._client.log_batch(self._run, params=params[at : at + 100])

    def figures(self, rows: Sequence[Row]) -> None:
        """Send them, as many at a time as MLflow takes."""
        now = int(1000 * time.time())
        metrics = [self._metric(_known_to_mlflow(n), v, now, step) for n, v, step in rows]
        for at in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[at : at + 1000])

    def finish(self, files: Iterable[Path], *, failed: bool) -> None:
        """Log the files as artifacts, and say how the run ended."""
        for file in files:
            self._client.log_artifact(self._run, str(file))
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    """Writes to Weights & Biases; offline, into the run's folder, unless ``WANDB_MODE`` is set."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"  # nothing leaves unless one asks for it
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        about = {"dir": str(folder), "name": folder.name, "config": dict(settings)}
        self._run = wandb.init(project=project, mode=mode, **about)

    def figures(self, rows: Sequence[Row]) -> None:
        """Log them one after the other: it allows no step to go back."""
        for name, value, _ in rows:
            self._run.log({name: value})

    def finish(self, files: Iterable[Path], *, failed: bool) -> None:
        """Save the files, and say how the run ended."""
        for file in files:
            self._run.save(str(file), base_path=str(file.parent), policy="now")
        self._run.finish(exit_code=int(failed))


Tracker = TensorBoard | MLflow | WeightsAndBiases
TRACKERS: dict[str, Callable[[Path, Settings], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""By their names in settings, which are those of their packages and of our extras."""


class Tracking:
    """All trackers of a run; as a context, it closes them when the run fails."""

    def __init__(
        self, names: Iterable[str], folder: Path, settings: Settings, note: Callable[[str], None]
    ) -> None:
        """Start them.

        Args:
            names: Of the trackers; may be empty.
            folder: Of the run.
            settings: To write down.
            note: Takes a sentence for people, on a tracker that fails later.

        Raises:
            ConfigError: If one is not installed, or cannot start.
        """
        require(names := tuple(names))
        self._note, self._seen, self._rows = note, Counter[str](), list[Row]()
        self._sent: Counter[str] = Counter()
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self._trackers[name] = TRACKERS[name](folder, settings)
            except Exception as error:
                self.finish({}, (), failed=True)  # those that have started
                raise ConfigError(
                    f"`track`: {name} cannot start ({type(error).__name__}: {error}). See to it, "
                    "or leave it out."
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish({}, (), failed=True)  # does nothing once the run has finished

    def hear(self, event: Mapping[str, Any]) -> None:
        """Keep the figures of an event of the run; pass them on when its phase ends."""
        if not self._trackers:
            return
        if event["event"] == "client" and event["status"] == "ok":
            for name, value in event.get("figures", {}).items():
                many = value if isinstance(value, list | tuple) else [value]
                short = "loss" if name == "losses" else name
                for each in many:
                    self._add(f"{short}/{event['client']}", each)
            self._sent.update({way: event[way] for way in ("bytes_sent", "bytes_received")})
        if event["event"] == "phase-finished":
            for name, value in {"seconds": event["seconds"], **self._sent}.items():
                self._add(f"{name}/{event['phase']}", value)
            self._sent.clear()
            self._flush()

    def finish(
        self, results: Mapping[str, Any], files: Iterable[Path], *, failed: bool = False
    ) -> None:
        """Pass the figures of the whole run on, and close all trackers."""
        whole = {k: v for k, v in results.items() if k.endswith("_accuracy") or k == "seconds"}
        whole["lambda"] = (results.get("scale") or {}).get("scale")
        for name, value in whole.items():
            self._add(f"run/{name}", value)
        self._flush()
        kept = tuple(files)
        self._each(lambda tracker: tracker.finish(kept, failed=failed))
        self._trackers.clear()

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            self._seen[name] += 1
            self._rows.append((name, float(value), self._seen[name]))

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._each(lambda tracker: tracker.figures(rows))

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                work(tracker)
            except Exception as error:  # whatever its server, its disk or its package does
                del self._trackers[name]
                logger.warning("`track`: %s failed.", name, exc_info=error)
                self._note(
                    f"`track`: {name} failed ({type(error).__name__}) and heard no more of the "
                    "run; the server's log says why."
                )


def require(names: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless the packages of all these trackers are installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        extras = ",".join(missing)
        raise ConfigError(
            f"`track` asks for {' and '.join(missing)}, which this Python does not have. Install: "
            f"pip install 'fedcompo[{extras}]'"
        )


def _known_to_mlflow(name: str) -> str:
    """Replace what MLflow takes in no name of a figure by its number, so that names stay apart."""
    return "".join(c if c.isalnum() or c in "_-. /" else f"_{ord(c):X}_" for c in name)
