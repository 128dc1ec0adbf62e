"""What each family of networks minimises on a training batch: pure, jittable functions in one table.

`objective(module, variables, batch, rng, train) -> (loss, metrics, new batch_stats)`; metrics are scalars. A batch
holds image0, image1 uint8 [B, H, W, C], mask0, mask1 bool [B, H/8, W/8], and sparse correspondences kpts0, kpts1 [B, M,
2] px of these images with match_mask [B, M].
"""

from __future__ import annotations

import jax
from jax import numpy as jnp

from gim_jax import losses, losses_dense
from gim_jax.models import dkm, loftr


def to_float(image: jax.Array) -> jax.Array:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(jnp.float32) / 255


def loftr_video(module, variables: dict, features: dict, kpts0, kpts1, mask, mask0, mask1) -> dict:
    """Compute LoFTR's losses on sparse correspondences (GIM's training code: `zeroshot_coarse_matching` and its fine
    part).

    Args:
      features: output of `LoFTR.encode`. kpts0, kpts1: [B, M, 2] px of the network's images. mask: [B, M] bool.
      mask0, mask1: [B, h, w] bool valid cells, or None.

    Returns:
      scalars coarse and fine; conf and mask [B, M]: confidences, and which correspondences took part; offset [B, N, 3],
      target [B, N, 2] in the fine window and fine_mask [B, N] of every so many-th correspondence (`max_fine_matches`).
    """
    config = module.config
    log_conf, mask = losses.zero_shot_log_conf(
        features["coarse0"], features["coarse1"], kpts0, kpts1, mask, mask0, mask1, config.temperature
    )
    every = -(-mask.shape[1] // config.max_fine_matches)
    fine_mask = mask[:, ::every]
    inside = lambda kpts: jnp.where(fine_mask[..., None], kpts[:, ::every], 0)  # noqa: E731
    cells0, place = losses.zero_shot_fine_cells(inside(kpts0), features["coarse0"].shape[2])
    cells1, target = losses.zero_shot_fine_cells(inside(kpts1), features["coarse1"].shape[2])
    windows0, windows1 = module.apply(variables, features, cells0, cells1, method="refine")
    offset = loftr.fine_offset(losses.window_query(windows0, place), windows1)
    target = target / (config.fine_window_size // 2)
    return {
        "coarse": losses.zero_shot_coarse_loss(log_conf, mask, config.conf_floor),
        "fine": losses.fine_loss(offset, target, fine_mask),
        "conf": jnp.exp(log_conf),
        "offset": offset,
        "target": target,
        "mask": mask,
        "fine_mask": fine_mask,
    }


def loftr_objective(module, variables: dict, batch: dict, rng, train: bool):
    """Sum LoFTR's coarse and fine loss over the batch's correspondences."""
    del rng  # nothing is drawn: correspondences are subsampled by the data pipeline
    mask0, mask1 = batch["mask0"], batch["mask1"]
    features, new = module.apply(
        variables,
        to_float(batch["image0"]),
        to_float(batch["image1"]),
        mask0,
        mask1,
        train,
        method="encode",
        mutable=["batch_stats"] if train else [],
    )
    video = loftr_video(module, variables, features, batch["kpts0"], batch["kpts1"], batch["match_mask"], mask0, mask1)
    loss = video["coarse"] + video["fine"]
    half_window_px = module.config.fine_window_size // 2 * loftr.FINE
    error = jnp.linalg.norm(video["offset"][..., :2] - video["target"], axis=-1) * half_window_px
    metrics = {
        "loss": loss,
        "loss_coarse": video["coarse"],
        "loss_fine": video["fine"],
        "confidence": losses.masked_mean(video["conf"], video["mask"]),
        "fine_error_px": losses.masked_mean(error, video["fine_mask"]),
        "num_matches": video["mask"].sum(-1).mean(),
    }
    return loss, metrics, new.get("batch_stats", variables["batch_stats"])


def dkm_objective(module, variables: dict, batch: dict, rng, train: bool):
    """Sum DKM's distances at the batch's correspondences over all strides; its certainty is not trained (GIM)."""
    del rng  # nothing is drawn
    shape = batch["image0"].shape
    images = (dkm.prepare(module.config, to_float(batch[k]), None, shape[2:0:-1]) for k in ("image0", "image1"))
    predictions, new = module.apply(variables, *images, train, mutable=["batch_stats"] if train else [])
    mask = batch["match_mask"]
    loss, parts, error = losses_dense.sparse_loss(predictions, batch["kpts0"], batch["kpts1"], mask)
    metrics = {
        "loss": loss,
        **{f"distance_{stride}": part["distance"] for stride, part in parts.items()},
        "error_px": losses.masked_mean(error, mask),
        "num_matches": mask.sum(-1).mean(),
    }
    return loss, metrics, new.get("batch_stats", variables["batch_stats"])


OBJECTIVES = {"loftr": loftr_objective, "dkm": dkm_objective}
