"""Which scene each packed record shows, and the order in which scenes and overlaps take their turns.

Packing writes `<name>-<split>.scenes.npz` beside the records; without it a record's scene is unknown and its overlap,
too, and a draw by scene or overlap is refused.
"""

from __future__ import annotations

import functools
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gim_jax.data.tfrecord import TFRecordSource, write_atomic

UNKNOWN = -1.0  # overlap of a pair without poses


@dataclass(frozen=True)
class Sampling:
    """Which records an epoch of a data set holds.

    Attributes:
      min_overlap, max_overlap: records outside are left out; of unknown overlap (video) all stay.
      per_scene: so many records of every scene, drawn anew in every epoch (LoFTR: 100 of MegaDepth, 200 of ScanNet;
        glue-factory: 300; SuperGlue: 200), equally from `num_bins` ranges of overlap; 0 = all records once.
      num_bins: 3 in glue-factory, 7 in GIM; empty bins are left out.
      power, epoch: with `epoch` > 0 instead: so many records by weights 1 / (records of the scene)^power, without
        replacement where there are enough (GIM: 938240 with power 0.75).
    """

    min_overlap: float = 0.0
    max_overlap: float = 1.0
    per_scene: int = 0
    num_bins: int = 1
    power: float = 0.0
    epoch: int = 0

    def __post_init__(self):
        if not 0 <= self.min_overlap < self.max_overlap <= 1:
            found = f"{self.min_overlap} to {self.max_overlap}"
            raise ValueError(f"min_overlap: found {found}, expected a range within 0 to 1")
        if min(self.per_scene, self.epoch, self.num_bins - 1) < 0 or (self.per_scene and self.epoch):
            raise ValueError("expected per_scene or epoch of 0 or more, and not both; num_bins from 1")

    @property
    def plain(self) -> bool:
        """True where every record takes its turn once per epoch."""
        return self == Sampling(num_bins=self.num_bins, power=self.power)


def index_path(folder: str | Path, name: str, split: str) -> Path:
    """Name the index of a split: `<name>-<split>.scenes.npz`."""
    return Path(folder) / f"{name}-{split}.scenes.npz"


def write_index(
    path: Path, scenes: Sequence[str], overlaps: Sequence[float], places: Sequence[tuple[int, int]]
) -> None:
    """Write scene, overlap and place (shard, byte offset of the payload) of every record."""
    names, numbers = np.unique(np.asarray(scenes, str), return_inverse=True)
    arrays = {
        "names": names,
        "scene": numbers.astype(np.int32),
        "overlap": np.asarray(overlaps, np.float32),
        "place": np.asarray(places, np.int64).reshape(-1, 2),
    }

    def write(file) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same records give the same bytes
                with archive.open(entry, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    write_atomic(path, write)


def read_index(path: Path, source: TFRecordSource) -> tuple[np.ndarray, np.ndarray]:
    """Look up (scene number [N] int32, overlap [N] float32) of the records of a source.

    Raises: ValueError if there is no index, or if it is that of other files.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; drawing by scene or overlap needs it, pack the records again")
    try:
        with np.load(path, allow_pickle=False) as file:
            index = {name: file[name] for name in ("scene", "overlap", "place")}
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not the index of a record folder ({type(error).__name__}: {error})") from error
    rows = {tuple(place): row for row, place in enumerate(index["place"].tolist())}
    found = np.array([rows.get(place, -1) for place in source.places()], np.int64)
    if (found < 0).any():
        raise ValueError(f"{path}: knows {len(rows)} records, but not all of these files; pack them again")
    return index["scene"][found], index["overlap"][found]


class Order:
    """The records of a data set, epoch after epoch: `order[position]` is a record's number.

    A function of (scenes, overlaps, settings, seed) alone. Two epochs are kept: threads cross a boundary one by one.
    """

    def __init__(self, scene: np.ndarray, overlap: np.ndarray, sampling: Sampling, seed: int):
        inside = (overlap == UNKNOWN) | ((overlap >= sampling.min_overlap) & (overlap <= sampling.max_overlap))
        self._members = np.flatnonzero(inside)
        if not len(self._members):
            raise ValueError(
                f"data.sampling: no record has an overlap of {sampling.min_overlap} to {sampling.max_overlap}"
            )
        self._scene, self._overlap = scene[self._members], overlap[self._members]
        self._sampling, self._seed = sampling, seed
        self._lock = threading.Lock()
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)
        self._length = len(self._epoch(0))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, len(self))
        with self._lock:
            return int(self._epoch(number)[place])

    def _draw(self, number: int) -> np.ndarray:
        rng, s = np.random.default_rng((self._seed, number)), self._sampling
        if s.epoch:
            count = np.bincount(self._scene)[self._scene]
            keys = rng.exponential(size=len(count)) * count.astype(float) ** s.power  # Efraimidis and Spirakis 2006
            chosen = np.argsort(keys, kind="stable")[: s.epoch]
            chosen = np.concatenate([chosen, rng.choice(len(count), max(s.epoch - len(count), 0))])
        elif s.per_scene:
            groups = np.split(np.argsort(self._scene, kind="stable"), np.cumsum(np.bincount(self._scene))[:-1])
            chosen = np.concatenate([self._of_scene(rng, group) for group in groups if len(group)])
        else:
            chosen = np.arange(len(self._members))
        return self._members[rng.permutation(chosen)]

    def _of_scene(self, rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
        """Draw `per_scene` of a scene's records, as evenly from the bins of overlap as can be."""
        s = self._sampling
        width = (s.max_overlap - s.min_overlap) / s.num_bins
        bins = np.clip((self._overlap[group] - s.min_overlap) // width, 0, s.num_bins - 1)
        filled = np.unique(bins)
        shares = np.full(len(filled), s.per_scene // len(filled))
        shares[rng.permutation(len(filled))[: s.per_scene % len(filled)]] += 1
        members = [group[bins == b] for b in filled]
        return np.concatenate([rng.choice(m, n, replace=len(m) < n) for m, n in zip(members, shares)])
