"""DISK: detection rule, padding, descriptors at keypoints; equality with kornia is in test_oracles_sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax.models import disk
from gim_jax.models.disk import Disk, DiskConfig
from tests.networks import random_variables


@pytest.fixture(scope="module")
def model():
    module = Disk(DiskConfig(max_keypoints=60, threshold=-1e9))
    return module, random_variables(module, jnp.zeros((1, 16, 16, 3)), gain=1.4)


def test_padding_changes_nothing(model):
    """An odd image in a larger batch equals itself alone, where it is padded with black to multiples of 16."""
    module, variables = model
    rng = np.random.default_rng(0)
    image = rng.random((1, 37, 50, 3), np.float32)
    batch = rng.random((2, 64, 80, 3), np.float32)
    batch[1, :37, :50] = image
    apply = jax.jit(module.apply)
    together = apply(variables, batch, jnp.array([[80, 64], [50, 37]]))
    alone = apply(variables, image)
    assert alone["mask"].sum() > 20
    np.testing.assert_array_equal(together["kpts"][1], alone["kpts"][0])
    np.testing.assert_array_equal(together["mask"][1], alone["mask"][0])
    np.testing.assert_allclose(together["scores"][1], alone["scores"][0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together["desc"][1], alone["desc"][0], atol=1e-4)


def test_keypoints_are_strict_maxima_of_whole_windows(model):
    module, variables = model
    image = np.random.default_rng(1).random((1, 32, 48, 3), np.float32)
    scores = np.asarray(module.apply(variables, image, None, method="encode")[1])[0]
    found = jax.jit(module.apply)(variables, image)
    want = []
    for y in range(2, 30):
        for x in range(2, 46):
            window = scores[y - 2 : y + 3, x - 2 : x + 3].ravel()
            if scores[y, x] > np.delete(window, 12).max():
                want.append((x, y))
    kpts = np.asarray(found["kpts"][0])[np.asarray(found["mask"][0])]
    assert 20 < len(want) <= 60
    assert sorted(map(tuple, kpts.astype(int))) == sorted(want)
    assert (np.diff(np.asarray(found["scores"][0])[: len(want)]) <= 0).all()


def test_equal_neighbours_cancel_each_other():
    x = jnp.zeros((1, 7, 7)).at[0, 3, 2:4].set(5.0)
    assert (disk.neighbour_max(x, 2)[0, 3, 2:4] == 5).all()
    x = jnp.zeros((1, 7, 7)).at[0, 3, 3].set(5.0)
    assert disk.neighbour_max(x, 2)[0, 3, 3] == 0 and disk.neighbour_max(x, 2)[0, 1, 5] == 5


def test_descriptors_are_those_of_the_whole_map(model):
    """Computed at keypoints only, they equal the dense convolution there."""
    module, variables = model
    image = np.random.default_rng(2).random((1, 32, 32, 3), np.float32)
    found = module.apply(variables, image)
    x, _ = module.apply(variables, image, None, method="encode")
    last = variables["params"]["unet"]["path_up_3"]["conv_3"]
    dense = jax.lax.conv_general_dilated(x, last["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    dense = np.asarray(dense + last["bias"])[0, ..., :128]
    kpts, mask = np.asarray(found["kpts"][0]).astype(int), np.asarray(found["mask"][0])
    want = dense[kpts[:, 1], kpts[:, 0]][mask]
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(found["desc"][0])[mask], want, atol=1e-5)


def test_doubling_interpolates_between_pixel_centres():
    x = np.random.default_rng(3).random((1, 3, 4, 2), np.float32)
    want = jax.image.resize(x, (1, 6, 8, 2), "bilinear")
    np.testing.assert_allclose(disk.double(jnp.asarray(x), None), want, atol=1e-6)
    larger = np.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)), constant_values=9)
    cropped = disk.double(jnp.asarray(larger), jnp.array([[4, 3]]))[:, :6, :8]
    np.testing.assert_allclose(cropped, want, atol=1e-6)


def test_normalisation_counts_the_region_only():
    x = np.random.default_rng(4).normal(3, 2, (1, 6, 8, 2)).astype(np.float32)
    region = x[:, :4, :5]
    want = (region - region.mean((1, 2))) / np.sqrt(region.var((1, 2)) + 1e-5)
    found = disk.normalise(jnp.asarray(x), jnp.array([[5, 4]]))[:, :4, :5]
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_number_of_parameters():
    """The released file holds 1,092,369 numbers."""
    shapes = jax.eval_shape(Disk(DiskConfig()).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == 1_092_369
