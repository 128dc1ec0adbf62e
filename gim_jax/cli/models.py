"""`gim-jax models`: the table of matchers."""

from __future__ import annotations

import argparse

from gim_jax.models import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print one line per model."""
    if args.json:
        import dataclasses
        import json

        print(json.dumps([dataclasses.asdict(info) for info in MODELS.values()], indent=1))
        return 0
    rows = [("name", "parameters", "licence of the weights", "weights", "published by the authors")]
    for info in MODELS.values():
        size = f"{info.num_params / 1e6:.2f} M" if info.num_params else "-"
        published = ", ".join(f"{figure} {value:g}" for figure, value in info.published.items()) or "-"
        rows.append((info.name, size, info.licence, info.weights_source, published))
    print(format_table(rows))
    return 0


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Align columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
