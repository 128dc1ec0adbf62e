"""Equal to independent implementations from PyPI, run live with the same random weights: transformers, kornia.

They come with the extra `test`; without them these tests are skipped.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax.models.disk import Disk, DiskConfig
from gim_jax.models.lightglue import LightGlueConfig, LightGlueMatcher
from gim_jax.models.superglue import SuperGlueConfig, SuperGlueMatcher
from gim_jax.models.superpoint import SuperPoint, SuperPointConfig
from gim_jax.weights.convert import from_torch, rename
from tests import oracles

pytestmark = pytest.mark.slow
torch = oracles.torch()
SIZE = np.array([[320, 240]])


def randomise(module, seed, gain=1.0):
    """Give a torch module random weights, also normalisation statistics; its state as arrays."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not value.dtype.is_floating_point or name.endswith("confidence_thresholds"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            noise = 1 + 0.2 * noise.abs()
        elif name.endswith("weight") and value.ndim > 1:
            noise = gain * noise / value[0].numel() ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise = 0.1 * noise
        value.copy_(noise)
    module.eval()
    return {k: v.numpy().copy() for k, v in module.state_dict().items()}


def smooth_image(seed, height, width, channels):
    """Blobs rather than noise, so that detections differ clearly."""
    rng = np.random.default_rng(seed)
    small = rng.random((1, height // 4, width // 4, channels)).astype(np.float32)
    return np.asarray(jax.image.resize(small, (1, height, width, channels), "cubic")).clip(0, 1)


def features(seed, m, n, dim=256):
    """Two sets of key points, part of them the same ones seen twice."""
    rng = np.random.default_rng(seed)
    out = []
    base = rng.standard_normal((1, max(m, n), dim))
    for count in (m, n):
        desc = base[:, :count] + 0.3 * rng.standard_normal((1, count, dim))
        out.append(
            {
                "kpts": rng.uniform(5, 235, (1, count, 2)).astype(np.float32),
                "scores": rng.random((1, count)).astype(np.float32),
                "desc": (desc / np.linalg.norm(desc, axis=-1, keepdims=True)).astype(np.float32),
                "mask": None,
            }
        )
    return out


@pytest.mark.parametrize("height, width", [(96, 128), (93, 131)])
def test_superpoint_equals_transformers(height, width):
    transformers = pytest.importorskip("transformers")
    config = transformers.SuperPointConfig(keypoint_threshold=0.012, max_keypoints=-1, nms_radius=3)
    oracle = transformers.SuperPointForKeypointDetection(config)
    rules = [
        (r"^encoder\.conv_blocks\.(\d)\.conv_(\w)", lambda m: f"conv{int(m[1]) + 1}{m[2]}"),
        (r"^keypoint_decoder\.conv_score_a", "convPa"),
        (r"^keypoint_decoder\.conv_score_b", "convPb"),
        (r"^descriptor_decoder\.conv_descriptor_a", "convDa"),
        (r"^descriptor_decoder\.conv_descriptor_b", "convDb"),
    ]
    state = randomise(oracle, 0, gain=1.5)
    image = smooth_image(0, height // 4 * 4, width // 4 * 4, 1)
    image = np.pad(image, ((0, 0), (0, height % 4), (0, width % 4), (0, 0)), mode="edge")
    with torch.no_grad():
        found = oracle(torch.from_numpy(image.transpose(0, 3, 1, 2)).repeat(1, 3, 1, 1))
    module = SuperPoint(SuperPointConfig(1000, nms_radius=3, threshold=0.012))
    template = jax.eval_shape(module.init, jax.random.key(0), image)
    ours = jax.jit(module.apply)(from_torch(state, template, rules), image)
    mask = np.asarray(ours["mask"][0])
    kpts = np.asarray(ours["kpts"][0])[mask]
    theirs = found.keypoints[0].numpy() * np.array([width, height])
    # transformers keeps those along the right and lower border
    inside = (theirs < np.array([width // 8, height // 8]) * 8 - 4.5).all(1)
    theirs = theirs[inside]
    assert len(kpts) == len(theirs) > 30
    order = np.linalg.norm(theirs[:, None] - kpts[None], axis=-1).argmin(1)
    assert len(set(order)) == len(order)
    np.testing.assert_allclose(kpts[order], theirs, atol=1e-3)
    np.testing.assert_allclose(np.asarray(ours["scores"][0])[mask][order], found.scores[0].numpy()[inside], atol=1e-5)
    want = found.descriptors[0].numpy()[inside]
    np.testing.assert_allclose(np.asarray(ours["desc"][0])[mask][order], want, atol=1e-5)


def superglue_state(state):
    """transformers' names and head order (head * 64 + channel) -> the official ones (channel * 4 + head)."""
    heads_last = np.arange(256).reshape(4, 64).T.ravel()
    out = {}
    for key, value in state.items():
        if ".attention.self." in key:
            value = value[heads_last]
        elif ".attention.output.dense.weight" in key:
            value = value[:, heads_last]
        out[key] = value
    rules = [
        (r"^keypoint_detector\.", None),
        (r"^keypoint_encoder\.encoder\.(\d)\.linear", lambda m: f"kenc.encoder.{3 * int(m[1])}"),
        (r"^keypoint_encoder\.encoder\.(\d)\.batch_norm", lambda m: f"kenc.encoder.{3 * int(m[1]) + 1}"),
        (r"^keypoint_encoder\.encoder\.4\.", "kenc.encoder.12."),
        (r"attention\.self\.query", "attn.proj.0"),
        (r"attention\.self\.key", "attn.proj.1"),
        (r"attention\.self\.value", "attn.proj.2"),
        (r"attention\.output\.dense", "attn.merge"),
        (r"mlp\.1\.", "mlp.3."),
        (r"mlp\.0\.batch_norm", "mlp.1"),
        (r"mlp\.0\.linear", "mlp.0"),
        (r"^final_projection\.", ""),
    ]
    return {new: out[old] for new, old in rename(out, rules).items()}


def test_superglue_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SuperGlueConfig(sinkhorn_iterations=30, matching_threshold=0.0)
    oracle = transformers.SuperGlueForKeypointMatching(config)
    randomise(oracle, 1)
    with torch.no_grad():
        for name, value in oracle.state_dict().items():
            if re.search(r"mlp\.1\.|keypoint_encoder\.encoder\.4\.", name):
                value *= 0.05  # small updates: points stay recognisable
            if "final_proj" in name:
                value *= 12
    state = {k: v.numpy().copy() for k, v in oracle.state_dict().items()}
    x0, x1 = features(1, 60, 60)
    both = [np.stack([x0[k], x1[k]], 1) for k in ("kpts", "desc", "scores")]
    with torch.no_grad():
        matches, scores, *_ = oracle._match_image_pair(
            *map(torch.from_numpy, both), 240, 320, mask=torch.ones(1, 2, 60, dtype=torch.int)
        )
    module = SuperGlueMatcher(SuperGlueConfig(sinkhorn_iters=30, threshold=0.0))
    template = jax.eval_shape(module.init, jax.random.key(0), x0, x1, SIZE, SIZE)
    ours = jax.jit(module.apply)(from_torch(superglue_state(state), template), x0, x1, SIZE, SIZE)
    assert (matches[0, 0] >= 0).sum() > 15
    np.testing.assert_array_equal(ours["matches0"][0], matches[0, 0].numpy())
    np.testing.assert_array_equal(ours["matches1"][0], matches[0, 1].numpy())
    np.testing.assert_allclose(ours["scores0"][0], scores[0, 0].numpy(), atol=2e-5)


FLOOR = 1e-30  # of scores: below, PyTorch has denormal numbers and XLA has 0
ADAPTIVE = {"depth_confidence": 0.6, "width_confidence": 0.9}


@pytest.mark.parametrize("adaptive", [{}, ADAPTIVE], ids=["complete", "adaptive"])
def test_lightglue_equals_kornia(adaptive):
    kornia = pytest.importorskip("kornia")
    settings = {"depth_confidence": -1.0, "width_confidence": -1.0, **adaptive}
    oracle = kornia.feature.LightGlue(features=None, weights=None, filter_threshold=FLOOR, **settings)
    with torch.no_grad():
        state = randomise(oracle, 2)
        for name, value in oracle.state_dict().items():
            if "final_proj.weight" in name:
                value *= 6
            if "token.0.bias" in name:
                value.fill_(2.0)
            state[name] = value.numpy().copy()
    x0, x1 = features(2, 70, 50)
    data = {
        f"image{i}": {
            "keypoints": torch.from_numpy(x["kpts"]),
            "descriptors": torch.from_numpy(x["desc"]),
            "image_size": torch.tensor([[320.0, 240.0]]),
        }
        for i, x in enumerate((x0, x1))
    }
    with torch.no_grad():
        found = oracle(data)
    module = LightGlueMatcher(LightGlueConfig(threshold=FLOOR, **settings))
    template = jax.eval_shape(module.init, jax.random.key(0), x0, x1, SIZE, SIZE)
    variables = from_torch(state, template, [(r"^confidence_thresholds$", None)])
    ours = jax.jit(module.apply)(variables, x0, x1, SIZE, SIZE)
    if adaptive:
        assert found["stop"] < 9, found["stop"]
    assert (found["matches0"][0] >= 0).sum() > 8
    assert ours["stop"][0] == found["stop"]
    np.testing.assert_array_equal(ours["matches0"][0], found["matches0"][0].numpy())
    np.testing.assert_array_equal(ours["matches1"][0], found["matches1"][0].numpy())
    np.testing.assert_array_equal(ours["depth0"][0], found["prune0"][0].numpy())
    np.testing.assert_allclose(ours["scores0"][0], found["matching_scores0"][0].numpy(), atol=2e-5)


def lightglue_state(state):
    """transformers' names and separate projections -> the official ones (head, channel, query/key/value)."""
    out = {}
    for key, value in state.items():
        layer = re.match(r"transformer_layers\.(\d+)\.self_attention\.([qkv])_proj\.(weight|bias)", key)
        if layer:
            new = f"transformers.{layer[1]}.self_attn.Wqkv.{layer[3]}"
            rest = value.shape[1:]
            whole = out.setdefault(new, np.zeros((4, 64, 3, *rest), np.float32))
            whole[:, :, "qkv".index(layer[2])] = value.reshape(4, 64, *rest)
        else:
            out[key] = value
    out = {k: v.reshape(768, *v.shape[3:]) if "Wqkv" in k else v for k, v in out.items()}
    rules = [
        (r"^keypoint_detector\.|cross_attention\.k_proj", None),
        (r"^positional_encoder\.projector", "posenc.Wr"),
        (r"^transformer_layers", "transformers"),
        (r"self_attention\.o_proj", "self_attn.out_proj"),
        (r"cross_attention\.q_proj", "cross_attn.to_qk"),
        (r"cross_attention\.v_proj", "cross_attn.to_v"),
        (r"cross_attention\.o_proj", "cross_attn.to_out"),
        (r"(self|cross)_mlp\.fc1", r"\1_attn.ffn.0"),
        (r"(self|cross)_mlp\.layer_norm", r"\1_attn.ffn.1"),
        (r"(self|cross)_mlp\.fc2", r"\1_attn.ffn.3"),
        (r"^match_assignment_layers\.(\d)\.final_projection", r"log_assignment.\1.final_proj"),
        (r"^match_assignment_layers", "log_assignment"),
        (r"^(token_confidence\.\d)\.token", r"\1.token.0"),
    ]
    return {new: out[old] for new, old in rename(out, rules).items()}


def test_lightglue_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LightGlueConfig(depth_confidence=-1.0, width_confidence=-1.0, filter_threshold=FLOOR)
    oracle = transformers.LightGlueForKeypointMatching(config)
    randomise(oracle, 3)
    with torch.no_grad():
        for layer in oracle.transformer_layers:  # the official network has one projection for both
            layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
        for layer in oracle.match_assignment_layers:
            layer.final_projection.weight *= 3
    state = {k: v.numpy().copy() for k, v in oracle.state_dict().items()}
    x0, x1 = features(3, 50, 50)
    both = [torch.from_numpy(np.stack([x0[k], x1[k]], 1)) for k in ("kpts", "desc")]
    with torch.no_grad():
        matches, scores, *_ = oracle._match_image_pair(*both, 240, 320, mask=torch.ones(1, 2, 50, dtype=torch.int))
    matches, scores = matches.reshape(2, -1), scores.reshape(2, -1)
    module = LightGlueMatcher(LightGlueConfig(threshold=FLOOR))
    template = jax.eval_shape(module.init, jax.random.key(0), x0, x1, SIZE, SIZE)
    ours = jax.jit(module.apply)(from_torch(lightglue_state(state), template), x0, x1, SIZE, SIZE)
    assert (matches[0] >= 0).sum() > 8
    np.testing.assert_array_equal(ours["matches0"][0], matches[0].numpy())
    np.testing.assert_allclose(ours["scores0"][0], scores[0].numpy(), atol=2e-5)


@pytest.mark.parametrize("height, width", [(64, 96), (70, 83)])
def test_disk_equals_kornia(height, width):
    kornia = pytest.importorskip("kornia")
    oracle = kornia.feature.DISK()
    with torch.no_grad():
        state = randomise(oracle, 4, gain=1.4)
    image = np.random.default_rng(4).random((1, height, width, 3), np.float32)
    with torch.no_grad():
        tensor = torch.from_numpy(image.transpose(0, 3, 1, 2))
        found = oracle(tensor, n=50, pad_if_not_divisible=True)[0]
    module = Disk(DiskConfig(50))
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(image))
    ours = jax.jit(module.apply)(from_torch(state, template), image)
    mask = np.asarray(ours["mask"][0])
    kpts = np.asarray(ours["kpts"][0])[mask]
    order = np.lexsort((kpts[:, 0], kpts[:, 1]))  # kornia lists them row by row
    assert len(kpts) > 20
    np.testing.assert_array_equal(kpts[order], found.keypoints.numpy())
    np.testing.assert_allclose(
        np.asarray(ours["scores"][0])[mask][order], found.detection_scores.numpy(), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(np.asarray(ours["desc"][0])[mask][order], found.descriptors.numpy(), atol=1e-4)
