"""Propagation of correspondences to distant frames (GIM section 3.1), a whole video a round.

Round r links the labels of (X, X+d) and (X+d, X+2d) for every sampled frame X at once, merges the direct labels of
(X, X+2d) where there are any, and keeps the pairs with more than a minimum of correspondences; then d doubles. Linked
labels give way to direct ones that lie within the link radius in either frame, so a merged pair stays one-to-one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from data_prep import local_motion
from gim_jax.ops import linking

MIN_PAIRS_PER_DEVICE = 64  # fewer are not worth the communication
MAX_STEP = 128  # sampled frames; where 85 s apart still share this much, farther pairs would be no harder


FIELDS = ("xy", "conf", "hops", "teacher", "mask")


@dataclass(frozen=True)
class Level:
    """The labels of all pairs (X, X + step) of a video, padded.

    Attributes:
      step: distance of the two frames in sampled frames.
      xy: [S, N, 4] float32 px, x0 y0 x1 y1; row s belongs to the pair that starts at sampled frame s.
      conf: [S, N] float32; of a linked label the lowest in its chain.
      hops: [S, N] int32; how many direct labels are chained, 1 for a direct one.
      teacher: [S, N] int32; who made it; of a linked label the first in its chain.
      mask: [S, N] bool.
    """

    step: int
    xy: np.ndarray
    conf: np.ndarray
    hops: np.ndarray
    teacher: np.ndarray
    mask: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """[S] int: correspondences of each pair."""
        return np.asarray(self.mask).sum(1)

    def pair(self, start: int) -> dict[str, np.ndarray]:
        """The labels of one pair without padding."""
        valid = self.mask[start]
        return {name: getattr(self, name)[start][valid] for name in ("xy", "conf", "hops", "teacher")}


def make_level(step: int, rows: list[dict[str, np.ndarray] | None], num_starts: int) -> Level:
    """Pad the direct labels of one interval: `rows[s]` has xy [M, 4], conf [M] and teacher [M], or is None."""
    counts = np.zeros(num_starts, int)
    counts[: len(rows)] = [0 if row is None else len(row["xy"]) for row in rows]
    mask = np.arange(_capacity(counts.max(initial=0), 1024))[None] < counts[:, None]
    present = [row for row in rows if row is not None]

    def padded(name, shape, dtype):
        out = np.zeros((*mask.shape, *shape), dtype)
        if present:
            out[mask] = np.concatenate([row[name] for row in present])
        return out

    return Level(
        step, padded("xy", (4,), np.float32), padded("conf", (), np.float32), mask.astype(np.int32),
        padded("teacher", (), np.int32), mask,
    )  # fmt: skip


def propagate(
    base: dict[int, Level], min_matches: int, radius_px: float = linking.RADIUS_PX, rule: str = "paper"
) -> list[Level]:
    """Propagate as far as pairs with more than `min_matches` correspondences reach.

    Args:
      base: direct labels by step (1, 2, 4 sampled frames); all with the same number of starts. Pairs more than
        `MAX_STEP` apart are not made, so a start depends on the `MAX_STEP` after it alone.
      min_matches: pairs with as many or fewer are dropped, at every interval.
      radius_px: two labels are linked where they are closer than this in the middle frame.
      rule: "paper"; "released" for the code's "same rounded pixel in the middle frame", to compare with; or "local",
        the paper's and what `local_motion.carry` adds.

    Returns:
      The kept labels, one level per interval from the shortest on.
    """
    num_starts = len(base[min(base)].mask)
    rows = _capacity(num_starts, 128)
    base = {step: _pad(direct, rows, direct.mask.shape[1]) for step, direct in base.items()}
    level = _drop_small(base[min(base)], min_matches)
    longest = max((step for step, direct in base.items() if direct.mask.any()), default=0)
    kept = [level]
    while 2 * level.step < min(num_starts, MAX_STEP + 1) and (level.mask.any() or longest > level.step):
        level = _round(level, base.get(2 * level.step), radius_px, rule)
        level = _drop_small(level, min_matches)
        kept.append(level)
    return [first_starts(level, num_starts) for level in kept if level.mask.any()]


def first_starts(level: Level, num: int) -> Level:
    """The pairs of the first `num` start frames alone."""
    return replace(level, **{name: getattr(level, name)[:num] for name in FIELDS})


def join_windows(windows: list[tuple[int, list[Level]]]) -> list[Level]:
    """Join consecutive parts of a video, (number of starts, levels); a part may lack the level of some interval."""
    joined = []
    for step in sorted({level.step for _, levels in windows for level in levels}):
        parts = [(num, next((level for level in levels if level.step == step), None)) for num, levels in windows]
        width = max(level.mask.shape[1] for _, level in parts if level is not None)
        like = first_starts(next(level for _, level in parts if level is not None), 0)
        padded = [_pad(like if level is None else level, num, width) for num, level in parts]
        joined.append(
            Level(step, **{name: np.concatenate([getattr(part, name) for part in padded]) for name in FIELDS})
        )
    return joined


def _drop_small(level: Level, min_matches: int) -> Level:
    return replace(level, mask=level.mask & (level.counts > min_matches)[:, None])


def _round(level: Level, direct: Level | None, radius_px: float, rule: str) -> Level:
    width = max(level.mask.shape[1], direct.mask.shape[1] if direct else 0)
    linked = _linked_jit(_shard(level, width), jnp.int32(level.step), radius_px=radius_px, rule=rule)
    if rule == "local":
        linked = {name: np.array(value) for name, value in linked.items()}
        linked = _shard(Level(2 * level.step, **_carried(level, linked, radius_px)), width)
    if direct is None:
        fields = _compacted_jit(linked)
    else:
        fields = _merged_jit(linked, _shard(direct, width), radius_px=radius_px)
    fields = {name: np.asarray(value) for name, value in fields.items()}
    width = _capacity(fields["mask"].sum(1).max(initial=0), 1024)
    return Level(2 * level.step, **{name: value[:, :width] for name, value in fields.items()})


@partial(jax.jit, static_argnames=("radius_px", "rule"))
def _linked_jit(level: dict, step, radius_px: float, rule: str) -> dict:
    """The labels of (X, X + 2 step) that those of (X, X + step) and (X + step, X + 2 step) make."""
    starts = jnp.arange(len(level["mask"]))
    later = {name: jnp.roll(value, -step, axis=0) for name, value in level.items()}
    later["mask"] &= (starts + step < len(starts))[:, None]
    middle = level["xy"][..., 2:], later["xy"][..., :2]
    if rule == "released":  # gim/datasets/walk/propagate.py: points of one pixel are then at distance zero
        middle = jnp.round(middle[0]), jnp.round(middle[1])
    row = linking.link(middle[0], level["mask"], middle[1], later["mask"], radius_px)
    partner = {
        name: jnp.take_along_axis(value, jnp.maximum(row, 0).reshape(row.shape + (1,) * (value.ndim - 2)), axis=1)
        for name, value in later.items()
    }
    return {
        "xy": jnp.concatenate([level["xy"][..., :2], partner["xy"][..., 2:]], -1),
        "conf": jnp.minimum(level["conf"], partner["conf"]),
        "hops": level["hops"] + partner["hops"],
        "teacher": level["teacher"],
        "mask": row >= 0,
    }


def _carried(level: Level, linked: dict[str, np.ndarray], radius_px: float) -> dict[str, np.ndarray]:
    """Add to links where labels meet those that the local motion of the labels around makes."""
    for start in np.flatnonzero(level.mask.any(1)).tolist():
        if start + level.step >= len(level.mask) or not level.mask[start + level.step].any():
            continue
        alone = np.flatnonzero(level.mask[start] & ~linked["mask"][start, : level.mask.shape[1]])
        later = level.pair(start + level.step)
        places, good = local_motion.carry(level.xy[start, alone], later["xy"], radius_px)
        alone, places = alone[good], places[good]
        linked["xy"][start, alone] = np.concatenate([level.xy[start, alone, :2], places], 1)
        linked["conf"][start, alone] = level.conf[start, alone]
        linked["hops"][start, alone] = level.hops[start, alone] + int(later["hops"].max())
        linked["mask"][start, alone] = True
    return linked


@partial(jax.jit, static_argnames="radius_px")
def _merged_jit(linked: dict, direct: dict, radius_px: float) -> dict:
    """Direct labels, then the linked ones that lie beside none of them in either frame; valid rows first."""
    linked = dict(linked)
    for side in (slice(0, 2), slice(2, 4)):
        taken = linking.is_near(
            linked["xy"][..., side], linked["mask"], direct["xy"][..., side], direct["mask"], radius_px
        )
        linked["mask"] &= ~taken
    merged = {name: jnp.concatenate([direct[name], linked[name]], 1) for name in linked}
    return _compacted_jit(merged)


@jax.jit
def _compacted_jit(fields: dict) -> dict:
    """Move the valid labels of every pair to the front, in their order."""
    mask = fields["mask"]
    place = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, mask.shape[1])  # those without a place are dropped
    order = jax.vmap(lambda place: jnp.zeros_like(place).at[place].set(jnp.arange(len(place)), mode="drop"))(place)
    fields = {
        name: jnp.take_along_axis(value, order.reshape(order.shape + (1,) * (value.ndim - 2)), axis=1)
        for name, value in fields.items()
    }
    return fields | {"mask": jnp.arange(mask.shape[1]) < mask.sum(1, keepdims=True)}


def _pad(level: Level, rows: int, width: int) -> Level:
    more = (rows - len(level.mask), width - level.mask.shape[1])
    if more == (0, 0):
        return level

    def padded(value: np.ndarray) -> np.ndarray:
        return np.pad(value, [(0, more[0]), (0, more[1])] + [(0, 0)] * (value.ndim - 2))

    return replace(level, **{name: padded(getattr(level, name)) for name in FIELDS})


def _shard(level: Level, width: int) -> dict:
    """Split the pairs, of `width` labels each, over the local devices, where each gets a fair number."""
    devices, rows = jax.local_devices(), len(level.mask)
    num = next(n for n in range(len(devices), 0, -1) if n == 1 or (rows % n == 0 and rows // n >= MIN_PAIRS_PER_DEVICE))
    mesh = jax.make_mesh((num,), ("data",), devices=devices[:num], axis_types=(AxisType.Auto,))
    level = _pad(level, rows, width)
    return jax.device_put({name: getattr(level, name) for name in FIELDS}, NamedSharding(mesh, PartitionSpec("data")))


def _capacity(num: int, step: int) -> int:
    """Round up so that few shapes are ever compiled: powers of two to `step`, multiples of it beyond."""
    num = max(int(num), 16)
    return 1 << (num - 1).bit_length() if num <= step else -(-num // step) * step
