"""DKM: its operators against brute force, its network and matching by their properties."""

import dataclasses

import cv2
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

from gim_jax.models import dkm
from gim_jax.models.dkm_network import COARSE, FINE, ConvRefiner
from gim_jax.ops.correlation import local_correlation
from gim_jax.ops.density import gaussian_density
from gim_jax.ops.depthwise import _taps_of_grouped_conv, depthwise_conv
from gim_jax.ops.gaussian_process import posterior_mean
from gim_jax.ops.resize import resize
from gim_jax.ops.sampling import grid_sample
from gim_jax.train.objectives import OBJECTIVES
from tests.networks import random_variables

TINY = dataclasses.replace(dkm.CONFIGS["dkm_tiny"], size=(96, 64), upsample_size=(128, 96), num_matches=64)
SIDE = 80  # px of the test images: 80 wide and 64 high, in a frame of 96 x 72
VALID, FRAME = (64, 80), (72, 96)  # (height, width)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# operators


def brute_force_correlation(feat0, feat1, flow, radius):
    """Sum over channels of feat0 times bilinear samples of feat1, one sample at a time, float64."""
    height, width, channels = feat1.shape
    out = np.zeros((*feat0.shape[:2], (2 * radius + 1) ** 2))
    for i, j in np.ndindex(feat0.shape[:2]):
        x, y = ((flow[i, j].astype(np.float64) + 1) * (width, height) - 1) / 2
        for k, (dy, dx) in enumerate(np.ndindex(2 * radius + 1, 2 * radius + 1)):
            px, py = x + dx - radius, y + dy - radius
            sample = np.zeros(channels)
            for cy in (int(np.floor(py)), int(np.floor(py)) + 1):
                for cx in (int(np.floor(px)), int(np.floor(px)) + 1):
                    if 0 <= cx < width and 0 <= cy < height:
                        sample += (1 - abs(px - cx)) * (1 - abs(py - cy)) * feat1[cy, cx]
            out[i, j, k] = feat0[i, j].astype(np.float64) @ sample / channels**0.5
    return out


@pytest.mark.parametrize("radius", [1, 3])
def test_local_correlation_is_that_of_bilinear_samples(radius):
    feat0, feat1 = random(1, 5, 6, 8), random(1, 5, 6, 8, seed=1)
    flow = np.random.default_rng(2).uniform(-1.6, 1.6, (1, 5, 6, 2)).astype(np.float32)  # windows cross the border
    flow[0, 0, 0] = (-80, 50)  # and one is far outside
    want = brute_force_correlation(feat0[0], feat1[0], flow[0], radius)
    assert np.abs(want[0, 0]).max() == 0
    got = jax.jit(local_correlation, static_argnums=3)(feat0, feat1, flow, radius)
    np.testing.assert_allclose(got[0], want, atol=2e-6)


def test_local_correlation_has_the_gradient_of_the_sampled_windows():
    feat0, feat1, weight = random(2, 4, 5, 8), random(2, 4, 5, 8, seed=1), random(2, 4, 5, 25, seed=3)
    flow = np.random.default_rng(2).uniform(-1.1, 1.1, (2, 4, 5, 2)).astype(np.float32)
    steps = np.arange(-2, 3)
    offsets = np.stack(np.meshgrid(2 * steps / 5, 2 * steps / 4), -1).reshape(25, 2).astype(np.float32)

    def dense(feat0, feat1, flow):
        windows = grid_sample(feat1, flow[:, :, :, None] + offsets, align_corners=False)
        return (weight * jnp.einsum("bhwc,bhwkc->bhwk", feat0, windows) / 8**0.5).sum()

    def streamed(feat0, feat1, flow):
        return (weight * local_correlation(feat0, feat1, flow, 2)).sum()

    gradients = (jax.jit(jax.grad(f, (0, 1, 2)))(feat0, feat1, flow) for f in (streamed, dense))
    for got, want in zip(*gradients):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("fault", [False, True])
