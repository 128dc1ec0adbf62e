"""What the matchers of keypoints (SuperGlue, LightGlue) minimise; a row of OBJECTIVES."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from gim_jax import losses, supervision
from gim_jax.models.sparse import valid_size
from gim_jax.models.superpoint import fill_random
from gim_jax.ops.assignment import mutual_matches
from gim_jax.train.kinds import DEFAULT, Settings, corner_convention, supervision_of


def keypoint_objective(module, variables: dict, batch: dict, rng, train: bool, settings: Settings = DEFAULT):
    """Match keypoints: of video pairs the labelled points with each other, of posed pairs the detected ones by depth.

    Keypoint i of image 0 of a video pair belongs to keypoint i of image 1. The detector is left alone. Slots without
    a keypoint are filled with random places among the others, so that a pair always has as many points (GIM's training
    code for LightGlue).

    Args:
      batch: see `gim_jax.train.objectives`.
    """
    train = train and not settings.frozen_stats
    images = [batch[k].astype(jnp.float32) / 255 for k in ("image0", "image1")]
    sizes = [valid_size(image, batch[k]) for image, k in zip(images, ("mask0", "mask1"))]
    mask = batch["match_mask"]
    keys = jax.random.split(rng)
    labelled = [{"kpts": batch[k], "mask": mask} for k in ("kpts0", "kpts1")]
    kpts = [fill_random(key, features, size) for key, features, size in zip(keys, labelled, sizes)]
    maps = module.apply(variables, *images, *sizes, method="encode")
    if "posed" not in batch:
        out, new = module.apply(
            variables, *maps, *kpts, *sizes, train, method="match_at", mutable=["batch_stats"] if train else []
        )
        loss = losses.diagonal_nll(out["log_assignment"], mask).mean()
        extra, want = {}, jnp.where(mask, jnp.arange(mask.shape[1]), -1)
    else:
        posed = batch["posed"]
        found = [module.apply(variables, *map_size, method="detect") for map_size in zip(maps, sizes)]
        found = [_resize_slots(features, mask.shape[1]) for features in found]
        filled = [fill_random(key, features, size) for key, features, size in zip(keys, found, sizes)]
        kpts = [jnp.where(posed[:, None, None], detected, places) for detected, places in zip(filled, kpts)]
        answers, new = module.apply(
            variables, *maps, *kpts, *sizes, train, method="answers_at", mutable=["batch_stats"] if train else []
        )
        everywhere = jnp.broadcast_to(posed[:, None], mask.shape)
        labels = supervision.label_by_depth(
            corner_convention(supervision_of(batch)),
            kpts[0],
            kpts[1],
            everywhere,
            everywhere,
            settings.positive_px,
            settings.negative_px,
        )
        weight, final = settings.balancing, answers[-1][0]
        if len(answers) == 1:  # SuperGlue
            by_depth = losses.assignment_nll(final, labels[0], labels[1], weight)["nll"]
        else:
            by_depth = losses.lightglue_loss(answers, labels[0], labels[1], everywhere, everywhere, weight)["total"]
        mixed = losses.mix(by_depth, losses.diagonal_nll(final, mask), posed)
        loss = mixed["total"]
        matches, _, scores, _ = mutual_matches(final[:, :-1, :-1], module.config.threshold)
        out = {"matches0": matches, "scores0": scores}
        extra = {"loss_posed": mixed["posed"], "loss_video": mixed["video"]}
        want = jnp.where(posed[:, None], labels[0], jnp.where(mask, jnp.arange(mask.shape[1]), -1))
    labels0 = want >= 0
    right = (out["matches0"] == want) & labels0
    num_labels = labels0.sum(-1)
    metrics = {
        "loss": loss,
        "recall": (right.sum(-1) / jnp.maximum(num_labels, 1)).mean(),
        "confidence": (jnp.where(right, out["scores0"], 0).sum(-1) / jnp.maximum(num_labels, 1)).mean(),
        "num_matches": num_labels.mean(),
        **extra,
    }
    return loss, metrics, new.get("batch_stats", variables.get("batch_stats", {}))


def _resize_slots(features: dict, num: int) -> dict:
    """Keep the best `num` keypoints, or add empty slots."""
    missing = max(num - features["mask"].shape[1], 0)
    kpts = jnp.pad(features["kpts"][:, :num], ((0, 0), (0, missing), (0, 0)))
    return {"kpts": kpts, "mask": jnp.pad(features["mask"][:, :num], ((0, 0), (0, missing)))}
