"""SuperGlue: padding, transport, statistics, the pipeline; parity with the official code is in test_parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax.models import superglue
from gim_jax.models.sparse import valid_size
from gim_jax.models.superglue import CONFIGS, SuperGlue, SuperGlueConfig, SuperGlueMatcher
from gim_jax.models.superpoint import SuperPointConfig
from gim_jax.ops.assignment import log_optimal_transport, mutual_matches
from tests.networks import random_variables

SMALL = SuperGlueConfig(
    SuperPointConfig(24, nms_radius=3, threshold=0.0),
    keypoint_encoder=(16,),
    num_layers=2,
    sinkhorn_iters=10,
    threshold=0.0,
)


def features(rng, count, capacity, dim=256):
    """One image's features, `count` of `capacity` slots valid, the rest noise."""
    desc = rng.standard_normal((1, capacity, dim)).astype(np.float32)
    return {
        "kpts": rng.uniform(0, 100, (1, capacity, 2)).astype(np.float32),
        "scores": rng.random((1, capacity)).astype(np.float32),
        "desc": desc / np.linalg.norm(desc, axis=-1, keepdims=True),
        "mask": np.arange(capacity)[None] < count,
    }


def cut(x, count):
    return {**{k: v[:, :count] for k, v in x.items()}, "mask": None}


SIZE = np.array([[120, 100]])


@pytest.fixture(scope="module")
def matcher():
    module = SuperGlueMatcher(SMALL)
    x = cut(features(np.random.default_rng(0), 2, 2), 2)
    variables = random_variables(module, x, x, SIZE, SIZE)
    return module, variables


def test_padding_changes_nothing(matcher):
    """A batch of pairs with 13 x 20 and 17 x 5 keypoints equals the pairs alone."""
    module, variables = matcher
    rng = np.random.default_rng(1)
    counts = [(13, 20), (17, 5)]
    pairs = [(features(rng, m, 18), features(rng, n, 21)) for m, n in counts]
    batch = [jax.tree.map(lambda *x: np.concatenate(x), *(pair[i] for pair in pairs)) for i in (0, 1)]
    together = jax.jit(module.apply)(variables, *batch, np.tile(SIZE, (2, 1)), np.tile(SIZE, (2, 1)))
    for i, ((m, n), (x0, x1)) in enumerate(zip(counts, pairs)):
        alone = module.apply(variables, cut(x0, m), cut(x1, n), SIZE, SIZE)
        keep0, keep1 = np.r_[:m, 18], np.r_[:n, 21]
        np.testing.assert_allclose(
            together["log_assignment"][i][keep0][:, keep1], alone["log_assignment"][0], atol=2e-5
        )
        np.testing.assert_array_equal(together["matches0"][i], np.r_[alone["matches0"][0], np.full(18 - m, -1)])
        np.testing.assert_array_equal(together["matches1"][i], np.r_[alone["matches1"][0], np.full(21 - n, -1)])
        assert (alone["matches0"] >= 0).sum() > 2


def test_images_without_keypoints_give_no_matches(matcher):
    module, variables = matcher
    rng = np.random.default_rng(2)
    pairs = [(features(rng, m, 6), features(rng, n, 6)) for m, n in [(0, 6), (6, 0), (0, 0)]]
    batch = [jax.tree.map(lambda *x: np.concatenate(x), *(pair[i] for pair in pairs)) for i in (0, 1)]
    size = np.tile(SIZE, (3, 1))
    out = jax.jit(module.apply)(variables, *batch, size, size)
    assert (np.asarray(out["matches0"]) == -1).all() and (np.asarray(out["matches1"]) == -1).all()
    assert all(np.isfinite(v).all() for v in out.values())


def unrolled_transport(scores, bin_score, iters):
    """SuperGlue's equations, written down one by one: [M, N] -> [M+1, N+1]."""
    m, n = scores.shape
    z = jnp.block([[scores, jnp.full((m, 1), bin_score)], [jnp.full((1, n), bin_score), jnp.full((1, 1), bin_score)]])
    mu, nu = jnp.append(jnp.ones(m), n) / (m + n), jnp.append(jnp.ones(n), m) / (m + n)
    u, v = jnp.zeros(m + 1), jnp.zeros(n + 1)
    for _ in range(iters):
        u = jnp.log(mu) - jax.nn.logsumexp(z + v, axis=1)
        v = jnp.log(nu) - jax.nn.logsumexp(z + u[:, None], axis=0)
    return z + u[:, None] + v + jnp.log(m + n)


