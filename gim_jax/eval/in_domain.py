"""MegaDepth-1500 and ScanNet-1500, from their published lists, with each family's protocol as a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import geometry
from gim_jax.data.scene_info import load
from gim_jax.eval.measure import Pair, Protocol
from gim_jax.eval.pairs import check_K, check_pose, read_pairs
from gim_jax.eval.run import Feed
from gim_jax.image import image_size

MEGADEPTH_FILES = tuple(  # LoFTR, assets/megadepth_test_1500_scene_info
    f"{scene}_{low}_{high}.npz"
    for scene, bins in (("0015", ((0.1, 0.3), (0.3, 0.5))), ("0022", ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7))))
    for low, high in bins
)
SCANNET_SIZE = (640, 480)  # of the images that intrinsics.npz belongs to
SCANNET_IMAGES = (  # where exports of ScanNet keep frame f of scene s
    "{scene}/color/{frame}.jpg",
    "scans_test/{scene}/color/{frame}.jpg",
    "{scene}/sens/frame-{frame:06d}.color.jpg",
    "scans_test/{scene}/sens/frame-{frame:06d}.color.jpg",
)
SUPERGLUE_LIST = "scannet_test_pairs_with_gt.txt"

# preset: (what is done to images, settings of networks that have them, how matches are measured). DKM resizes inside
# the network. "released" maps points as the published evaluations do, without the half pixel.
MEGADEPTH = {
    "dkm": (
        Feed(),
        {"size": (880, 660), "upsample_size": (1536, 1152)},
        Protocol(frame=(("long_side", 1200),), mean_focal=True, repeats=5, mapping="released"),
    ),
    "loftr": (Feed((("long_side", 840), ("multiple", 8))), {}, Protocol(mapping="released")),
    "superglue": (
        Feed((("long_side", 1600),)),
        {},
        Protocol(frame=(("long_side", 1600),), mapping="released"),
    ),
}
SCANNET = {
    "dkm": (
        Feed(),
        {"size": (640, 480), "upsample_size": None},
        Protocol(frame=(("short_side", 480),), mean_focal=True, repeats=5, offset_px=0.5, mapping="released"),
    ),
    "loftr": (
        Feed((("exact", SCANNET_SIZE),)),
        {},
        Protocol(frame=(("exact", SCANNET_SIZE),), mapping="released"),
    ),
    "superglue": (
        Feed((("exact", SCANNET_SIZE),)),
        {},
        Protocol(threshold_px=1.0, frame=(("exact", SCANNET_SIZE),), mapping="released"),
    ),
}
PRESET_OF = {"rootsift": "loftr", "loftr": "loftr", "superglue": "superglue", "lightglue": "superglue", "dkm": "dkm"}


def _find(folder: Path, name: str, places: tuple[str, ...]) -> Path:
    for place in places:
        if (folder / place / name).is_file():
            return folder / place / name
    raise ValueError(f"{folder}: found no {name}, expected it there or in {', '.join(p for p in places if p != '.')}")


def _inside(root: Path, name: str) -> Path:
    """Join a name from a file to its root; it may not leave it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"image: found {name!r}, expected a path below {root}")
    return root / name


def _checked(
    where: str,
    names: list[str],
    paths: list[Path],
    Ks: tuple[np.ndarray, np.ndarray],
    T_0to1: np.ndarray,
    sizes: dict[Path, tuple[int, int]],
) -> Pair:
    """Make a pair, its numbers and images checked; `where` begins the message."""
    try:
        for side, (path, K) in enumerate(zip(paths, Ks)):
            if path not in sizes:
                sizes[path] = image_size(path)
            if not np.isfinite(K).all():
                raise ValueError(f"K{side}: found {K.tolist()}, expected finite numbers")
            check_K(f"K{side}", K, sizes[path])
        if not np.isfinite(T_0to1).all():
            raise ValueError("T_0to1: found numbers that are not finite")
        check_pose(T_0to1)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Pair(names[0], names[1], paths[0], paths[1], 0, 0, None, Ks[0], Ks[1], T_0to1, 1)


