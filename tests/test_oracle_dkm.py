"""DKM against GIM's own PyTorch code, live, as the wheel `vismatch` carries it."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gim_jax.models import dkm
from gim_jax.ops.gaussian_process import posterior_mean
from gim_jax.weights.convert import from_torch
from tests import oracles

torch = oracles.torch()
if importlib.util.find_spec("vismatch") is None:  # found without importing: it has 28 dependencies
    pytest.skip("vismatch is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow
RULES = [(r"^encoder\.net\.fc\.", None)]


@pytest.fixture(scope="module")
def official():
    """The official module with random weights, its heads small so that the warp stays inside the images."""
    torch.set_num_threads(1)  # batched inverses are wrong with more (torch 2.13, CPU)
    sys.path.insert(
        0, str(Path(importlib.util.find_spec("vismatch").submodule_search_locations[0]) / "third_party/gim")
    )
    from dkm.models.model_zoo.DKMv3 import DKMv3  # pyright: ignore

    torch.manual_seed(0)
    model = DKMv3(weights=None, h=96, w=128).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.8, 1.3)
            elif "terminal_module" in name or "out_conv" in name:
                value.mul_(0.1)
    yield model
    sys.path.pop(0)


def test_dense_match_with_both_passes(official):
    model = official
    model.upsample_preds, model.upsample_res = True, (120, 168)
    config = dataclasses.replace(dkm.CONFIGS["gim_dkm"], size=(128, 96), upsample_size=(168, 120))
    module = dkm.DKM(config)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), image, image)
    variables = from_torch({k: v.numpy() for k, v in model.state_dict().items()}, template, RULES)

    rng = np.random.default_rng(0)  # smooth images, brighter than what GIM takes for black
    coarse = rng.uniform(0.1, 1, (2, 3, 12, 16)).astype(np.float32)
    images = torch.nn.functional.interpolate(torch.from_numpy(coarse), (150, 200), mode="bicubic").clamp(0.1, 1)
    with torch.no_grad():
        warp, certainty = (x.numpy() for x in model.match(images[:1], images[1:], device="cpu"))
    given = images.numpy().transpose(0, 2, 3, 1)
    got_warp, got_certainty = jax.jit(lambda v, a, b: dkm.dense_match(module, v, a, b))(variables, given[:1], given[1:])
    assert warp.std() > 0.3 and (np.abs(warp) < 1).mean() > 0.9 and certainty.std() > 1e-3  # a case that says something
    np.testing.assert_allclose(got_warp[0], warp.reshape(got_warp[0].shape), atol=2e-4)
    np.testing.assert_allclose(got_certainty[0], certainty.reshape(got_certainty[0].shape), atol=2e-4)


@pytest.mark.parametrize("shape", [(40, 46), (45, 46)])  # 1840 and 2070 tokens
def test_released_fault_of_the_gaussian_process(official, shape):
    process = official.decoder.gps["16"]
    rng = np.random.default_rng(0)
    feat0, feat1 = rng.standard_normal((2, 2, 32, *shape)).astype(np.float32)
    with torch.no_grad():
        want = process(torch.from_numpy(feat0), torch.from_numpy(feat1)).numpy()
        values = process.get_pos_enc(torch.from_numpy(feat1))[0].numpy().reshape(-1, shape[0] * shape[1]).T
    tokens = [x.reshape(2, 32, -1).transpose(0, 2, 1) for x in (feat0, feat1)]
    want = want.reshape(2, want.shape[1], -1).transpose(0, 2, 1)
    correct = np.asarray(posterior_mean(*tokens, values, tokens[1]))
    faulty = np.asarray(posterior_mean(*tokens, values, tokens[1][:1]))
    np.testing.assert_allclose(correct[0], want[0], atol=2e-3)
    large = shape[0] * shape[1] > 2000
    np.testing.assert_allclose((faulty if large else correct)[1], want[1], atol=2e-3)
    assert np.abs(faulty[1] - correct[1]).max() > 0.05
