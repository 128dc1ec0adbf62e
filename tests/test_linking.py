"""The link rule against brute force over all pairs of points, on random and on adversarial inputs."""

import jax
import numpy as np
import pytest

from gim_jax.ops import linking

WIDTH, HEIGHT = 64, 48
RNG = np.random.default_rng(0)


def brute_force(mid0: np.ndarray, mid1: np.ndarray, radius: float = 1.0) -> np.ndarray:
    """Nearest both ways, strictly closer than the radius, ties to the lower index: every pair compared."""
    out = np.full(len(mid0), -1)
    if not len(mid0) or not len(mid1):
        return out
    offset = mid0[:, None].astype(np.float32) - mid1[None].astype(np.float32)
    d2 = offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1]
    d2 = np.where(d2 < np.float32(radius * radius), d2, np.inf)
    to1, to0 = d2.argmin(1), d2.argmin(0)
    for i in range(len(mid0)):
        if np.isfinite(d2[i, to1[i]]) and to0[to1[i]] == i:
            out[i] = to1[i]
    return out


def noisy_copies(num: int, sigma: float):
    points = RNG.uniform(0, 1, (num, 2)) * [WIDTH, HEIGHT]
    return points, RNG.permutation(points + RNG.normal(0, sigma, points.shape))


LATTICE = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), -1).reshape(-1, 2).astype(float)
BORDER = np.array([[0, 0], [WIDTH - 1, 0], [0, HEIGHT - 1], [WIDTH - 1, HEIGHT - 1], [-0.4, -0.4], [63.6, 47.6]])
CASES = {
    "random": noisy_copies(300, 0.5),
    "dense": noisy_copies(1500, 0.7),
    "cell borders": (LATTICE[:900], LATTICE[:900] + RNG.choice([-1, -0.5, 0, 0.5, 1], (900, 2))),
    "exactly one pixel apart": (LATTICE[::7], LATTICE[::7] + [1, 0]),
    "just below one pixel": (LATTICE[::7], LATTICE[::7] + [0, np.float32(1) - np.float32(2**-20)]),
    "image borders": (BORDER, BORDER + 0.3),
    "duplicates": (np.repeat(LATTICE[::40], 3, 0), np.repeat(LATTICE[::40] + 0.25, 2, 0)),
    "all at one place": (np.full((50, 2), 7.5), np.full((70, 2), 7.5)),
    "a crowd in one row": (
        np.stack([RNG.uniform(0, WIDTH, 800), np.full(800, 9.99)], 1),
        np.stack([RNG.uniform(0, WIDTH, 800), np.full(800, 10.01)], 1),
    ),
    "around the grid's last column": tuple(points / [16, 0.1] + [2046, 0] for points in noisy_copies(300, 0.05)),
    "beyond the grid": tuple(points + [10_000, 30_000] for points in noisy_copies(300, 0.5)),
    "ties left and right": (np.array([[5.0, 5.0]]), np.array([[5.5, 5.0], [4.5, 5.0], [5.0, 5.5]])),
    "empty first": (np.zeros((0, 2)), LATTICE[:5]),
    "empty second": (LATTICE[:5], np.zeros((0, 2))),
    "one and one": (np.array([[3.0, 3.0]]), np.array([[3.9, 3.0]])),
}


def padded(points: np.ndarray, capacity: int):
    out, mask = RNG.uniform(0, 20, (capacity, 2)).astype(np.float32), np.zeros(capacity, bool)
    slots = np.sort(RNG.choice(capacity, len(points), replace=False))  # holes anywhere, order kept
    out[slots], mask[slots] = points, True
    return out, mask, slots


@pytest.mark.parametrize("name", CASES)
def test_numpy_link_equals_brute_force(name):
    mid0, mid1 = (points.astype(np.float32) for points in CASES[name])
    np.testing.assert_array_equal(linking.link_numpy(mid0, mid1), brute_force(mid0, mid1))


def test_jitted_link_of_all_cases_at_once_equals_brute_force():
    capacity = max(len(points) for case in CASES.values() for points in case) + 100
    first = [padded(case[0], capacity) for case in CASES.values()]
    second = [padded(case[1], capacity) for case in CASES.values()]
    rows = linking.link(*(np.stack([case[k] for case in side]) for side in (first, second) for k in (0, 1)))
    for name, row, (_, mask, _), (_, _, slots) in zip(CASES, np.asarray(rows), first, second):
        mid0, mid1 = (points.astype(np.float32) for points in CASES[name])
        want = brute_force(mid0, mid1)
        want = np.where(want >= 0, slots[np.maximum(want, 0)] if len(slots) else -1, -1)
        np.testing.assert_array_equal(row[mask], want, err_msg=name)
        assert (row[~mask] == -1).all(), name


def test_link_is_one_to_one():
    mid0, mid1 = (points.astype(np.float32) for points in CASES["dense"])
    linked = linking.link_numpy(mid0, mid1)
    linked = linked[linked >= 0]
    assert len(linked) > 500
    assert len(np.unique(linked)) == len(linked)


def test_share_of_links_follows_the_distance():
    """A disc of 1 px links every pair of points closer than that and none farther (spec: 1 at .75 px, 0 at 1.2 px)."""
    mid0 = (LATTICE[LATTICE.sum(1) % 4 == 0] * 4).astype(np.float32)
    angle = RNG.uniform(0, 2 * np.pi, len(mid0))
    for distance, share in ((0.25, 1.0), (0.75, 1.0), (1.2, 0.0)):
        mid1 = mid0 + distance * np.stack([np.cos(angle), np.sin(angle)], 1)
        assert (linking.link_numpy(mid0, mid1) >= 0).mean() == share


def test_is_near_marks_what_brute_force_marks():
    mid0, mid1 = (points.astype(np.float32) for points in CASES["dense"])
    distance = np.linalg.norm(mid0[:, None] - mid1[None], axis=-1).min(1)
    clear = np.abs(distance - 1) > 1e-5
    ones = np.ones((1, len(mid0)), bool)
    near = np.asarray(linking.is_near(mid0[None], ones, mid1[None], ones))[0]
    np.testing.assert_array_equal(near[clear], (distance < 1)[clear])


def test_one_trace_for_all_videos_of_a_shape():
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return linking.link.__wrapped__(*args)

    jitted = jax.jit(counted)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        points = rng.uniform(0, 30, (2, 4, 64, 2)).astype(np.float32)
        masks = rng.uniform(size=(2, 4, 64)) < 0.5
        jitted(points[0], masks[0], points[1], masks[1])
    assert traces == 1
