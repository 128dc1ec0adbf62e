"""Nearest descriptors through cells (an inverted file, Jegou et al., PAMI 2011): a descriptor is compared with those
of the cells whose centres are most like it, a tenth of all or so. Nearly all that pass a ratio test lie there.

The same input gives the same cells and matches on every machine: nothing is random.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gim_jax import rootsift

ROUNDS = 4  # of k-means
MIN_DESCRIPTORS = 1024  # with fewer all are compared


class Cells(NamedTuple):
    """Where each cell of sorted descriptors ends, [C] int, and the directions of the centres, [C, D] of unit length."""

    ends: np.ndarray
    centers: np.ndarray


def into_cells(desc: np.ndarray) -> tuple[np.ndarray, Cells]:
    """Find about sqrt(M) cells of descriptors [M, D] float32 of unit length, and the order [M] that sorts them so."""
    num = max(round(np.sqrt(len(desc))), 1)
    centers = desc[:: max(len(desc) // num, 1)][:num]
    for _ in range(ROUNDS):
        cell = np.argmax(desc @ centers.T, 1)
        order = np.argsort(cell, kind="stable")
        first = np.unique(cell[order], return_index=True)[1]  # of each cell that is not empty
        sums = np.add.reduceat(desc[order], first, axis=0)
        centers = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    cell = np.argmax(desc @ centers.T, 1)
    order = np.argsort(cell, kind="stable")
    return order, Cells(np.cumsum(np.bincount(cell, minlength=len(centers))), centers)


def match_in_cells(
    desc0: np.ndarray, desc1: np.ndarray, cells1: Cells, ratio: float, probes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rootsift.match` where a descriptor of image 0 sees only those of its `probes` most likely cells of image 1.

    `desc1` is in the order of its cells.
    """
    num0, num_cells = len(desc0), len(cells1.centers)
    probes = min(probes, num_cells)
    likely = np.argpartition(desc0 @ cells1.centers.T, num_cells - probes, axis=1)[:, num_cells - probes :]
    by_cell = np.argsort(likely.ravel(), kind="stable")
    queries = np.split(by_cell // probes, np.cumsum(np.bincount(likely.ravel(), minlength=num_cells))[:-1])
    best, second = np.full((2, num0), -1.0, np.float32)
    partner, column = np.zeros(num0, np.int64), np.full(len(desc1), -1.0, np.float32)
    for rows, start, end in zip(queries, np.concatenate([[0], cells1.ends]), cells1.ends):
        if start == end or not len(rows):
            continue
        sim = desc0[rows] @ desc1[start:end].T
        column[start:end] = sim.max(0)
        at, line = sim.argmax(1), np.arange(len(rows))
        top = sim[line, at]
        sim[line, at] = -1
        second[rows] = np.maximum(np.maximum(second[rows], sim.max(1)), np.minimum(best[rows], top))
        better = top > best[rows]
        partner[rows[better]] = at[better] + start
        best[rows] = np.maximum(best[rows], top)
    return rootsift.select(partner, best, second, column, ratio)
