"""Homographies against the truth: `gim_jax` matches with `fit("H")`, and COLMAP's SIFT with its LO-RANSAC beside them.

    python benchmarks/homography.py FOLDER ... [--model NAME --weights FILE] [--threshold PX]

A folder has `pairs_with_H.txt`, `name0 name1 H(9)` a line, image 0 -> image 1, pixel centres at whole numbers. The
error of a pair is the mean distance of the four corners of image 0, mapped by both homographies; where the plane fills
a part of the image alone, `points/NAME.txt` has points on it (`x0 y0 x1 y1` a line), and theirs is taken. A pair
without a trusted homography counts as infinitely wrong.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from gim_jax import api, geometry
from gim_jax.eval.metrics import homography_corner_error
from gim_jax.image import encode_jpeg, read_image
from gim_jax.tasks import sfm

LIMITS_PX = (3, 5, 10)


def read_pairs(folder: Path) -> list[tuple[Path, Path, np.ndarray, np.ndarray | None]]:
    """Read (path0, path1, H [3, 3], points [N, 4] or None) of every pair."""
    pairs = []
    for line in (folder / "pairs_with_H.txt").read_text().splitlines():
        name0, name1, *values = line.split()
        stem = Path(name0).stem.removesuffix("A")
        points = folder / "points" / f"{stem}.txt"
        known = np.loadtxt(points) if points.is_file() else None
        pairs.append((folder / name0, folder / name1, np.array(values, float).reshape(3, 3), known))
    return pairs


def error_px(H: np.ndarray | None, truth: np.ndarray, size: tuple[int, int], known: np.ndarray | None) -> float:
    if H is None or known is None:
        return homography_corner_error(H, truth, size)
    return float(np.linalg.norm(geometry.warp_homography(known[:, :2], H) - known[:, 2:], axis=1).mean())


def colmap_H(images: list[np.ndarray], threshold_px: float) -> np.ndarray | None:
    """Fit with COLMAP's own features, matches and estimator."""
    pycolmap = sfm.quiet_pycolmap()
    with tempfile.TemporaryDirectory() as name:
        for side, rgb in enumerate(images):
            (Path(name) / f"{side}.jpg").write_bytes(encode_jpeg(rgb, 100))
        extraction, matching = pycolmap.FeatureExtractionOptions(), pycolmap.FeatureMatchingOptions()
        extraction.use_gpu = matching.use_gpu = False
        path = f"{name}/a.db"
        pycolmap.extract_features(path, name, extraction_options=extraction)
        pycolmap.match_exhaustive(path, matching_options=matching)
        with pycolmap.Database.open(path) as database:
            ids = {image.name: image.image_id for image in database.read_all_images()}
            ids = [ids[f"{side}.jpg"] for side in (0, 1)]
            if not database.exists_matches(*ids):
                return None
            index = np.asarray(database.read_matches(*ids))
            kpts = [geometry.corner_to_pixel(np.asarray(database.read_keypoints(i))[:, :2]) for i in ids]
        options = pycolmap.RANSACOptions()
        options.max_error = threshold_px
        kpts = [points[index[:, side]].astype(np.float64) for side, points in enumerate(kpts)]
        answer = pycolmap.estimate_homography_matrix(*kpts, options)
        return None if answer is None else np.asarray(answer["H"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="rootsift")
    parser.add_argument("--weights")
    parser.add_argument("--threshold", type=float, default=2.0, metavar="PX", help="inlier distance of both")
    args = parser.parse_args()
    matcher = api.load_matcher(args.model, args.weights)

    def ours(images):
        return matcher(*images).fit("H", threshold_px=args.threshold).model

    methods = {f"gim-jax, {args.model}": ours, "COLMAP's SIFT": lambda images: colmap_H(images, args.threshold)}
    limits = " | ".join(f"within {limit} px" for limit in LIMITS_PX)
    print(f"| set | error at | method | pairs | median error, px | {limits} | no homography | s |")
    print("|---|---|---|" + "---|" * (len(LIMITS_PX) + 4))
    for folder in args.folders:
        pairs = read_pairs(folder)
        for label, method in methods.items():
            started, errors = time.monotonic(), []
            for path0, path1, truth, known in pairs:
                images = [read_image(path) for path in (path0, path1)]
                errors.append(error_px(method(images), truth, images[0].shape[1::-1], known))
            found, seconds = np.array(errors), time.monotonic() - started
            within = " | ".join(f"{(found < limit).sum()}" for limit in LIMITS_PX)
            where = "corners" if pairs[0][3] is None else "points"
            print(
                f"| {folder.name} | {where} | {label} | {len(pairs)} | {np.median(found):.2f} | {within} "
                f"| {np.isinf(found).sum()} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
