"""How right are the labels? The share of correspondences close to the true point, against a rendered world."""

from __future__ import annotations

import numpy as np

from data_prep.label import VideoLabels
from data_prep.propagate import Level
from data_prep.truth import Truth, correspondence_error

WITHIN_PX = (1.0, 2.0, 3.0)


def label_accuracy(labels: VideoLabels, truth: Truth, levels: dict[str, list[Level]] | None = None) -> list[dict]:
    """Compare every correspondence on static surfaces with the truth, by kind of label and interval.

    Args:
      labels: of the world's video.
      truth: of the same world.
      levels: name -> levels to judge; by default the direct labels and the kept ones, the latter split into
        direct and propagated.

    Returns:
      Rows of dict(labels, frames_apart, pairs, correspondences, judged, within=[share within 1, 2, 3 px]);
      `judged` counts those that start on a static surface whose true position lies in the other frame.
    """
    levels = levels or {"direct": list(labels.direct.values()), "kept": labels.levels}
    rows = []
    for name, members in levels.items():
        for level in members:
            errors, hops, num_pairs = level_errors(level, labels.frames, truth)
            parts = {name: np.ones(len(errors), bool)}
            if name == "kept" and (hops > 1).any():
                parts["kept: propagated"] = hops > 1
            for part, chosen in parts.items():
                judged = errors[chosen & np.isfinite(errors)]
                rows.append(
                    {
                        "labels": part,
                        "frames_apart": level.step * (labels.frames[1] - labels.frames[0]),
                        "pairs": num_pairs,
                        "correspondences": int(chosen.sum()),
                        "judged": len(judged),
                        "within": [float((judged <= px).mean()) if len(judged) else None for px in WITHIN_PX],
                    }
                )
    return rows


def level_errors(level: Level, frames: list[int], truth: Truth) -> tuple[np.ndarray, np.ndarray, int]:
    """Distance from the true point of all labels of an interval: errors [K] px (nan: no truth), hops [K], pairs."""
    errors, hops = [np.zeros(0)], [np.zeros(0, int)]
    starts = np.flatnonzero(level.counts).tolist()
    for start in starts:
        pair = level.pair(start)
        ends = frames[start], frames[start + level.step]
        error, valid = correspondence_error(truth, *ends, pair["xy"][:, :2], pair["xy"][:, 2:])
        errors.append(np.where(valid, error, np.nan))
        hops.append(pair["hops"])
    return np.concatenate(errors), np.concatenate(hops), len(starts)
