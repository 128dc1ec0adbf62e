"""Run implementations of one thing side by side: each in a process of its own, repetitions taking turns."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

THREADS = 2


@dataclass
class Result:
    """What one implementation took and gave; `missing` says which package it lacks."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0  # largest resident set of the process, compilation and weights included
    run_peak_mb: float = 0.0  # the same once it is warm
    start_mb: float = 0.0  # resident before the first repetition: libraries, weights, inputs
    outputs: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    missing: str = ""

    def __str__(self) -> str:
        wall, cpu = statistics.median(self.wall_s), statistics.median(self.cpu_s)
        return f"{wall:.3f} s (min {min(self.wall_s):.3f}, CPU {cpu:.3f}), {self.peak_mb:.0f} MB"


def memory_mb(key: str) -> float:
    """Read VmRSS (resident now) or VmHWM (its peak) of this process; Linux."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


def compare(setups: dict[str, tuple[Callable, tuple]], repetitions: int) -> dict[str, Result]:
    """Time several implementations.

    Args:
      setups: name -> (function, arguments). The function runs in the process of its implementation; it returns
        `run`, which takes nothing and does the work to its end, `outputs`, which turns what `run` gives into named
        arrays, and a dict of facts. A package it cannot import counts as missing.
      repetitions: timed, after one that is not.
    """
    context = multiprocessing.get_context("spawn")
    workers, results = {}, {name: Result() for name in setups}
    for name, (setup, args) in setups.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, setup, args), daemon=True)
        process.start()
        theirs.close()
        workers[name] = ours, process
    for name, (pipe, _) in workers.items():
        kind, value = pipe.recv()
        if kind == "missing":
            results[name].missing = value
        else:
            results[name].info = value
    present = [name for name in setups if not results[name].missing]
    for i in range(repetitions + 1):
        for name in present:
            pipe = workers[name][0]
            pipe.send("run")
            wall, cpu = pipe.recv()
            if i:
                results[name].wall_s.append(wall)
                results[name].cpu_s.append(cpu)
    for name in present:
        pipe, process = workers[name]
        pipe.send("stop")
        found = results[name]
        found.start_mb, found.peak_mb, found.run_peak_mb, found.outputs = pipe.recv()
        process.join()
    return results


def _serve(pipe, setup, args):
    """Answer the parent; the threads of all libraries follow from the processors left to this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a thread that waits uses no time, so that CPU seconds mean work
    try:
        run, outputs, info = setup(*args)
    except ImportError as error:
        pipe.send(("missing", str(error)))
        return
    pipe.send(("ready", info))
    start, peak, out, count = memory_mb("VmRSS"), 0.0, None, 0
    while pipe.recv() == "run":
        out = None
        if count == 1:  # warm: forget the peak of compilation and of the first repetition
            peak = memory_mb("VmHWM")
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        wall, cpu = time.perf_counter(), time.process_time()
        out = run()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu))
        count += 1
    warm = memory_mb("VmHWM")
    pipe.send((start, max(peak, warm), warm, outputs(out)))