def test_gaussian_process_equals_the_dense_inverse(fault):
    feat0, feat1, values = random(2, 30, 16), random(2, 40, 16, seed=1), random(40, 5, seed=2)
    solved = feat1[:1] if fault else feat1  # the released fault: the inverse of the first item for all

    def kernel(x, y):
        cosine = x @ y.T / (np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1) + 1e-6)
        return np.exp((cosine - 1) / 0.2)

    for i, got in enumerate(posterior_mean(feat0, feat1, values, solved)):
        a, b, c = (x.astype(np.float64) for x in (feat0[i], feat1[i], solved[min(i, len(solved) - 1)]))
        want = kernel(a, b) @ np.linalg.inv(kernel(c, c) + 0.1 * np.eye(40)) @ values
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_depthwise_convolution_and_gradient_equal_the_grouped_one():
    x, kernel, weight = random(2, 6, 7, 3), random(5, 5, 1, 3, seed=1), random(2, 6, 7, 3, seed=2)

    def grouped(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), [(2, 2)] * 2, dimension_numbers=layout, feature_group_count=3
        )

    np.testing.assert_allclose(depthwise_conv(x, kernel), grouped(x, kernel), atol=1e-5)
    got, want = (
        jax.jit(jax.grad(lambda *args, f=f: (f(*args) * weight).sum(), (0, 1)))(x, kernel)
        for f in (depthwise_conv, grouped)
    )
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(_taps_of_grouped_conv(x, kernel, weight), got[1], atol=1e-4)  # what a TPU runs


@pytest.mark.parametrize("size", [(37, 29), (90, 70)])
def test_linear_resize_equals_opencv(size):
    image = random(50, 61, 3)
    want = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(resize(image[None], size[::-1])[0], want, atol=2e-5)


@pytest.mark.parametrize("size", [(23, 17), (90, 70)])
def test_cubic_resize_equals_pil(size):
    image = np.random.default_rng(0).integers(70, 186, (50, 61, 3), np.uint8)  # PIL clips between its two axes
    want = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC), np.float32)
    got = resize(image[None].astype(np.float32), size[::-1], antialias_cubic=True)[0]
    assert np.abs(got - want).max() < 1.2  # PIL rounds after each axis


@pytest.mark.parametrize("cubic", [False, True])
def test_resize_of_a_valid_part_equals_resize_of_the_crop(cubic):
    image = random(1, 50, 61, 3)
    got = resize(image, (20, 80), jnp.asarray([[41.0, 33.0]]), cubic)
    np.testing.assert_allclose(got, resize(image[:, :33, :41], (20, 80), antialias_cubic=cubic), atol=1e-5)


def test_density_in_chunks_equals_the_dense_one():
    points = random(100, 4, seed=3) * 0.3
    square = ((points[:, None] - points[None]) ** 2).sum(-1, dtype=np.float64)
    np.testing.assert_allclose(gaussian_density(points, 0.1, chunk=7), np.exp(-square / 0.02).sum(1), rtol=1e-5)


# network


@pytest.fixture(scope="module")
def network():
    module = dkm.DKM(TINY)
    image = np.zeros((1, 64, 64, 3), np.float32)
    variables = random_variables(module, image, image)
    heads = [variables["params"]["decoder"][f"conv_refiner_{s}"]["out_conv"] for s in FINE]
    heads += [variables["params"]["decoder"]["embedding_decoder"][f"terminal_module_{s}"] for s in COARSE]
    for head in heads:  # keeps the warp inside the images
        head["kernel"] *= 0.3
    return module, variables


