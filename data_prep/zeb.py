"""Build a set of ZEB from posed images with depth: overlaps, pairs sampled evenly over them, the released layout.

    python -m data_prep.zeb KIT SOURCE OUT [--cap N] [--scenes A B] [--seed 0]

SOURCE is the data set as its authors publish it (`zeb_sources`), OUT the root of ZEB's folders. A domain of one's own:
`build(scenes, folder, ...)` with scenes of `Frame`s; `gim-jax eval --benchmark=pairs --pairs OUT/<folder>/pairs.list`
evaluates any set, those of the twelve `--benchmark=zeb` too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from data_prep.folder import write_folder
from data_prep.posed import run
from gim_jax import geometry
from gim_jax.eval import zeb

NUM_BINS = 10  # of overlap, (0, 0.1] to (0.9, 1]; explains the number of pairs of every released scene
CAPS = {  # most pairs of a scene, as found in the released sets
    **{"GL3": 13, "BLE": 64, "ETI": 10000, "ETO": 10000, "KIT": 685, "WEA": 500, "SEA": 2000, "NIG": 500},
    **{"MUL": 5000, "SCE": 30, "ICL": 1250, "GTA": 410},
}
TOKEN_SUFFIX = {"GL3": ".jpg", "BLE": ".jpg", "KIT": ".png", "ETI": ".JPG", "ETO": ".JPG"}  # of names in pair files
SPARSE = ("KIT", "WEA", "SEA", "NIG")  # depth of a laser: where there is none, nothing is known
DEPTH_TOLERANCE = 0.05  # relative, of a point and the depth where it arrives (DKM's)
GRID = (160, 120)  # (width, height) of the depth maps in which overlap is counted
MAX_CANDIDATES = 200_000  # pairs of a scene whose overlap is computed; more frames: a random choice of them
BATCH = 64  # pairs at once


@dataclass(frozen=True)
class Frame:
    """A posed image with depth.

    Attributes:
      name: of the image in its scene, without extension.
      image: () -> [H, W, 3] uint8 RGB.
      K: [3, 3] intrinsics of that image.
      T: [4, 4] world to camera, OpenCV axes.
      depth: () -> [h, w] float32 z-depth that spans the image at any resolution, 0 where unknown.
      size: (width, height) of the image.
    """

    name: str
    image: Callable[[], np.ndarray]
    K: np.ndarray
    T: np.ndarray
    depth: Callable[[], np.ndarray]
    size: tuple[int, int]


Scene = tuple[str, Sequence[Frame]]  # name, frames


def shrink_depth(depth: np.ndarray, size: tuple[int, int] = GRID) -> np.ndarray:
    """Shrink a depth map to (width, height): the nearest known depth of each cell, 0 where none is known.

    Args:
      depth: [h, w], 0, NaN or inf = unknown.
    """
    if depth.shape[0] < size[1] or depth.shape[1] < size[0]:  # a coarser map: repeat its pixels
        rows, columns = (np.arange(max(n, m)) * n // max(n, m) for n, m in zip(depth.shape, size[::-1]))
        depth = depth[rows[:, None], columns]
    height, width = depth.shape
    known = np.isfinite(depth) & (depth > 0)
    out = np.full((size[1], size[0]), np.inf, np.float32)
    y, x = np.nonzero(known) if known.mean() < 0.5 else np.indices(depth.shape).reshape(2, -1)
    values = np.where(known, depth, np.inf).astype(np.float32)[y, x]
    np.minimum.at(out, (y * size[1] // height, x * size[0] // width), values)
    return np.where(np.isfinite(out), out, 0)


@functools.partial(jax.jit, static_argnames=("sparse",))
def overlap_ratios(depths, Ks, Ts, pairs, sparse: bool = False):
    """Return the overlap [P] of pairs: the smaller of both directions' shares of an image's known depth that the other
    image sees (inside it, and within 5 % of its depth).

    Args:
      depths: [N, h, w] float32, 0 = unknown.
      Ks: [N, 3, 3] of these maps; Ts: [N, 4, 4] world to camera.
      pairs: [P, 2] int32 indices.
      sparse: a point that arrives where no depth is known is seen.
    """
    height, width = depths.shape[1:]
    xs, ys = jnp.meshgrid(jnp.arange(width, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32))
    pixels = jnp.stack([xs, ys], -1).reshape(-1, 2)
    inverse = geometry.invert_pose(Ts)

    def share(i, j):
        z = depths[i].reshape(-1)
        points = jnp.concatenate([geometry.normalize_by_K(pixels, Ks[i]) * z[:, None], z[:, None]], -1)
        T = Ts[j] @ inverse[i]
        moved = points @ T[:3, :3].T + T[:3, 3]
        depth = moved[:, 2]
        uv = moved[:, :2] / jnp.maximum(depth, 1e-6)[:, None] * jnp.diag(Ks[j])[:2] + Ks[j][:2, 2]
        cell = jnp.round(uv).astype(jnp.int32)
        inside = (depth > 0) & (cell >= 0).all(-1) & (cell < jnp.array([width, height])).all(-1)
        there = depths[j][jnp.clip(cell[:, 1], 0, height - 1), jnp.clip(cell[:, 0], 0, width - 1)]
        agree = jnp.abs(depth - there) <= DEPTH_TOLERANCE * depth
        seen = inside & (agree | (sparse & (there == 0)))
        return jnp.sum(seen & (z > 0)) / jnp.maximum(jnp.sum(z > 0), 1)

    return jax.lax.map(lambda p: jnp.minimum(share(p[0], p[1]), share(p[1], p[0])), pairs, batch_size=BATCH)


def scene_overlaps(frames: Sequence[Frame], pairs: np.ndarray, sparse: bool = False) -> np.ndarray:
    """Return the overlaps [P] of pairs [P, 2] of the frames of a scene."""
    depths = np.stack([shrink_depth(frame.depth()) for frame in frames])
    Ks = [geometry.scale_K(frame.K, np.divide(GRID, frame.size)) for frame in frames]
    Ts = np.stack([frame.T for frame in frames])
    Ts = Ts.astype(np.float64) @ np.linalg.inv(Ts[0])  # near the origin, where float32 is fine
    padded = np.zeros((-(-len(pairs) // BATCH) * BATCH, 2), np.int32)
    padded[: len(pairs)] = pairs
    return np.asarray(overlap_ratios(depths, np.stack(Ks).astype(np.float32), Ts.astype(np.float32), padded, sparse))[
        : len(pairs)
    ]


def quotas(cap: int, num_bins: int = NUM_BINS) -> list[int]:
    """Split the cap of a scene over the bins of overlap: the first cap % num_bins bins get one more."""
    return [cap // num_bins + (index < cap % num_bins) for index in range(num_bins)]


def sample_pairs(overlaps: np.ndarray, cap: int, seed: int | Sequence[int] = 0, num_bins: int = NUM_BINS) -> np.ndarray:
    """Choose pairs of a scene evenly over the bins (low, high] of overlap on [0, 1].

    Args:
      overlaps: [P].
      cap: most pairs.
      seed: of the draw within a bin.

    Returns:
      Sorted indices of at most `cap` pairs.
    """
    rng = np.random.default_rng(seed)
    bins = np.ceil(np.asarray(overlaps, np.float64) * num_bins - 1e-9).astype(int) - 1
    chosen = []
    for index, quota in enumerate(quotas(cap, num_bins)):
        members = np.flatnonzero(bins == index)
        chosen.append(rng.permutation(members)[:quota])
    return np.sort(np.concatenate(chosen))


def candidates(num_frames: int, seed: int | Sequence[int] = 0, most: int = MAX_CANDIDATES) -> np.ndarray:
    """Return pairs [P, 2] int32, i < j, of a scene: all, or a random choice of `most`."""
    i, j = np.triu_indices(num_frames, 1)
    pairs = np.stack([i, j], -1).astype(np.int32)
    if len(pairs) > most:
        pairs = pairs[np.sort(np.random.default_rng(seed).choice(len(pairs), most, replace=False))]
    return pairs


def build(
    scenes: Iterable[Scene],
    folder: str | Path,
    *,
    sep: str = "-",
    cap: int = 500,
    seed: int = 0,
    sparse: bool = False,
    suffix: str = "",
    settings: dict | None = None,
) -> int:
    """Write a set in the released layout: PNG images, a text file per pair, and `pairs.list` with all of them.

    The folder appears when it is whole, with the arguments as `config.json`.

    Args:
      scenes: names and frames.
      folder: of the set; not there yet or empty.
      sep: between scene and names; a scene's name may not hold it.
      cap: most pairs of a scene.
      seed: of the choice; a scene's depends on its name and nothing else.
      sparse: see `overlap_ratios`.
      suffix: of the names in the pair files.
      settings: what JSON can hold, of what the scenes are made from: a folder that was built with the same settings and
        arguments is left as it is.

    Returns:
      The number of pairs.

    Raises:
      ValueError: a name that leads out of the folder, or of a scene that holds the separator; no pair at all; a folder
        that holds something else.
    """
    folder = Path(folder)
    if settings is None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; choose another folder or remove it")
    about = {"sep": sep, "cap": cap, "seed": seed, "sparse": sparse, "suffix": suffix, **(settings or {})}

    def write(temporary: Path) -> None:
        lines = [
            line for one in scenes for line in _write_scene(*one, temporary, folder, sep, cap, seed, sparse, suffix)
        ]
        if not lines:
            raise ValueError(f"{folder}: found no pair of frames that overlap")
        (temporary / "pairs.list").write_text("".join(lines))

    return len((write_folder(folder, about, write) / "pairs.list").read_text().splitlines())


def _write_scene(scene: str, frames: Sequence[Frame], out: Path, folder: Path, sep, cap, seed, sparse, suffix):
    """Write the images and pairs of a scene into `out`, which becomes `folder`; yield the lines of `pairs.list`."""
    for name in (scene, *(frame.name for frame in frames)):
        if "/" in name or "\\" in name or name in (".", "..") or (name == scene and sep in name):
            raise ValueError(f"{folder}: found the name {name!r}, expected one without {sep!r} and folders")
    if len(frames) < 2:
        return
    seeds = [seed, int(hashlib.sha256(scene.encode()).hexdigest()[:8], 16)]
    pairs = candidates(len(frames), seeds)
    overlaps = scene_overlaps(frames, pairs, sparse)
    for index in sample_pairs(overlaps, cap, seeds):
        i, j = pairs[index]
        for frame in (frames[i], frames[j]):
            _write_image(out / f"{scene}{sep}{frame.name}.png", frame)
        T = geometry.relative_pose(frames[i].T, frames[j].T)
        numbers = [*[overlaps[index]] * 2, *frames[i].K.ravel(), *frames[j].K.ravel(), *T.ravel()]
        names = [frames[k].name for k in (i, j)]
        text = " ".join(repr(float(value)) for value in numbers)
        line = " ".join([*(name + suffix for name in names), text]) + "\n"
        (out / f"{scene}{sep}{names[0]}{sep}{names[1]}.txt").write_text(line)
        yield " ".join([*(f"{scene}{sep}{name}.png" for name in names), text]) + "\n"


def _write_image(path: Path, frame: Frame) -> None:
    if path.exists():
        return
    image = frame.image()
    if (image.shape[1], image.shape[0]) != tuple(frame.size):
        raise ValueError(f"{path.name}: the image has {image.shape[1]}x{image.shape[0]} px, expected {frame.size}")
    path.write_bytes(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.zeb", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("set", choices=list(zeb.SETS))
    parser.add_argument("source", help="folder of the data set as published")
    parser.add_argument("out", help="root of ZEB's folders")
    parser.add_argument("--cap", type=int, help="pairs of a scene (default: as in the released set)")
    parser.add_argument("--scenes", nargs="+", default=[], help="only these")
    parser.add_argument("--seed", type=int, default=0)
    return run(parser, convert, argv)


def convert(args: argparse.Namespace) -> int:
    """Build the set that the arguments name."""
    from data_prep.zeb_sources import SOURCES

    cap = CAPS[args.set] if args.cap is None else args.cap
    for name, value, least in (("--cap", cap, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise ValueError(f"{name}: found {value}, expected {least} or more")
    chosen, source = zeb.SETS[args.set], Path(args.source)
    folder = Path(args.out) / chosen.folder
    count = build(
        SOURCES[args.set](source, args.scenes),
        folder,
        sep=chosen.sep,
        cap=cap,
        seed=args.seed,
        sparse=args.set in SPARSE,
        suffix=TOKEN_SUFFIX.get(args.set, ""),
        settings={"set": args.set, "source": str(source.resolve()), "scenes": args.scenes},
    )
    print(f"{args.set}: {count} pairs in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
