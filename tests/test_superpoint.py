"""SuperPoint's detection, description and padding; parity with the official code is in test_parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax.models import superpoint
from gim_jax.models.superpoint import SuperPoint, SuperPointConfig
from tests.networks import random_variables

DUMMY = jnp.zeros((1, 16, 16, 1))


@pytest.fixture(scope="module")
def model():
    """A small K, and weights that give an uneven score map."""
    module = SuperPoint(SuperPointConfig(max_keypoints=48, nms_radius=3, threshold=0.0))
    params = random_variables(module, DUMMY, gain=1.5)
    return jax.jit(module.apply), params


def image(height, width, seed=0, channels=1):
    return np.random.default_rng(seed).random((1, height, width, channels), np.float32)


def brute_force_nms(scores, radius):
    """The rule of the paper's code in plain loops: [H, W] -> [H, W]."""
    height, width = scores.shape

    def window_max(x, i, j):
        return x[max(i - radius, 0) : i + radius + 1, max(j - radius, 0) : j + radius + 1].max()

    def maxima(x):
        return np.array([[x[i, j] == window_max(x, i, j) for j in range(width)] for i in range(height)])

    kept = maxima(scores)
    for _ in range(2):
        covered = np.array([[window_max(kept, i, j) for j in range(width)] for i in range(height)])
        rest = np.where(covered, 0, scores)
        kept |= maxima(rest) & ~covered
    return np.where(kept, scores, 0)


def test_nms_equals_brute_force_also_on_plateaus():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (23, 31)).astype(np.float32) / 12  # many equal neighbours
    scores[3:6, 4:9] = 2.0
    found = superpoint.non_maximum_suppression(jnp.asarray(scores)[None], 2, jnp.ones((1, 23, 31), bool))[0]
    np.testing.assert_array_equal(found, brute_force_nms(scores, 2))
    assert (np.asarray(found)[3:6, 4:9] == 2).all()


def test_padding_changes_nothing(model):
    """A batch of two sizes, neither a multiple of 8, equals the two images alone."""
    apply, params = model
    small, large = image(61, 83, 1), image(72, 90, 2)
    batch = np.random.default_rng(3).random((2, 80, 96, 1), np.float32)  # noise where nothing is valid
    batch[0, :61, :83], batch[1, :72, :90] = small, large
    together = apply(params, batch, jnp.array([[83, 61], [90, 72]]))
    for i, alone in enumerate([apply(params, small), apply(params, large)]):
        assert alone["mask"].sum() > 20
        for name in ("kpts", "mask"):
            np.testing.assert_array_equal(together[name][i], alone[name][0])
        np.testing.assert_allclose(together["scores"][i], alone["scores"][0], atol=1e-6)
        np.testing.assert_allclose(together["desc"][i], alone["desc"][0], atol=2e-6)


def test_descriptors_have_unit_length_and_masked_slots_are_zero():
    module = SuperPoint(SuperPointConfig(max_keypoints=400, threshold=0.005))
    params = random_variables(module, DUMMY)
    found = jax.jit(module.apply)(params, image(24, 24))  # 24 x 24 px cannot hold 400 keypoints
    mask = np.asarray(found["mask"])
    assert 0 < mask.sum() < 400
    np.testing.assert_allclose(np.linalg.norm(found["desc"], axis=-1), mask.astype(float), atol=1e-6)
    assert (np.asarray(found["scores"])[~mask] == 0).all() and (np.asarray(found["kpts"])[~mask] == 0).all()
    assert (np.asarray(found["scores"])[mask] > 0.005).all()


@pytest.mark.parametrize("border_of, last", [("map", (75, 51)), ("image", (79, 55))])
def test_no_keypoint_within_the_border(border_of, last):
    """85 x 63 px: the score map is 80 x 56. Its border starts at 76, 52; that of the image at 81, 59."""
    module = SuperPoint(SuperPointConfig(80 * 56, nms_radius=0, threshold=0.0, border_of=border_of))
    found = jax.jit(module.apply)(random_variables(module, DUMMY), image(63, 85))
    kpts = np.asarray(found["kpts"][0])[np.asarray(found["mask"][0])]
    assert len(kpts) == (last[0] - 3) * (last[1] - 3)  # without suppression every pixel is one
    assert tuple(kpts.min(0)) == (4, 4) and tuple(kpts.max(0)) == last


def test_rgb_is_weighted_as_luma(model):
    apply, params = model
    rgb = image(48, 56, 4, channels=3)
    gray = (0.299 * rgb[..., :1] + 0.587 * rgb[..., 1:2] + 0.114 * rgb[..., 2:]).astype(np.float32)
    np.testing.assert_array_equal(apply(params, rgb)["kpts"], apply(params, gray)["kpts"])


