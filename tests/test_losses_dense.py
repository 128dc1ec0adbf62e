"""Losses of dense warps: closed forms for warps that are known."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from gim_jax import losses_dense
from gim_jax.models.dkm_network import position_grid

HEIGHT, WIDTH = 64, 96
STRIDES = (32, 16, 8, 4, 2, 1)

dense_loss = jax.jit(losses_dense.dense_loss)
scale_losses = jax.jit(losses_dense.scale_losses)
sparse_loss = jax.jit(losses_dense.sparse_loss, static_argnames="released")
depth_targets = jax.jit(losses_dense.depth_targets, static_argnums=0)
gim_depth_targets = jax.jit(losses_dense.gim_depth_targets, static_argnums=(0, 2))


def translation(shift_px, certainty=0.0):
    """Predictions of a warp that moves all pixels by (x, y) px."""
    step = np.float32(2 * np.asarray(shift_px) / (WIDTH, HEIGHT))
    out = {}
    for stride in STRIDES:
        shape = -(-HEIGHT // stride), -(-WIDTH // stride)
        flow = np.asarray(position_grid(*shape))[None] + step
        out[stride] = {"flow": flow, "certainty": np.full((1, *shape), certainty, np.float32)}
    return out


def points(num=50, border=17):
    """Points whose four neighbours exist at every stride."""
    rng = np.random.default_rng(0)
    return rng.uniform(border, (WIDTH - 1 - border, HEIGHT - 1 - border), (1, num, 2)).astype(np.float32)


def test_sparse_loss_is_zero_for_the_true_warp():
    kpts0 = points()
    shift = np.float32([5.25, -3.5])
    mask = np.ones(kpts0.shape[:2], bool)
    total, _, error_px = sparse_loss(translation(shift), kpts0, kpts0 + shift, mask)
    assert float(total) < 1e-5 and float(error_px.max()) < 1e-3
    released = sparse_loss(translation(shift), kpts0, kpts0 + shift, mask, released=True)[0]
    assert float(released) > 0.01  # its targets belong to another convention than the network's warp


def test_sparse_loss_is_the_distance_and_skips_masked_points():
    kpts0 = points()
    mask = np.arange(50)[None] < 20
    kpts1 = np.where(mask[..., None], kpts0 + np.float32([3, 4]), 1e3).astype(np.float32)
    total, parts, error_px = sparse_loss(translation((0, 0)), kpts0, kpts1, mask)
    want = np.hypot(3 * 2 / WIDTH, 4 * 2 / HEIGHT)
    assert all(abs(float(p["distance"]) - want) < 1e-5 for p in parts.values())
    np.testing.assert_allclose(total, 6 * want, rtol=1e-5)
    np.testing.assert_allclose(error_px[mask], 5, rtol=1e-4)
    assert all(abs(float(p["cross_entropy"]) - np.log(2)) < 1e-6 for p in parts.values())  # certainty 1/2


def test_sparse_loss_has_a_finite_gradient_at_zero_distance():
    kpts0 = points()
    mask = np.ones((1, 50), bool)
    grads = jax.jit(jax.grad(lambda p: sparse_loss(p, kpts0, kpts0, mask)[0]))(translation((0, 0)))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.fixture
def plane():
    """A plane 2 m in front of two parallel cameras 0.1 m apart: all pixels move by -focal * 0.1 / 2 px."""
    focal = 80.0
    K = np.array([[[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]]], np.float32)
    T = np.eye(4, dtype=np.float32)[None]
    T[0, 0, 3] = -0.1
    depth = np.full((1, HEIGHT, WIDTH), 2, np.float32)
    return depth, T, K, np.float32([-focal * 0.1 / 2, 0])


@pytest.mark.parametrize("stride", [8, 1])
def test_depth_targets_of_a_plane(plane, stride):
    depth, T, K, shift = plane
    depth = depth.copy()
    depth[0, :16] = 0  # unknown
    shape = HEIGHT // stride, WIDTH // stride
    target, valid = (np.asarray(x)[0].reshape(*shape, -1) for x in depth_targets(shape, depth, depth, T, K, K))
    want = np.asarray(position_grid(*shape)) + 2 * shift / np.float32([WIDTH, HEIGHT])
    x_px = (want[..., 0] + 1) / 2 * WIDTH
    y_px = (np.asarray(position_grid(*shape))[..., 1] + 1) / 2 * HEIGHT
    expected = (x_px > 0) & (x_px < WIDTH - 1) & (y_px > 16) & (y_px < HEIGHT - 1)
    if stride == 8:
        assert (valid[..., 0] == expected).all()
    np.testing.assert_allclose(target[valid[..., 0]], want[valid[..., 0]], atol=1e-4)


def test_gim_depth_targets_go_through_crop_scale_flip_and_homography(plane):
    depth, T, K, shift = plane
    K = K.copy()
    K[0, :2, 2] -= 0.5  # the principal point in pixels counted from the centre of the first one
    scale, offset = np.float32([[2, 2]]), np.float32([[4, 3]])
    batch = {
        "depth0": depth, "depth1": depth, "T_0to1": T, "K0": K, "K1": K,
        "imsize1": np.array([[HEIGHT, WIDTH]]),
        "scale0": scale, "scale1": scale, "offset0": offset, "offset1": offset,
        "hflip1": np.array([True]), "vflip1": np.array([False]), "resize1": np.array([[20, 30]]),
        "Hq_aug": np.float32([[[1, 0, 2], [0, 1, -1], [0, 0, 1]]]),
    }  # fmt: skip
    target, valid = gim_depth_targets((20, 30), batch, (20, 30))
    x, y = np.meshgrid(np.arange(30), np.arange(20))
    moved = np.stack([x, y], -1).reshape(-1, 2) + shift / 2
    moved = moved * (-1, 1) + (29, 0) + (2, -1)
    want = (2 * moved + 1) / (30, 20) - 1
    assert valid.sum() > 300
    np.testing.assert_allclose(target[0], want, atol=2e-3)  # 1e-4 is added to every depth of 2


def test_pixels_count_at_fine_strides_only_where_the_stride_before_was_close():
    predictions = translation((0, 0))
    predictions[16]["flow"][:, :, 3:] += 0.2  # more than 2 / 512 * 4 * 8 = 0.125
    everywhere = {
        s: (np.asarray(position_grid(*p["flow"].shape[1:3])).reshape(1, -1, 2), np.ones((1, p["certainty"].size), bool))
        for s, p in predictions.items()
    }
    out = scale_losses(predictions, everywhere)
    assert out[16]["valid"].all() and out[4]["valid"].all()
    assert (out[8]["valid"] == (np.arange(12) // 2 < 3)).all()


def test_dense_loss_without_valid_pixels_trains_certainty_alone():
    predictions = translation((0, 0), certainty=1.0)
    nowhere = {s: (np.full((1, p["certainty"].size, 2), np.nan), np.zeros((1, p["certainty"].size), bool))
               for s, p in predictions.items()}  # fmt: skip
    loss = jax.jit(jax.value_and_grad(lambda p: dense_loss(p, nowhere), has_aux=True))
    (total, _), grads = loss(predictions)
    np.testing.assert_allclose(total, 6 * 0.01 * np.log1p(np.e), rtol=1e-5)
    assert all((g["flow"] == 0).all() and np.isfinite(g["certainty"]).all() for g in grads.values())


def test_certainty_of_excluded_pairs_is_not_trained():
    one = translation((0, 0), certainty=1.0)
    predictions = jax.tree.map(lambda x: np.concatenate([x, x]), one)
    nowhere = {s: (np.zeros((2, p["certainty"][0].size, 2)), np.zeros((2, p["certainty"][0].size), bool))
               for s, p in predictions.items()}  # fmt: skip
    trained = jnp.array([True, False])
    grads = jax.jit(jax.grad(lambda p: dense_loss(p, nowhere, certainty=trained)[0]))(predictions)
    assert all((g["certainty"][0] != 0).all() and (g["certainty"][1] == 0).all() for g in grads.values())
