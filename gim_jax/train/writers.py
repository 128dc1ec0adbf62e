"""Metrics as JSON lines, TensorBoard files and, by option, at Weights & Biases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
    """Write scalars and pictures of a run that may have been interrupted.

    Lines after `start`, the step that the run continues from, are removed: those steps are taken again. From 0 it
    starts anew. With a `project` the same goes to Weights & Biases, where the folder's path names the run.

    Attributes:
      latest: the last value written of every scalar.
      lines: those that were there.
    """

    def __init__(self, workdir: str | Path, start: int, project: str = "", config: Mapping[str, Any] | None = None):
        lines = [line for line in read_metrics(workdir) if line["step"] <= start] if start else []
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path = Path(workdir) / METRICS
        write_atomic(path, lambda file: file.write(text.encode()))
        self.lines = lines
        self.latest: dict[str, Any] = {name: value for line in lines for name, value in line.items()}
        self._file = open(path, "a", buffering=1)  # every line is on disk before the next step
        # A file is named by the second it is made in: without the step, a quickly restarted run would lose one.
        suffix = f".{start}"
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1, filename_suffix=suffix)
        self._wandb: Any = None
        if project:
            import wandb  # pyright: ignore[reportMissingImports]

            identity = hashlib.sha256(str(Path(workdir).resolve()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(
                project=project, id=identity, resume="allow", dir=workdir, name=Path(workdir).name, config=config
            )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars that belong to the state after `step` steps."""
        line = {"step": step, **scalars}
        self._file.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)
        self.latest.update(line)

    def draw(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write pictures [H, W, 3] uint8 RGB."""
        for name, picture in pictures.items():
            self._board.add_image(name, picture, step, dataformats="HWC")
        if self._wandb and pictures:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({name: wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def require_wandb(project: str) -> None:
    """Raise ValueError if a project is named but its package is missing."""
    if not project:
        return
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"wandb: found {project!r}, but the package is missing: pip install 'gim-jax[wandb]'"
        ) from error
