"""`gim-jax report`: one HTML page about a labelling or a quickstart folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="output of `gim-jax label` or `gim-jax quickstart`")


def run(args: argparse.Namespace) -> None:
    from gim_jax.report import write_report

    print(write_report(Path(args.folder)).resolve())
