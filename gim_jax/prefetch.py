"""Load the images of a list of pairs ahead of the device that matches them: once each, and not all at once."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

AHEAD = 8  # pairs
CAPACITY = 64  # loaded images
THREADS = 2


def load_pairs(
    pairs: Sequence[tuple[Any, Any]],
    load: Callable[[Any], Any],
    ahead: int = AHEAD,
    capacity: int = CAPACITY,
    threads: int = THREADS,
) -> Iterator[tuple[Any, Any]]:
    """Yield `(load(source0), load(source1))` of each pair in order, computed by threads ahead of the caller.

    Args:
      pairs: of sources: paths (equal paths are one source) or objects (one source each).
      load: called in threads; its errors are raised where the pair's turn comes.
      ahead: pairs that are loaded early.
      capacity: what is loaded serves all later pairs, as long as no more than so many are held; above that the one
        whose next pair is farthest is dropped and loaded again in time. Those of the `ahead` pairs are always held.
    """
    keys = [tuple(str(s) if isinstance(s, str | os.PathLike) else id(s) for s in pair) for pair in pairs]
    turns: defaultdict[Any, deque[int]] = defaultdict(deque)  # of a source, the next one first
    for index, pair in enumerate(keys):
        for key in pair:
            turns[key].append(index)
    held: dict[Any, Future] = {}
    pool = ThreadPoolExecutor(threads)
    try:
        for turn in range(-ahead, len(keys)):
            if turn + ahead < len(keys):
                for key, source in zip(keys[turn + ahead], pairs[turn + ahead]):
                    if key not in held:
                        held[key] = pool.submit(load, source)
            if turn < 0:
                continue
            yield tuple(held[key].result() for key in keys[turn])  # type: ignore[misc]
            for key in keys[turn]:
                turns[key].popleft()
            for key in set(keys[turn]):
                if not turns[key]:
                    del held[key]
            while len(held) > capacity:
                last = max(held, key=lambda key: turns[key][0])
                if turns[last][0] <= turn + ahead:
                    break
                del held[last]
    finally:
        pool.shutdown(cancel_futures=True)