def test_transport_equals_its_equations_with_gradient():
    rng = np.random.default_rng(3)
    scores = jnp.asarray(rng.normal(0, 3, (7, 9)), jnp.float32)
    weights = jnp.asarray(rng.normal(0, 1, (8, 10)), jnp.float32)
    padded = jnp.full((1, 10, 12), 50.0).at[0, :7, :9].set(scores)
    mask0, mask1 = (jnp.arange(10) < 7)[None], (jnp.arange(12) < 9)[None]
    keep0, keep1 = jnp.r_[:7, 10], jnp.r_[:9, 12]

    def value(fn):
        return jax.value_and_grad(lambda s, a: (fn(s, a) * weights).sum(), argnums=(0, 1))

    def masked(s, a):
        return log_optimal_transport(padded.at[0, :7, :9].set(s), a, 6, mask0, mask1)[0][keep0][:, keep1]

    want = value(lambda s, a: unrolled_transport(s, a, 6))(scores, 1.5)
    for fn in (masked, lambda s, a: log_optimal_transport(s[None], a, 6)[0]):
        found = jax.jit(value(fn))(scores, jnp.float32(1.5))
        np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
        np.testing.assert_allclose(found[1][0], want[1][0], atol=2e-5)
        np.testing.assert_allclose(found[1][1], want[1][1], atol=1e-4)
    rows = np.exp(log_optimal_transport(scores[None], jnp.float32(1.5), 200)[0])
    np.testing.assert_allclose(rows.sum(1), [1] * 7 + [9], rtol=1e-4)
    np.testing.assert_allclose(rows.sum(0), [1] * 9 + [7], rtol=1e-4)


def test_transport_keeps_no_matrix_per_iteration():
    """Memory of the gradient at 100 iterations: a few matrices and two vectors each, not 100 matrices."""
    scores = jax.ShapeDtypeStruct((1, 300, 300), jnp.float32)
    step = jax.jit(jax.grad(lambda s: log_optimal_transport(s, jnp.float32(1.0), 100)[0, 0, 0]))
    used = step.lower(scores).compile().memory_analysis().temp_size_in_bytes
    assert used < 12 * 301 * 301 * 4 + 100 * 2 * 301 * 4 * 2


def test_mutual_matches_by_hand():
    p = jnp.log(jnp.array([[[0.5, 0.1, 0.05], [0.6, 0.2, 0.05], [0.1, 0.1, 0.08]]]))
    matches0, matches1, scores0, scores1 = mutual_matches(p, 0.15)
    np.testing.assert_array_equal(matches0[0], [-1, 0, -1])  # row 2's best column prefers row 1, too
    np.testing.assert_array_equal(matches1[0], [1, -1, -1])
    np.testing.assert_allclose(scores0[0], [0, 0.6, 0], atol=1e-6)
    np.testing.assert_allclose(scores1[0], [0.6, 0, 0], atol=1e-6)
    mask = jnp.array([[True, False, True]])
    np.testing.assert_array_equal(mutual_matches(p, 0.15, mask0=mask)[0][0], [0, -1, -1])


def test_batch_statistics_leave_padding_out(matcher):
    module, variables = matcher
    x = features(np.random.default_rng(4), 9, 15)
    train = lambda x: module.apply(variables, x, x, SIZE, SIZE, True, mutable=["batch_stats"])[1]  # noqa: E731
    padded, alone = jax.jit(train)(x), train(cut(x, 9))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), padded, alone)
    before = variables["batch_stats"]["kenc"]["encoder_1"]["mean"]
    assert np.abs(padded["batch_stats"]["kenc"]["encoder_1"]["mean"] - before).max() > 1e-3


