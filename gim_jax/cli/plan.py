"""`gim-jax plan`: compile a training step for TPU slices without having one, and say what it needs and how long."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path
from typing import Any

from gim_jax.config import load_config
from gim_jax.data.tfrecord import write_atomic

COLUMNS = {  # heading: figure of `gim_jax.train.plan.plan` and its form
    "topology": ("topology", ""),
    "chips": ("chips", "d"),
    "pairs/chip": ("pairs_per_chip", "d"),
    "batch": ("batch_size", "d"),
    "HBM GiB": ("hbm_gib", ".2f"),
    "of": ("hbm_there_gib", "d"),
    "fits": ("fits", ""),
    "TFLOP": ("tflop", ".2f"),
    "GB": ("gbyte", ".0f"),
    "collectives": ("num_collectives", "d"),
    "their GB": ("collective_gbyte", ".3f"),
    "compute ms": ("compute_ms", ".1f"),
    "memory ms": ("memory_ms", ".1f"),
    "compiler ms": ("compiler_ms", ".1f"),
    "bound": ("bound", ""),
    "pairs/s": ("pairs_per_s", ".0f"),
    "days": ("days", ".2f"),
    "chip hours": ("chip_hours", ".0f"),
}


def add_arguments(parser) -> None:
    parser.add_argument("--config", required=True, help="configs/NAME.py[:ARGUMENT]; --config.KEY=VALUE changes one")
    parser.add_argument(
        "--topology", default="v5e:4x4", help="v4|v5e|v5p|v6e:AxB[xC], several separated by commas; or cuda"
    )
    parser.add_argument("--pairs-per-chip", default="", help="numbers separated by commas (default: the config's)")
    parser.add_argument("--effort", type=float, default=-1.0, help="of the compiler, -1 to 1; 0 takes 6 times as long")
    parser.add_argument("--out", metavar="DIR", help="gets plan.csv and plan.png")
    parser.set_defaults(accepts_overrides=True)


def run(args) -> int:
    config: Any = load_config(args.config, args.overrides)
    try:
        wanted = [int(number) for number in args.pairs_per_chip.split(",") if number]
    except ValueError as error:
        raise ValueError(f"--pairs-per-chip: found {args.pairs_per_chip!r}, expected whole numbers") from error
    if any(number < 1 for number in wanted):
        raise ValueError(f"--pairs-per-chip: found {args.pairs_per_chip!r}, expected 1 or more")
    # The TPU compiler is asked by name: no TPU is looked for, nor its metadata server.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from gim_jax.cli.models import format_table
    from gim_jax.train import plan

    rows: list[dict[str, Any]] = []
    for topology in args.topology.split(","):
        if topology == "cuda":
            for number in wanted or [1]:
                found = plan.lower_for_gpu(config, number)
                print(
                    f"cuda, {number} pairs: lowers; " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True
                )
            continue
        chips = plan.slice_of(topology, config.mesh.fsdp).size
        for number in wanted or [max(config.batch_size // chips, config.optim.accumulate)]:
            rows.append(plan.plan(config, topology, number, args.effort))
            print("  ".join(f"{k} {v}" for k, v in zip(COLUMNS, cells(rows[-1])) if v != "-"), flush=True)
            if args.out:
                write(Path(args.out), args.config, rows)
    if rows:
        print(f"\n{args.config} {' '.join(args.overrides)}: {config.num_steps} steps of {config.batch_size} pairs")
        print(format_table([tuple(COLUMNS), *(cells(row) for row in rows)]))
    for topology in dict.fromkeys(row["topology"] for row in rows):
        fitting = max((row["batch_size"] for row in rows if row["topology"] == topology and row["fits"]), default=None)
        print(f"{topology}: largest of these batches that fits: {fitting or 'none'}")
    if args.out and rows:
        print(f"{args.out}/plan.csv, {args.out}/plan.png", file=sys.stderr)
    return 0


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row of the table."""
    values = [(row.get(key), form) for key, form in COLUMNS.values()]
    return tuple(
        "-" if value is None else ("yes" if value else "NO") if isinstance(value, bool) else format(value, form)
        for value, form in values
    )


def write(out: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Write `plan.csv` and `plan.png`: memory and throughput against the batch."""
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({key for row in rows for key in row}))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "plan.csv", lambda file: file.write(text.getvalue().encode()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for topology in dict.fromkeys(row["topology"] for row in rows):
        of = [row for row in rows if row["topology"] == topology]
        (line,) = left.plot([r["pairs_per_chip"] for r in of], [r["hbm_gib"] for r in of], "o-", label=topology)
        left.axhline(of[0]["hbm_there_gib"], color=line.get_color(), linestyle=":")
        fitting = [r for r in of if r["fits"]]
        right.plot([r["batch_size"] for r in fitting], [r["pairs_per_s"] for r in fitting], "o-", label=topology)
    left.set(xlabel="pairs per chip", ylabel="HBM per chip, GiB (dotted: there)", title=title)
    right.set(xlabel="global batch", ylabel="pairs per second, estimated")
    if any(row["fits"] for row in rows):  # nothing has no logarithm
        right.set(xscale="log", yscale="log")
    right.legend()
    write_atomic(out / "plan.png", lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
