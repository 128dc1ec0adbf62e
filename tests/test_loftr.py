"""LoFTR: structure, masks, batches, streamed losses, and the live oracle where it is installed."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from gim_jax import losses, supervision
from gim_jax.models import loftr
from gim_jax.ops import assignment, attention, sampling
from gim_jax.train.objectives import OBJECTIVES
from tests import oracles

TINY = replace(
    loftr.CONFIGS["loftr_tiny"],
    initial_dim=8,
    block_dims=(8, 8, 16),
    num_heads=2,
    coarse_layers=("self", "cross"),
    thr=0.0,
    border_rm=0,
)


@pytest.fixture(scope="module")
def tiny():
    """A small network with random statistics, and images that overlap by a shift of (24, 16) px."""
    rng = np.random.default_rng(0)
    module = loftr.LoFTR(TINY)
    scene = rng.random((96, 128), np.float32)
    scene = scene + np.roll(scene, 1, 0) + np.roll(scene, 1, 1)
    image0, image1 = scene[None, :64, :80, None] / 3, scene[None, 16:80, 24:104, None] / 3
    variables = module.init(jax.random.key(0), image0, image1)
    variables = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), variables)
    return module, variables, image0, image1


def matches(found, row=0):
    """List the valid matches of one pair, sorted by their place in image 0."""
    mask = np.asarray(found["mask"][row])
    kpts0, kpts1, conf = (np.asarray(found[k][row])[mask] for k in ("kpts0", "kpts1", "conf"))
    order = np.lexsort(kpts0.T)
    return kpts0[order], kpts1[order], conf[order]


def test_official_sizes():
    """Parameter counts of the published networks."""
    expected = {"loftr_outdoor": 11_561_456, "loftr_outdoor_ot": 11_561_457, "gim_loftr": 16_180_312}
    for name, number in expected.items():
        module = loftr.LoFTR(loftr.CONFIGS[name])
        image = jax.ShapeDtypeStruct((1, 480, 640, module.config.in_channels), jnp.float32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), image, image)
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == number, name
        other = jax.ShapeDtypeStruct((1, 320, 840, module.config.in_channels), jnp.float32)
        found = jax.eval_shape(lambda v, a, b, m=module: loftr.match(m, v, a, b), shapes, image, other)
        assert found["kpts1"].shape == (1, 4096, 2) and found["mask"].shape == (1, 4096), name


def test_what_masked_cells_hold_reaches_no_match(tiny):
    module, variables, image0, image1 = tiny
    pad = lambda x: np.pad(x, ((0, 0), (0, 24), (0, 16), (0, 0)))  # noqa: E731
    mask = np.zeros((1, 11, 12), bool)
    mask[:, :8, :10] = True
    features = module.apply(variables, pad(image0), pad(image1), mask, mask, method="encode")
    noise = {k: v.at[:, 8:].set(9.0).at[:, :, 10:].set(9.0) if "coarse" in k else v for k, v in features.items()}
    clean, dirty = (loftr.coarse_matches(module.config, f, mask, mask) for f in (features, noise))
    assert clean["mask"].sum() > 3
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_masked_tokens_are_invisible_to_the_others(tiny):
    _, variables, *_ = tiny
    rng = np.random.default_rng(1)
    x0, x1 = rng.standard_normal((2, 1, 12, 16)).astype(np.float32)
    mask0, mask1 = np.arange(12)[None] < 9, np.arange(12)[None] < 7
    transformer = loftr.LocalFeatureTransformer(16, 2, ("self", "cross"))
    params = {"params": variables["params"]["loftr_coarse"]}
    short = transformer.apply(params, x0[:, :9], x1[:, :7])
    long = transformer.apply(params, x0, x1, mask0, mask1)
    for a, b in zip(short, long):
        np.testing.assert_allclose(a, b[:, : a.shape[1]], atol=2e-6)


def test_a_batch_equals_single_pairs(tiny):
    module, variables, image0, image1 = tiny
    batch = loftr.match(module, variables, np.concatenate([image0, image1]), np.concatenate([image1, image0]))
    for row, (a, b) in enumerate(((image0, image1), (image1, image0))):
        for one, many in zip(matches(loftr.match(module, variables, a, b)), matches(batch, row)):
            np.testing.assert_allclose(one, many, atol=1e-4)


def test_capacity_keeps_the_most_confident(tiny):
    module, variables, image0, image1 = tiny
    every = loftr.match(module, variables, image0, image1)
    few = loftr.match(loftr.LoFTR(replace(module.config, max_matches=3)), variables, image0, image1)
    assert every["mask"].sum() > 3
    np.testing.assert_array_equal(few["conf"][0], np.sort(every["conf"][0])[::-1][:3])


def test_matches_by_brute_force():
    """The streamed mutual maximum equals one on the whole matrix, over several chunks and with masks."""
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((2, n, 6)).astype(np.float32) * 2 for n in (37, 29))
    mask0, mask1 = rng.random((2, 37)) < 0.8, rng.random((2, 29)) < 0.8
    index, conf, mutual = map(np.asarray, assignment.dual_softmax_best(a, b, mask0, mask1, chunk=10))
    for k in range(2):
        s = np.exp((a[k] @ b[k].T).astype(np.float64)) * mask0[k][:, None] * mask1[k]
        with np.errstate(invalid="ignore"):
            matrix = np.nan_to_num(s / s.sum(0)) * np.nan_to_num(s / s.sum(1, keepdims=True))
        for i in range(37):
            best = matrix[i].argmax()
            is_mutual = mask0[k, i] and matrix[:, best].argmax() == i
            assert mutual[k, i] == is_mutual
            if is_mutual:
                assert index[k, i] == best
                np.testing.assert_allclose(conf[k, i], matrix[i, best], rtol=1e-4)


def test_transport_ignores_masked_entries():
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((1, 5, 7)).astype(np.float32)
    mask0, mask1 = np.array([[1, 0, 1, 1, 0]], bool), np.array([[1, 1, 0, 1, 0, 1, 1]], bool)
    config = replace(TINY, match_type="sinkhorn", skh_prefilter=True)
    full = loftr.transport_confidence(config, scores, jnp.float32(0.7), mask0, mask1)
    small = loftr.transport_confidence(config, scores[:, mask0[0]][:, :, mask1[0]], jnp.float32(0.7))
    np.testing.assert_allclose(np.asarray(full)[:, mask0[0]][:, :, mask1[0]], small, rtol=1e-5)
    assert np.asarray(full)[:, ~mask0[0]].max() == 0


def dense_loss(a, b, match1, mask0, mask1, kind):
    """The coarse loss as it is written in the paper, on the whole matrix of confidences."""
    conf = assignment.dual_softmax(jnp.einsum("blc,bsc->bls", a, b), mask0, mask1)
    conf = jnp.clip(conf, 1e-6, 1 - 1e-6)
    true = match1[..., None] == np.arange(b.shape[1])
    weight = mask0[:, :, None] & mask1[:, None]
    if kind == "focal":
        positive, negative = -0.25 * (1 - conf) ** 2 * jnp.log(conf), -0.25 * conf**2 * jnp.log(1 - conf)
    else:
        positive, negative = -jnp.log(conf), -jnp.log(1 - conf)
    return (positive * weight * true).sum() / true.sum() + (negative * weight * ~true).sum() / (~true).sum()


@pytest.mark.parametrize("kind", ["focal", "cross_entropy"])
def test_streamed_loss_equals_dense_loss_in_value_and_gradient(kind):
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal((2, n, 8)) for n in (45, 50))
    b[:, :45] += 1.5 * a  # some true matches are confident
    match1 = np.where(rng.random((2, 45)) < 0.6, np.arange(45), -1)
    mask0, mask1 = rng.random((2, 45)) < 0.9, rng.random((2, 50)) < 0.9
    streamed = lambda a, b: sum(losses.coarse_loss(a, b, match1, mask0, mask1, kind=kind, chunk=16))  # noqa: E731
    with jax.enable_x64(True):
        value, grads = jax.value_and_grad(streamed, argnums=(0, 1))(a, b)
        expected, expected_grads = jax.value_and_grad(dense_loss, argnums=(0, 1))(a, b, match1, mask0, mask1, kind)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    for g, e in zip(grads, expected_grads):
        np.testing.assert_allclose(g, e, atol=1e-9 * np.abs(e).max())


def test_attention_of_all_heads_at_once_equals_head_by_head():
    """What a TPU runs, on the CPU, in value and gradient."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.uniform(0.1, 2, (3, 25, 4, 16)) for _ in range(3))
    with jax.enable_x64(True):
        of = lambda form: jax.value_and_grad(lambda *x: (form(*x) ** 2).sum(), (0, 1, 2))(q, k, v)  # noqa: E731
        (value, grads), (expected, expected_grads) = map(
            of, (attention._narrow_linear_attention, attention._linear_attention_by_head)
        )
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for g, e in zip(grads, expected_grads):
        np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-12)


