"""What stays on its device where a batch is split over several: two batches as one, correlations."""

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding

from gim_jax.ops.correlation import local_correlation
from gim_jax.ops.pairing import join, part
from gim_jax.train import compiled, sharding


def test_parts_are_what_was_joined_pair_by_pair():
    x0, x1 = np.arange(6).reshape(3, 2), np.arange(6, 12).reshape(3, 2)
    both = join(x0, x1)
    np.testing.assert_array_equal(both, [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]])
    np.testing.assert_array_equal(part(both)[0], x0)
    np.testing.assert_array_equal(part(both)[1], x1)


def collectives(function, *arguments):
    """Of the gradient by the first argument, which all devices have; batches of the others are split over them."""
    split = NamedSharding(sharding.make_mesh(), sharding.BATCH)
    shapes = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=split if i else None) for i, shape in enumerate(arguments)
    ]
    return compiled.collectives(jax.jit(jax.grad(function)).trace(*shapes).lower().compile().as_text())


def test_gradient_through_joined_pairs_moves_nothing_but_its_sum():
    def loss(kernel, image0, image1):
        out0, out1 = part(jnp.tanh(join(image0, image1) @ kernel))
        return (out0 * out1).sum()

    assert collectives(loss, (8, 8), (16, 4, 8), (16, 4, 8)) == ({"all-reduce": 1}, 8 * 8 * 4)


def test_gradient_through_correlations_moves_nothing_but_its_sum():
    def loss(kernel, map0, map1, flow):
        return local_correlation(map0, map1 @ kernel, flow, 1).sum()

    assert collectives(loss, (8, 8), (8, 4, 4, 8), (8, 4, 4, 8), (8, 4, 4, 2)) == ({"all-reduce": 1}, 8 * 8 * 4)