@pytest.fixture(scope="module")
def pairs():
    """Two pairs in frames larger than the images, and their masks of cells."""
    images = np.random.default_rng(0).uniform(0.1, 1, (4, *FRAME, 3)).astype(np.float32)
    images[:, VALID[0] :] = images[:, :, VALID[1] :] = 0
    images[0, 10:30, 20:50] = 0.02  # black for GIM, in image 0 of the first pair
    mask = np.zeros((2, FRAME[0] // 8, FRAME[1] // 8), bool)
    mask[:, : VALID[0] // 8, : VALID[1] // 8] = True
    return images[:2], images[2:], mask, mask


@pytest.fixture(scope="module")
def dense(network):
    """The jitted dense match, and how often it was traced."""
    module, variables = network
    traces = []

    @jax.jit
    def run(image0, image1, mask0, mask1):
        traces.append(0)
        return dkm.dense_match(module, variables, image0, image1, mask0, mask1)

    return run, traces


def test_full_size_shapes():
    config = dkm.CONFIGS["gim_dkm"]
    assert (config.size, config.upsample_size) == ((896, 672), (1536, 1152))
    module = dkm.DKM(config)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image, image)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 70_212_090  # the released model
    image = jax.ShapeDtypeStruct((1, 1080, 1920, 3), jnp.float32)
    warp, certainty = jax.eval_shape(lambda *args: dkm.dense_match(module, *args), variables, image, image)
    assert (warp.shape, certainty.shape) == ((1, 1152, 3072, 4), (1, 1152, 3072))
    found = jax.eval_shape(lambda *args: dkm.match(module, *args), variables, image, image)
    assert {k: v.shape for k, v in found.items()} == {
        "kpts0": (1, 5000, 2),
        "kpts1": (1, 5000, 2),
        "conf": (1, 5000),
        "mask": (1, 5000),
    }


def test_item_by_item_equals_one_batch(network, dense, pairs):
    module, variables = network
    warp, certainty = dense[0](*pairs)

    @jax.jit
    def batched(variables):
        small, large = (
            jnp.concatenate([dkm.prepare(TINY, i, m, size) for i, m in zip(pairs[:2], pairs[2:])])
            for size in (TINY.size, TINY.upsample_size)
        )
        swap = lambda maps: {s: jnp.roll(x, 2, axis=0) for s, x in maps.items()}  # noqa: E731
        maps = module.apply(variables, small, method="encode")
        first = module.apply(variables, maps, swap(maps), maps, method="decode")
        maps = module.apply(variables, large, method="encode")
        last = module.apply(variables, maps, swap(maps), first[1], method="refine")[1]
        return dkm.assemble(first[16]["certainty"], last["flow"], last["certainty"])

    want_warp, want_certainty = batched(variables)
    np.testing.assert_allclose(warp, want_warp, atol=2e-4)
    lit = ~np.concatenate([dkm.black(i, m, (96, 128)) for i, m in zip(pairs[:2], pairs[2:])], 2)
    assert lit.mean() > 0.9 and np.std(want_certainty) > 0.01
    np.testing.assert_allclose(certainty[lit], want_certainty[lit], atol=2e-4)


def test_swapped_images_swap_the_directions(dense, pairs):
    image0, image1, mask0, mask1 = pairs
    warp, certainty = dense[0](*pairs)
    swapped, swapped_certainty = dense[0](image1, image0, mask1, mask0)
    width = warp.shape[2] // 2
    np.testing.assert_allclose(warp[:, :, :width], swapped[:, :, width:][..., [2, 3, 0, 1]], atol=1e-5)
    np.testing.assert_allclose(certainty[:, :, width:], swapped_certainty[:, :, :width], atol=1e-5)


def test_padding_has_no_influence(dense, pairs):
    image0, image1, mask0, mask1 = pairs
    noisy = image0.copy()
    noisy[:, VALID[0] :] = 1
    noisy[:, :, VALID[1] :] = 0.7
    for a, b in zip(dense[0](*pairs), dense[0](noisy, image1, mask0, mask1)):
        np.testing.assert_array_equal(a, b)


def test_one_trace_for_all_images_of_a_shape(dense, pairs):
    run, traces = dense
    run(*pairs)
    run(pairs[0] * 0.5, pairs[1][::-1].copy(), pairs[2], np.ones_like(pairs[3]))
    assert len(traces) == 1


def test_black_pixels_match_nothing(dense, pairs):
    certainty = dense[0](*pairs)[1]
    rows, columns = slice(10 * 96 // 64 + 1, 30 * 96 // 64 - 1), slice(20 * 128 // 80 + 1, 50 * 128 // 80 - 1)
    assert (certainty[0, rows, columns] == 0).all() and (certainty[1, rows, columns] > 0).all()
    assert not dkm.black(pairs[1], pairs[3], (96, 128)).any()


def test_prepared_input_of_a_padded_image_is_that_of_the_crop(pairs):
    for config in (TINY, dataclasses.replace(TINY, official=True)):
        got = dkm.prepare(config, pairs[0], pairs[2], (100, 50))
        want = dkm.prepare(config, pairs[0][:, : VALID[0], : VALID[1]], None, (100, 50))
        np.testing.assert_allclose(got, want, atol=1e-4)  # in units of ImageNet's std


def test_official_input_is_normalised_and_gims_is_not():
    image = np.full((1, 8, 8, 3), 0.5, np.float32)
    want = (0.5 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(dkm.prepare(dkm.CONFIGS["dkm_outdoor"], image, None, (8, 8))[0, 0, 0], want, atol=1e-6)
    np.testing.assert_array_equal(dkm.prepare(dkm.CONFIGS["gim_dkm"], image, None, (8, 8)), image)


@pytest.mark.parametrize(("height", "wrong"), [(45, True), (43, False)])  # 2070 and 1978 tokens
def test_released_fault_uses_the_first_inverse_above_2000_tokens(network, height, wrong):
    variables = network[1]
    channels = {1: 3, 2: 8, 4: 32, 8: 64, 16: 128, 32: 256}
    sides = {s: (-(-16 * height // s), -(-16 * 46 // s)) for s in channels}
    maps0, maps1, first = (
        {s: random(1, *sides[s], c, seed=seed + s) for s, c in channels.items()} for seed in (0, 100, 200)
    )

    def at_16(solve, first):
        module = dkm.DKM(dataclasses.replace(TINY, gp_solve=solve))
        run = jax.jit(lambda *maps: module.apply(variables, *maps, method="decode")[16]["flow"])
        return np.asarray(run(maps0, maps1, first))

    correct = at_16("correct", first)
    np.testing.assert_allclose(at_16("released", maps1), correct, atol=1e-5)
    assert (np.abs(at_16("released", first) - correct).max() > 1e-3) == wrong


def test_gradients_stop_between_strides(network):
    module, variables = network
    image0, image1 = random(1, 64, 64, 3), random(1, 64, 64, 3, seed=1)

    @jax.jit
    @jax.grad
    def gradient(params):
        return module.apply({**variables, "params": params}, image0, image1)[8]["flow"].sum()

    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    grads = gradient(variables["params"])
    decoder = {name: largest(tree) for name, tree in grads["decoder"].items()}
    assert largest(grads["encoder"]) > 0 and decoder.pop("conv_refiner_8") > 0
    assert set(decoder.values()) == {0.0}


def test_warped_features_carry_no_gradient():
    refiner = ConvRefiner(features=18, disp_dim=2, radius=0, num_hidden=1)  # no correlation: nothing else reads image 1
    feat0, feat1, flow = random(1, 6, 6, 8), random(1, 6, 6, 8, seed=1), random(1, 6, 6, 2, seed=2) * 0.3
    variables = random_variables(refiner, feat0, feat1, flow)
    value = lambda *inputs: refiner.apply(variables, *inputs)[0].sum()  # noqa: E731
    grad0, grad1 = jax.jit(jax.grad(value, (0, 1)))(feat0, feat1, flow)
    assert np.abs(grad0).max() > 0 and np.abs(grad1).max() == 0
    assert abs(value(feat0, feat1, flow) - value(feat0, feat1 + 1, flow)) > 0


def test_objective_trains_and_moves_the_statistics(network):
    module, variables = network
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 256, (2, 64, 64, 3), np.uint8) for k in ("image0", "image1")}
    batch |= {k: rng.uniform(0, 63, (2, 20, 2)).astype(np.float32) for k in ("kpts0", "kpts1")}
    batch["match_mask"] = np.arange(20) < np.array([[20], [5]])

    @jax.jit
    def step(params):
        def loss(params):
            value, metrics, stats = OBJECTIVES["dkm"](module, {**variables, "params": params}, batch, None, True)
            return value, (metrics, stats)

        (value, (metrics, stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, metrics, stats, jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    value, metrics, stats, params = step(variables["params"])
    assert float(metrics["loss"]) == float(value) and float(metrics["num_matches"]) == 12.5
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert float(step(params)[0]) < float(value)


# samples


def test_samples_are_distinct_certain_and_repeatable():
    warp = np.random.default_rng(0).uniform(-1, 1, (3000, 4)).astype(np.float32)
    certainty = np.where(np.arange(3000) % 3 == 0, 0.9, 0.0).astype(np.float32)
    matches, conf = dkm.sample(warp, certainty, jax.random.key(1), 200)
    assert (conf == np.float32(0.9)).all() and len(np.unique(matches, axis=0)) == 200
    again, _ = dkm.sample(warp, certainty, jax.random.key(1), 200)
    other, _ = dkm.sample(warp, certainty, jax.random.key(2), 200)
    assert (again == matches).all() and not (other == matches).all()


def test_samples_are_drawn_in_proportion_to_certainty_below_the_threshold():
    num = 4000
    warp = np.random.default_rng(0).uniform(-40, 40, (num, 4)).astype(np.float32)  # far apart: density is no matter
    certainty = np.repeat(np.float32([0.04, 0.01]), num // 2)
    num_matches = 50  # 200 candidates: few enough that drawing without replacement is close to drawing with
    draw = jax.jit(lambda key: dkm.sample(warp, certainty, key, num_matches)[1])
    share = np.mean([np.mean(draw(jax.random.key(i)) == np.float32(0.04)) for i in range(40)])
    # expectation 0.8, one standard deviation sqrt(0.8 * 0.2 / 2000) = 0.009; exhaustion takes about 0.01 off
    assert abs(share - 0.795) < 0.03


def test_samples_thin_out_dense_clusters():
    rng = np.random.default_rng(0)
    crowd = rng.normal(0.5, 0.02, (3600, 4))
    few = rng.normal(-0.5, 0.02, (400, 4))
    warp = np.concatenate([crowd, few]).astype(np.float32)
    matches, _ = dkm.sample(warp, np.full(4000, 0.9, np.float32), jax.random.key(0), 200)
    # 800 candidates hold about 720 and 80; inverse densities make the two clusters equally likely, until the
    # smaller one runs out: 80 of 200 at most, against 20 in proportion
    share = (np.asarray(matches)[:, 0] < 0).sum()
    assert 55 <= share <= 95


def test_no_certainty_gives_no_match(network, pairs):
    variables = network[1]
    black = np.zeros((1, 64, 64, 3), np.float32)
    one_pass = dkm.DKM(dataclasses.replace(TINY, upsample_size=None, num_matches=32))
    found = jax.jit(lambda v, i: dkm.match(one_pass, v, i, i))(variables, black)
    assert not found["mask"].any() and np.isfinite(found["kpts0"]).all() and found["kpts0"].shape == (1, 32, 2)
    found = jax.jit(lambda v, i: dkm.match(one_pass, v, i, i))(variables, pairs[0][:1])
    mask, kpts = np.asarray(found["mask"]), np.asarray(found["kpts0"])
    assert mask.any() and (kpts[mask] >= -0.5).all() and (kpts[mask] <= np.array(FRAME[::-1]) - 0.5).all()
    # in the first direction points are the centres of the warp's pixels: 96 columns on 96 px, 64 rows on 72 px
    grid = mask & (np.abs(kpts[..., 0] - np.round(kpts[..., 0])) < 1e-3)
    rows = (kpts[grid][:, 1] + 0.5) * 64 / 72 - 0.5
    assert (np.abs(rows - np.round(rows)) < 1e-3).mean() > 0.9 and grid.sum() > 5
