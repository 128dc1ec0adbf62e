"""Kill labelling and packing at random moments, start them again, and compare the files with those of undisturbed runs.

    python -m tests.kill_at_random [--moments 20] [--seed 0] [--frames 120]

Not a test of its own, as it takes minutes; `tests/test_fleet.py` kills at chosen writes.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.test_fleet import OVERRIDES, contents
from tests.test_label import pan
from tests.test_video import write_video


def killed_and_finished(command: list[str], out: Path, wanted: dict[str, bytes], after_s: float) -> tuple[bool, list]:
    """Was the command still running when killed, and what differs from the wanted files after it was run again?"""
    shutil.rmtree(out, ignore_errors=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(after_s)
    process.kill()
    killed = process.wait() == -9
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = contents(out)
    return killed, sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=120)
    args = parser.parse_args()
    rng, failures = np.random.default_rng(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_video(root / "pan.mp4", pan(args.frames, 2, 0), options={"crf": "6"})
        program = [sys.executable, "-m", "gim_jax"]
        commands = {
            "label": lambda out: [*program, "label", str(root / "pan.mp4"), "--out", str(out), *OVERRIDES],
            "pack": lambda out: [*program, "pack", str(root / "label"), "--out", str(out)],
        }
        for name, command in commands.items():
            began = time.monotonic()
            subprocess.run(command(root / name), check=True, stdout=subprocess.DEVNULL)
            seconds, wanted, runs, hits = time.monotonic() - began, contents(root / name), 0, 0
            while hits < args.moments:  # a run that ended before its moment came does not count
                again = root / f"{name}-again" / name
                killed, differ = killed_and_finished(command(again), again, wanted, rng.uniform(0.2, 1.0) * seconds)
                runs, hits, failures = runs + 1, hits + killed, failures + bool(differ)
                if differ:
                    print(f"{name}: differs: {', '.join(differ)}")
            print(
                f"{name}: {hits} of {runs} runs killed ({seconds:.1f} s undisturbed), {len(wanted)} files",
                flush=True,
            )
    print(f"{failures} differences")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
