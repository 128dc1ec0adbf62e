"""Propagation of correspondences to distant frames (GIM section 3.1), a whole video a round.

Round r links the labels of (X, X+d) and (X+d, X+2d) for every sampled frame X, merges the direct labels of (X, X+2d)
where there are any, and keeps the pairs with more than a minimum of correspondences; then d doubles. Linked labels give
way to direct ones that lie within the link radius in either frame, so a merged pair stays one-to-one.

It is done in NumPy, in threads: sorting and gathering a few thousand points is no work for an accelerator, and on the
CPU a compiled XLA program takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from data_prep import linking, local_motion

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
    """Pad the labels of one interval.

    Args:
      rows: `rows[s]` has xy [M, 4], conf [M], teacher [M], and hops [M] unless the labels are direct; or it is None.
    """
    counts = np.zeros(num_starts, int)
    counts[: len(rows)] = [0 if row is None else len(row["xy"]) for row in rows]
    mask = np.arange(max(counts.max(initial=0), 1))[None] < counts[:, None]
    present = [row for row in rows if row is not None]

    def padded(name, shape, dtype):
        out = np.zeros((*mask.shape, *shape), dtype)
        if present:
            out[mask] = np.concatenate([row.get(name, np.ones(len(row["xy"]))) for row in present])
        return out

    return Level(
        step, padded("xy", (4,), np.float32), padded("conf", (), np.float32), padded("hops", (), np.int32),
        padded("teacher", (), np.int32), mask,
    )  # fmt: skip


def propagate(
    base: dict[int, Level],
    min_matches: int,
    radius_px: float = linking.RADIUS_PX,
    rule: str = "paper",
    run: Callable[[Callable, Iterable[int]], Iterable] = map,
) -> list[Level]:
    """Propagate as far as pairs with more than `min_matches` correspondences reach.

    Args:
      base: direct labels by step (1, 2, 4 sampled frames); all with the same number of starts. Pairs more than
        `MAX_STEP` apart are not made, so a start depends on the `MAX_STEP` after it alone.
      min_matches: pairs with as many or fewer are dropped, at every interval.
      radius_px: two labels are linked where they are closer than this in the middle frame.
      rule: "paper"; "released" for the code's "same rounded pixel in the middle frame", to compare with; or "local",
        the paper's and what `local_motion.carry` adds.
      run: maps a function over the starts; `Executor.map` for threads.

    Returns:
      The kept labels, one level per interval from the shortest on.
    """
    level = _drop_small(base[min(base)], min_matches)
    longest = max((step for step, direct in base.items() if direct.mask.any()), default=0)
    kept = [level]
    while 2 * level.step < min(len(level.mask), MAX_STEP + 1) and (level.mask.any() or longest > level.step):
        level = _round(level, base.get(2 * level.step), radius_px, rule, run)
        level = _drop_small(level, min_matches)
        kept.append(level)
    return [level for level in kept if level.mask.any()]


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
        joined.append(Level(step, **{name: np.concatenate([part[name] for part in padded]) for name in FIELDS}))
    return joined


def _drop_small(level: Level, min_matches: int) -> Level:
    return replace(level, mask=level.mask & (level.counts > min_matches)[:, None])


def _round(level: Level, direct: Level | None, radius_px: float, rule: str, run) -> Level:
    counts, step = level.counts, level.step

    def pair(start: int) -> dict[str, np.ndarray] | None:
        given = direct.pair(start) if direct is not None and direct.mask[start].any() else None
        if start + step >= len(counts) or not (counts[start] and counts[start + step]):
            return given
        linked = link_pair(level.pair(start), level.pair(start + step), radius_px, rule)
        return linked if given is None else merge_pair(given, linked, radius_px)

    return make_level(2 * step, list(run(pair, range(len(counts)))), len(counts))


def link_pair(first: dict, second: dict, radius_px: float, rule: str) -> dict[str, np.ndarray]:
    """The labels of (X, X + 2d) that those of (X, X + d) and (X + d, X + 2d) make; as `Level.pair`."""
    middle = first["xy"][:, 2:], second["xy"][:, :2]
    if rule == "released":  # gim/datasets/walk/propagate.py: points of one pixel are then at distance zero
        middle = np.round(middle[0]), np.round(middle[1])
    row = linking.link(*middle, radius_px)
    one, two = np.flatnonzero(row >= 0), row[row >= 0]
    linked = {
        "xy": np.concatenate([first["xy"][one, :2], second["xy"][two, 2:]], 1),
        "conf": np.minimum(first["conf"][one], second["conf"][two]),
        "hops": first["hops"][one] + second["hops"][two],
        "teacher": first["teacher"][one],
    }
    if rule != "local":
        return linked
    alone = np.flatnonzero(row < 0)
    places, good = local_motion.carry(first["xy"][alone], second["xy"], radius_px)
    alone, places = alone[good], places[good].astype(np.float32)
    carried = {
        "xy": np.concatenate([first["xy"][alone, :2], places], 1),
        "conf": first["conf"][alone],
        "hops": first["hops"][alone] + second["hops"].max(),
        "teacher": first["teacher"][alone],
    }
    return {name: np.concatenate([linked[name], carried[name]]) for name in linked}


def merge_pair(direct: dict, linked: dict, radius_px: float) -> dict[str, np.ndarray]:
    """Direct labels, then the linked ones that lie beside none of them in either frame."""
    taken = [linking.is_near(linked["xy"][:, s], direct["xy"][:, s], radius_px) for s in (slice(0, 2), slice(2, 4))]
    free = ~(taken[0] | taken[1])
    return {name: np.concatenate([direct[name], linked[name][free]]) for name in direct}


def _pad(level: Level, rows: int, width: int) -> dict[str, np.ndarray]:
    fields = {name: getattr(level, name) for name in FIELDS}
    more = (rows - len(level.mask), width - level.mask.shape[1])
    return {
        name: np.pad(value, [(0, more[0]), (0, more[1])] + [(0, 0)] * (value.ndim - 2))
        for name, value in fields.items()
    }
