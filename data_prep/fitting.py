"""What robust fitting confirms of the matches of a pair of frames; thresholds follow the size of the frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial import cKDTree

from data_prep import appearance
from gim_jax import robust
from gim_jax.types import Fit


@dataclass(frozen=True)
class PairLabels:
    """The direct labels of a pair of frames, or why there are none.

    Attributes:
      xy: [M, 4] float32 px, x0 y0 x1 y1; conf: [M] float32; teacher: [M] int32 index of the labeller.
      kind: "F" epipolar lines, "H" a homography, "" no labels.
      reason: why there are no labels, "" otherwise.
      matches, confirmed: [L] int32, what each labeller found and what robust fitting left of it.
    """

    xy: np.ndarray
    conf: np.ndarray
    teacher: np.ndarray
    kind: str
    reason: str
    matches: np.ndarray
    confirmed: np.ndarray

    @classmethod
    def none(cls, reason: str, num_labellers: int) -> PairLabels:
        zeros = np.zeros(num_labellers, np.int32)
        return cls(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), "", reason, zeros, zeros
        )


def pixel_scale(size: tuple[int, int], config) -> float:
    """How many pixels of a frame of `size` one pixel of `config.threshold_size` is, at least one.

    So an enlarged video is labelled like the original; below that size the noise is the detector's, not the video's.
    """
    width, height = config.threshold_size
    return max(1.0, float(np.sqrt(size[0] * size[1] / (width * height))))


def min_matches_for(size: tuple[int, int], config) -> int:
    """The paper's 1024 correspondences at full HD, scaled with the image area unless told otherwise."""
    if not config.scale_min_matches:
        return config.min_matches
    width, height = config.min_matches_size
    return round(config.min_matches * size[0] * size[1] / (width * height))


def fit_motion(xy: np.ndarray, size: tuple[int, int], config, threshold_px: float = 0.0) -> tuple[str, Fit]:
    """`robust.fit_motion` of correspondences [M, 4] px between two frames of one size; 0: `config.threshold_px`."""
    return robust.fit_motion(
        xy[:, :2], xy[:, 2:], size, (threshold_px or config.threshold_px) * pixel_scale(size, config),
        confidence=config.confidence, max_iters=config.max_iters,
    )  # fmt: skip


def confirm(
    names: Sequence[str],
    found: Sequence,
    masks: tuple[np.ndarray | None, np.ndarray | None],
    grays: tuple[np.ndarray, np.ndarray],
    size: tuple[int, int],
    config,
) -> PairLabels:
    """Fit each labeller's matches on their own and unite what is confirmed: none can veto another.

    What fits a motion has to come from the pictures as well, see `data_prep.appearance`.

    Args:
      names, found: of the labellers; each found has xy [M, 4] px, conf [M] and reason.
      masks: [h, w] bool of the two frames at any scale, True where labels may lie; None for everywhere.
      grays: the two frames, of `appearance.reduced_gray`.
      size: (width, height) of the frames.
    """
    parts, kinds, reasons, matches = [], [], [], []
    for index, one in enumerate(found):
        keep = one_to_one(one.xy, one.conf)
        keep = keep[inside(masks[0], one.xy[keep, :2], size) & inside(masks[1], one.xy[keep, 2:], size)]
        xy, conf = one.xy[keep], one.conf[keep]
        matches.append(len(xy))
        if one.reason:
            reasons.append(one.reason)
            continue
        kind, fit = fit_motion(xy, size, config)
        if not kind:
            reasons.append(fit.reason)
            continue
        share, judged = appearance.agreement(*grays, xy[fit.inliers], size)
        if judged < appearance.MIN_JUDGED or share < config.min_agreement:
            why = f"{100 * share:.0f} % of {judged} look most alike where they are"
            reasons.append(f"{fit.num_inliers} matches fit a motion that the pictures do not show: {why}")
            continue
        kinds.append(kind)
        parts.append((xy[fit.inliers], conf[fit.inliers], np.full(fit.num_inliers, index, np.int32)))
    if not parts:
        text = reasons[0] if len(names) == 1 else "; ".join(f"{n}: {r}" for n, r in zip(names, reasons))
        return replace(PairLabels.none(text, len(names)), matches=np.array(matches, np.int32))
    xy, conf, teacher = (np.concatenate(part) for part in zip(*parts))
    confirmed = np.bincount(teacher, minlength=len(names)).astype(np.int32)
    keep = thin(xy, conf, teacher, config.thin_px * pixel_scale(size, config)) if len(parts) > 1 else slice(None)
    kind = "F" if "F" in kinds else "H"
    return PairLabels(xy[keep], conf[keep], teacher[keep], kind, "", np.array(matches, np.int32), confirmed)


def inside(mask: np.ndarray | None, kpts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[M] bool: is the nearest entry of a mask of any scale True at points [M, 2] px of a frame of `size`?"""
    if mask is None:
        return np.ones(len(kpts), bool)
    scale = np.divide(mask.shape[::-1], size)
    x, y = np.clip(np.floor((kpts + 0.5) * scale), 0, np.array(mask.shape[::-1]) - 1).astype(int).T
    return mask[y, x]


def one_to_one(xy: np.ndarray, conf: np.ndarray) -> np.ndarray:
    """Rows to keep so that no position occurs twice in either frame (SIFT repeats one per orientation)."""
    order = np.argsort(-conf, kind="stable")
    for side in (xy[:, :2], xy[:, 2:]):
        first = np.unique(side[order], axis=0, return_index=True)[1]
        order = order[np.sort(first)]
    return np.sort(order)


def thin(xy: np.ndarray, conf: np.ndarray, teacher: np.ndarray, radius_px: float) -> np.ndarray:
    """Rows to keep so that no two labellers' labels lie closer than a radius in either frame.

    In order of falling confidence (then of row) a label stays unless one that stays is near it.
    """
    near = [cKDTree(side).query_pairs(radius_px, output_type="ndarray") for side in (xy[:, :2], xy[:, 2:])]
    pairs = np.unique(np.concatenate(near), axis=0)
    pairs = pairs[teacher[pairs[:, 0]] != teacher[pairs[:, 1]]]
    rank = np.empty(len(xy), int)
    rank[np.argsort(-conf, kind="stable")] = np.arange(len(xy))
    swap = rank[pairs[:, 0]] > rank[pairs[:, 1]]
    pairs[swap] = pairs[swap][:, ::-1]  # the better one first
    keep, undecided = np.ones(len(xy), bool), pairs
    while len(undecided):  # a label that no undecided better one is near is decided
        first = ~np.isin(undecided[:, 0], undecided[:, 1])
        keep[undecided[first, 1]] = False
        gone = np.isin(undecided, undecided[first, 1]).any(1)
        undecided = undecided[~(first | gone)]
    return np.flatnonzero(keep)
