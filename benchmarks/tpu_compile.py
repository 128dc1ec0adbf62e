"""Every full-size network compiled for a real TPU, without having one: HBM, FLOPs, bytes and time per chip.

Inference of one pair at the size of the published protocol on one chip, and the training step of each family that has
an objective on a slice of chips; bfloat16 with float32 islands. The figures are the compiler's: `memory_analysis()` and
`cost_analysis()` of the program that a chip would run. FLOPs and bytes of a loop are those of one turn of it.

    pip install -e ".[tpu-compile]"
    python benchmarks/tpu_compile.py [NAME ...] [--topology v5e:2x2] [--train-topology v5e:4x4] [--dtype bfloat16]
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the TPU compiler is asked by name; no TPU is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor its metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling claims no chip

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from gim_jax import export
from gim_jax.cli.models import format_table
from gim_jax.config import load_config, replace
from gim_jax.models import get_model, in_dtype
from gim_jax.train import sharding
from gim_jax.train.kinds import Settings
from gim_jax.train.objectives import OBJECTIVES
from gim_jax.train.state import abstract_state, make_init, make_optimizer
from gim_jax.train.step import make_train_step

GIB = 2**30
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
TRAINING = {  # model: its experiment; one pair per chip
    "superglue_outdoor": "configs/superglue.py:gim",
    "gim_lightglue": "configs/lightglue.py:gim",
    "loftr_outdoor": "configs/loftr.py:outdoor",
    "gim_loftr": "configs/loftr.py:gim",
    "gim_dkm": "configs/dkm.py:gim",
}


def inference(name: str, dtype: str, topology: str):
    """Trace one pair of a model for one chip of a topology."""
    chip = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])
    info = get_model(name)
    config = in_dtype(info.config, dtype)
    inputs = export.abstract_inputs(info, info.template(config), INFERENCE[name])
    run = jax.jit(export.program(info, config), in_shardings=chip, out_shardings=chip)
    return run.trace(*inputs)


def training(name: str, dtype: str, topology: str):
    """Trace the training step of an experiment for a slice, one pair per chip."""
    chips = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(chips).reshape(-1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    config = load_config(TRAINING[name])
    info = get_model(config.model.name)
    fields = {key: value for key, value in config.model.to_dict().items() if key != "name"}
    module = info.network(in_dtype(replace(info.config, fields, "config.model"), dtype))
    tx, schedule = make_optimizer(config.optim, config.num_steps, len(chips))
    init = make_init(module, config.data.channels, tx, config.optim.ema_decay > 0)
    state = abstract_state(init, mesh, config.mesh.fsdp_min_size)
    args = config.seed, config.optim.ema_decay, mesh, state
    settings = replace(Settings(), config.objective.to_dict(), "config.objective")
    objective = functools.partial(OBJECTIVES[info.family], settings=settings)
    step = make_train_step(objective, module, tx, schedule, *args)
    (width, height), pairs, points = config.data.size, len(chips), config.data.max_matches
    shapes = {
        **{key: ((pairs, height, width, config.data.channels), np.uint8) for key in ("image0", "image1")},
        **{key: ((pairs, height // 8, width // 8), bool) for key in ("mask0", "mask1")},
        **{key: ((pairs, points, 2), np.float32) for key in ("kpts0", "kpts1")},
        "match_mask": ((pairs, points), bool),
    }
    split = NamedSharding(mesh, sharding.BATCH)
    batch = {key: jax.ShapeDtypeStruct(*value, sharding=split) for key, value in shapes.items()}
    return step.trace(state, batch)


COLUMNS = {  # heading: figure of `measure` and its form
    "HBM GiB": ("hbm_gib", ".2f"),
    "arguments": ("arguments_gib", ".2f"),
    "temporaries": ("temporaries_gib", ".2f"),
    "output": ("output_gib", ".4f"),
    "TFLOP": ("tflop", ".2f"),
    "GB moved": ("gbyte", ".0f"),
    "optimal ms": ("optimal_ms", ".1f"),
    "compiled in s": ("compile_s", ".0f"),
}


def measure(traced) -> dict[str, float | None]:
    """Compile and read the compiler's figures, per chip."""
    start = time.monotonic()
    compiled = traced.lower().compile()
    seconds = time.monotonic() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated arguments become outputs
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output + memory.generated_code_size_in_bytes
    optimal = cost["optimal_seconds"] * 1e3
    return {
        "hbm_gib": total / GIB,
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "output_gib": output / GIB,
        "tflop": cost["flops"] / 1e12,
        "gbyte": cost["bytes accessed"] / 1e9,
        "optimal_ms": optimal if optimal > 0 else None,  # the compiler counts -1 s where it has no estimate
        "compile_s": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(INFERENCE)}; default: all")
    parser.add_argument(
        "--topology", default="v5e:2x2", help="whose one chip runs the inference (default: %(default)s)"
    )
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
    jax.config.update("jax_exec_time_optimization_effort", args.effort)
    try:
        topologies.get_topology_desc(args.topology, "tpu")
    except RuntimeError as error:
        print(f'skipped, no TPU compiler: {error}; pip install -e ".[tpu-compile]"')
        return 0
    jobs = [
        (kind, name, args.topology if kind == "inference" else args.train_topology)
        for kind, table in (("inference", INFERENCE), ("training", TRAINING))
        for name in table
        if name in (args.names or table) and args.only in (None, kind)
    ]
    results = []
    table = [("step", "network", "for", *COLUMNS)]
    for kind, name, topology in jobs:
        row = {"kind": kind, "name": name, "topology": topology, "dtype": args.dtype}
        row |= measure({"inference": inference, "training": training}[kind](name, args.dtype, topology))
        results.append(row)
        figures = ("-" if row[key] is None else format(row[key], form) for key, form in COLUMNS.values())
        table.append((kind, name, topology, *figures))
        print("  ".join(f"{key} {text}" for key, text in zip(table[0], table[-1])), flush=True)
    print(f"\n{args.dtype}, jax {jax.__version__}, compiler's effort {args.effort:g}; per chip\n{format_table(table)}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
