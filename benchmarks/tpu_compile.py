"""Every full-size network compiled for a real TPU, without having one: HBM, FLOPs, bytes and time per chip.

Inference of one pair at the size of the published protocol on one chip, and the training step of each experiment on a
slice, one pair per chip (`gim-jax plan` varies that); bfloat16 with float32 islands. Memory, bytes and time are the
compiler's figures for the program that a chip would run (bytes of a loop: of one turn); FLOPs are counted in the traced
program, loops times their length.

    pip install -e ".[tpu-compile]"
    python benchmarks/tpu_compile.py [NAME ...] [--only inference] [--dtype bfloat16] [--json FILE]
"""

import argparse
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # the TPU compiler is asked by name; no TPU is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor its metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling claims no chip

import jax
from jax.sharding import SingleDeviceSharding

from gim_jax import export
from gim_jax.cli.models import format_table
from gim_jax.config import load_config
from gim_jax.data.json_file import write_json
from gim_jax.models import get_model, in_dtype
from gim_jax.train.compiled import measure
from gim_jax.train.plan import slice_of, trace_step

ZEB = (1600, 1216)  # 1600x1200 in its bucket: the largest of ZEB
INFERENCE = {  # model: (width, height) px of both images
    "superglue_indoor": (640, 512),
    "superglue_outdoor": ZEB,
    "superglue_open": ZEB,
    "lightglue_superpoint": (1024, 768),
    "lightglue_superpoint_adaptive": (1024, 768),
    "lightglue_disk": (1024, 768),
    "gim_lightglue": ZEB,
    "loftr_outdoor": (896, 896),  # 840x840 in its bucket
    "loftr_outdoor_ot": (896, 896),
    "gim_loftr": (896, 896),
    "dkm_outdoor": ZEB,
    "gim_dkm": ZEB,
}
TRAINING = {  # model: its experiment
    "superglue_outdoor": "configs/superglue.py:gim",
    "gim_lightglue": "configs/lightglue.py:gim",
    "loftr_outdoor": "configs/loftr.py:outdoor",
    "gim_loftr": "configs/loftr.py:gim",
    "dkm_outdoor": "configs/dkm.py:outdoor",
    "gim_dkm": "configs/dkm.py:gim",
}
COLUMNS = {  # heading: figure of `measure` and its form
    "HBM GiB": ("hbm_gib", ".2f"),
    "of": ("hbm_there_gib", "d"),
    "arguments": ("arguments_gib", ".2f"),
    "temporaries": ("temporaries_gib", ".2f"),
    "output": ("output_gib", ".4f"),
    "TFLOP": ("tflop", ".2f"),
    "GB": ("gbyte", ".0f"),
    "at peak ms": ("compute_ms", ".1f"),
    "compiler's optimal ms": ("compiler_ms", ".1f"),
    "compiled in s": ("compile_s", ".0f"),
}


def inference(name: str, dtype: str, topology: str):
    """Trace one pair of a model for one chip of a topology."""
    chip = SingleDeviceSharding(slice_of(topology, 1).devices.flat[0])
    info = get_model(name)
    config = in_dtype(info.config, dtype)
    inputs = export.abstract_inputs(info, info.template(config), INFERENCE[name])
    run = jax.jit(export.program(info, config), in_shardings=chip, out_shardings=chip)
    return run.trace(*inputs), 1


def training(name: str, dtype: str, topology: str):
    """Trace the training step of an experiment for a slice, the fewest pairs per chip that its settings allow."""
    config = load_config(TRAINING[name], [f"--config.model.dtype={dtype}"])
    mesh = slice_of(topology, config.mesh.fsdp)
    return trace_step(config, mesh, mesh.size * config.optim.accumulate), mesh.size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(INFERENCE)}; default: all")
    parser.add_argument("--topology", default="v5e:2x2", help="of the inference's chip (default: %(default)s)")
    parser.add_argument("--train-topology", default="v5e:4x4", help="of the training steps (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--effort",
        type=float,
        default=-1.0,
        help="of the compiler, -1 to 1; 0 is what jax.jit does: six times slower, temporaries smaller, the rest the "
        "same (default: %(default)s)",
    )
    parser.add_argument("--only", choices=("inference", "training"))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    unknown = set(args.names) - INFERENCE.keys()
    if unknown:
        parser.error(f"no such model here: {', '.join(sorted(unknown))}")
    try:
        for topology in (args.topology, args.train_topology):
            slice_of(topology, 1)
    except ValueError as error:
        print(f"skipped: {error}")
        return 0
    jobs = [
        (kind, name, topology)
        for kind, names, topology in (
            ("inference", INFERENCE, args.topology),
            ("training", TRAINING, args.train_topology),
        )
        for name in names
        if name in (args.names or names) and args.only in (None, kind)
    ]
    results, table = [], [("step", "network", "on", *COLUMNS)]
    for kind, name, topology in jobs:
        traced, chips = {"inference": inference, "training": training}[kind](name, args.dtype, topology)
        row = measure(traced, chips, topology, args.effort)
        results.append({"kind": kind, "name": name, "topology": topology, "dtype": args.dtype} | row)
        figures = ("-" if row.get(key) is None else format(row[key], form) for key, form in COLUMNS.values())
        table.append((kind, name, topology, *figures))
        print("  ".join(f"{key} {text}" for key, text in zip(table[0], table[-1])), flush=True)
        if args.json:
            write_json(args.json, results)
    print(f"\n{args.dtype}, jax {jax.__version__}, compiler's effort {args.effort:g}; per chip\n{format_table(table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
