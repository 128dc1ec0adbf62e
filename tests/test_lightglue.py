"""LightGlue: padding, early stop and pruning per pair, heads; parity with the official code is in test_parity."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax.models import lightglue
from gim_jax.models.disk import DiskConfig
from gim_jax.models.lightglue import CONFIGS, LightGlue, LightGlueConfig, LightGlueMatcher
from tests.networks import random_variables
from tests.test_superglue import cut, features

SMALL = LightGlueConfig(num_layers=3, threshold=0.0, input_dim=32, dim=32, num_heads=2)
SIZE = np.array([[120, 100]])


@pytest.fixture(scope="module")
def variables():
    x = cut(features(np.random.default_rng(0), 2, 2, 32), 2)
    variables = random_variables(LightGlueMatcher(SMALL), x, x, SIZE, SIZE)
    for i in range(3):
        variables["params"][f"log_assignment_{i}"]["final_proj"]["kernel"] *= 0.5
        variables["params"][f"log_assignment_{i}"]["matchability"]["kernel"] *= 2  # some can be dropped
    return variables


def batch_of(counts, capacity, seed=1):
    rng = np.random.default_rng(seed)
    pairs = [(features(rng, m, capacity[0], 32), features(rng, n, capacity[1], 32)) for m, n in counts]
    return pairs, [jax.tree.map(lambda *x: np.concatenate(x), *(pair[i] for pair in pairs)) for i in (0, 1)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_pairs_of_a_batch_and_their_padding_do_not_mix(variables, adaptive):
    """Two pairs, padded; with `adaptive` they stop at different layers and drop different points."""
    config = dataclasses.replace(SMALL, depth_confidence=0.53, width_confidence=0.6) if adaptive else SMALL
    variables = jax.tree.map(np.copy, variables)
    heads = variables["params"]["token_confidence_0"]["token_0"]
    heads["kernel"] *= 20  # about half of the points are sure after the first layer
    heads["bias"] = heads["bias"] * 0 + 1.0
    module = LightGlueMatcher(config)
    counts = [(13, 20), (17, 5)]
    pairs, batch = batch_of(counts, (18, 21), seed=3)
    together = jax.jit(module.apply)(variables, *batch, np.tile(SIZE, (2, 1)), np.tile(SIZE, (2, 1)))
    if adaptive:
        assert len(set(np.asarray(together["stop"]).tolist())) == 2, together["stop"]
        assert 0 < together["kept0"].sum() < 30
    for i, ((m, n), (x0, x1)) in enumerate(zip(counts, pairs)):
        alone = jax.jit(module.apply)(variables, cut(x0, m), cut(x1, n), SIZE, SIZE)
        keep0, keep1 = np.r_[:m, 18], np.r_[:n, 21]
        assert together["stop"][i] == alone["stop"][0]
        np.testing.assert_array_equal(together["kept0"][i], np.r_[alone["kept0"][0], np.full(18 - m, False)])
        np.testing.assert_allclose(
            together["log_assignment"][i][keep0][:, keep1], alone["log_assignment"][0], rtol=1e-5, atol=2e-5
        )
        np.testing.assert_array_equal(together["matches0"][i], np.r_[alone["matches0"][0], np.full(18 - m, -1)])
        np.testing.assert_array_equal(together["matches1"][i], np.r_[alone["matches1"][0], np.full(21 - n, -1)])


def test_settings_that_never_apply_change_nothing(variables):
    """Stopping at 100 % sure points and dropping at certainty 1 is the complete network."""
    _, batch = batch_of([(9, 8)], (9, 8))
    config = dataclasses.replace(SMALL, depth_confidence=1.0, width_confidence=1.0)
    plain = jax.jit(LightGlueMatcher(SMALL).apply)(variables, *batch, SIZE, SIZE)
    adaptive = jax.jit(LightGlueMatcher(config).apply)(variables, *batch, SIZE, SIZE)
    for name in ("log_assignment", "scores0"):
        np.testing.assert_allclose(plain[name], adaptive[name], atol=1e-5)
    np.testing.assert_array_equal(plain["depth0"], adaptive["depth0"])
    training = LightGlueMatcher(dataclasses.replace(config, depth_confidence=0.01)).apply
    np.testing.assert_allclose(
        training(variables, *batch, SIZE, SIZE, True)["log_assignment"], plain["log_assignment"], atol=1e-5
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_images_without_keypoints_give_no_matches(variables, adaptive):
    config = dataclasses.replace(SMALL, depth_confidence=0.95, width_confidence=0.99) if adaptive else SMALL
    _, batch = batch_of([(0, 6), (6, 0), (0, 0)], (6, 6))
    size = np.tile(SIZE, (3, 1))
    out = jax.jit(LightGlueMatcher(config).apply)(variables, *batch, size, size)
    assert (np.asarray(out["matches0"]) == -1).all() and (np.asarray(out["matches1"]) == -1).all()
    assert all(np.isfinite(v).all() for v in out.values())


def test_the_last_of_all_layers_is_the_answer(variables):
    _, batch = batch_of([(9, 8)], (9, 8))
    module = LightGlueMatcher(SMALL)
    layers = module.apply(variables, *batch, SIZE, SIZE, method="supervised")
    out = module.apply(variables, *batch, SIZE, SIZE)
    assert len(layers) == 3
    np.testing.assert_allclose(layers[-1][0], out["log_assignment"], atol=1e-6)
    rows = np.exp(layers[0][0])[:, :-1].sum(2)
    assert (rows < 1.001).all()  # what is left is the doubt


def test_rotations_depend_on_differences_of_places_only():
    """Queries and keys turned by their places have products that a common shift of places leaves alone."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 3, 8)).astype(np.float32)
    places, shift = rng.standard_normal((2, 1, 1, 4)).astype(np.float32)
    first = lightglue.rotate(q, jnp.cos(places), jnp.sin(places))
    moved = lightglue.rotate(q, jnp.cos(places + shift), jnp.sin(places + shift))
    key = lightglue.rotate(k, jnp.cos(places * 0), jnp.sin(places * 0))
    key_moved = lightglue.rotate(k, jnp.cos(shift), jnp.sin(shift))
    np.testing.assert_allclose((first * key).sum(-1), (moved * key_moved).sum(-1), atol=1e-5)
    np.testing.assert_allclose((first**2).sum(-1), (q**2).sum(-1), rtol=1e-5)


