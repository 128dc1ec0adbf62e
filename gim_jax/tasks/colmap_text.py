"""COLMAP's text files of keypoints and matches, for its `feature_importer` and `matches_importer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import geometry
from gim_jax.data.tfrecord import write_atomic
from gim_jax.tasks.image_pairs import Pairs


def write_features(folder: str | Path, keypoints: Mapping[str, np.ndarray]) -> None:
    """Write `<name>.txt` for every image, name -> [K, 2] px: `K 128`, then `x y scale orientation d1 ... d128` a line.

    COLMAP's pixel centres lie at 0.5. Our matches need no descriptors, but the format does: they are 128 zeros.
    """
    rest = " 1 0" + 128 * " 0" + "\n"
    for name, points in keypoints.items():
        path = Path(folder) / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{x:.9g} {y:.9g}{rest}" for x, y in geometry.pixel_to_corner(points).tolist()]
        text = f"{len(lines)} 128\n{''.join(lines)}"
        write_atomic(path, lambda file, text=text: file.write(text.encode()))


def write_matches(path: str | Path, pairs: Pairs, matches: Sequence[np.ndarray]) -> None:
    """Write matches [M, 2] int of pairs: `name0 name1`, then a line `index0 index1` for each, then a blank line."""
    blocks = [
        f"{name0} {name1}\n" + "".join(f"{a} {b}\n" for a, b in index.tolist())
        for (name0, name1), index in zip(pairs, matches)
        if len(index)
    ]
    text = "\n".join(blocks) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def verified_matches(database: Any, pairs: Pairs) -> list[np.ndarray]:
    """Return the matches [M, 2] int of pairs that agree with the two-view geometries of an open pycolmap database."""
    ids = {image.name: image.image_id for image in database.read_all_images()}
    found = []
    for name0, name1 in pairs:
        exists = database.exists_two_view_geometry(ids[name0], ids[name1])
        inliers = database.read_two_view_geometry(ids[name0], ids[name1]).inlier_matches if exists else []
        found.append(np.asarray(inliers, np.int64).reshape(-1, 2))
    return found
