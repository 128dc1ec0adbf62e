"""What each family of networks minimises on a training batch: pure, jittable functions in one table.

`objective(module, variables, batch, rng, train, settings) -> (loss, metrics, new batch_stats)`; metrics are scalars. A
batch holds image0, image1 uint8 [B, H, W, C], mask0, mask1 bool [B, H/8, W/8], and sparse correspondences kpts0, kpts1
[B, M, 2] px of these images with match_mask [B, M]; with posed pairs in it also what `gim_jax.train.kinds` says.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp

from gim_jax import losses, losses_dense, supervision
from gim_jax.models import dkm, loftr
from gim_jax.ops import assignment
from gim_jax.train.keypoints import keypoint_objective
from gim_jax.train.kinds import DEFAULT, Settings, mix, supervision_of

TRAIN_FINE_CHUNK = 512  # windows of a pair that LoFTR's fine stage sees at once


def to_float(image: jax.Array) -> jax.Array:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(jnp.float32) / 255


def refine(module, variables: dict, features: dict, cells0, cells1) -> tuple[jax.Array, jax.Array]:
    """Compute `LoFTR.refine`, many windows in pieces and again for the gradient: attention in 4096 windows at once is
    4 of the 9 GiB that a step would hold at 840x840."""
    piece = lambda cells: module.apply(variables, features, *cells, method="refine")  # noqa: E731
    if cells0.shape[1] > TRAIN_FINE_CHUNK:
        piece = jax.checkpoint(piece)
    return assignment.map_rows(piece, (cells0, cells1), TRAIN_FINE_CHUNK)


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
    windows0, windows1 = refine(module, variables, features, cells0, cells1)
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


def loftr_posed(module, variables: dict, features: dict, batch: dict, rng, settings: Settings) -> dict:
    """Compute LoFTR's losses on the posed pairs of a batch.

    The fine stage is trained at true coarse matches, drawn at random where there are more than `max_fine_matches`. The
    official code also draws from what is predicted, but wrong predictions lie outside of their window and add nothing.

    Returns:
      scalars coarse and fine; offset [B, N, 3], target [B, N, 2] and fine_mask [B, N] as of `loftr_video`.
    """
    config, posed = module.config, batch["posed"]
    size, *shape = features["coarse0"].shape[:3]
    given = supervision_of(batch)
    targets = supervision.coarse_targets(given, (shape[0], shape[1]), (shape[0], shape[1]))
    match1 = jnp.where(posed[:, None], targets["match1"], -1)
    masks = [batch[k].reshape(size, -1) & posed[:, None] for k in ("mask0", "mask1")]
    positive, negative = losses.coarse_loss(
        *loftr.logits(config, features), match1, *masks, negatives=settings.negatives, kind="focal"
    )
    draw = jax.random.uniform(rng, match1.shape) + (match1 >= 0)
    draw, cells0 = jax.lax.top_k(draw, min(config.max_fine_matches, match1.shape[1]))
    mask = draw >= 1
    cells0 = jnp.where(mask, cells0, 0)
    cells1 = jnp.where(mask, jnp.take_along_axis(match1, cells0, axis=1), 0)
    index = jnp.repeat(jnp.arange(size), cells0.shape[1])
    target = supervision.fine_targets(given, targets, index, cells0.ravel(), cells1.ravel()).reshape(*cells0.shape, 2)
    mask &= jnp.isfinite(target).all(-1)
    target = jnp.where(mask[..., None], target, 0)
    windows0, windows1 = refine(module, variables, features, cells0, cells1)
    offset = loftr.fine_offset(windows0[:, :, windows0.shape[2] // 2], windows1)
    return {
        "coarse": positive + negative * size / jnp.maximum(posed.sum(), 1),  # the mean counts the video pairs, too
        "fine": losses.fine_loss(offset, target, mask),
        "offset": offset,
        "target": target,
        "fine_mask": mask,
    }


def loftr_objective(module, variables: dict, batch: dict, rng, train: bool, settings: Settings = DEFAULT):
    """Sum LoFTR's coarse and fine loss over the batch: by depth where there is some, else by correspondences."""
    mask0, mask1 = batch["mask0"], batch["mask1"]
    train = train and not settings.frozen_stats
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
    kpts, mask, mixed = (batch["kpts0"], batch["kpts1"]), batch["match_mask"], {}
    if "posed" in batch:
        mask = mask & ~batch["posed"][:, None]
    video = loftr_video(module, variables, features, *kpts, mask, mask0, mask1)
    coarse, fine = video["coarse"], video["fine"]
    if "posed" in batch:
        posed = loftr_posed(module, variables, features, batch, rng, settings)
        coarse, fine = mix(batch, posed["coarse"], coarse), mix(batch, posed["fine"], fine)
        mixed = {f"{name}_{kind}": part[name] for kind, part in (("posed", posed), ("video", video)) for name in PARTS}
        mixed["fine_error_px_posed"] = _fine_error_px(module, posed)
    metrics = {
        "loss": coarse + fine,
        "loss_coarse": coarse,
        "loss_fine": fine,
        "confidence": losses.masked_mean(video["conf"], video["mask"]),
        "fine_error_px": _fine_error_px(module, video),
        "num_matches": video["mask"].sum(-1).mean(),
        **mixed,
    }
    return coarse + fine, metrics, new.get("batch_stats", variables["batch_stats"])


