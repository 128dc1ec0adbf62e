"""Nearest descriptors through cells: exact where all cells are looked into, nearly so with few, and repeatable."""

import numpy as np

from data_prep.cells import into_cells, match_in_cells
from gim_jax import rootsift


def descriptors(num: int, noise: float):
    """Two sets [num, 128] of unit length: noisy copies of each other in other orders, a tenth of them strangers."""
    rng = np.random.default_rng(0)
    words = rng.gamma(0.5, size=(60, 128))
    clean = rng.gamma(0.5, size=(num, 128)) + words[rng.integers(0, 60, num)]
    sides = [clean + noise * rng.gamma(0.5, size=clean.shape), clean + noise * rng.gamma(0.5, size=clean.shape)]
    sides[1][: num // 10] = rng.gamma(0.5, size=(num // 10, 128))
    sides = [rng.permutation(side) for side in sides]
    return [(side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in sides]


def matches(desc0, desc1, probes: int) -> dict[int, int]:
    order, cells = into_cells(desc1)
    idx0, idx1, conf = match_in_cells(desc0, desc1[order], cells, 0.8, probes)
    assert ((0 < conf) & (conf <= 1)).all()
    return dict(zip(idx0.tolist(), order[idx1].tolist()))


def test_all_cells_give_the_exact_matches():
    desc0, desc1 = descriptors(1500, 0.3)
    idx0, idx1, _ = rootsift.match(desc0, desc1, 0.8)
    assert len(idx0) > 1000
    assert matches(desc0, desc1, 10**6) == dict(zip(idx0.tolist(), idx1.tolist()))


def test_few_cells_give_nearly_all_of_them_one_to_one():
    desc0, desc1 = descriptors(4000, 0.3)
    exact = dict(zip(*(idx.tolist() for idx in rootsift.match(desc0, desc1, 0.8)[:2])))
    found = matches(desc0, desc1, 8)
    assert len(set(found.items()) & set(exact.items())) > 0.95 * len(exact)
    assert len(set(found.values())) == len(found) and len(found) < 1.05 * len(exact)


def test_every_descriptor_is_in_one_cell_and_the_same_input_gives_the_same_cells():
    desc = descriptors(1500, 0.3)[1]
    (order, cells), (again, others) = into_cells(desc), into_cells(desc.copy())
    assert sorted(order.tolist()) == list(range(1500)) and cells.ends[-1] == 1500
    assert (order == again).all() and (cells.centers == others.centers).all()
    assert into_cells(desc[:1])[1].ends.tolist() == [1]
