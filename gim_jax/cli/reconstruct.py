"""`gim-jax reconstruct`: cameras and points from two images, from a folder of images, or from a video."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from gim_jax import api
from gim_jax.cli.match import _intrinsics, check_positive
from gim_jax.data.json_file import read_json, write_json
from gim_jax.data.tfrecord import write_atomic

EXHAUSTIVE = 30  # images; 435 pairs
MAX_KEYPOINTS = 8192  # of RootSIFT in each of many images, as in COLMAP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="two images; a folder of images; a video")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results, made if it is not there")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    for name in ("--K0", "--K1"):
        parser.add_argument(
            name,
            nargs=4,
            type=float,
            metavar=("FX", "FY", "CX", "CY"),
            help="intrinsics of two images; without them EXIF's focal length, else one found from the matches",
        )
    parser.add_argument("--threshold", type=float, default=1.0, metavar="PX", help="inlier distance, two images")
    many = parser.add_argument_group("many images (pip install 'gim-jax[sfm]')")
    add_matching_arguments(many)
    many.add_argument("--num-frames", type=int, default=200, metavar="N", help="of a video (default: %(default)s)")


def add_matching_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what `match_images` and COLMAP's database need; `gim-jax export` takes the same."""
    group.add_argument(
        "--pairs",
        default="auto",
        metavar="HOW",
        help="exhaustive, sequential, retrieval, or a file of names; auto: exhaustive up to 30 images, sequential and "
        "retrieval for a video, else retrieval",
    )
    group.add_argument(
        "--neighbours", type=int, metavar="N", help="images paired with each (sequential 5, retrieval 20)"
    )
    group.add_argument("--cameras", default="auto", choices=("auto", "single", "per-folder", "per-image"))
    group.add_argument("--camera-model", default="", metavar="NAME", help="COLMAP's camera model, such as PINHOLE")
    group.add_argument(
        "--camera-params", nargs="+", type=float, default=(), metavar="X", help="its parameters, kept fixed"
    )
    group.add_argument("--merge", type=float, metavar="PX", help="radius within which points are one keypoint")
    group.add_argument("--max-keypoints", type=int, metavar="N", help="per image, the best supported")


def run(args: argparse.Namespace) -> int:
    """Reconstruct and write the results. Exit code 1 where there is nothing to be trusted."""
    if len(args.sources) == 2:
        return _two_view(args)
    if len(args.sources) == 1:
        return _many(args)
    raise ValueError(f"found {len(args.sources)} sources, expected two images, one folder or one video")


def _many(args: argparse.Namespace) -> int:
    from gim_jax.tasks import image_pairs, load_extra, sfm

    load_extra("pycolmap", "sfm")
    source, out = Path(args.sources[0]), Path(args.out)
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder, expected a folder of images or a video")
    matcher = matcher_of_many(args)
    video = source.is_file()
    folder = _extract_frames(source, out, args.num_frames) if video else source
    names = image_pairs.list_images(folder)
    if len(names) < 3:
        raise ValueError(f"{folder}: found {len(names)} images, expected three or more")
    if webp := [name for name in names if name.lower().endswith(".webp")]:
        raise ValueError(f"{folder / webp[0]}: COLMAP reads no WebP, expected JPEG or PNG")
    pairs, keypoints, matched = match_images(args, folder, names, matcher, out, video)
    write_database(args, folder, pairs, keypoints, matched, out)
    print("mapping with COLMAP", flush=True)
    models = sfm.map_images(out / "database.db", folder, out / "sparse", bool(args.camera_params))
    record = sfm.statistics(models, len(names)) | {
        "num_pairs": len(pairs),
        "num_matches": sum(len(index) for index, _ in matched),
        "merge_px": merge_radius(args, matcher),
        "matcher": matcher.describe(),
    }
    write_json(out / "statistics.json", record)
    if not models:
        for name in ("points.ply", "poses.json", "picture.png"):  # of an earlier run
            (out / name).unlink(missing_ok=True)
        print(f"no reconstruction: {record['num_matches']} matches in {len(pairs)} pairs, no pair to start from")
        return 1
    sfm.export_model(models[0], out)
    best = record["models"][0]
    print(f"{best['num_images']} of {len(names)} images, {best['num_points']} points", end=", ")
    print(f"{best['mean_track_length']:.2f} images a point, reprojection error {best['mean_reprojection_px']:.2f} px")
    print(f"database.db, sparse/0, points.ply, poses.json, statistics.json and picture.png in {out}")
    return 0


