"""What a training step needs of chips that are not there: it is compiled for them, by their own compiler.

`jax.experimental.topologies` describes a TPU slice, `libtpu` compiles for it on any host. Memory and the compiler's own
time are what it says of the program that every chip would run; FLOPs are counted in the traced step, loops times their
length, because the compiler counts one turn of a loop.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from gim_jax.train import sharding
from gim_jax.train.loop import build
from gim_jax.train.state import abstract_state, make_init, make_optimizer
from gim_jax.train.step import make_train_step

GIB = 2**30
CHIPS = {  # generation: HBM GiB, bfloat16 TFLOP/s, HBM GB/s, per chip (cloud.google.com/tpu/docs/system-architecture)
    "v4": (32, 275, 1228),
    "v5e": (16, 197, 819),
    "v5p": (95, 459, 2765),
    "v6e": (32, 918, 1640),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of")


def abstract_batch(data: Any, batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Describe a batch of `config.data`, see `gim_jax.data.augment.make_sample`."""
    (width, height), points = data.size, data.max_matches
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"match_mask": ((points,), bool), "conf": ((points,), np.float32)}
    for i in "01":
        shapes |= {f"image{i}": ((height, width, data.channels), np.uint8), f"kpts{i}": ((points, 2), np.float32)}
        shapes[f"mask{i}"] = ((height // 8, width // 8), bool)
        if data.depth:
            shapes |= {f"depth{i}": ((height, width), np.float32), f"K{i}": ((3, 3), np.float32)}
    if data.depth:
        shapes |= {"Hq_aug": ((3, 3), np.float32), "T_0to1": ((4, 4), np.float32), "imsize1": ((2,), np.int32)}
        shapes |= {"posed": ((), bool), "depth_complete": ((), bool)}
    split = NamedSharding(mesh, sharding.BATCH)
    return {
        k: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split) for k, (shape, dtype) in shapes.items()
    }


def trace_step(config: Any, mesh: Mesh, batch_size: int) -> Any:
    """Trace the real training step of a configuration for a mesh: what `jax.jit(...).trace` gives."""
    module, objective, _ = build(config)
    tx, schedule = make_optimizer(config.optim, config.num_steps, batch_size)
    init = make_init(module, config.data.channels, tx, config.optim.ema_decay > 0)
    state = abstract_state(init, mesh, config.mesh.fsdp_min_size)
    args = tx, schedule, config.seed, config.optim.ema_decay, mesh, state, config.optim.accumulate
    return make_train_step(objective, module, *args).trace(state, abstract_batch(config.data, batch_size, mesh))


def slice_of(topology: str, fsdp: int) -> Mesh:
    """Make the mesh of a TPU slice such as "v5e:4x4" that need not exist.

    Raises: ValueError for an unknown one, or without the TPU compiler.
    """
    from jax.experimental import topologies

    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"--topology: found {topology!r}, expected {'|'.join(CHIPS)}:AxB[xC]")
    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise ValueError(
            f"--topology={topology}: {text}; the TPU compiler: pip install 'gim-jax[tpu-compile]'"
        ) from error
    if len(devices) % fsdp:
        raise ValueError(f"mesh.fsdp: found {fsdp}, expected a divisor of {len(devices)} chips")
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def plan(config: Any, topology: str, pairs_per_chip: int, effort: float = -1.0) -> dict[str, Any]:
    """Compile the step of a configuration for a slice and read what it needs.

    Args:
      config: of `configs/`; its schedule's pairs are trained at this batch.
      topology: see `slice_of`.
      pairs_per_chip: of a step, all parts of `optim.accumulate` together.
      effort: of the compiler, -1 to 1; 0 is what `jax.jit` does and takes several times as long.

    Returns: per chip hbm_gib (needed), hbm_there_gib, fits, arguments_gib, temporaries_gib, tflop, gbyte (the
      compiler's, of one turn of each loop), collective_gbyte and collectives {name: count}, compute_ms (FLOPs at the
      peak), memory_ms (bytes at the peak), compiler_ms (its estimate, None without), step_ms (the largest), bound; of
      the whole chips, batch_size, pairs_per_s, days and chip_hours for the schedule; compile_s. Where the compiler runs
      out of memory only what is known then.
    """
    mesh = slice_of(topology, config.mesh.fsdp)
    hbm_there, peak_tflops, peak_gbytes = CHIPS[topology.partition(":")[0]]
    batch_size = mesh.size * pairs_per_chip
    row = {"topology": topology, "chips": mesh.size, "pairs_per_chip": pairs_per_chip, "batch_size": batch_size}
    row |= {"hbm_there_gib": hbm_there, "fits": False}
    start = time.monotonic()
    traced = trace_step(config, mesh, batch_size)
    row["tflop"] = count_flops(traced.jaxpr.jaxpr) / mesh.size / 1e12
    row["compute_ms"] = row["tflop"] / peak_tflops * 1e3
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", effort)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = OUT_OF_MEMORY.search(str(error))
        if not used:
            raise
        row["hbm_gib"] = float(used[1]) * {"K": 2**-20, "M": 2**-10, "G": 1}[used[2]]
        return row | {"compile_s": time.monotonic() - start}
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state passed in becomes the state put out
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    needed = (arguments + temporaries + output + memory.generated_code_size_in_bytes) / GIB
    counts, moved = collectives(text)
    optimal = cost.get("optimal_seconds", -1) * 1e3
    row |= {
        "hbm_gib": needed,
        "fits": needed <= hbm_there,
        "arguments_gib": arguments / GIB,
        "temporaries_gib": temporaries / GIB,
        "gbyte": cost["bytes accessed"] / 1e9,
        "memory_ms": cost["bytes accessed"] / 1e6 / peak_gbytes,
        "compiler_ms": optimal if optimal > 0 else None,
        "collectives": counts,
        "collective_gbyte": moved / 1e9,
    }
    times = {"compute": row["compute_ms"], "memory": row["memory_ms"], "compiler": row["compiler_ms"] or 0.0}
    row["step_ms"], row["bound"] = max(times.values()), max(("compute", "memory"), key=times.__getitem__)
    row["pairs_per_s"] = batch_size / row["step_ms"] * 1e3
    row["days"] = config.num_steps * config.batch_size / row["pairs_per_s"] / 86400
    return row | {"chip_hours": 24 * row["days"] * mesh.size, "compile_s": time.monotonic() - start}


