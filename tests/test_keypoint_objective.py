"""Training keypoint matchers on video pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gim_jax.data.augment import Geometry
from gim_jax.models.lightglue import LightGlue, LightGlueConfig
from gim_jax.models.sparse import valid_size
from gim_jax.models.superglue import SuperGlue, SuperGlueConfig
from gim_jax.models.superpoint import SuperPointConfig
from gim_jax.train.keypoints import keypoint_objective
from tests.networks import random_variables

EXTRACTOR = SuperPointConfig(16, nms_radius=2)
MODULES = {
    "superglue": SuperGlue(SuperGlueConfig(EXTRACTOR, num_layers=2, keypoint_encoder=(16,), sinkhorn_iters=5)),
    "lightglue": LightGlue(LightGlueConfig(EXTRACTOR, num_layers=1, depth_confidence=0.9, kpt_offset=0.5)),
}


def batch(num_labels=10, slots=14):
    """Image 1 is image 0 moved by 8 px: labels say so."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 40, 56, 1), np.uint8)
    kpts = rng.uniform(12, 36, (1, slots, 2)).astype(np.float32)
    return {
        "image0": jnp.asarray(image),
        "image1": jnp.asarray(np.roll(image, 8, 2)),
        "mask0": jnp.ones((1, 5, 7), bool),
        "mask1": jnp.ones((1, 5, 7), bool),
        "kpts0": jnp.asarray(kpts),
        "kpts1": jnp.asarray(kpts + [8, 0]).astype(jnp.float32),
        "match_mask": jnp.arange(slots)[None] < num_labels,
    }


@pytest.mark.parametrize("family", MODULES)
def test_training_learns_the_labels_and_leaves_the_detector_alone(family):
    module = MODULES[family]
    image = jnp.zeros((1, 32, 32, 1))
    variables = jax.jit(module.init)(jax.random.key(0), image, image)
    params, stats = variables["params"], variables.get("batch_stats", {})
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params, stats, opt, rng):
        def loss_fn(params):
            now = {"params": params, "batch_stats": stats}
            loss, metrics, new = keypoint_objective(module, now, batch(), rng, True)
            return loss, (metrics, new)

        (loss, (metrics, stats_)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), stats_, opt, loss, metrics, grads

    opt, history = tx.init(params), []
    for i in range(25):
        params, stats, opt, loss, metrics, grads = step(params, stats, opt, jax.random.key(i))
        history.append(float(loss))
        if i == 0:
            assert all((g == 0).all() for g in jax.tree.leaves(grads["extractor"]))
            assert metrics["num_matches"] == 10
            assert jax.tree.structure(stats) == jax.tree.structure(variables.get("batch_stats", {}))
    assert history[-1] < 0.5 * history[0], history
    assert metrics["recall"] > 0.5
    jax.tree.map(np.testing.assert_array_equal, params["extractor"], variables["params"]["extractor"])


def test_what_unlabelled_slots_hold_does_not_matter():
    module = MODULES["lightglue"]
    image = jnp.zeros((1, 32, 32, 1))
    variables = random_variables(module, image, image)
    first, second = batch(), batch()
    second["kpts0"] = second["kpts0"].at[:, 10:].set(-1e6)
    run = jax.jit(lambda b: keypoint_objective(module, variables, b, jax.random.key(0), False)[0])
    assert run(first) == run(second) > 0
    assert np.isfinite(run({**first, "match_mask": first["match_mask"] & False}))


def test_labels_of_a_warped_image_are_described():
    # An image of 64x40 in a box of 64x64, upside down: it fills the lower 40 rows, all of them described.
    upside_down = np.array([[-1.0, 0, 63], [0, -1, 63], [0, 0, 1]])
    mask = Geometry((64, 40), (0, 0), (64, 40), upside_down).coarse_mask((64, 64))[None]
    np.testing.assert_array_equal(mask[0], np.arange(8)[:, None].repeat(8, 1) >= 3)
    image = np.random.default_rng(0).random((1, 64, 64, 1), np.float32) * (np.arange(64) >= 24)[:, None, None]
    module = MODULES["superglue"]
    variables = random_variables(module, image, image)
    kpts = np.stack(np.meshgrid(np.arange(4, 64, 8), np.arange(28, 64, 8)), -1).reshape(1, -1, 2)

    @jax.jit
    def describe(image, mask, kpts):
        size = valid_size(image, mask)
        maps = module.apply(variables, image, image, size, size, method="encode")[0]
        return size, module.bind(variables).extractor.at(maps, kpts, size)["desc"]

    size, desc = describe(image, mask, jnp.asarray(kpts, jnp.float32))
    np.testing.assert_array_equal(size, [[64, 64]])
    np.testing.assert_allclose(jnp.linalg.norm(desc, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("family", MODULES)
def test_detection_and_description_share_one_run_of_the_detector(family):
    """The convolutions of a step on posed pairs are those of one SuperPoint: 8 of the encoder, 2 of each head."""
    module = MODULES[family]
    image = jnp.zeros((1, 32, 32, 1))
    variables = jax.eval_shape(module.init, jax.random.key(0), image, image)
    posed = {"posed": jnp.ones(1, bool), "depth_complete": jnp.ones(1, bool), "imsize1": jnp.array([[56, 40]])}
    posed |= {f"depth{i}": jnp.ones((1, 40, 56)) for i in "01"} | {f"K{i}": jnp.eye(3)[None] for i in "01"}
    posed |= {"Hq_aug": jnp.eye(3)[None], "T_0to1": jnp.eye(4)[None]}
    step = lambda v, b: keypoint_objective(module, v, b, jax.random.key(0), True)  # noqa: E731
    traced = jax.make_jaxpr(step)(variables, batch() | posed)
    assert str(traced).count("conv_general_dilated[") == 12
