"""Two batches as one."""

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding

from gim_jax.ops.pairing import join, part
from gim_jax.train import compiled, sharding


def test_parts_are_what_was_joined_pair_by_pair():
    x0, x1 = np.arange(6).reshape(3, 2), np.arange(6, 12).reshape(3, 2)
    both = join(x0, x1)
    np.testing.assert_array_equal(both, [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]])
    np.testing.assert_array_equal(part(both)[0], x0)
    np.testing.assert_array_equal(part(both)[1], x1)


def test_gradient_on_a_mesh_moves_nothing_but_its_sum():
    mesh = sharding.make_mesh()
    split = NamedSharding(mesh, sharding.BATCH)
    x = jax.ShapeDtypeStruct((16, 4, 8), np.float32, sharding=split)

    def loss(kernel, image0, image1):
        out0, out1 = part(jnp.tanh(join(image0, image1) @ kernel))
        return (out0 * out1).sum()

    kernel = jax.ShapeDtypeStruct((8, 8), np.float32)
    text = jax.jit(jax.grad(loss)).trace(kernel, x, x).lower().compile().as_text()
    assert compiled.collectives(text) == ({"all-reduce": 1}, 8 * 8 * 4)