def test_layers_recomputed_or_stored_give_the_same_gradient(matcher):
    module, variables = matcher
    other = SuperGlueMatcher(dataclasses.replace(SMALL, remat="cheap"))
    x = cut(features(np.random.default_rng(5), 8, 8), 8)

    def grad(net):
        def loss(params):
            out = net.apply({**variables, "params": params}, x, x, SIZE, SIZE, True, mutable=["batch_stats"])
            return out[0]["log_assignment"][:, 0, 0].sum()

        return jax.grad(loss)(variables["params"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grad(module), grad(other))


@pytest.mark.parametrize("name, count", [("superglue_outdoor", 12_023_297), ("superglue_rootsift", 3_018_497)])
def test_number_of_parameters(name, count):
    """The counts of the published network and of its 128-d form."""
    config = CONFIGS[name]
    x = cut(features(np.random.default_rng(0), 2, 2, config.dim), 2)
    module = SuperGlueMatcher(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, x, SIZE, SIZE)
    assert sum(p.size for p in jax.tree.leaves(shapes["params"])) == count


@pytest.fixture(scope="module")
def pipeline():
    module = SuperGlue(SMALL)
    image = jnp.zeros((1, 32, 32, 1))
    variables = random_variables(module, image, image, gain=1.5)
    variables["params"]["matcher"]["final_proj"]["kernel"] *= 8
    traces = []

    @jax.jit
    def run(*inputs):
        traces.append(1)
        return superglue.match(module, variables, *inputs)

    return run, traces


def test_padded_images_match_like_cropped_ones_without_a_new_trace(pipeline):
    run, traces = pipeline
    rng = np.random.default_rng(6)
    image0, image1 = rng.random((1, 40, 56, 1), np.float32), rng.random((1, 48, 48, 1), np.float32)
    padded = [rng.random((1, 56, 64, 1), np.float32) for _ in "01"]
    masks = [np.zeros((1, 7, 8), bool) for _ in "01"]
    for pad, mask, image in zip(padded, masks, (image0, image1)):
        pad[:, : image.shape[1], : image.shape[2]] = image
        mask[:, : image.shape[1] // 8, : image.shape[2] // 8] = True
    found = run(*padded, *masks)
    run(*padded[::-1], *masks[::-1])
    flat = run(np.full_like(padded[0], 0.5), np.zeros_like(padded[1]), *masks)
    assert len(traces) == 1  # other images, other valid sizes: the same program
    assert all(np.isfinite(v).all() for v in flat.values())
    alone = run(image0, image1, None, None)
    np.testing.assert_array_equal(found["mask"], alone["mask"])
    assert found["mask"].sum() > 2
    for name in ("kpts0", "kpts1"):
        np.testing.assert_array_equal(found[name], alone[name])
    np.testing.assert_allclose(found["conf"], alone["conf"], rtol=1e-3)


def test_valid_size_of_masks():
    image, mask = jnp.zeros((2, 64, 80, 1)), np.zeros((2, 8, 10), bool)
    mask[0, :5, :7] = mask[1, :8, :1] = True
    np.testing.assert_array_equal(valid_size(image, jnp.asarray(mask)), [[56, 40], [8, 64]])
    np.testing.assert_array_equal(valid_size(image, None), [[80, 64], [80, 64]])
    np.testing.assert_array_equal(valid_size(image, jnp.array([[77, 33], [1, 2]])), [[77, 33], [1, 2]])


def test_full_size_shapes():
    """The outdoor protocol: 1600 px, 2048 keypoints, batch of 4."""
    module = SuperGlue(CONFIGS["superglue_outdoor"])
    image = jax.ShapeDtypeStruct((4, 1200, 1600, 1), jnp.float32)
    mask = jax.ShapeDtypeStruct((4, 150, 200), jnp.bool_)
    params = jax.eval_shape(module.init, jax.random.key(0), image, image)
    out = jax.eval_shape(lambda *a: superglue.match(module, *a), params, image, image, mask, mask)
    assert {k: v.shape for k, v in out.items()} == {
        "kpts0": (4, 2048, 2),
        "kpts1": (4, 2048, 2),
        "conf": (4, 2048),
        "mask": (4, 2048),
    }


def test_layer_starts_as_in_pytorch():
    # Linear layers from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), the four of the attention as copies, no last bias.
    module = superglue.Layer(SuperGlueConfig(dim=16))
    x = jnp.ones((1, 2, 16))
    params = jax.jit(module.init, static_argnums=5)(jax.random.key(0), x, x, None, None, False)["params"]
    attention = [params["attn"][name] for name in ("proj_0", "proj_1", "proj_2", "merge")]
    for part in attention:
        jax.tree.map(np.testing.assert_array_equal, part, attention[0])
    for kernel, fan_in in ((attention[0]["kernel"], 16), (params["mlp_0"]["kernel"], 32)):
        assert 0.9 / fan_in**0.5 < np.abs(kernel).max() <= 1 / fan_in**0.5
        np.testing.assert_allclose(np.std(kernel), (3 * fan_in) ** -0.5, rtol=0.1)
    assert not params["mlp_3"]["bias"].any() and params["mlp_0"]["bias"].any()
