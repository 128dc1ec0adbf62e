"""What the matchers of keypoints (SuperGlue, LightGlue) minimise on video pairs; a row of OBJECTIVES."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from gim_jax import losses
from gim_jax.models.sparse import valid_size
from gim_jax.models.superpoint import fill_random


def keypoint_objective(module, variables: dict, batch: dict, rng, train: bool):
    """Match the labelled points with each other: keypoint i of image 0 belongs to keypoint i of image 1.

    The detector is left out and left alone: the labels are the keypoints, slots without one are filled with random
    places among them, so that a pair always has as many points (GIM's training code for LightGlue).

    Args:
      batch: see `gim_jax.train.objectives`.
    """
    images = [batch[k].astype(jnp.float32) / 255 for k in ("image0", "image1")]
    sizes = [valid_size(image, batch[k]) for image, k in zip(images, ("mask0", "mask1"))]
    mask = batch["match_mask"]
    kpts = [
        fill_random(key, {"kpts": batch[k], "mask": mask}, size)
        for key, k, size in zip(jax.random.split(rng), ("kpts0", "kpts1"), sizes)
    ]
    out, new = module.apply(
        variables, *images, *kpts, *sizes, train, method="match_at", mutable=["batch_stats"] if train else []
    )
    loss = losses.diagonal_nll(out["log_assignment"], mask).mean()
    right = (out["matches0"] == jnp.arange(mask.shape[1])) & mask
    num_labels = mask.sum(-1)
    metrics = {
        "loss": loss,
        "recall": (right.sum(-1) / jnp.maximum(num_labels, 1)).mean(),
        "confidence": (jnp.where(right, out["scores0"], 0).sum(-1) / jnp.maximum(num_labels, 1)).mean(),
        "num_matches": num_labels.mean(),
    }
    return loss, metrics, new.get("batch_stats", variables.get("batch_stats", {}))
