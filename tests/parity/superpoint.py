"""SuperPoint cases: the official form, GIM's form."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from gim_jax.models.superpoint import SuperPoint, SuperPointConfig, non_maximum_suppression
from gim_jax.weights.convert import from_torch

CAPACITY = 8192  # slots where the official run sets no limit


def config_of(meta: dict) -> SuperPointConfig:
    """Read both forms' settings; absent ones have the official defaults."""
    if "detection_threshold" in meta:  # GIM's form names its settings otherwise
        return SuperPointConfig(
            max_keypoints=meta["max_num_keypoints"] or CAPACITY,
            nms_radius=meta.get("nms_radius", 4),
            threshold=meta["detection_threshold"],
            border=meta.get("remove_borders", 4),
            border_of="image",
            sampling="legacy" if meta.get("legacy_sampling", True) else "fixed",
            refinement_radius=meta.get("refinement_radius", 0),
        )
    limit = meta.get("max_keypoints", -1)
    return SuperPointConfig(
        max_keypoints=limit if limit > 0 else CAPACITY,
        nms_radius=meta.get("nms_radius", 4),
        threshold=meta.get("keypoint_threshold", 0.005),
        border=meta.get("remove_borders", 4),
    )


def tensor(image: np.ndarray) -> jnp.ndarray:
    """uint8 [H, W] or [H, W, 3] -> float32 [1, H, W, C] in [0, 1]."""
    return jnp.asarray((image.astype(np.float32) / np.float32(255.0)).reshape(1, *image.shape[:2], -1))


def load(case, config: SuperPointConfig):
    module = SuperPoint(config)
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    return module, from_torch(case.state_dict("superpoint"), template)


def subsample(x: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Take every n-th entry: the documented stride where it gives `shape`, else the one that does."""
    for axis, (want, stride) in enumerate(zip(shape, strides)):
        size = x.shape[axis]
        stride = stride if -(-size // stride) == want else -(-size // want)
        x = x[(slice(None),) * axis + (slice(None, None, stride),)]
    return x


def in_order_of(features: dict, want: np.ndarray, offset: float) -> dict[str, np.ndarray]:
    """Sort the found key points like `want` [n, 2]: the order of close scores is nobody's promise."""
    mask = np.asarray(features["mask"][0])
    found = {k: np.asarray(v[0])[mask] for k, v in features.items() if k != "mask"}
    kpts = found["kpts"] + np.float32(offset)
    assert len(kpts) == len(want), f"{len(kpts)} keypoints, expected {len(want)}"
    order = np.linalg.norm(want[:, None].astype(np.float64) - kpts[None], axis=-1).argmin(1)
    assert len(set(order.tolist())) == len(order), "keypoints differ"
    return {"kpts": kpts[order], "scores": found["scores"][order], "desc": found["desc"][order]}


def run(case):
    gim = "detection_threshold" in case.meta["config"]
    config = config_of(case.meta["config"])
    module, variables = load(case, config)
    image = tensor(case.inputs["image"])

    @jax.jit
    def forward(variables):
        features, state = module.apply(variables, image, capture_intermediates=True)
        return features, state["intermediates"], *module.apply(variables, image, method="encode")

    features, taps, scores, _ = forward(variables)
    strides = {"conv1b": 8, "conv2b": 4, "conv3b": 2, "conv4b": 2}
    for name, want in case.outputs.items():
        tap = name.removesuffix("_sub")
        if not tap.startswith("conv"):
            continue
        value = np.asarray(taps[tap]["__call__"][0]).transpose(0, 3, 1, 2)
        channel, space = (8, strides[tap]) if tap in strides else ((1, 2) if tap == "convPb" else (16, 1))
        case.check(name, subsample(value, want.shape, (1, channel, space, space)))
    scores = np.asarray(scores)
    case.check("dense_scores_sub", subsample(scores[0], case.outputs["dense_scores_sub"].shape, (3, 3)))
    case.check("dense_scores_sum", scores.sum(dtype=np.float64))
    if "n_nonzero_after_nms" in case.outputs:
        peaks = non_maximum_suppression(jnp.asarray(scores), config.nms_radius, jnp.ones(scores.shape, bool))
        case.check("n_nonzero_after_nms", (np.asarray(peaks) != 0).sum().astype(np.int32))
    best = np.asarray(features["scores"][0])
    assert (np.diff(best) <= 0).all(), "scores do not decrease"
    found = in_order_of(features, case.outputs["keypoints"], 0.5 if gim else 0.0)
    case.check("keypoints", found["kpts"])
    if "scores" in case.outputs:
        case.check("scores", found["scores"])
    noted = re.search(r"descriptors_sub = descriptors[^\[]*\[::(\d+)\]", case.meta["notes"])
    stride = int(noted[1]) if noted else 1
    want = case.outputs["descriptors_sub"]
    case.check("descriptors_sub", subsample(found["desc"], want.shape[:1], (stride,)))
