"""Camera poses against the truth: `gim-jax reconstruct` and COLMAP's own SIFT, and images held back and localized.

    python benchmarks/reconstruction.py FOLDER ... [--model NAME --weights FILE] [--long-side PX] [--max-keypoints N]
        [--known-intrinsics]

A folder has `images/` and `pairs_with_gt.txt` (38 tokens a pair; see `gim_jax.eval.pairs`), whose chain of relative
poses gives the true cameras. Without --known-intrinsics both find the focal length and take the principal point to be
in the middle; with it both have the true intrinsics. For localization every fourth image is left out of the model.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from gim_jax import api, geometry
from gim_jax.eval.pairs import read_pairs
from gim_jax.image import encode_jpeg, image_size, read_image, resize, target_size
from gim_jax.tasks import image_pairs, localize, sfm, tracks


def chain(pairs) -> dict[str, np.ndarray]:
    """World-to-camera poses by image name, the first image is the world."""
    poses = {pairs[0].path0.name: np.eye(4)}
    while True:
        before = len(poses)
        for pair in pairs:
            a, b = pair.path0.name, pair.path1.name
            if a in poses and b not in poses:
                poses[b] = pair.T_0to1 @ poses[a]
            elif b in poses and a not in poses:
                poses[a] = np.linalg.inv(pair.T_0to1) @ poses[b]
        if len(poses) == before:
            return poses


def row(name: str, label: str, model, truth: dict, num: int, seconds: float) -> None:
    if model is None:
        print(f"| {name} | {label} | 0 of {num} | | | | | | {seconds:.0f} |", flush=True)
        return
    errors = np.array(list(sfm.pose_errors(sfm.poses_of(model), truth).values()))
    print(
        f"| {name} | {label} | {model.num_reg_images()} of {num} | {model.num_points3D()} "
        f"| {model.compute_mean_track_length():.2f} | {model.compute_mean_reprojection_error():.3f} "
        f"| {spread(errors[:, 0], 3)} | {spread(100 * errors[:, 1], 2)} | {seconds:.0f} |",
        flush=True,
    )


def spread(values: np.ndarray, digits: int) -> str:
    return f"{np.median(values):.{digits}f}, {values.max():.{digits}f}"


def build(folder: Path, names: list[str], matcher, work: Path, params=()):
    pairs = image_pairs.exhaustive(names)
    found = sfm.match_all(folder, pairs, matcher, work.parent / "cache")
    keypoints, matched = tracks.build_tracks(pairs, found, sfm.merge_radius(matcher))
    work.mkdir()
    sfm.write_database(
        work / "a.db",
        folder,
        keypoints,
        pairs,
        [index for index, _ in matched],
        cameras="single",
        camera_model="PINHOLE" if params else "",
        camera_params=params,
    )
    return (sfm.map_images(work / "a.db", folder, work / "sparse", bool(params)) or [None])[0]


def colmap_sift(folder: Path, work: Path, max_keypoints: int, params=()):
    import pycolmap

    work.mkdir()
    options = pycolmap.FeatureExtractionOptions()
    options.sift.max_num_features = max_keypoints
    options.use_gpu = False
    reader = pycolmap.ImageReaderOptions()
    if params:
        reader.camera_model, reader.camera_params = "PINHOLE", ",".join(map(str, params))
    pycolmap.extract_features(
        str(work / "a.db"), str(folder), camera_mode=pycolmap.CameraMode.SINGLE, reader_options=reader,
        extraction_options=options,
    )  # fmt: skip
    matching = pycolmap.FeatureMatchingOptions()
    matching.use_gpu = False
    pycolmap.match_exhaustive(str(work / "a.db"), matching_options=matching)
    return (sfm.map_images(work / "a.db", folder, work / "sparse", bool(params)) or [None])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="rootsift")
    parser.add_argument("--weights")
    parser.add_argument("--long-side", type=int, default=768)
    parser.add_argument("--max-keypoints", type=int, default=4096)
    parser.add_argument("--known-intrinsics", action="store_true")
    args = parser.parse_args()
    settings = {"max_keypoints": args.max_keypoints} if args.model == "rootsift" else {}
    matcher, label = api.load_matcher(args.model, args.weights, **settings), f"gim-jax, {args.model}"
    sfm.quiet_pycolmap()
    how = "true intrinsics" if args.known_intrinsics else "one focal length, found"
    print(f"Long side {args.long_side} px, RootSIFT and SIFT {args.max_keypoints} keypoints, {how}.\n")
    print("| set | method | images | points | images a point | reprojection, px ", end="")
    print("| rotation error, deg: median, max | centre, cm: median, max | s |")
    print("|---|---|" + 7 * "---|")
    located = []
    for source in args.folders:
        pairs = read_pairs(source / "pairs_with_gt.txt")
        truth, params = chain(pairs), ()
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            (work / "images").mkdir()
            for image in truth:
                rgb = read_image(source / "images" / image)
                rgb = resize(rgb, target_size(rgb.shape[1::-1], long_side=args.long_side, upscale=False), 3)  # area
                (work / "images" / image).write_bytes(encode_jpeg(rgb, 95))
            names = sorted(truth)
            if args.known_intrinsics:
                scale = args.long_side / max(image_size(pairs[0].path0))
                K = geometry.scale_K(pairs[0].K0, min(scale, 1.0))
                params = (K[0, 0], K[1, 1], K[0, 2] + 0.5, K[1, 2] + 0.5)
            started = time.monotonic()
            ours = build(work / "images", names, matcher, work / "ours", params)
            row(source.name, label, ours, truth, len(names), time.monotonic() - started)
            started = time.monotonic()
            theirs = colmap_sift(work / "images", work / "colmap", args.max_keypoints, params)
            row(source.name, "COLMAP's SIFT", theirs, truth, len(names), time.monotonic() - started)
            held = names[2::4]
            kept = [name for name in names if name not in held]
            model = build(work / "images", kept, matcher, work / "part", params)
            if model is None:
                located.append(f"| {source.name} | no model of the rest | | | |")
                continue
            camera = next(iter(model.cameras.values()))
            camera.has_prior_focal_length = True
            results = localize.localize(
                model, work / "images", work / "images", dict.fromkeys(held, camera),
                dict.fromkeys(held, kept), matcher, cache=work / "cache",
            )  # fmt: skip
            own = {n: r.cam_from_world for n, r in results.items() if r.cam_from_world is not None and not r.fallback}
            if not own:
                located.append(f"| {source.name} | 0 of {len(held)} | | | |")
                continue
            errors = sfm.pose_errors(sfm.poses_of(model) | own, truth)
            found = np.array([errors[name] for name in own])
            located.append(
                f"| {source.name} | {len(own)} of {len(held)} | {spread(found[:, 0], 3)} "
                f"| {spread(100 * found[:, 1], 2)} | {min(r.num_inliers for r in results.values())} |"
            )
    print("\nEvery fourth image held back and localized in the model of the rest:\n")
    print("| set | localized | rotation error, deg: median, max | centre, cm: median, max | inliers, fewest |")
    print("|---|---|---|---|---|")
    print("\n".join(located))


if __name__ == "__main__":
    main()
