"""From matches of pairs to keypoints of images that several pairs share.

A matcher without keypoints gives other points in every pair. Within an image, points closer than a radius become one
keypoint, and that keypoint is one of them, not a grid cell: nothing is rounded. What a match moves by is at most the
radius, and nothing where a matcher repeats its points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial import cKDTree


def anchor_points(
    points: np.ndarray, scores: np.ndarray, radius_px: float, max_keypoints: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose keypoints among points so that none is closer than a radius to another.

    Those that most points support are chosen first: the sum of the scores within the radius.

    Args:
      points: [N, 2] float32 px.
      scores: [N], positive.
      radius_px: 0 merges equal points alone.
      max_keypoints: the best supported are kept.

    Returns:
      keypoints [K, 2] float32, best first, and the keypoint of every point [N], -1 where none is within the radius.
    """
    if len(points) == 0:
        return np.zeros((0, 2), np.float32), np.zeros(0, int)
    places, group = np.unique(np.asarray(points, np.float32), axis=0, return_inverse=True)
    group = group.ravel()
    votes = np.bincount(group, scores, len(places))
    tree = cKDTree(places)
    near = tree.query_pairs(radius_px, output_type="ndarray") if radius_px > 0 else np.zeros((0, 2), int)
    support = votes + np.bincount(near[:, 0], votes[near[:, 1]], len(places))
    support += np.bincount(near[:, 1], votes[near[:, 0]], len(places))
    rank = np.empty(len(places), int)
    order = np.lexsort((places[:, 1], places[:, 0], -votes, -support))
    rank[order] = np.arange(len(places))
    swap = rank[near[:, 0]] > rank[near[:, 1]]
    near[swap] = near[swap][:, ::-1]  # the better one first
    open_, chosen = np.ones(len(places), bool), np.zeros(len(places), bool)
    while open_.any():  # those that beat all their open neighbours, together; then what they do not cover
        fights = near[open_[near].all(1)]
        beaten = np.zeros(len(places), bool)
        beaten[fights[:, 1]] = True
        winners = open_ & ~beaten
        chosen |= winners
        open_ &= ~winners
        open_[near[winners[near[:, 0]], 1]] = False
        open_[near[winners[near[:, 1]], 0]] = False
    picked = order[chosen[order]][:max_keypoints]
    distance, nearest = cKDTree(places[picked]).query(places)
    nearest = np.where(distance <= radius_px, nearest, -1)
    return places[picked], nearest[group]


def one_to_one(matches: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the best match of every keypoint on both sides: matches [M, 2] int and scores [M], best first."""
    order = np.argsort(-scores, kind="stable")
    matches, scores = matches[order], scores[order]
    for side in (0, 1):
        first = np.sort(np.unique(matches[:, side], return_index=True)[1])
        matches, scores = matches[first], scores[first]
    return matches, scores


def build_tracks(
    pairs: Sequence[tuple[str, str]],
    found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    radius_px: float = 0.0,
    max_keypoints: int | None = None,
    fixed: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Turn matches of pairs into keypoints of images and indices into them.

    Args:
      pairs: names of the images.
      found: kpts0 [M, 2], kpts1 [M, 2] px and conf [M] of every pair.
      radius_px, max_keypoints: see `anchor_points`.
      fixed: keypoints [K, 2] that some images have already; their matches go to the nearest within the radius.

    Returns:
      keypoints of every image, name -> [K, 2] float32 px; per pair the matches [M, 2] int, one to one, and their
      confidence [M], best first.
    """
    fixed = fixed or {}
    spots: dict[str, list[tuple[int, int]]] = {}
    for index, names in enumerate(pairs):
        for side, name in enumerate(names):
            spots.setdefault(name, []).append((index, side))
    keypoints: dict[str, np.ndarray] = {}
    assigned: dict[tuple[int, int], np.ndarray] = {}
    for name, places in spots.items():
        points = np.concatenate([found[index][side] for index, side in places]).reshape(-1, 2)
        scores = np.concatenate([found[index][2] for index, _ in places])
        if name in fixed:
            keypoints[name] = np.asarray(fixed[name], np.float32)
            nearest = np.full(len(points), -1)
            if len(points) and len(keypoints[name]):
                distance, nearest = cKDTree(keypoints[name]).query(points)
                nearest = np.where(distance <= max(radius_px, 1e-3), nearest, -1)
        else:
            keypoints[name], nearest = anchor_points(points, np.maximum(scores, 1e-3), radius_px, max_keypoints)
        ends = np.cumsum([len(found[index][2]) for index, _ in places])
        for place, part in zip(places, np.split(nearest, ends[:-1])):
            assigned[place] = part
    matches = []
    for index, (_, _, conf) in enumerate(found):
        ids = np.stack([assigned[index, 0], assigned[index, 1]], 1).reshape(-1, 2).astype(int)
        both = (ids >= 0).all(1)
        matches.append(one_to_one(ids[both], np.asarray(conf)[both]))
    return keypoints, matches
