"""`metrics.jsonl`: one line a logging interval."""

from __future__ import annotations

import json

from torchrec_fmp import paths


class MetricsLog:
    """Appends to a JSON-lines file; on ranks that do not report, does nothing.

    Args:
        path: the file, or None for no log.
        interval: steps between two lines.
    """

    def __init__(self, path: str | None, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"the logging interval is {interval} steps, it must be at least 1")
        self._path = path
        self._interval = interval
        self._losses: list[float] = []

    def step(self, phase: str, step: int, loss: float, samples: int) -> None:
        """Notes a step; every `interval` steps writes the mean loss since the last line."""
        self._losses.append(loss)
        if (step + 1) % self._interval:
            return
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        self.write({"phase": phase, "step": step + 1, "samples": samples, "loss": mean})

    def write(self, record: dict[str, object]) -> None:
        """Appends one line."""
        if self._path is not None:
            with paths.open_path(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")
