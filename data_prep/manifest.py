"""What a manifest row says of a labelled video: yields by stage, what was lost and why, and how the pairs look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np

from data_prep.fitting import PairLabels

FOCAL = 1.2  # longer sides: COLMAP's guess where nothing states a focal length
NUM_SHOWN = 3  # pairs of each of the best, the median and the worst that the report shows
EDGES = {  # of the histograms; the last bin is open
    "interval_s": (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128),
    "overlap": (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "rotation_deg": (0, 1, 2, 5, 10, 15, 20, 30, 45, 60, 90),
    "parallax_deg": (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32),
    "matches": (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}


@dataclass
class Summary:
    """What became of every start frame; [S] arrays by step for the kept labels.

    Attributes:
      counts, chained: by step, kept correspondences of each pair, and how many of them are propagated.
      kinds: by step, what binds each kept pair: "F" epipolar lines, "H" a homography (the camera only turns, or sees
        one plane), "" no pair.
      best: step of the farthest kept pair that moves, 0 for none.
      still: a pair is kept, but nothing moves in it.
      unplaced: COLMAP gives the frame no pose, where it is the source of the labels.
    """

    counts: dict[int, np.ndarray] = field(default_factory=dict)
    chained: dict[int, np.ndarray] = field(default_factory=dict)
    kinds: dict[int, np.ndarray] = field(default_factory=dict)
    best: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    still: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    unplaced: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


@dataclass(frozen=True)
class PairStatistics:
    """How a saved pair looks, from its correspondences alone.

    Attributes:
      interval_s: time between the frames. matches: number of correspondences.
      overlap: share of the frame within the convex hull of the correspondences, the smaller of both frames.
      rotation_deg: turn of the camera, of the fitted geometry with a focal length of `FOCAL` longer sides.
      parallax_deg: median angle between the rays to a point that is left when the turn is taken out.
    """

    interval_s: float
    overlap: float
    rotation_deg: float
    parallax_deg: float
    matches: int


def pair_statistics(xy: np.ndarray, F: np.ndarray | None, size: tuple[int, int], interval_s: float) -> PairStatistics:
    """Describe correspondences [M, 4] px between frames of one size; F is None where a homography binds them."""
    shares = [cv2.contourArea(cv2.convexHull(side.astype(np.float32))) for side in (xy[:, :2], xy[:, 2:])]
    centred = (xy.reshape(-1, 2, 2) - np.divide(np.subtract(size, 1), 2)) / (FOCAL * max(size))
    rays = np.concatenate([centred, np.ones((*centred.shape[:2], 1))], 2)
    rays /= np.linalg.norm(rays, axis=2, keepdims=True)
    R = _turn_between(rays[:, 0], rays[:, 1]) if F is None else _turn_of(F, centred, size)
    cosine = np.clip((rays[:, 0] @ R.T * rays[:, 1]).sum(1), -1, 1)
    return PairStatistics(
        interval_s=float(interval_s),
        overlap=float(min(shares) / (size[0] * size[1])),
        rotation_deg=float(np.degrees(np.arccos(np.clip((np.trace(R) - 1) / 2, -1, 1)))),
        parallax_deg=float(np.degrees(np.median(np.arccos(cosine)))),
        matches=len(xy),
    )


def _turn_of(F: np.ndarray, centred: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Rotation [3, 3] of a fundamental matrix, of the four possible ones that with most points before both cameras."""
    focal = FOCAL * max(size)
    K = np.array([[focal, 0, (size[0] - 1) / 2], [0, focal, (size[1] - 1) / 2], [0, 0, 1]])
    return cv2.recoverPose(K.T @ F @ K, centred[:, 0].copy(), centred[:, 1].copy(), np.eye(3))[1]


