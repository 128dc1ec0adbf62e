"""ZEB, GIM's zero-shot benchmark, as released: twelve folders of PNG images and one text file per pair.

The first line of `<scene><sep><name0><sep><name1>.txt` has 38 tokens: name0 name1 covisible0 covisible1 K0 K1 T_0to1,
see `pairs`; K is of the stored PNG `<scene><sep><name>.png`. Source: GIM's `datasets/` and `trainer/lightning.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax.eval import document, released, run
from gim_jax.eval.measure import Pair
from gim_jax.eval.pairs import parse

IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g)$", re.IGNORECASE)  # of names in pair files; the images are PNG
NO_BASELINE = 0.05  # metres; shorter translations have no direction that could be measured


@dataclass(frozen=True)
class ZebSet:
    """A set of ZEB.

    Attributes:
      name: column of the table.
      folder: below the benchmark's root.
      sep: between scene and names in the names of files.
      prefix, suffix: of a name in the identifier of a pair.
      long_side: px; larger images are made so large, and sides stay as they are; None: sides are floored to eights.
      canvas: (width, height) px to which images are padded, None for no padding.
      metric: the poses are in metres.
    """

    name: str
    folder: str
    sep: str
    prefix: str = ""
    suffix: str = ""
    long_side: int | None = None
    canvas: tuple[int, int] | None = None
    metric: bool = False

    @property
    def feed(self) -> run.Feed:
        """What is done to its images; those of KITTI and ETH3D alone are limited and padded, and not floored."""
        if self.long_side is None:
            return run.Feed((("multiple", 8),))
        return run.Feed((("long_side", self.long_side), ("upscale", False)), self.canvas)


SETS = {
    s.name: s
    for s in (
        ZebSet("GL3", "gl3d", "_"),
        ZebSet("BLE", "blendedmvs", "_"),
        ZebSet("ETI", "eth3di", "-", suffix=".JPG", long_side=1600, canvas=(1600, 1072), metric=True),
        ZebSet("ETO", "eth3do", "-", suffix=".JPG", long_side=1600, canvas=(1600, 1072), metric=True),
        ZebSet("KIT", "kitti", "-", suffix=".png", long_side=1240, canvas=(1240, 384), metric=True),
        ZebSet("WEA", "robotcarweather", "_", metric=True),
        ZebSet("SEA", "robotcarseason", "_", metric=True),
        ZebSet("NIG", "robotcarnight", "_", metric=True),
        ZebSet("MUL", "multifov", "-", prefix="img/", suffix=".png"),
        ZebSet("SCE", "scenenet", "-", suffix=".jpg"),
        ZebSet("ICL", "iclnuim", "-", suffix=".jpg", metric=True),
        ZebSet("GTA", "gtasfm", "-"),
    )
}
CANVAS_FAMILIES = (
    "rootsift",
    "dkm",
)  # see the padding; other networks get sizes or masks, and padding is nothing to them
DENSE_FAMILIES = ("dkm",)  # coordinates are fractions of the input
MATCHER = {"long_side": None, "exact": None, "multiple": 1, "aspect": None}  # images come in their final size
FAMILY_SETTINGS = {"dkm": {"size": (880, 660), "upsample_size": (1536, 1152)}}  # GIM's benchmark, larger than its demo


def read_set(root: str | Path, name: str) -> list[Pair]:
    """Read the pairs of a set, sorted by scene and the text of the line, as the official code sorts them.

    Raises:
      ValueError: naming file and line: see `pairs.parse`; a name that leaves its folder; two files of a pair; no pair.
    """
    zeb, folder = SETS[name], Path(root) / SETS[name].folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected the set {name} of ZEB")
    rows = []
    for path in sorted(folder.glob("*.txt")):
        with open(path, "rb") as file:
            line = file.readline(1 << 16)
        try:
            tokens = line.decode("utf-8").split()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:1: not text: {error.reason} at byte {error.start}") from error
        rows.append(([path.stem.split(zeb.sep)[0], *tokens], path))
    rows.sort(key=lambda row: row[0])
    sizes: dict[Path, tuple[int, int]] = {}
    first: dict[str, Path] = {}
    out = []
    for (scene, *tokens), path in rows:
        names = [IMAGE_SUFFIX.sub("", token) for token in tokens[:2]]
        images = [folder / f"{scene}{zeb.sep}{stem}.png" for stem in names]
        try:
            if any("/" in stem or "\\" in stem for stem in names):
                raise ValueError(f"name0 name1: found {tokens[0]} {tokens[1]}, expected names without a folder")
            pair = parse(tokens, images, 1, sizes, overlaps=True)
        except ValueError as error:
            raise ValueError(f"{path}:1: {error}") from error
        identifier = "#".join([scene, *(f"{zeb.prefix}{stem}{zeb.suffix}" for stem in names)])
        if identifier in first:
            raise ValueError(f"{path}:1: {identifier}: the pair stands in {first[identifier].name} too")
        first[identifier] = path
        out.append(replace(pair, set=name, identifier=identifier))
    if not out:
        raise ValueError(f"{folder}: found no pair, expected text files of {name}")
    return out


def subset(pairs: Iterable[Pair], overlap: tuple[float, float] | None = None, fraction: float = 1.0) -> list[Pair]:
    """Choose pairs for a quick run.

    Args:
      overlap: (low, high]: pairs whose overlap lies there.
      fraction: share of the pairs, chosen by the hash of the identifier, so every run and machine chooses the same.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: found {fraction}, expected more than 0 and at most 1")
    low, high = overlap or (-np.inf, np.inf)
    chosen = []
    for pair in pairs:
        share = int(hashlib.sha256(f"{pair.set}#{pair.identifier}".encode()).hexdigest()[:12], 16) / 16**12
        if share < fraction and low < (-1 if pair.overlap is None else pair.overlap) <= high:
            chosen.append(pair)
    if not chosen:
        raise ValueError(f"subset: found no pair with overlap in ({low:g}, {high:g}] and a fraction of {fraction:g}")
    return chosen


