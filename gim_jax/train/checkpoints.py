"""Checkpoints of state, data position and timer together, and the wish to stop.

Orbax writes them asynchronously and renames them when they are complete, so a killed save costs the steps since the
one before and nothing else. A checkpoint restores onto another mesh and another number of hosts.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gim_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
      folder: made if missing; leftovers of killed saves in it are removed.
      keep: how many to keep, the newest.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Start to save the state and `extra` (JSON). Waits only for a save before that is still unfinished."""
        if self.latest == step:
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint into arrays of the shapes, types and places that `abstract` describes."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), extra=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["extra"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


class StopSignal:
    """Notes SIGTERM and Ctrl-C so that the loop can save first; a second signal acts at once.

    On several hosts the runtime agrees on one step for all of them to stop at, whichever was told to.
    """

    def __init__(self) -> None:
        self._stopped = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # With several hosts SIGTERM belongs to the runtime, and outside of the main thread Python allows no handler.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self._stopped = True
        self._restore_handlers()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # tells the runtime

    def reached(self, step: int) -> bool:
        """Say whether to stop at this step; on several hosts all get the same answer."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._stopped

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()
