"""Metrics as JSON lines and TensorBoard files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from gim_jax.data.tfrecord import write_atomic

METRICS = "metrics.jsonl"


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`; a last line that a killed run left unfinished is not counted."""
    path = Path(workdir) / METRICS
    if not path.exists():
        return []
    *lines, rest = path.read_text().split("\n")
    try:
        return [json.loads(line) for line in lines + ([rest] if rest else [])]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines]


class Writers:
    """Write scalars of a run that may have been interrupted.

    Lines after `start`, the step that the run continues from, are removed: those steps are taken again. From 0 it
    starts anew.

    Attributes:
      latest: the last value written of every scalar.
    """

    def __init__(self, workdir: str | Path, start: int):
        lines = [line for line in read_metrics(workdir) if line["step"] <= start] if start else []
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path = Path(workdir) / METRICS
        write_atomic(path, lambda file: file.write(text.encode()))
        self.latest: dict[str, Any] = {name: value for line in lines for name, value in line.items()}
        self._file = open(path, "a", buffering=1)  # every line is on disk before the next step
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars that belong to the state after `step` steps."""
        line = {"step": step, **scalars}
        self._file.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self.latest.update(line)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()