def test_descriptor_positions():
    """Worked by hand: legacy maps px 0 to -0.4351 and px 639 to the last of 80 cells."""
    kpts, cells = jnp.array([[[0.0, 0.0], [639.0, 639.0], [3.5, 3.5]]]), jnp.array([[80, 80]])
    np.testing.assert_allclose(
        superpoint.descriptor_index(kpts, cells, "legacy")[0, :, 0], [-3.5 / 635.5 * 79, 79.0, 0.0], atol=1e-5
    )
    np.testing.assert_allclose(superpoint.descriptor_index(kpts, cells, "fixed")[0, :, 0], [-0.5, 79.375, -0.0625])
    np.testing.assert_allclose(superpoint.descriptor_index(kpts, cells, "exact")[0, :, 0], [-0.4375, 79.4375, 0.0])
    with pytest.raises(ValueError, match="sampling: 'best', expected one of legacy"):
        superpoint.descriptor_index(kpts, cells, "best")


def test_refinement_finds_the_centre_of_mass():
    scores = np.zeros((1, 20, 20), np.float32)
    scores[0, 10, 9:12] = [1, 2, 5]  # mean x = 10 + 4/8
    offset = superpoint.soft_argmax(jnp.asarray(scores), jnp.array([[10 * 20 + 10]]), 2)
    np.testing.assert_allclose(offset[0, 0], [0.5, 0.0], atol=1e-6)


def test_random_places_fill_the_box_of_the_found_ones():
    mask = jnp.arange(500)[None] < 3
    kpts = jnp.zeros((1, 500, 2)).at[0, :3].set(jnp.array([[10.0, 40.0], [30.0, 20.0], [20.0, 25.0]]))
    size = jnp.array([[64, 48]])
    filled = superpoint.fill_random(jax.random.key(0), {"kpts": kpts, "mask": mask}, size)
    np.testing.assert_array_equal(filled[0, :3], kpts[0, :3])
    rest = np.asarray(filled[0, 3:])
    assert (rest.min(0) >= [10, 20]).all() and (rest.max(0) <= [30, 40]).all()
    assert (rest.min(0) < [11, 21]).all() and (rest.max(0) > [29, 39]).all()
    none = superpoint.fill_random(jax.random.key(0), {"kpts": kpts, "mask": mask & False}, size)
    assert none.min() >= 0 and 40 < none.max() < 48


@pytest.mark.parametrize("config, count", [("superpoint", 1_300_865), ("superpoint_open", 1_304_067)])
def test_number_of_parameters(config, count):
    """The counts of the published networks."""
    module = SuperPoint(superpoint.CONFIGS[config])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 480, 640, 1)))
    assert sum(p.size for p in jax.tree.leaves(shapes["params"])) == count
    assert sum(p.size for p in jax.tree.leaves(shapes.get("batch_stats", {}))) == (
        3202 if config == "superpoint_open" else 0
    )


def test_open_normalises_after_the_rectifier():
    """With statistics mean 1, var 3 the first block gives (relu(conv) - 1) / sqrt(3 + 1e-3)."""
    block = superpoint.Block(1, 1, True, jnp.float32)
    variables = {
        "params": {
            "conv": {"kernel": jnp.ones((1, 1, 1, 1)), "bias": jnp.zeros(1)},
            "bn": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
        },
        "batch_stats": {"bn": {"mean": jnp.ones(1), "var": jnp.full(1, 3.0)}},
    }
    x = jnp.array([-2.0, 5.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(block.apply(variables, x).ravel(), np.array([-1.0, 4.0]) / 3.001**0.5, rtol=1e-6)


def test_flat_image_gives_finite_results_and_tiny_ones_an_error(model):
    apply, params = model
    for shape in ((8, 8), (40, 40)):
        found = apply(params, np.full((1, *shape, 1), 0.5, np.float32))
        assert all(np.isfinite(v).all() for v in found.values())
    with pytest.raises(ValueError, match="image: 9x7 px, SuperPoint needs at least 8x8"):
        apply(params, image(7, 9))


def test_full_size_shapes():
    module = SuperPoint(superpoint.CONFIGS["gim_superpoint"])
    params = jax.eval_shape(module.init, jax.random.key(0), DUMMY)
    size = jax.ShapeDtypeStruct((4, 2), jnp.int32)
    out = jax.eval_shape(module.apply, params, jax.ShapeDtypeStruct((4, 1024, 1024, 1), jnp.float32), size)
    assert {k: v.shape for k, v in out.items()} == {
        "kpts": (4, 2048, 2),
        "scores": (4, 2048),
        "desc": (4, 2048, 256),
        "mask": (4, 2048),
    }
