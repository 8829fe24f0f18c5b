"""`metrics.jsonl`: one line per logging interval."""

from __future__ import annotations

import json

from torchrec_fmp import paths


class MetricsLog:
    """Appends to a JSON-lines file; does nothing on ranks that do not report.

    Args:
        path: path of the file, or None for no log.
        interval: number of steps between two lines.
    """

    def __init__(self, path: str | None, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"the logging interval is {interval} steps; it must be at least 1")
        self._path = path
        self._interval = interval
        self._losses: list[float] = []
        self._place: dict[str, object] = {}

    def step(self, phase: str, step: int, loss: float, samples: int) -> None:
        """Records a step; every `interval` steps, writes the mean loss since the last line."""
        self._losses.append(loss)
        self._place = {"phase": phase, "step": step + 1, "samples": samples}
        if (step + 1) % self._interval == 0:
            self.flush()

    def flush(self) -> None:
        """Writes the steps since the last line. Called after each phase: no line mixes phases."""
        if self._losses:
            self.write({**self._place, "loss": sum(self._losses) / len(self._losses)})
            self._losses.clear()

    def write(self, record: dict[str, object]) -> None:
        """Appends one line."""
        if self._path is not None:
            with paths.open_path(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")
