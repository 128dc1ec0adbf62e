"""`gim-jax export`: a matcher or its matches in the form of other tools."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """
--to stablehlo (default) writes OUT, what jax.export.deserialize reads (StableHLO for every platform asked for), and
OUT.json, which says what it is and how to call it: names, shapes and types of inputs and outputs, conventions, licence,
hash of the weights, and five lines of Python that run it with jax and safetensors alone. The weights are not in OUT:
they are its first argument, the arrays of the same .safetensors file as --weights, so OUT stays below a megabyte,
serves retrained weights of the same network, and carries no licence but this package's.
--to hub writes the folder OUT in the layout of a model hub: model.safetensors, config.json and README.md, the model
card.
--to hloc matches the images of a folder and writes OUT/features.h5, matches.h5 and pairs.txt for hloc.
--to colmap does so for COLMAP: OUT/database.db, features/NAME.txt for its feature_importer, and for its
matches_importer matches_raw.txt and matches_inliers.txt."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gim_jax.cli.reconstruct import add_matching_arguments

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"{parser.description}.\n{HELP}"
    parser.add_argument("--to", default="stablehlo", choices=tuple(TARGETS), help="(default: %(default)s)")
    parser.add_argument("--model", required=True, help="a name of `gim-jax models`")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument("out", metavar="OUT", help="a file for stablehlo, such as loftr.stablehlo; else a folder")
    artefact = parser.add_argument_group("stablehlo")
    artefact.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("WIDTH", "HEIGHT"),
        help="px of both images, multiples of 64; smaller images are padded (default: what the model's preset needs)",
    )
    artefact.add_argument("--batch", type=int, default=1, metavar="N", help="pairs per call (default: %(default)s)")
    artefact.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what the network computes in; scores and geometry are float32 (default: as trained, float32)",
    )
    artefact.add_argument(
        "--platforms",
        default="cpu,cuda,tpu",
        help="where it is to run, separated by commas (default: %(default)s)",
    )
    many = parser.add_argument_group("hloc and colmap (pip install 'gim-jax[sfm]')")
    many.add_argument("--images", metavar="DIR", help="the folder of images to match")
    add_matching_arguments(many)


def run(args: argparse.Namespace) -> int:
    """Export, then say what was written."""
    return TARGETS[args.to](args)


def _stablehlo(args: argparse.Namespace) -> int:
    from gim_jax import export

    settings = {"dtype": args.dtype} if args.dtype else {}
    size = tuple(args.size) if args.size else None
    platforms = tuple(name for name in args.platforms.split(",") if name)
    about = export.export(args.model, args.weights, args.out, size, args.batch, platforms, **settings)
    batch, height, width, _ = about["inputs"]["image0"]["shape"]
    print(
        f"{args.out}: {args.model}, {batch} pair{'s' * (batch > 1)} of {width}x{height} px, "
        f"{about['artefact']['bytes'] / 1e6:.1f} MB for {', '.join(about['platforms'])}\n"
        f"{export.description_of(args.out)}: how to call it; licence of the weights: {about['weights']['licence']}"
    )
    return 0


def _hub(args: argparse.Namespace) -> int:
    from gim_jax.tasks import hub

    config = hub.write_folder(args.model, args.weights, args.out)
    print(f"{args.out}: model.safetensors, config.json and README.md of {args.model}, licence {config['licence']}")
    return 0


def _hloc(args: argparse.Namespace) -> int:
    from gim_jax.tasks import hloc, sfm

    folder, out, pairs, keypoints, matched = _match(args, "h5py")
    sizes = {name: sfm.stored_turns(folder / name)[1] for name in keypoints}
    hloc.write_features(out / "features.h5", keypoints, sizes)
    hloc.write_matches(out / "matches.h5", pairs, matched, keypoints)
    hloc.write_pairs(out / "pairs.txt", pairs)
    print(f"features.h5, matches.h5 and pairs.txt in {out}: {_count(matched)} matches")
    return 0


def _colmap(args: argparse.Namespace) -> int:
    from gim_jax.cli.reconstruct import write_database
    from gim_jax.tasks import colmap_text, load_extra

    pycolmap = load_extra("pycolmap", "sfm")
    folder, out, pairs, keypoints, matched = _match(args, "pycolmap")
    write_database(args, folder, pairs, keypoints, matched, out)
    colmap_text.write_features(out / "features", keypoints)
    colmap_text.write_matches(out / "matches_raw.txt", pairs, [index for index, _ in matched])
    with pycolmap.Database.open(str(out / "database.db")) as database:
        inliers = colmap_text.verified_matches(database, pairs)
    colmap_text.write_matches(out / "matches_inliers.txt", pairs, inliers)
    print(f"database.db, features/, matches_raw.txt ({_count(matched)}) and", end=" ")
    print(f"matches_inliers.txt ({sum(map(len, inliers))}) in {out}")
    return 0


def _match(args: argparse.Namespace, module: str):
    """Match the images: their folder, the folder of the results, pairs, keypoints, matches of the pairs."""
    from gim_jax.cli.reconstruct import match_images, matcher_of_many
    from gim_jax.tasks import image_pairs, load_extra

    load_extra(module, "sfm")
    if not args.images:
        raise ValueError(f"--to {args.to}: needs --images, a folder of images")
    folder, out = Path(args.images), Path(args.out)
    names = image_pairs.list_images(folder)
    if len(names) < 2:
        raise ValueError(f"{folder}: found one image, expected two or more")
    matcher = matcher_of_many(args)
    return folder, out, *match_images(args, folder, names, matcher, out)


def _count(matched) -> int:
    return sum(len(index) for index, _ in matched)


TARGETS = {"stablehlo": _stablehlo, "hub": _hub, "hloc": _hloc, "colmap": _colmap}
