"""Labels have to come from the pictures: right ones are told from smooth nonsense and from chance."""

import numpy as np
import pytest

from data_prep import appearance
from data_prep.fitting import confirm
from data_prep.matchers import Found
from gim_jax.config import load_config
from tests.test_label import pan

SIZE = (200, 150)
FRAMES = pan(2, 12, 0)  # the picture moves 12 px to the left
GRAYS = tuple(appearance.reduced_gray(frame, 1.0) for frame in FRAMES)


def labels(motion, num: int = 400) -> np.ndarray:
    kpts0 = np.random.default_rng(1).uniform([20, 10], [190, 140], (num, 2))
    return np.concatenate([kpts0, kpts0 + motion], 1).astype(np.float32)


def test_right_labels_look_alike_and_wrong_ones_do_as_chance_has_it():
    assert appearance.agreement(*GRAYS, labels([-12.0, 0.0]), SIZE)[0] > 0.95
    assert appearance.agreement(*GRAYS, labels([-11.3, 0.6]), SIZE)[0] > 0.9, "less than a pixel off"
    for motion in ([0.0, 0.0], [-12.0, 9.0], [-30.0, 0.0]):
        share, judged = appearance.agreement(*GRAYS, labels(motion), SIZE)
        assert share < 0.25 and judged > 200, motion


def test_larger_frames_are_judged_at_the_size_of_small_ones():
    """Twice as large: points in px of the large frame, pictures of the small one."""
    xy = 2 * labels([-12.0, 0.0]) + 0.5
    assert appearance.agreement(*GRAYS, xy, (400, 300))[0] > 0.95


def test_what_shows_nothing_is_not_judged():
    flat = np.full((150, 200), 90, np.uint8)
    assert appearance.agreement(flat, flat, labels([0.0, 0.0]), SIZE) == (0.0, 0)
    assert appearance.agreement(*GRAYS, np.zeros((0, 4), np.float32), SIZE) == (0.0, 0)


@pytest.mark.parametrize("motion, kind", [([-12.0, 0.0], "H"), ([0.0, 0.0], "")])
def test_a_network_that_says_nothing_moves_is_refused_where_something_does(motion, kind):
    """Both fit a homography to the last pixel; one of them is in the pictures."""
    found = [Found(labels(motion), np.full(400, 0.9, np.float32))]
    row = confirm(["untrained"], found, (None, None), GRAYS, SIZE, load_config("configs/label.py"))
    assert row.kind == kind and len(row.xy) == (400 if kind else 0)
    assert ("pictures do not show" in row.reason) == (not kind)
