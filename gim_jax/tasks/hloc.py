"""hloc's files (github.com/cvg/Hierarchical-Localization): keypoints and matches as HDF5, pair lists as text.

Keypoints have pixel centres at integers, as here, and are float32: hloc's own extractor stores half precision, which
steps by 1 px above 1024. The extra `sfm` has h5py.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gim_jax.data.tfrecord import write_atomic
from gim_jax.tasks import load_extra
from gim_jax.tasks.image_pairs import Pairs

CONF = {  # of hloc.match_dense: images in colour and as they are, our matchers resize them
    "output": "matches-gim-jax",
    "model": {"name": "gim_jax"},
    "preprocessing": {"grayscale": False, "resize_max": None, "dfactor": 1},
    "max_error": 1,
    "cell_size": 1,
}


def register(package: str = "hloc") -> None:
    """Make `hloc_matcher` known to an installed hloc as its matcher `gim_jax`; ValueError where hloc is not there.

    Args:
      package: "hloc", which is installed from its repository (the package of that name on PyPI is something else), or
        "imcui.hloc", the copy in image-matching-webui.
    """
    name = f"{package}.matchers.gim_jax"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "hloc_matcher.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    try:
        importlib.import_module(f"{package}.matchers")
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except ImportError as error:
        raise ValueError(f"{package} is not installed ({error}): github.com/cvg/Hierarchical-Localization") from error
    sys.modules[name] = module


def pair_name(name0: str, name1: str) -> str:
    """Return hloc's group of a pair: `a/b.jpg`, `c/d.jpg` -> `a-b.jpg/c-d.jpg` (hloc utils/parsers.py)."""
    return f"{name0.replace('/', '-')}/{name1.replace('/', '-')}"


def write_features(
    path: str | Path,
    keypoints: Mapping[str, np.ndarray],
    sizes: Mapping[str, tuple[int, int]],
    uncertainty_px: float = 1.0,
) -> None:
    """Write keypoints, name -> [K, 2] px, and image sizes, name -> (width, height), as hloc's feature file."""
    h5py, buffer = load_extra("h5py", "sfm"), io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, points in keypoints.items():
            group = file.create_group(name)
            stored = group.create_dataset("keypoints", data=np.asarray(points, np.float32))
            stored.attrs["uncertainty"] = uncertainty_px
            group.create_dataset("scores", data=np.ones(len(points), np.float32))
            group.create_dataset("image_size", data=np.asarray(sizes[name], np.int64))
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def write_matches(
    path: str | Path,
    pairs: Pairs,
    matches: Sequence[tuple[np.ndarray, np.ndarray]],
    keypoints: Mapping[str, np.ndarray],
) -> None:
    """Write matches, [M, 2] int and confidence [M] per pair as of `tracks.build_tracks`, as hloc's match file."""
    h5py, buffer = load_extra("h5py", "sfm"), io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for (name0, name1), (index, conf) in zip(pairs, matches):
            matches0 = np.full(len(keypoints[name0]), -1, np.int32)
            scores0 = np.zeros(len(keypoints[name0]), np.float16)
            matches0[index[:, 0]], scores0[index[:, 0]] = index[:, 1], conf
            group = file.create_group(pair_name(name0, name1))
            group.create_dataset("matches0", data=matches0)
            group.create_dataset("matching_scores0", data=scores0)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def read_features(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read keypoints [K, 2] float32 of images from a feature file; ValueError names what is missing or malformed."""
    h5py = load_extra("h5py", "sfm")
    try:
        with h5py.File(path, "r") as file:
            out = {}
            for name in names:
                if f"{name}/keypoints" not in file:
                    raise ValueError(f"{path}: {name}: found no keypoints")
                points = np.asarray(file[f"{name}/keypoints"], np.float32)
                if points.ndim != 2 or points.shape[1] < 2 or not np.isfinite(points).all():
                    raise ValueError(f"{path}: {name}: found shape {points.shape}, expected finite [K, 2]")
                out[name] = points[:, :2]
            return out
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as HDF5: {error}") from error


def read_matches(path: str | Path, pairs: Pairs) -> list[np.ndarray]:
    """Read matches [M, 2] int64 of pairs from a match file, in either order of the names; ValueError as above."""
    h5py = load_extra("h5py", "sfm")
    try:
        with h5py.File(path, "r") as file:
            out = []
            for name0, name1 in pairs:
                group, order = pair_name(name0, name1), 1
                if f"{group}/matches0" not in file:
                    group, order = pair_name(name1, name0), -1
                if f"{group}/matches0" not in file:
                    raise ValueError(f"{path}: {name0} {name1}: found no matches of this pair")
                matches0 = np.asarray(file[f"{group}/matches0"])
                if matches0.ndim != 1 or matches0.dtype.kind not in "iu":
                    raise ValueError(f"{path}: {group}: found matches0 of {matches0.dtype}, expected integers [K]")
                first = np.flatnonzero(matches0 >= 0)
                out.append(np.stack([first, matches0[first]], 1)[:, ::order].astype(np.int64))
            return out
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as HDF5: {error}") from error


def write_pairs(path: str | Path, pairs: Pairs) -> None:
    """Write a pair list."""
    write_atomic(path, lambda file: file.write("".join(f"{a} {b}\n" for a, b in pairs).encode()))
