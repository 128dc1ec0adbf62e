"""The same losses whatever happens: every family trained by the command line on other devices and hosts, and stopped.

A small network of each family takes a few steps on posed and video pairs in one mixture: on 8 devices; on 1; with
parameters split over 2 and 4; as 2 processes of 4 devices; stopped by SIGTERM and continued, alone and as 2 processes;
and what 2 processes began continued on 1, 4 and 8 devices. Prints how far loss and gradient norm of any step are from
those of 8 devices, relative, and whether stopped runs end with the same bits, data order included. The learning rate is
small, as large steps of a new network amplify rounding.

    python benchmarks/same_losses.py [loftr dkm superglue lightglue] [--steps 8] [--json FILE]
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from input_pipeline import make_record

from gim_jax.cli.models import format_table
from gim_jax.data import records
from gim_jax.train.writers import read_metrics

REPO = Path(__file__).parent.parent
SMALL = {  # family: configuration and what makes it compile soon
    "loftr": ("configs/loftr.py:tiny", ["model.coarse_layers=('self','cross')"]),
    "dkm": ("configs/dkm.py:tiny", ["model.num_hidden=1"]),
    "superglue": ("configs/superglue.py:tiny", ["model.num_layers=2", "model.sinkhorn_iters=5"]),
    "lightglue": ("configs/lightglue.py:tiny", ["model.num_layers=2"]),
}
SAME = ("loss", "grad_norm")


def train(family: str, data: str, steps: int, out: Path, devices: int, hosts: int = 1, fsdp: int = 1, stop: int = 0):
    """Run `gim-jax train` as `hosts` processes with `devices` each; with `stop`, SIGTERM once that step is written."""
    config, changes = SMALL[family]
    changes = [
        *changes, f"num_steps={steps}", "optim.warmup_steps=1", "optim.lr=1e-4", "optim.min_lr=1e-5",
        "data.size=(96,96)", "data.max_matches=32", "data.min_matches=8", f"data.records={data}", "data.depth=True",
        f"mesh.fsdp={fsdp}", "mesh.fsdp_min_size=256",
    ]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gim_jax", "train", f"--config={config}", f"--workdir={out}"]
    command += [f"--config.{change}" for change in changes]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    errors = [out.with_name(f"{out.name}.{index}.err") for index in range(hosts)]
    for index in range(hosts):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        join = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={hosts}", f"--process-id={index}"]
        running.append(
            subprocess.Popen(
                command + (join if hosts > 1 else []),
                cwd=REPO,
                env=os.environ | flags,
                stdout=subprocess.DEVNULL,
                stderr=errors[index].open("w"),
            )
        )
    while stop and all(one.poll() is None for one in running):
        if any(line["step"] >= stop for line in read_metrics(out)):
            running[-1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    if {one.wait() for one in running} != {130 if stop else 0}:
        said = errors[0].read_text()[-2000:]
        raise SystemExit(f"{' '.join(command)}: {[one.returncode for one in running]}\n{said}")


def read(out: Path) -> tuple[list[tuple], bytes]:
    """Return loss and gradient norm of every step, and the bytes of the weights' arrays."""
    lines = [tuple(line[name] for name in SAME) for line in read_metrics(out) if "loss" in line]
    data = (out / "weights.safetensors").read_bytes()
    return lines, data[8 + int.from_bytes(data[:8], "little") :]


def apart(ours: list[tuple], theirs: list[tuple]) -> list[float]:
    """Return the largest relative difference of each figure over all steps."""
    assert len(ours) == len(theirs)
    return [max(abs(a[i] - b[i]) / abs(b[i]) for a, b in zip(ours, theirs)) for i in range(len(SAME))]


def compare(family: str, data: str, steps: int, folder: Path) -> list[tuple]:
    """Train one family in all ways; rows of the table."""
    rows, base = [], folder / "8"

    def run(name, **how):
        out = folder / name
        train(family, data, steps, out, **how)
        return out

    def row(what, out, against=base):
        (losses, weights), (other, others) = read(out), read(against)
        same = losses == other and weights == others
        figures = [f"{value:.1e}" for value in apart(losses, other)]
        rows.append((family, what, *figures, "yes" if same else "no"))
        print("  ".join(rows[-1]), flush=True)

    run("8", devices=8)
    row("8 devices, stopped and continued", run_twice(run, "stopped", dict(devices=8), dict(devices=8)))
    row("1 device", run("1", devices=1))
    row("8 devices, fsdp 2", run("fsdp2", devices=8, fsdp=2))
    row("8 devices, fsdp 4", run("fsdp4", devices=8, fsdp=4))
    pair = dict(devices=4, hosts=2)
    hosts = run("hosts", **pair)
    row("2 processes of 4", hosts)
    run("begun", **pair, stop=2)
    for devices in (1, 4, 8):
        shutil.copytree(folder / "begun", folder / f"begun{devices}")
        row(f"2 processes of 4, continued on {devices}", run(f"begun{devices}", devices=devices))
    row("2 processes, stopped and continued (of 2 processes)", run("begun", **pair), hosts)
    return rows


def run_twice(run, name, first, second):
    run(name, **first, stop=2)
    return run(name, **second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(SMALL)}; default: all")
    parser.add_argument("--steps", type=int, default=8, help="the runs that are stopped are so at 2 or soon after")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    table = [("family", "run", "loss", "gradient norm", "same bits")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("video", "posed"):
            made = [records.encode(make_record(seed, kind == "posed")) for seed in range(12)]
            records.write_dataset(folder / kind, kind, "train", 2, made)
        for family in args.families or SMALL:
            table += compare(family, f"{folder / 'video'},{folder / 'posed'}", args.steps, folder / family)
            if args.json:
                Path(args.json).write_text(json.dumps(table, indent=1))
    print(f"\n{format_table(table)}")


if __name__ == "__main__":
    main()
