"""The one place where devices are arranged: a mesh of `data` and `fsdp` axes, and what lies where on it.

Batches are split over both axes. Parameters and optimiser state are replicated over `data` and, with more than one
device on `fsdp`, the large ones are split over it. The compiler puts in the communication (axis type Auto).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices as (data, fsdp).

    Args:
      fsdp: devices that share one copy of the large parameters.
      devices: all there are if None.

    Raises: ValueError if the number of devices is no multiple of it.
    """
    num_devices = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or num_devices % fsdp:
        raise ValueError(f"mesh.fsdp: found {fsdp}, expected a divisor of {num_devices} devices")
    return jax.make_mesh(
        (num_devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def state_shardings(mesh: Mesh, shapes: Any, min_size: int) -> Any:
    """Decide where every array of a state lies.

    Args:
      shapes: tree of anything with a shape.
      min_size: arrays of fewer elements are replicated.

    Returns: tree of NamedSharding: the largest dimension that `fsdp` divides is split over it.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf) -> NamedSharding:
        dims = [d for d, n in enumerate(leaf.shape) if n % parts == 0]
        if parts == 1 or np.prod(leaf.shape) < min_size or not dims:
            return NamedSharding(mesh, PartitionSpec())
        split = max(dims, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if d == split else None for d in range(split + 1))))

    return jax.tree.map(place, shapes)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put this host's part of a global batch onto its devices, split along the first dimension."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def to_host(tree: Any) -> Any:
    """Copy a tree of arrays to NumPy on every host, whatever hosts they are spread over."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