def data_hash(pairs: Sequence[Pair]) -> str:
    """Hash the truth of the pairs, and the names and sizes in bytes of their images: 64 hex digits."""
    digest = hashlib.sha256()
    sizes: dict[Path, int] = {}
    for pair in pairs:
        for path in (pair.path0, pair.path1):
            if path not in sizes:
                sizes[path] = path.stat().st_size
        numbers = [a.tobytes() for a in (pair.K0, pair.K1, pair.T_0to1, pair.H) if a is not None]
        names = (pair.set, pair.identifier, pair.path0.name, pair.path1.name, pair.turns0, pair.turns1)
        digest.update(repr((names, sizes[pair.path0], sizes[pair.path1])).encode() + b"".join(numbers))
    return digest.hexdigest()


def feeds(family: str, gray: bool = False) -> dict[str, run.Feed]:
    """Return what is done to the images of each set for a family of matchers: the padding only where it is seen.

    Args:
      gray: for networks of gray images.
    """
    padded = family in CANVAS_FAMILIES
    return {name: replace(s.feed, canvas=s.canvas if padded else None, gray=gray) for name, s in SETS.items()}


def add_baselines(sets: Sequence[dict[str, Any]]) -> None:
    """Add to the records of metric sets the AUC without the pairs that have no baseline, and the number of those."""
    for record in sets:
        if SETS[record["set"]].metric:
            baseline = np.array([np.nan if b is None else b for b in record["pairs"]["baseline"]])
            kept = document.errors_of(record)[~(baseline < NO_BASELINE)]
            record["num_without_baseline"] = int((baseline < NO_BASELINE).sum())
            record["auc_with_baseline"] = document.auc_by_threshold(kept) if len(kept) else None


def write_released(folder: str | Path, result: dict[str, Any], model: str, version: str) -> list[Path]:
    """Write a result as the released text files, and the same columns as `pairs-<version>.npz`."""
    folder, written, whole = Path(folder), [], {}
    for record in result["sets"]:
        pairs = record["pairs"]
        number = lambda name, none, pairs=pairs: np.array([none if v is None else v for v in pairs[name]])  # noqa: E731
        columns = {
            "identifiers": pairs["identifier"],
            "covisible0": number("overlap", np.nan),
            "covisible1": number("overlap", np.nan),
            "R_errs": number("R_error_deg", np.inf),
            "t_errs": number("t_error_deg", np.inf),
            "t_errs2": number("t_error", np.inf),
            "Bef.Prec": number("precision", 0.0),
            "Bef.Num": number("precision", 0.0) * number("num_matches", 0),
            "Aft.Prec": number("precision_inliers", 0.0),
            "Aft.Num": number("precision_inliers", 0.0) * number("num_inliers", 0),
        }
        for name in ("Bef.Num", "Aft.Num"):
            columns[name] = np.rint(columns[name])
        path = folder / released.file_name(model, record["set"], version)
        released.write(path, columns)
        written.append(path)
        for name, values in columns.items():
            whole.setdefault(name, []).append(np.asarray(values))
        whole.setdefault("set", []).append(np.array([record["set"]] * record["num_pairs"]))
    path = folder / f"pairs-{version}.npz"
    run.write_chunk(path, {name: np.concatenate(values) for name, values in whole.items()})
    return [*written, path]


def differs(pairs: Sequence[Pair], done: run.Done) -> bool:
    """Return whether the released mapping changes any error."""
    assert done.tables is not None
    first, second = (table["error"] for table in done.tables)
    return not np.array_equal(np.nan_to_num(first, posinf=-1), np.nan_to_num(second, posinf=-1))