def _turn_between(rays0: np.ndarray, rays1: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] that takes unit rays [M, 3] nearest to others (Kabsch)."""
    U, _, Vt = np.linalg.svd(rays1.T @ rays0)
    return (U * [1, 1, np.sign(np.linalg.det(U @ Vt))]) @ Vt


def histograms(pairs: Sequence[PairStatistics]) -> dict[str, dict]:
    """Count the pairs by each of `EDGES`: name -> lower edges and counts of the bins."""
    counts = {}
    for name, edges in EDGES.items():
        bins = np.searchsorted(edges, [getattr(pair, name) for pair in pairs], side="right") - 1
        counts[name] = {"edges": list(edges), "counts": np.bincount(bins, minlength=len(edges)).tolist()}
    return counts


def shown_pairs(pairs: Sequence[PairStatistics]) -> dict[str, list[dict]]:
    """Which saved pairs have most, middling and fewest correspondences, with what is known of them."""
    order = np.argsort([-pair.matches for pair in pairs], kind="stable").tolist()
    middle = max(len(order) // 2 - NUM_SHOWN // 2, 0)
    chosen = {
        "best": order[:NUM_SHOWN],
        "median": order[middle : middle + NUM_SHOWN],
        "worst": order[::-1][:NUM_SHOWN],
    }
    return {name: [{"index": k, **asdict(pairs[k])} for k in numbers] for name, numbers in chosen.items()}


def stages(rows: dict[int, list[PairLabels]], summary: Summary, labellers: Sequence[str]) -> list[dict]:
    """Counts by interval: of the direct labels, by labeller, and of the kept ones."""
    out = []
    for step, pairs in rows.items():
        counts = np.array([len(row.xy) for row in pairs], int)
        by_labeller = {
            name: {
                "matches": int(sum(row.matches[k] for row in pairs)),
                "pairs_fitted": int(sum(row.confirmed[k] > 0 for row in pairs)),
                "confirmed": int(sum(row.confirmed[k] for row in pairs)),
                "labels": int(sum((row.teacher == k).sum() for row in pairs)),
            }
            for k, name in enumerate(labellers)
        }
        out.append({"stage": "direct", "step": step, "pairs": len(counts), "fitted": int((counts > 0).sum()),
                    "homographies": sum(row.kind == "H" for row in pairs), **_spread(counts[counts > 0]),
                    "labellers": by_labeller})  # fmt: skip
    for step, counts in summary.counts.items():
        out.append({"stage": "kept", "step": step, "pairs": max(len(counts) - step, 0),
                    "kept": int((counts > 0).sum()), "homographies": int((summary.kinds[step] == "H").sum()),
                    "propagated_share": float(summary.chained[step].sum() / counts.sum()),
                    **_spread(counts[counts > 0])})  # fmt: skip
    return out


def _spread(counts: np.ndarray) -> dict:
    if not len(counts):
        return {"correspondences": 0}
    low, median, high = np.percentile(counts, [5, 50, 95]).round().astype(int).tolist()
    return {"correspondences": int(counts.sum()), "p5": low, "median": median, "p95": high}


def reasons(rows: dict[int, list[PairLabels]], summary: Summary, min_matches: int) -> list[str]:
    """Why no pair starts at a sampled frame, "" where one does."""
    nearest = rows[min(rows)]
    out = []
    for start, best in enumerate(summary.best):
        if best:
            out.append("")
        elif start >= len(nearest):
            out.append("the video ends")
        elif summary.still[start]:
            out.append("the camera stands still")
        elif nearest[start].reason:
            out.append(nearest[start].reason)
        elif summary.unplaced[start]:
            out.append("the reconstruction does not place this frame")
        else:
            found = f"{len(nearest[start].xy)} correspondences to the next sampled frame"
            out.append(f"{found}, {min_matches} are not enough")
    return out


def stretches(times_s: list[float], why: list[str]) -> list[dict]:
    """Runs of sampled frames lost for the same kind of reason (numbers aside)."""
    runs: list[dict] = []
    for time_s, reason in zip(times_s, why):
        kind = "".join(c for c in reason if not c.isdigit())
        if runs and runs[-1]["kind"] == kind:
            runs[-1] |= {"to_s": time_s, "frames": runs[-1]["frames"] + 1}
        else:
            runs.append({"kind": kind, "from_s": time_s, "to_s": time_s, "frames": 1, "reason": reason})
    return [{k: v for k, v in run.items() if k != "kind"} for run in runs if run["reason"]]


def read_manifest(path: Path) -> dict | None:
    """The manifest row of a video, None where there is none or an unreadable one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