def read_megadepth(root: str | Path) -> list[Pair]:
    """Read MegaDepth-1500: the five `<scene>_<overlaps>.npz` of LoFTR, below `root` or its folder
    `megadepth_test_1500_scene_info`, with images below `root` (`Undistorted_SfM/<scene>/images/...`).

    Raises:
      ValueError: naming file and pair: a missing file or field, an index out of range, a pair twice, see `pairs`.
    """
    root = Path(root)
    sizes: dict[Path, tuple[int, int]] = {}
    out: list[Pair] = []
    seen: dict[str, str] = {}
    for name in MEGADEPTH_FILES:
        path = _find(root, name, (".", "megadepth_test_1500_scene_info", "scene_info"))
        info = load(path)
        missing = [key for key in ("image_paths", "intrinsics", "poses", "pair_infos") if key not in info]
        if missing:
            raise ValueError(f"{path}: without {', '.join(missing)}")
        for index, entry in enumerate(info["pair_infos"]):
            where = f"{path}: pair {index}"
            try:
                (i, j), overlap = entry[0], float(entry[1])
                names = [str(info["image_paths"][k]) for k in (i, j)]
                K0, K1, T0, T1 = (
                    np.asarray(info[key][k], np.float64).reshape(n, n)
                    for key, n in (("intrinsics", 3), ("poses", 4))
                    for k in (i, j)
                )
                paths = [_inside(root, n) for n in names]
            except (TypeError, ValueError, IndexError, KeyError) as error:
                raise ValueError(f"{where}: {error}") from error
            identifier = "#".join([name[:4], *(Path(n).name for n in names)])
            if identifier in seen:
                raise ValueError(f"{where}: {identifier} stands in {seen[identifier]} too")
            seen[identifier] = where
            T_0to1 = geometry.relative_pose(T0, T1)
            pair = _checked(where, names, paths, (K0, K1), T_0to1, sizes)
            out.append(replace(pair, overlap=overlap, line=index + 1, set="MegaDepth-1500", identifier=identifier))
    return out


def read_scannet(root: str | Path) -> list[Pair]:
    """Read ScanNet-1500: LoFTR's `test.npz` and `intrinsics.npz` below `root` or its folder `scannet_test_1500`, or
    SuperGlue's `scannet_test_pairs_with_gt.txt`; images as `SCANNET_IMAGES` says.

    K is scaled from 640x480 to the stored images by plain factors, as the published evaluations scale it back.

    Raises:
      ValueError: naming file and pair: a missing file or image, a field of another shape, a pair twice, see `pairs`.
    """
    root = Path(root)
    if (root / SUPERGLUE_LIST).is_file():
        return [replace(pair, set="ScanNet-1500") for pair in read_pairs(root / SUPERGLUE_LIST)]
    places = (".", "scannet_test_1500", "assets/scannet_test_1500")
    path = _find(root, "test.npz", places)
    info, intrinsics = load(path), load(_find(root, "intrinsics.npz", places))
    names, poses = info.get("name"), info.get("rel_pose")
    if not isinstance(names, np.ndarray) or names.ndim != 2 or names.shape[1] != 4:
        raise ValueError(f"{path}: name: expected [pairs, 4] numbers (scene, scan, frame, frame)")
    if not isinstance(poses, np.ndarray) or poses.shape != (len(names), 12):
        raise ValueError(f"{path}: rel_pose: expected [{len(names)}, 12], the first three rows of T_0to1")
    sizes: dict[Path, tuple[int, int]] = {}
    seen: dict[str, int] = {}
    out = []
    for index, ((number, scan, *frames), pose) in enumerate(zip(names.tolist(), poses)):
        scene, where = f"scene{number:04d}_{scan:02d}", f"{path}: pair {index}"
        if scene not in intrinsics:
            raise ValueError(f"{where}: intrinsics.npz has no {scene}")
        paths = [_scannet_image(root, where, scene, frame) for frame in frames]
        Ks = []
        for image in paths:
            sizes[image] = sizes.get(image) or image_size(image)
            K = np.asarray(intrinsics[scene], np.float64)[:3, :3]
            Ks.append(geometry.scale_K(K, np.divide(sizes[image], SCANNET_SIZE), half_pixel=False))
        T_0to1 = np.vstack([pose.reshape(3, 4).astype(np.float64), [0, 0, 0, 1]])
        identifier = f"{scene}#{frames[0]}#{frames[1]}"
        if identifier in seen:
            raise ValueError(f"{where}: {identifier} is pair {seen[identifier]} too")
        seen[identifier] = index
        texts = [str(p.relative_to(root)) for p in paths]
        pair = _checked(where, texts, paths, (Ks[0], Ks[1]), T_0to1, sizes)
        out.append(replace(pair, line=index + 1, set="ScanNet-1500", identifier=identifier))
    return out


def _scannet_image(root: Path, where: str, scene: str, frame: int) -> Path:
    for place in SCANNET_IMAGES:
        if (root / place.format(scene=scene, frame=frame)).is_file():
            return root / place.format(scene=scene, frame=frame)
    expected = " or ".join(place.format(scene=scene, frame=frame) for place in SCANNET_IMAGES[:3:2])
    raise ValueError(f"{where}: found no image of frame {frame}, expected {root}/{expected}")


def preset(table: Mapping[str, Any], name: str | None, family: str) -> tuple[Feed, dict[str, Any], Protocol]:
    """Look up a preset by name, or that of a family."""
    name = name or PRESET_OF[family]
    if name not in table:
        raise ValueError(f"protocol: found {name!r}, expected one of {', '.join(table)}")
    return table[name]
