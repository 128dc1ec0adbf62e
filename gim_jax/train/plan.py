"""What a training step needs of chips that are not there: it is compiled for them, by their own compiler.

`jax.experimental.topologies` describes a TPU slice, `libtpu` compiles for it on any host (`compiled.measure`).
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from gim_jax.train import sharding
from gim_jax.train.compiled import CHIPS, GIB, count_flops, measure
from gim_jax.train.loop import build
from gim_jax.train.step import build_step


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
    _, state, step = build_step(config, module, objective, mesh)
    return step.trace(state, abstract_batch(config.data, batch_size, mesh))


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
      effort: see `compiled.measure`.

    Returns: what `measure` does, and of the whole slice topology, chips, pairs_per_chip, batch_size; where the step
      could be compiled pairs_per_s, and days and chip_hours for the schedule.
    """
    mesh = slice_of(topology, config.mesh.fsdp)
    batch_size = mesh.size * pairs_per_chip
    row = {"topology": topology, "chips": mesh.size, "pairs_per_chip": pairs_per_chip, "batch_size": batch_size}
    row |= measure(trace_step(config, mesh, batch_size), mesh.size, topology, effort)
    if "step_ms" in row:
        row["pairs_per_s"] = batch_size / row["step_ms"] * 1e3
        row["days"] = config.num_steps * config.batch_size / row["pairs_per_s"] / 86400
        row["chip_hours"] = 24 * row["days"] * mesh.size
    return row


def lower_for_gpu(config: Any, batch_size: int) -> dict[str, Any]:
    """Check that the step lowers for CUDA, on one device, and estimate its memory.

    Returns: state_gib and batch_gib, exact; saved_gib, the arrays that the forward pass keeps for the backward pass if
      nothing is fused, an upper bound; tflop.
    """
    from jax import export

    module, objective, _ = build(config)
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    _, state, step = build_step(config, module, objective, mesh)
    batch = abstract_batch(config.data, batch_size, mesh)
    export.export(step, platforms=["cuda"])(state, batch)

    def forward(state, batch):
        loss = lambda p: objective(module, state.replace(params=p).variables(), batch, jax.random.key(0), True)[0]  # noqa: E731
        return jax.vjp(loss, state.params)

    _, saved = jax.eval_shape(forward, state, batch)
    size = lambda tree: sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)) / GIB  # noqa: E731
    flops = count_flops(step.trace(state, batch).jaxpr.jaxpr) / 1e12
    return {"state_gib": size(state), "batch_gib": size(batch), "saved_gib": size(saved), "tflop": flops}
