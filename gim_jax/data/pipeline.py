"""Training batches from record folders: global shuffle, decode and augment in threads, exact position.

    offset index -> shuffle, or draw by scene and overlap (seed) -> mix -> decode + augment (seed, position) -> batch

The element at global position i is a function of (files, settings, seed, i) and of nothing else: not of hosts, threads,
batches or interruptions. Host p of n makes the p-th block of every global batch, and the
position is one integer (`grain.experimental.ElasticIterator`) that any number of hosts can continue from.

Records that are damaged, or that keep too few correspondences after augmentation, are replaced by another one of the
same data set and epoch, counted and named. NumPy and OpenCV only; nothing here touches a JAX device.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gim_jax.config import replace
from gim_jax.data import records
from gim_jax.data.augment import Augment, TooFewMatchesError, make_sample
from gim_jax.data.scenes import Order, Sampling, index_path, read_index
from gim_jax.geometry import CELL

MAX_REPLACEMENTS = 100  # so many bad records in a row mean that the data or the settings are wrong
TOO_FEW_MATCHES = "too few matches after augmentation"


class Batches:
    """Iterate over the batches of one host, for ever.

    Args:
      data: `config.data`, with
        records: packed folders, labelling folders or record files, separated by commas;
        weights: sampling weight per folder, () = equal;
        split: "train", ...; only packed folders have others;
        size: (width, height) px of the network frame, multiples of 8;
        channels: 1 (gray) or 3 (RGB);
        max_matches, min_matches: static number of correspondences per pair, and how many a pair needs;
        num_threads: how many make a batch each, 0 = the calling thread; num_prefetch: batches made ahead, at least one
          by each thread;
        depth: batches also hold depth, poses and intrinsics (zeros for pairs without), for supervision by depth;
        sampling: the fields of `gim_jax.data.scenes.Sampling`, for every folder;
        augment_of: {name of a packed data set: fields of `augment` that it has otherwise};
        on_damage: "skip" replaces damaged records, "raise" stops at the first;
        augment: the fields of `gim_jax.data.augment.Augment`.
      seed: of the order and of the augmentation.
      batch_size: pairs per global batch.
      shard_index, shard_count: this host and their number.

    Attributes:
      num_records: records per data set.
      made_of: of each data set its folder, number of records and digest, for what is made of them.
      incidents: Counter of reason -> how often, of everything left out so far.

    Raises: ValueError naming the setting, the file or the record that is wrong.
    """

    def __init__(self, data: Any, seed: int, batch_size: int, shard_index: int = 0, shard_count: int = 1):
        if len(data.size) != 2 or any(n < CELL or n % CELL for n in data.size):
            raise ValueError(f"data.size: found {data.size}, expected (width, height), multiples of {CELL}")
        self._size = (int(data.size[0]), int(data.size[1]))
        if data.channels not in (1, 3):
            raise ValueError(f"data.channels: found {data.channels}, expected 1 or 3")
        if not 1 <= data.min_matches <= data.max_matches:
            raise ValueError(f"data.min_matches: found {data.min_matches}, expected 1 to {data.max_matches}")
        if data.on_damage not in ("skip", "raise"):
            raise ValueError(f"data.on_damage: found {data.on_damage!r}, expected 'skip' or 'raise'")
        if batch_size < 1 or batch_size % shard_count:
            raise ValueError(f"batch_size: found {batch_size}, expected a multiple of {shard_count} hosts")
        self._data, self._seed = data, seed
        sampling = replace(Sampling(), data.get("sampling", {}), "data.sampling")
        self._augments: list[Augment] = []
        self.made_of: list[dict[str, Any]] = []
        self.incidents: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._sources: list[records.TFRecordSource] = []
        self._orders: list[Any] = []  # place in the endless sequence of epochs -> number of the record
        self._epochs: list[int] = []  # places in an epoch
        for k, name in enumerate(_names(data.records)):
            source = records.TFRecordSource(records.dataset_paths(name, data.split), data.on_damage)
            if not len(source):
                raise ValueError(f"{name}: found no intact record, expected at least 1")
            self.incidents.update(source.skipped)
            self._sources.append(source)
            digest = records.dataset_digest(name, data.split)
            self.made_of.append({"records": name, "split": data.split, "num_records": len(source), "sha256": digest})
            title = records.split_lengths(Path(name), data.split)[0] if records.is_packed(name) else ""
            own = data.get("augment_of", {}).get(title, {}) if data.augment.get("enabled", True) else {}
            self._augments.append(replace(Augment(), {**data.augment, **own}, "data.augment"))
            if sampling.plain:
                order = grain.MapDataset.range(len(source)).seed(seed + k).shuffle().repeat()
            elif title:
                order = Order(*read_index(index_path(name, title, data.split), source), sampling, seed + k)
            else:
                raise ValueError(f"{name}: is not packed; data.sampling needs the index that packing writes")
            self._orders.append(order)
            self._epochs.append(len(source) if sampling.plain else len(order))
        self.num_records = [len(source) for source in self._sources]
        weights = [float(w) for w in data.weights] or [1.0] * len(self._sources)
        if len(weights) != len(self._sources) or min(weights) <= 0:
            raise ValueError(f"data.weights: found {weights}, expected {len(self._sources)} positive numbers")

        places = [
            grain.MapDataset.range(length).repeat().map_with_index(lambda place, _, k=k: (k, place))
            for k, length in enumerate(self._epochs)
        ]
        mixed = places[0] if len(places) == 1 else grain.MapDataset.mix(places, weights)
        share = batch_size // shard_count

        def element(position: int) -> dict[str, np.ndarray]:
            # Host p is given the positions p, p + n, ...; it shall have the p-th block of every batch instead, so that
            # the rows of a global batch are in one order on any number of hosts.
            step, row = divmod(position, batch_size)
            position = step * batch_size + row % shard_count * share + row // shard_count
            key: Any = mixed[position]
            return self._sample(position, key)

        self._iterator = grain.experimental.ElasticIterator(
            grain.MapDataset.range(sys.maxsize).map(element),
            batch_size,
            grain.sharding.ShardOptions(shard_index=shard_index, shard_count=shard_count),
            read_options=grain.ReadOptions(
                num_threads=data.num_threads,
                prefetch_buffer_size=max(data.num_prefetch, data.num_threads) if data.num_threads else 0,
            ),
        )

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return the position as JSON: the next global position, and what it is a position in."""
        digests = [made["sha256"] for made in self.made_of]
        return {**self._iterator.get_state(), "num_records": self.num_records, "sha256": digests, "seed": self._seed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state()` of any host; other data or another seed is a ValueError."""
        for name, value in (("num_records", self.num_records), ("seed", self._seed)):
            if state.get(name) != value:
                raise ValueError(f"data position: {name}: found {state.get(name)}, expected {value}: other data?")
        for made, digest in zip(self.made_of, state.get("sha256", [])):
            if None not in (digest, made["sha256"]) and digest != made["sha256"]:
                raise ValueError(f"data position: {made['records']}: found sha256 {made['sha256']}, expected {digest}")
        self._iterator.set_state({"global_next_index": int(state["global_next_index"])})

    def close(self) -> None:
        """Stop the threads."""
        self._iterator.close()

    def _sample(self, position: int, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """Make the element at a global position from `key` = (data set, place in its order), or from a replacement."""
        k, place = key
        source, length = self._sources[k], self._epochs[k]
        for attempt in range(MAX_REPLACEMENTS):
            rng = np.random.default_rng((self._seed, position, attempt))
            if attempt:
                place = place // length * length + int(rng.integers(length))
            index = int(self._orders[k][place])
            try:
                return make_sample(
                    records.decode(source[index]),
                    rng,
                    self._size,
                    self._data.channels,
                    self._data.max_matches,
                    self._data.min_matches,
                    self._augments[k],
                    self._data.get("depth", False),
                )
            except TooFewMatchesError:
                self._count(TOO_FEW_MATCHES)
            except ValueError as error:
                text = str(error) if source.where(index) in str(error) else f"{source.where(index)}: {error}"
                if self._data.on_damage == "raise":
                    raise ValueError(text) from error
                self._count(text)
        with self._lock:
            common = self.incidents.most_common(3)
        raise ValueError(f"data.records: {MAX_REPLACEMENTS} records in a row were unusable; so far: {common}")

    def _count(self, reason: str) -> None:
        with self._lock:
            self.incidents[reason] += 1


def _names(text: str) -> list[str]:
    """Split the setting `records` at its commas, unless it is the name of one existing path."""
    names = [text] if text and Path(text).exists() else [name for name in text.split(",") if name]
    if not names:
        raise ValueError("data.records: found '', expected a folder of records")
    return names