def test_offset_and_size_normalise_places():
    """GIM: half a pixel is added, and the longer side becomes [-1, 1]: the image's corner is (-1, -0.75) here."""
    config = dataclasses.replace(SMALL, kpt_offset=0.5)
    x = cut(features(np.random.default_rng(0), 2, 2, 32), 2)
    x["kpts"] = np.array([[[-0.5, -0.5], [39.5, 29.5]]], np.float32)
    module = LightGlueMatcher(config)
    variables = random_variables(module, x, x, SIZE, SIZE)
    variables["params"]["posenc"]["Wr"]["kernel"] = np.eye(2, 8, dtype=np.float32)
    _, (cosines, _) = module.apply(variables, x, np.array([[80, 60]]), method="encode")
    np.testing.assert_allclose(cosines[0, :, :2], np.cos([[-1, -0.75], [0, 0]]), atol=1e-6)


@pytest.mark.parametrize(
    "name, count", [("gim_lightglue", 11_851_601), ("lightglue_sift", 11_884_689), ("lightglue_disk", 11_884_625)]
)
def test_number_of_parameters(name, count):
    """Published counts; DISK's form lacks the 64 parameters of scale and orientation."""
    config = CONFIGS[name]
    x = cut(features(np.random.default_rng(0), 2, 2, config.input_dim), 2)
    x |= {"scales": np.ones((1, 2), np.float32), "oris": np.ones((1, 2), np.float32)}
    shapes = jax.eval_shape(LightGlueMatcher(config).init, jax.random.key(0), x, x, SIZE, SIZE)
    assert sum(p.size for p in jax.tree.leaves(shapes["params"])) == count


def test_identical_images_match_point_to_point():
    """Whatever the weights, equal images have equal descriptors: matches lie on the diagonal."""
    config = dataclasses.replace(SMALL, extractor=DiskConfig(16, threshold=-1e9), input_dim=128, dim=128)
    module = LightGlue(config)
    image = np.random.default_rng(0).random((1, 32, 48, 3), np.float32)
    variables = random_variables(module, jnp.asarray(image), jnp.asarray(image))
    for kind, layer in itertools.product(("self_attn", "cross_attn"), range(3)):
        # small updates leave descriptors at about equal lengths, so that each is most similar to itself
        for value in variables["params"]["matcher"][f"transformers_{layer}"][kind]["ffn_3"].values():
            value *= 0.02
    traces = []

    @jax.jit
    def run(image0, image1):
        traces.append(1)
        return lightglue.match(module, variables, image0, image1)

    found = run(image, image)
    assert found["mask"].sum() > 8
    np.testing.assert_array_equal(found["kpts0"], found["kpts1"])
    flat = run(image * 0 + 0.5, image)
    assert all(np.isfinite(v).all() for v in flat.values())
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["gim_lightglue", "lightglue_superpoint_adaptive", "lightglue_disk"])
def test_full_size_shapes(name):
    module = LightGlue(CONFIGS[name])
    image = jax.ShapeDtypeStruct((2, 768, 1024, 3), jnp.float32)
    size = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), image, image)
    out = jax.eval_shape(lambda *a: lightglue.match(module, *a), params, image, image, size, size)
    assert out["kpts1"].shape == (2, 2048, 2) and out["mask"].dtype == bool
