"""`gim-jax localize`: the poses of query images in a COLMAP model."""

from __future__ import annotations

import argparse
from pathlib import Path

from gim_jax import api
from gim_jax.cli.match import check_writable
from gim_jax.cli.progress import Progress
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--colmap", metavar="DIR", help="the model: cameras, images, points3D")
    parser.add_argument("--images", metavar="DIR", help="folder of the model's images")
    parser.add_argument("--query-images", metavar="DIR", help="folder of the queries")
    parser.add_argument(
        "--queries",
        nargs="+",
        metavar="FILE",
        help="lists of `name MODEL width height params...`; without them all images of the folder, with EXIF's focal",
    )
    parser.add_argument("--pairs", metavar="FILE", help="`query image` a line, best first; default: by similarity")
    parser.add_argument(
        "--inloc", metavar="DIR", help="InLoc's data set and protocol instead of a model; needs --pairs"
    )
    parser.add_argument("--num-retrieved", type=int, default=20, metavar="N", help="database images of a query")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument(
        "--retriangulate", action="store_true", help="make the model's points from this matcher first; needs --cache"
    )
    parser.add_argument("--anchor", type=float, metavar="PX", help="how near an observation a match has to be")
    parser.add_argument("--max-error", type=float, default=12.0, metavar="PX", help="inlier distance (%(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="poses: `basename qw qx qy qz tx ty tz` a line")
    parser.add_argument("--json", metavar="FILE", help="write the counts and reasons of every query")
    parser.add_argument("--picture", metavar="PNG", help="draw the model (cameras in red) and the queries (green)")
    parser.add_argument("--cache", metavar="DIR", help="keeps matches, so that an interrupted run continues")


def run(args: argparse.Namespace) -> int:
    """Localize and write the poses. Exit code 1 where no query was found."""
    from gim_jax.tasks import image_pairs, load_extra, localize, sfm
    from gim_jax.viz import encode_png

    load_extra("pycolmap", "sfm")
    for path in (args.out, args.json, args.picture):
        check_writable(path)
    if args.retriangulate and not args.cache:
        raise ValueError("--retriangulate: needs --cache for the new model")
    if args.num_retrieved < 1:
        raise ValueError(f"--num-retrieved: found {args.num_retrieved}, expected one or more")
    for name, value in (("--max-error", args.max_error), ("--anchor", args.anchor)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: found {value:g}, expected a positive number of px")
    if args.inloc and args.picture:
        raise ValueError("--picture: draws a model, --inloc has none")
    if args.inloc:
        return _inloc(args)
    absent = [name for name in ("colmap", "images", "query_images") if not getattr(args, name)]
    if absent:
        raise ValueError(f"--{absent[0].replace('_', '-')}: is needed, or --inloc")
    model = localize.read_model(args.colmap)
    database = sorted(sfm.poses_of(model))
    missing = [name for name in database if not (Path(args.images) / name).is_file()]
    if missing:
        raise ValueError(f"{args.images}: found no {missing[0]}, an image of the model")
    if args.queries:
        cameras = localize.read_queries(args.queries)
    else:
        names = image_pairs.list_images(args.query_images)
        cameras = {name: localize.guess_camera(Path(args.query_images) / name) for name in names}
    missing = [name for name in cameras if not (Path(args.query_images) / name).is_file()]
    if missing:
        raise ValueError(f"{args.query_images}: found no {missing[0]}, a query")
    if args.model != "rootsift":
        api.enable_compilation_cache()
    matcher = api.load_matcher(args.model, args.weights)
    retrieved: dict[str, list[str]] = {name: [] for name in cameras}
    if args.pairs:
        for query, name in image_pairs.read_pair_list(args.pairs, {*cameras, *database}):
            if query in retrieved:
                retrieved[query].append(name)
    else:
        with Progress("describing", "images") as progress:
            descriptor = image_pairs.GlobalDescriptor(args.images, database, progress)
        for name in cameras:
            retrieved[name] = descriptor.similar(Path(args.query_images) / name, args.num_retrieved)
    cache = Path(args.cache) if args.cache else None
    if args.retriangulate and cache is not None:
        with Progress("matching the database", "pairs") as progress:
            model = localize.triangulate(model, args.images, matcher, cache / "database", progress=progress)
        print(f"{model.num_points3D()} points, {model.compute_mean_track_length():.2f} images a point")
    with Progress("matching", "pairs") as progress:
        results = localize.localize(
            model,
            args.images,
            args.query_images,
            cameras,
            retrieved,
            matcher,
            anchor_px=args.anchor,
            max_error_px=args.max_error,
            cache=cache and cache / "queries",
            progress=progress,
        )
    settings = {"max_error_px": args.max_error, "anchor_px": args.anchor, "retriangulated": args.retriangulate}
    if args.picture:
        own = {n: r.cam_from_world for n, r in results.items() if r.cam_from_world is not None and not r.fallback}
        picture = sfm.draw_model(*sfm.points_of(model), sfm.poses_of(model), own)
        write_atomic(args.picture, lambda file: file.write(encode_png(picture)))
        print(f"drawn in {args.picture}")
    return _write(args, results, settings, matcher)


def _inloc(args: argparse.Namespace) -> int:
    from gim_jax.tasks import inloc

    if not args.pairs:
        raise ValueError("--inloc: needs --pairs, hloc's pairs-query-netvlad40.txt")
    dataset = Path(args.inloc)
    try:
        words = [line.split() for line in Path(args.pairs).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.pairs}: cannot be read as a list of pairs: {error}") from error
    retrieved: dict[str, list[str]] = {}
    for number, pair in enumerate(words, 1):
        missing = [name for name in pair if not (dataset / name).is_file()]
        if len(pair) not in (0, 2) or missing:
            raise ValueError(f"{args.pairs}:{number}: found {' '.join(pair)}, expected two images of {dataset}")
        if pair:
            retrieved.setdefault(pair[0], []).append(pair[1])
    if args.model != "rootsift":
        api.enable_compilation_cache()
    matcher = api.load_matcher(args.model, args.weights)
    with Progress("matching", "pairs") as progress:
        results = inloc.localize(dataset, retrieved, matcher, cache=args.cache, progress=progress)
    return _write(args, results, {"protocol": "inloc", "max_error_px": inloc.MAX_ERROR_PX}, matcher)


def _write(args: argparse.Namespace, results: dict, settings: dict, matcher) -> int:
    from gim_jax.tasks import localize

    own = [name for name, result in results.items() if result.cam_from_world is not None and not result.fallback]
    for name, result in results.items():
        if name not in own:
            stand_in = f"; the pose of {result.fallback} stands in" if result.fallback else ""
            print(f"  {name}: {result.reason}{stand_in}")
    poses = {name: r.cam_from_world for name, r in results.items() if r.cam_from_world is not None}
    localize.write_poses(args.out, poses)
    print(f"{len(own)} of {len(results)} queries localized; written to {args.out}")
    if args.json:
        record = {
            "queries": {
                name: {
                    "cam_from_world": None if r.cam_from_world is None else r.cam_from_world.tolist(),
                    "num_matches": r.num_matches,
                    "num_points": r.num_points,
                    "num_inliers": r.num_inliers,
                    "reason": r.reason,
                    "fallback": r.fallback,
                }
                for name, r in results.items()
            },
            "settings": settings,
            "matcher": matcher.describe(),
        }
        write_json(args.json, record)
        print(f"written to {args.json}")
    return 0 if own else 1
