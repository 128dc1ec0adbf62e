"""Propagation on videos whose labels are known: points that move by a given amount per sampled frame."""

import numpy as np
import pytest

from data_prep import propagate as prop

NUM_FRAMES, NUM_POINTS = 12, 60
SHIFT = np.array([3.0, 1.0])  # px per sampled frame


def grid_points(num: int = NUM_POINTS) -> np.ndarray:
    return np.stack([10 + 7 * (np.arange(num) % 10), 20 + 9 * (np.arange(num) // 10)], 1).astype(float)


def direct_level(step: int, jitter: float = 0.0, cut: int | None = None, num_frames: int = NUM_FRAMES) -> prop.Level:
    """Every point is matched from s to s + step; no pair crosses the cut (between frames cut - 1 and cut)."""
    rng = np.random.default_rng(step)
    rows = []
    for start in range(num_frames - step):
        if cut is not None and start < cut <= start + step:
            rows.append(None)
            continue
        points = grid_points()
        ends = points + SHIFT * (start + step)
        starts = points + SHIFT * start + rng.uniform(-jitter, jitter, points.shape)
        rows.append(
            {"xy": np.concatenate([starts, ends], 1).astype(np.float32), "conf": np.full(NUM_POINTS, 1 / step),
             "teacher": np.zeros(NUM_POINTS, int)}
        )  # fmt: skip
    return prop.make_level(step, rows, num_frames)


def test_doubling_reaches_every_interval_with_exact_positions():
    levels = prop.propagate({1: direct_level(1)}, min_matches=10)
    assert [level.step for level in levels] == [1, 2, 4, 8]
    for level in levels:
        assert (level.counts > 0).sum() == NUM_FRAMES - level.step
        pair = level.pair(1)
        np.testing.assert_allclose(
            pair["xy"][:, 2:] - pair["xy"][:, :2], np.tile(SHIFT * level.step, (60, 1)), atol=1e-4
        )
        assert (pair["hops"] == level.step).all()


def test_direct_labels_win_over_linked_ones():
    levels = prop.propagate({1: direct_level(1), 2: direct_level(2)}, min_matches=10)
    two = levels[1].pair(0)
    assert len(two["xy"]) == NUM_POINTS, "a point labelled both ways is kept once"
    assert (two["hops"] == 1).all() and np.allclose(two["conf"], 0.5)


def test_merging_takes_the_union():
    """Direct labels of half of the points, linked ones of the other half."""
    half = direct_level(2)
    half.mask[:, 30:] = False
    two = prop.propagate({1: direct_level(1), 2: half}, min_matches=10)[1].pair(3)
    assert len(two["xy"]) == NUM_POINTS
    assert (two["hops"] == 1).sum() == 30 and (two["hops"] == 2).sum() == 30


def test_no_pair_crosses_a_cut():
    cut = 5
    base = {step: direct_level(step, cut=cut) for step in (1, 2, 4)}
    for level in prop.propagate(base, min_matches=10):
        starts = np.flatnonzero(level.counts > 0)
        assert len(starts) and not ((starts < cut) & (starts + level.step >= cut)).any()


def test_a_missing_step_is_never_linked_across():
    base = direct_level(1)
    base.mask[4] = False
    for level in prop.propagate({1: base}, min_matches=10)[1:]:
        starts = np.flatnonzero(level.counts > 0)
        assert not ((starts <= 4) & (starts + level.step > 4)).any()


@pytest.mark.parametrize("minimum, steps", [(59, [1, 2, 4, 8]), (60, [])])
def test_a_pair_needs_more_than_the_minimum(minimum, steps):
    assert [level.step for level in prop.propagate({1: direct_level(1)}, min_matches=minimum)] == steps


def test_points_one_pixel_apart_in_the_middle_frame_are_not_linked():
    base = direct_level(1)
    base.xy[..., :2] += [1.0, 0.0]  # every pair starts one pixel beside where the one before it ends
    assert [level.step for level in prop.propagate({1: base}, min_matches=10)] == [1]
    base.xy[..., :2] -= [0.25, 0.0]
    assert [level.step for level in prop.propagate({1: base}, min_matches=10)] == [1, 2, 4, 8]


def test_a_long_interval_lives_on_its_own_direct_labels():
    """Nothing survives at 1, but direct labels at 4 are chained to 8."""
    weak = direct_level(1)
    weak.mask[:, 5:] = False
    levels = prop.propagate({1: weak, 2: prop.make_level(2, [], NUM_FRAMES), 4: direct_level(4)}, min_matches=10)
    assert [level.step for level in levels] == [4, 8]


def test_no_labels_at_all():
    assert prop.propagate({1: prop.make_level(1, [None] * 3, 4)}, min_matches=10) == []


def test_rounds_equal_a_loop_over_pairs_with_the_numpy_link():
    """The whole-video round against one pair at a time, on labels with noise and holes."""
    from gim_jax.ops import linking

    base = direct_level(1, jitter=0.9)
    base.mask[...] &= np.random.default_rng(1).uniform(size=base.mask.shape) < 0.8
    got = prop.propagate({1: base}, min_matches=5)
    current = {s: base.pair(s)["xy"] for s in range(NUM_FRAMES - 1)}
    for level in got[1:]:
        half = level.step // 2
        following = {}
        for s, xy in current.items():
            if s + half in current:
                row = linking.link_numpy(xy[:, 2:], current[s + half][:, :2])
                linked = np.concatenate([xy[row >= 0, :2], current[s + half][row[row >= 0], 2:]], 1)
                if len(linked) > 5:
                    following[s] = linked
        assert sorted(following) == np.flatnonzero(level.counts).tolist()
        for s, xy in following.items():
            np.testing.assert_array_equal(level.pair(s)["xy"], xy)
        current = following


def test_one_compilation_for_videos_of_similar_length():
    prop._linked_jit.clear_cache()
    for num_frames in (17, 20, 30):
        prop.propagate({1: direct_level(1, num_frames=num_frames)}, min_matches=10)
    assert prop._linked_jit._cache_size() == 1


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(monkeypatch):
    import jax

    base = direct_level(1, jitter=0.9, num_frames=40)
    alone = prop.propagate({1: base}, min_matches=5)
    monkeypatch.setattr(prop, "MIN_PAIRS_PER_DEVICE", 8)
    shared = prop.propagate({1: base}, min_matches=5)
    assert len(jax.devices()) == 8 and len(alone) > 3
    assert len(prop._shard(prop.first_starts(base, 32), base.mask.shape[1])["mask"].sharding.device_set) == 4
    for one, eight in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one.mask, eight.mask)
        np.testing.assert_array_equal(one.xy[one.mask], eight.xy[eight.mask])


def test_released_rule_links_equal_rounded_pixels_only():
    """A quarter of a pixel apart but across a pixel border: linked by the paper's rule alone."""
    base = direct_level(1)
    base.xy[..., 2:] += [0.4, 0.0]
    base.xy[..., :2] += [0.65, 0.0]
    assert [level.step for level in prop.propagate({1: base}, min_matches=10, rule="released")] == [1]
    assert [level.step for level in prop.propagate({1: base}, min_matches=10)] == [1, 2, 4, 8]
