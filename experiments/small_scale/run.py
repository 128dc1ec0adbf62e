"""The paper's claims at the scale of one CPU: renders, labels, trains, evaluates, reports; started again it goes on.

    python experiments/small_scale/run.py --out DIR --list
    python experiments/small_scale/run.py --out DIR [--real REAL_PAIRS] [--known FOLDER_OF_RESULTS] [STEP ...]

Without names every step that is missing is run, the most important first; names may have wildcards ("loftr-*-0"), and
bring what they need. A step ends with `DIR/results/STEP.json`, written at once; `DIR/logs/STEP.log` is what it printed.
The tables and figures of what is there are made anew at the end, `DIR/report/`. `--known` takes over results of another
machine, of the steps that no other one needs: the same step gives the same result.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from steps import ROOT, SCALES, Step, Table

from gim_jax.cli.models import format_table
from gim_jax.data.json_file import read_json, write_json
from gim_jax.data.tfrecord import write_atomic
from gim_jax.eval.document import versions

OUTPUT = "--json"  # a command that names its output is judged by it: an evaluation of a part ends with 1


class Driver:
    """Runs steps in a folder."""

    def __init__(self, out: Path, scale: str, real: Path | None):
        if real and not real.is_dir():
            raise ValueError(f"--real {real}: no such folder")
        self.out, self.scale = out.resolve(), scale
        self.real = real.resolve() if real else None
        self.steps = Table(self.out, SCALES[scale], self.real).steps
        self.env = {
            "JAX_PLATFORMS": "cpu",
            # One XLA device per core uses the cores better than one program on all of them does.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={len(os.sched_getaffinity(0))}",
            "JAX_COMPILATION_CACHE_DIR": str(self.out / "xla"),  # rows of a network share their programs
            "PYTHONPATH": str(ROOT),
        } | os.environ

    def result(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"

    def state(self, name: str) -> str:
        """Say "done", "missing", or why a step is left out."""
        step = self.steps[name]
        if self.result(name).is_file():
            return "done"
        if step.option and not self.real:
            return f"skipped: no --{step.option}"
        for need in step.needs:
            if self.state(need).startswith("skipped"):
                return f"skipped: needs {need}"
        return "missing"

    def plan(self, patterns: list[str]) -> list[str]:
        """Return the chosen steps and all that the missing ones need, needs first, otherwise in the table's order."""
        unknown = [p for p in patterns if not any(fnmatch(name, p) for name in self.steps)]
        if unknown:
            raise ValueError(f"STEP: {unknown[0]} is none; --list shows all")
        order: list[str] = []

        def visit(name: str) -> None:
            if name not in order:
                for need in self.steps[name].needs if self.state(name) == "missing" else ():
                    visit(need)
                order.append(name)

        for name in self.steps:
            if not patterns or any(fnmatch(name, pattern) for pattern in patterns):
                visit(name)
        return order

    def claim(self) -> int:
        """Make the folder or check that it is this experiment's, and lock it; returns the open lock."""
        for folder in ("results", "logs", "eval"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        settings = {"scale": self.scale, "real": bool(self.real)}
        path = self.out / "experiment.json"
        found = read_json(path)
        if found not in (None, settings):
            raise ValueError(f"--out {self.out}: holds an experiment with {found}, expected {settings}")
        write_json(path, settings)
        lock = os.open(self.out / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # commands inherit the lock: it is held as long as one of a killed driver still works
            raise ValueError(f"--out {self.out}: a run is at work here, or a command that it started") from None
        return lock

    def adopt(self, known: Path) -> list[str]:
        """Copy results that are missing here and whose files no step needs. Returns their names."""
        if not known.is_dir():
            raise ValueError(f"--known {known}: no such folder")
        needed = {need for step in self.steps.values() for need in step.needs}
        names = [path.stem for path in sorted(known.glob("*.json")) if path.stem in self.steps.keys() - needed]
        names = [name for name in names if not self.result(name).is_file()]
        for name in names:
            content = read_json(known / f"{name}.json")
            if content.get("scale") != self.scale:
                raise ValueError(f"{known / name}.json: scale: found {content.get('scale')!r}, expected {self.scale!r}")
            write_atomic(self.result(name), lambda file, content=content: file.write(json.dumps(content).encode()))
        return names

    def run(self, patterns: list[str], known: Path | None = None) -> list[str]:
        """Take over known results, run what is missing of the chosen steps. Returns the names of those that failed."""
        lock, failed = self.claim(), []
        if known:
            print(f"known: {' '.join(self.adopt(known)) or 'nothing new'}", flush=True)
        for name in self.plan(patterns):
            state, step = self.state(name), self.steps[name]
            if state != "missing":
                if state != "done":
                    print(f"{name}: {state}", flush=True)
                continue
            if missing := [need for need in step.needs if not self.result(need).is_file()]:
                print(f"{name}: left out, {missing[0]} failed", flush=True)
                failed.append(name)
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}: about {step.minutes:.0f} minutes on one core", flush=True)
            if problem := self.run_step(step, lock):
                print(f"{name}: failed: {problem}", flush=True)
                failed.append(name)
        os.close(lock)
        return failed

    def run_step(self, step: Step, lock: int) -> str:
        """Run the commands of a step and write its result. Returns what went wrong, or nothing."""
        log, clock = (self.out / "logs" / f"{step.name}.{suffix}" for suffix in ("log", "seconds"))
        for command in step.commands:
            began = time.monotonic()
            with open(log, "ab") as file:
                file.write(f"$ {shlex.join(command)}\n".encode())
                file.flush()
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    pass_fds=(lock,),
                    env=self.env,
                ).returncode
            with open(clock, "a") as file:
                file.write(f"{time.monotonic() - began:.1f}\n")
            fine = code == 0 or (code == 1 and OUTPUT in command and Path(command[command.index(OUTPUT) + 1]).is_file())
            if not fine:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                return f"exit code {code}: {lines[-1][:300]} (see {log})"
        about = {
            "step": step.name,
            "scale": self.scale,
            "commands": [self.shown(command) for command in step.commands],
            "seconds": round(sum(map(float, clock.read_text().split())), 1),
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "versions": versions(),
        }
        content = json.dumps(about | step.result())
        write_atomic(self.result(step.name), lambda file: file.write(content.encode()))
        return ""

    def shown(self, command: tuple[str, ...]) -> str:
        """Say a command as one would type it in the checkout."""
        text = shlex.join(command)
        places = {f"{ROOT}/": "", str(self.out): "OUT", str(self.real): "REAL", sys.executable: "python"}
        for place, name in places.items():
            text = text.replace(place, name)
        return text

    def print_list(self, patterns: list[str]) -> None:
        rows = [("step", "state", "minutes expected", "taken", "needs")]
        for name in self.plan(patterns):
            state, step = self.state(name), self.steps[name]
            taken = f"{read_json(self.result(name))['seconds'] / 60:.1f}" if state == "done" else ""
            rows.append((name, state, f"{step.minutes:.0f}", taken, " ".join(step.needs)))
        left = sum(self.steps[name].minutes for name in self.plan(patterns) if self.state(name) == "missing")
        print(format_table(rows))
        print(f"{left / 60:.1f} hours of one core are left")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="names or wildcards (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--real", type=Path, metavar="DIR", help="real pairs and videos; without it left out")
    parser.add_argument("--known", type=Path, metavar="DIR", help="results of another machine")
    parser.add_argument("--scale", choices=SCALES, default="full", help="smoke: all of it in minutes, for a test")
    parser.add_argument("--list", action="store_true", help="print the steps and their state")
    args = parser.parse_args(argv)
    try:
        driver = Driver(args.out, args.scale, args.real)
        if args.list:
            driver.print_list(args.steps)
            return 0
        failed = driver.run(args.steps, args.known)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    from report import write_report

    write_report(driver.out / "results", driver.out / "report")
    print(f"report: {driver.out / 'report' / 'tables.md'}; {len(failed)} steps failed {' '.join(failed)}".rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