def count_flops(jaxpr: Any) -> int:
    """Count the multiplications and additions of all matrix products and convolutions of a traced program.

    A scan counts times its length, a branch as its most expensive case, a loop of unknown length once.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            )
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features_out = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features_out
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(count_flops(getattr(j, "jaxpr", j)) for j in _jaxprs(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]


def collectives(text: str) -> tuple[dict[str, int], int]:
    """Find the collectives of a compiled program: {name: how many}, and the bytes of their results on one chip."""
    counts: dict[str, int] = {}
    total = 0
    for shapes, name, start in re.findall(rf"= (\S.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", text):
        sizes = [
            BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        ]
        counts[name] = counts.get(name, 0) + 1
        total += sum(sizes) // (2 if start else 1)  # what is under way lists its argument, too
    return counts, total


def lower_for_gpu(config: Any, batch_size: int) -> dict[str, Any]:
    """Check that the step lowers for CUDA, on one device, and estimate its memory.

    Returns: state_gib and batch_gib, exact; saved_gib, the arrays that the forward pass keeps for the backward pass if
      nothing is fused, an upper bound; tflop.
    """
    from jax import export

    mesh = sharding.make_mesh(1, jax.devices()[:1])
    module, objective, _ = build(config)
    tx, schedule = make_optimizer(config.optim, config.num_steps, batch_size)
    init = make_init(module, config.data.channels, tx, config.optim.ema_decay > 0)
    state = abstract_state(init, mesh, config.mesh.fsdp_min_size)
    args = tx, schedule, config.seed, config.optim.ema_decay, mesh, state, config.optim.accumulate
    step, batch = make_train_step(objective, module, *args), abstract_batch(config.data, batch_size, mesh)
    wrapped: Any = step
    export.export(wrapped, platforms=["cuda"])(state, batch)
    _, saved = jax.eval_shape(
        lambda params: jax.vjp(
            lambda p: objective(module, state.replace(params=p).variables(), _zeros(batch), jax.random.key(0), True)[0],
            params,
        ),
        state.params,
    )
    size = lambda tree: sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)) / GIB  # noqa: E731
    flops = count_flops(wrapped.trace(state, batch).jaxpr.jaxpr) / 1e12
    return {"state_gib": size(state), "batch_gib": size(batch), "saved_gib": size(saved), "tflop": flops}


def _zeros(batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {name: jax.numpy.zeros(a.shape, a.dtype) for name, a in batch.items()}