def test_the_loss_takes_more_pairs_of_cells_than_an_int32_counts():
    """The recipe's batch of 64 pairs at 840x840 has 7.8e9 of them."""
    tokens, match1 = jax.ShapeDtypeStruct((64, 105 * 105, 8), jnp.float32), jax.ShapeDtypeStruct((64, 105 * 105), int)
    positive, negative = jax.eval_shape(losses.coarse_loss, tokens, tokens, match1)
    assert positive.shape == negative.shape == ()


def test_streamed_loss_needs_a_quarter_of_the_memory():
    """At 840x840, L = 11025 cells: peak of loss and gradient as the compiler plans it."""
    tokens = jax.ShapeDtypeStruct((1, 105 * 105, 256), jnp.float32)
    match1 = jax.ShapeDtypeStruct((1, 105 * 105), jnp.int32)
    valid = np.ones((1, 105 * 105), bool)

    def peak(loss):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(tokens, tokens, match1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    streamed = peak(lambda a, b, m: sum(losses.coarse_loss(a, b, m, valid, valid)))
    dense = peak(lambda a, b, m: dense_loss(a, b, m, valid, valid, "focal"))
    print(f"streamed {streamed / 1e6:.0f} MB, dense {dense / 1e6:.0f} MB")
    assert streamed < dense / 4


def test_zero_shot_confidence_by_brute_force():
    """Sampled points compete with each other and with all valid cells of the other image."""
    rng = np.random.default_rng(5)
    coarse0, coarse1 = rng.standard_normal((2, 1, 4, 5, 8)).astype(np.float32)
    kpts0, kpts1 = rng.uniform(0, 23.9, (2, 1, 6, 2)).astype(np.float32)
    kpts0[0, 5] = (33, 3)  # beyond the centre of the last cell
    mask = np.array([[1, 1, 0, 1, 1, 1]], bool)
    cells0, cells1 = rng.random((2, 1, 4, 5)) < 0.7
    log_conf, kept = losses.zero_shot_log_conf(coarse0, coarse1, kpts0, kpts1, mask, cells0, cells1, 0.1)
    np.testing.assert_array_equal(kept, mask & (np.arange(6) != 5))
    points = [np.asarray(sampling.bilinear(c, k / 8))[0][kept[0]] for c, k in ((coarse0, kpts0), (coarse1, kpts1))]
    rows = [np.concatenate([p, c[0][m[0]]]) for p, c, m in zip(points, (coarse0, coarse1), (cells0, cells1))]
    e = np.exp((rows[0] @ rows[1].T / 8 / 0.1).astype(np.float64))
    conf = (e / e.sum(0) * (e / e.sum(1, keepdims=True)))[np.arange(4), np.arange(4)]
    np.testing.assert_allclose(np.exp(log_conf)[kept], conf, rtol=1e-4)
    expected = (-0.25 * (1 - conf) ** 2 * np.log(conf)).mean()
    np.testing.assert_allclose(losses.zero_shot_coarse_loss(log_conf, kept, floor=0), expected, rtol=1e-4)


def test_fine_targets_of_sparse_points():
    """A point is taken from the window of the nearest coarse cell."""
    kpts = np.array([[[17.0, 6.0], [4.1, 20.0]]], np.float32)
    cells, place = losses.zero_shot_fine_cells(kpts, width=10)
    np.testing.assert_array_equal(cells, [[1 * 10 + 2, 2 * 10 + 1]])  # 20 / 8 = 2.5 rounds to even
    np.testing.assert_allclose(place, [[[0.5, -1.0], [-1.95, 2.0]]], atol=1e-6)
    windows = np.random.default_rng(6).standard_normal((1, 2, 25, 3)).astype(np.float32)
    query = losses.window_query(windows, place)
    np.testing.assert_allclose(query[0, 0], (windows[0, 0, 7] + windows[0, 0, 8]) / 2, rtol=1e-5)  # row 1, columns 2, 3


def test_fine_offset_finds_a_peak():
    """One window cell equals the query: its place is found, with no spread; a flat window gives the centre."""
    query = np.full((1, 4), 20.0, np.float32)
    windows = np.zeros((1, 25, 4), np.float32)
    windows[0, 3 * 5 + 1] = 20.0
    offset = np.asarray(loftr.fine_offset(query, windows))
    np.testing.assert_allclose(offset[0, :2], [-0.5, 0.5], atol=1e-5)
    flat = np.asarray(loftr.fine_offset(query, windows * 0))
    np.testing.assert_allclose(flat[0], [0, 0, 2 * np.sqrt(0.5)], atol=1e-5)  # linspace(-1, 1, 5) has variance 1/2


def test_fine_spread_of_a_sharp_window_is_no_rounding():
    """Two neighbours, 0.5 apart, of probabilities 1 - p and p: the standard deviation is 0.5 sqrt(p (1 - p))."""
    query = np.full((1, 4), 1.0, np.float32)
    windows = np.full((1, 25, 4), -100.0, np.float32)
    windows[0, 8], windows[0, 9] = 8.0, 0.0  # products of 16 and 0 before the softmax
    p = 1 / (1 + np.exp(16.0))
    spread = np.asarray(loftr.fine_offset(query, windows))[0, 2]
    np.testing.assert_allclose(spread, 0.5 * np.sqrt(p * (1 - p)) + 1e-5, rtol=1e-4)  # y: the official floor


def test_depth_supervision_of_a_plane():
    """A fronto-parallel plane and a sideways step: all cells match the cell a disparity away, both ways."""
    depth = np.full((1, 64, 96), 5.0, np.float32)
    K = np.array([[[50.0, 0, 48], [0, 50, 32], [0, 0, 1]]], np.float32)
    T = np.eye(4, dtype=np.float32)[None]
    T_0to1 = T.copy()
    T_0to1[0, 0, 3] = -1.6  # disparity 50 * 1.6 / 5 = 16 px = 2 cells
    T_1to0 = np.linalg.inv(T_0to1)
    batch = {"depth0": depth, "depth1": depth, "K0": K, "K1": K, "T_0to1": T_0to1, "T_1to0": T_1to0}
    targets = supervision.coarse_targets(batch, (8, 12), (8, 12))
    y, x = np.divmod(np.arange(96), 12)
    expected = np.where((x >= 2), y * 12 + x - 2, -1)
    np.testing.assert_array_equal(targets["match1"][0], expected)
    fine = supervision.fine_targets(batch, targets, np.zeros(1, int), np.array([14]), np.array([12]))
    np.testing.assert_allclose(fine, 0, atol=1e-3)


def test_objective_learns_one_pair(tiny):
    """Gradient steps on one pair lower the loss, move the running statistics, and every parameter has a gradient."""
    module, variables, image0, image1 = tiny
    to_uint8 = lambda x: np.round(x * 255).astype(np.uint8)  # noqa: E731
    y, x = np.divmod(np.arange(30), 6)
    kpts0 = np.stack([24 + 8 * x, 16 + 8 * y], -1)[None].astype(np.float32)
    batch = {
        "image0": to_uint8(image0),
        "image1": to_uint8(image1),
        "kpts0": kpts0,
        "kpts1": kpts0 - np.float32([24, 16]),
        "match_mask": np.ones((1, 30), bool),
        "mask0": np.ones((1, 8, 10), bool),
        "mask1": np.ones((1, 8, 10), bool),
    }

    @jax.jit
    def step(params, stats):
        def loss(params):
            state = {"params": params, "batch_stats": stats}
            value, metrics, new = OBJECTIVES["loftr"](module, state, batch, jax.random.key(0), train=True)
            return value, (metrics, new)

        (value, (_, new)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.003 * g, params, grads), new, value, grads

    params, stats = variables["params"], variables["batch_stats"]
    values = []
    for _ in range(8):
        params, stats, value, grads = step(params, stats)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0], values
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), stats, variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0


