"""One line of progress: done, of how many, rate, time left."""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints `label: 120 of 400 frames, 35.1/s, 8 s left`; rewritten in place on a terminal.

    Call it with (done, total). Use it as a context manager so that the line is ended.
    """

    def __init__(self, label: str, unit: str = "", every_s: float = 5.0):
        self.label, self.unit = label, unit
        self.live = sys.stdout.isatty()
        self.every_s = 0.2 if self.live else every_s
        self.started = self.shown = time.monotonic()
        self.line = ""

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.shown < self.every_s:
            return
        self.shown = now
        rate = done / max(now - self.started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if 0 < done < total else ""
        self.line = f"  {self.label}: {done} of {total} {self.unit}, {rate:.3g}/s{left}"
        print(("\r\x1b[K" if self.live else "") + self.line, end="" if self.live else "\n", flush=True)

    def close(self) -> None:
        if self.live and self.line:
            print(flush=True)
        self.line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