def matcher_of_many(args: argparse.Namespace):
    """Load the matcher for many images; the settings of the cameras and the folder are checked first."""
    from gim_jax.tasks import sfm

    if bool(args.camera_model) != bool(args.camera_params):
        raise ValueError("--camera-model, --camera-params: found one of them, expected both or none")
    if args.camera_model:
        sfm.check_camera(args.camera_model, args.camera_params)
    if args.merge is not None and not 0 <= args.merge < np.inf:
        raise ValueError(f"--merge: found {args.merge:g}, expected px, 0 or more")
    if args.max_keypoints is not None and args.max_keypoints < 1:
        raise ValueError(f"--max-keypoints: found {args.max_keypoints}, expected one or more")
    check_folder(args.out)
    if args.model != "rootsift":
        api.enable_compilation_cache()
    settings = {"max_keypoints": args.max_keypoints or MAX_KEYPOINTS} if args.model == "rootsift" else {}
    return api.load_matcher(args.model, args.weights, **settings)


def check_folder(path: str) -> None:
    """Refuse a file in the place of the folder of results."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{path}: is a file, expected a folder to write")


def merge_radius(args: argparse.Namespace, matcher) -> float:
    """Return the radius of a keypoint, in px."""
    from gim_jax.tasks import sfm

    return sfm.merge_radius(matcher) if args.merge is None else args.merge


def match_images(args: argparse.Namespace, folder: Path, names: list[str], matcher, out: Path, video: bool = False):
    """Choose pairs, match them with a cache in `out`/matches, build tracks: pairs, keypoints, matches of the pairs."""
    from gim_jax.cli.progress import Progress
    from gim_jax.tasks import sfm, tracks

    with Progress("describing", "images") as progress:
        pairs = _choose_pairs(args, folder, names, video, progress)
    print(f"{len(names)} images, {len(pairs)} pairs")
    with Progress("matching", "pairs") as progress:
        found = sfm.match_all(folder, pairs, matcher, out / "matches", progress)
    return pairs, *tracks.build_tracks(pairs, found, merge_radius(args, matcher), args.max_keypoints)


def write_database(args: argparse.Namespace, folder: Path, pairs, keypoints, matched, out: Path) -> None:
    """Write `out`/database.db anew, with verified pairs."""
    from gim_jax.tasks import sfm

    for name in ("database.db", "database.pairs.txt"):
        (out / name).unlink(missing_ok=True)
    sfm.write_database(
        out / "database.db",
        folder,
        keypoints,
        pairs,
        [index for index, _ in matched],
        cameras=args.cameras,
        camera_model=args.camera_model,
        camera_params=args.camera_params,
    )


def _choose_pairs(args: argparse.Namespace, folder: Path, names: list[str], video: bool, progress) -> list:
    from gim_jax.tasks import image_pairs

    how = args.pairs
    if how == "auto":
        how = "exhaustive" if len(names) <= EXHAUSTIVE else "both" if video else "retrieval"
    if args.neighbours is not None and args.neighbours < 1:
        raise ValueError(f"--neighbours: found {args.neighbours}, expected one or more")
    if how == "exhaustive":
        return image_pairs.exhaustive(names)
    pairs = image_pairs.sequential(names, args.neighbours or 5) if how in ("sequential", "both") else []
    if how in ("retrieval", "both"):
        pairs += image_pairs.GlobalDescriptor(folder, names, progress).pairs(args.neighbours or 20)
    if how not in ("sequential", "retrieval", "both"):
        return image_pairs.read_pair_list(how, names)
    return image_pairs.unique_pairs(pairs)


def _extract_frames(video: Path, out: Path, num_frames: int) -> Path:
    """Decode at most so many frames, evenly, into `out`/images; what a finished earlier run left is used again."""
    from data_prep.video import decode, probe, sample_frames
    from gim_jax.image import encode_jpeg

    if num_frames < 3:
        raise ValueError(f"--num-frames: found {num_frames}, expected three or more")
    info = probe(video)
    num = info.num_frames or sum(1 for _ in decode(video, []))  # some files do not state their length
    every = max(-(-num // num_frames), 1)
    done, wanted = out / "frames.json", {"video_sha256": info.sha256, "every": every}
    folder, found = out / "images", read_json(done)
    if isinstance(found, dict) and found.items() >= wanted.items():
        return folder
    for old in folder.glob("frame_*.jpg"):
        old.unlink()
    notes: list[str] = []
    times = {}
    for frame in sample_frames(video, every_frames=every, notes=notes):
        name = f"frame_{frame.index:06d}.jpg"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, lambda file, rgb=frame.rgb: file.write(encode_jpeg(rgb, 95)))
        times[name] = frame.time_s
    for note in notes:
        print(f"{video}: {note}")
    if not times:
        raise ValueError(f"{video}: found no frame that can be decoded, expected a video")
    write_json(done, wanted | {"video": str(video), "times_s": times})
    print(f"{video}: {len(times)} frames, one of {every}")
    return folder


def _two_view(args: argparse.Namespace) -> int:
    from gim_jax.image import read_image
    from gim_jax.tasks import two_view
    from gim_jax.tasks.clouds import write_ply
    from gim_jax.viz import encode_png

    if (args.K0 is None) != (args.K1 is None):
        raise ValueError("--K0, --K1: found one of them, expected both or none")
    check_positive(args.threshold)
    check_folder(args.out)
    images = [read_image(path) for path in args.sources]
    Ks, origin = [_intrinsics(args.K0), _intrinsics(args.K1)], "given"
    if args.K0 is None:
        focals = [two_view.exif_focal_px(path) for path in args.sources]
        if all(focals):
            Ks = [two_view.guess_K(image.shape[1::-1], focal) for image, focal in zip(images, focals)]
            origin = "from EXIF"
        else:
            origin = "found from the matches"
    if args.model != "rootsift":
        api.enable_compilation_cache()
    matcher = api.load_matcher(args.model, args.weights)
    matches = matcher(*images)
    found = two_view.reconstruct(matches, *Ks, threshold_px=args.threshold)
    print(", ".join(f"{num} {text}" for text, num in found.counts.items()))
    stats = two_view.statistics(found)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    poses = {
        "image0": args.sources[0],
        "image1": args.sources[1],
        "size0": matches.size0,
        "size1": matches.size1,
        "K0": found.K0.tolist(),
        "K1": found.K1.tolist(),
        "intrinsics": origin,
        "T_0to1": None if found.T_0to1 is None else found.T_0to1.tolist(),
        "unit": "distance between the cameras",
    }
    stats["matcher"] = matcher.describe()
    write_json(out / "poses.json", poses)
    write_json(out / "statistics.json", stats)
    picture = two_view.draw_reconstruction(images[0], images[1], matches, found)
    write_atomic(out / "picture.png", lambda file: file.write(encode_png(picture)))
    if found.T_0to1 is None:
        print(f"no reconstruction: {found.reason}")
        return 1
    colors = two_view.sample_colors(images[0], matches.kpts0[found.index])
    write_ply(out / "points.ply", found.points, colors)
    angle, error = stats["rotation_deg"], stats["median_reprojection_px"]
    print(f"{len(found.points)} points, rotation {angle:.2f} deg, median reprojection error {error:.2f} px")
    print(f"focal lengths {found.K0[0, 0]:.0f} and {found.K1[0, 0]:.0f} px, {origin}")
    print(f"points.ply, poses.json, statistics.json and picture.png in {out}")
    return 0 if np.isfinite(found.points).all() else 1
