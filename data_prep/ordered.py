"""Map a function in threads, results in order."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ordered(function: Callable, number: int, num_threads: int) -> Iterator:
    """Yield `function(k)` for k in 0..number-1, computed in threads, few results in memory at a time."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting = collections.deque()
        try:
            for k in range(number):
                waiting.append(pool.submit(function, k))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
