"""`gim-jax train`: train a matcher on packed records; started again in the same folder it continues."""

from __future__ import annotations

import sys
import time

from gim_jax.api import enable_compilation_cache
from gim_jax.config import load_config


def add_arguments(parser) -> None:
    parser.add_argument(
        "--config", required=True, help="configs/NAME.py[:ARGUMENT]; --config.KEY=VALUE changes a value"
    )
    parser.add_argument("--workdir", required=True, help="folder of the run: metrics, checkpoints, weights")
    parser.add_argument(
        "--coordinator",
        metavar="auto|HOST:PORT",
        help="train on several hosts, started alike on each; on TPU pods and under SLURM they find each other (auto)",
    )
    parser.add_argument("--num-processes", type=int, help="with HOST:PORT: how many hosts")
    parser.add_argument("--process-id", type=int, help="with HOST:PORT: which this is, from 0; 0 runs at HOST")
    parser.set_defaults(accepts_overrides=True)


def join_hosts(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Connect with the other hosts, if any. Returns whether this host is the first, which prints and writes."""
    import jax

    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise ValueError("--coordinator=HOST:PORT needs --num-processes=N and --process-id=0 to N - 1")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    return jax.process_index() == 0 if coordinator else True


def run(args) -> int:
    config = load_config(args.config, args.overrides)
    first = join_hosts(args.coordinator, args.num_processes, args.process_id)
    enable_compilation_cache()
    import jax  # a second of imports that a wrong option need not wait for

    from gim_jax.train import loop

    with Line(every_s=0.5 if sys.stdout.isatty() else 10.0) as line:
        result = loop.train(config, args.workdir, line if first else None)
    host = f"host {jax.process_index()}: " if jax.process_count() > 1 else ""
    for reason, count in sorted(result["incidents"].items()):
        print(f"{host}left out {count} times: {reason}", file=sys.stderr)
    if not first:
        return 0
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    print(f"{result['step']} steps in {result['elapsed_s']:.0f} s; seconds of this run: {seconds}")
    print(f"loss {result['loss']:.4f}; weights ({result['num_params']:,} parameters): {result['weights']}")
    return 0


class Line:
    """Prints step, loss, rate and time left; rewritten in place on a terminal."""

    def __init__(self, every_s: float):
        self.every_s = every_s
        self.live = sys.stdout.isatty()
        self.first: tuple[int, float] | None = None
        self.shown = 0.0

    def __call__(self, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)  # the first step holds the compilation
        elif now - self.shown < self.every_s and step < num_steps:
            return
        self.shown = now
        rate = (step - self.first[0]) / max(now - self.first[1], 1e-9)
        left = f", {(num_steps - step) / rate:.0f} s left" if rate else ""
        text = f"  step {step} of {num_steps}: loss {metrics['loss']:.4f}, {rate:.2f} steps/s{left}"
        print(("\r\x1b[K" if self.live else "") + text, end="" if self.live else "\n", flush=True)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live and self.first:
            print(flush=True)