def test_bad_configurations_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"match_type: 'sinkhorm', expected one of dual_softmax, sinkhorn"):
        loftr.LoFTRConfig(match_type="sinkhorm")
    with pytest.raises(ValueError, match=r"coarse width 30, expected a multiple of 4"):
        loftr.LoFTRConfig(block_dims=(8, 8, 30), num_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("match_type", ["dual_softmax"])
def test_equals_kornia(match_type):
    """The whole matcher against kornia's LoFTR with the same random weights."""
    torch = oracles.torch()
    kornia = pytest.importorskip("kornia")
    from gim_jax.weights.convert import from_torch

    torch.manual_seed(0)
    config = {**kornia.feature.loftr.loftr.default_cfg}
    config["match_coarse"] = {**config["match_coarse"], "thr": 0.0, "match_type": match_type}
    config["coarse"] = {**config["coarse"], "temp_bug_fix": True}
    oracle = kornia.feature.LoFTR(pretrained=None, config=config).eval()
    with torch.no_grad():
        for name, value in oracle.named_parameters():
            if name.startswith("loftr_coarse.layers.7.norm2"):
                value.mul_(6)
        for name, value in oracle.named_buffers():
            if name.endswith("running_var"):
                value.mul_(1.3)
    state = {k: v.numpy() for k, v in oracle.state_dict().items()}
    module = loftr.LoFTR(replace(loftr.CONFIGS["loftr_indoor_new"], thr=0.0, temp_bug_fix=True))
    image0 = np.random.default_rng(7).random((1, 1, 96, 128), np.float32)
    image1 = np.roll(image0, (16, 24), (2, 3))
    template = jax.eval_shape(module.init, jax.random.key(0), *[jnp.zeros((1, 96, 128, 1))] * 2)
    variables = from_torch({k: v for k, v in state.items() if not k.startswith("pos_encoding")}, template)
    with torch.no_grad():
        want = oracle({"image0": torch.from_numpy(image0), "image1": torch.from_numpy(image1)})
    nhwc = lambda x: x.transpose(0, 2, 3, 1)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda v, a, b: loftr.match(module, v, a, b))(variables, nhwc(image0), nhwc(image1))
    kpts0, kpts1, conf = matches(found)
    order = np.lexsort(want["keypoints0"].numpy().T)
    assert len(kpts0) == len(order) > 10
    np.testing.assert_array_equal(kpts0, want["keypoints0"].numpy()[order])
    np.testing.assert_allclose(kpts1, want["keypoints1"].numpy()[order], atol=2e-3)
    np.testing.assert_allclose(conf, want["confidence"].numpy()[order], atol=2e-4)