PARTS = ("coarse", "fine")


def _fine_error_px(module, part: dict) -> jax.Array:
    error = jnp.linalg.norm(part["offset"][..., :2] - part["target"], axis=-1)
    return losses.masked_mean(error * (module.config.fine_window_size // 2 * loftr.FINE), part["fine_mask"])


def dkm_losses(predictions: dict, batch: dict, settings: Settings):
    """Sum DKM's losses over all strides: by depth where there is some, else at the correspondences.

    The certainty of video pairs is trained towards 1 at the correspondences; `settings.released` leaves that out.

    Returns:
      scalar loss; {name: scalar}; [B, M] distance in px at the correspondences.
    """
    mask, weight = batch["match_mask"], 0.0 if settings.released else settings.certainty_weight
    points = batch["kpts0"], batch["kpts1"]
    video_mask = mask & ~batch["posed"][:, None] if "posed" in batch else mask
    loss, parts, error = losses_dense.sparse_loss(predictions, *points, video_mask, settings.released)
    loss += weight * sum(part["cross_entropy"] for part in parts.values())
    metrics = {f"distance_{stride}": part["distance"] for stride, part in parts.items()}
    if "posed" not in batch:
        return loss, metrics, error
    shape = predictions[1]["certainty"].shape[1:]
    given = supervision_of(batch)
    targets = {
        stride: losses_dense.gim_depth_targets(p["certainty"].shape[1:], given, shape, settings.released)
        for stride, p in predictions.items()
    }
    posed, parts = losses_dense.dense_loss(
        predictions,
        targets,
        batch["posed"] & batch["depth_complete"],
        settings.certainty_weight,
        local_distance=settings.local_distance,
    )
    metrics |= {f"distance_{stride}_posed": part["distance"] for stride, part in parts.items()}
    metrics |= {"loss_posed": posed, "loss_video": loss, "certainty_1": parts[1]["cross_entropy"]}
    return mix(batch, posed, loss), metrics, error


def dkm_objective(module, variables: dict, batch: dict, rng, train: bool, settings: Settings = DEFAULT):
    """See `dkm_losses`."""
    del rng  # nothing is drawn
    train = train and not settings.frozen_stats
    shape = batch["image0"].shape
    images = (dkm.prepare(module.config, to_float(batch[k]), None, shape[2:0:-1]) for k in ("image0", "image1"))
    predictions, new = module.apply(variables, *images, train, mutable=["batch_stats"] if train else [])
    loss, parts, error = dkm_losses(predictions, batch, settings)
    mask = batch["match_mask"]
    metrics = {
        "loss": loss,
        **parts,
        "error_px": losses.masked_mean(error, mask),
        "num_matches": mask.sum(-1).mean(),
    }
    return loss, metrics, new.get("batch_stats", variables["batch_stats"])


OBJECTIVES = {
    "loftr": loftr_objective,
    "dkm": dkm_objective,
    "superglue": keypoint_objective,
    "lightglue": keypoint_objective,
}
