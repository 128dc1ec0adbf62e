"""The two kinds of training pairs, posed ones with depth and video pairs with correspondences, and what is learnt of
each.

A batch of mixed data has `posed` [B] bool, depth0, depth1 [B, H, W] (0 = unknown), K0, K1 [B, 3, 3] of the crops,
T_0to1 [B, 4, 4], imsize1 [B, 2], Hq_aug [B, 3, 3] and depth_complete [B] (`gim_jax.data.augment.make_sample`); one of
video pairs alone has none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import numpy as jnp


@dataclass(frozen=True)
class Settings:
    """`config.objective`: what is minimised beyond the paper's choices that the network's configuration fixes.

    Attributes:
      released: do as GIM's released training code does where it is at fault: DKM's targets normalised by width - 1,
        and the certainty loss of video pairs computed and dropped.
      negatives: LoFTR also pushes down all wrong pairs of posed images (official); GIM's code has the line commented
        out.
      certainty_weight: of DKM's certainty beside the distance (both codes).
      local_distance: DKM, see `losses_dense.scale_losses`.
      positive_px, negative_px: sparse matchers: a keypoint this close to another's projection is its match, one
        farther than that from all is unmatched (GIM, glue-factory).
      balancing: weight of the matched points beside the unmatched ones (the same).
      frozen_stats: batch normalisation keeps its statistics.
    """

    released: bool = False
    negatives: bool = True
    certainty_weight: float = 0.01
    local_distance: float = 4.0
    positive_px: float = 3.0
    negative_px: float = 5.0
    balancing: float = 0.5
    frozen_stats: bool = False


DEFAULT = Settings()


def supervision_of(batch: dict) -> dict:
    """Pick from a mixed batch what the functions of `gim_jax.supervision` and `losses_dense` read."""
    names = ("depth0", "depth1", "T_0to1", "K0", "K1", "Hq_aug", "imsize1", "mask0", "mask1")
    T = batch["T_0to1"]
    R = T[:, :3, :3].swapaxes(1, 2)
    inverse = jnp.concatenate([R, -jnp.einsum("bij,bjk->bik", R, T[:, :3, 3:], precision="highest")], -1)
    return {name: batch[name] for name in names} | {
        "Hq_ori": batch["Hq_aug"],
        "T_1to0": jnp.concatenate([inverse, T[:, 3:]], 1),
    }


def corner_convention(batch: dict) -> dict:
    """Turn intrinsics and homography of pixel centres into those of points counted from the image's corner."""
    shift = jnp.asarray([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], jnp.float32)
    back = jnp.asarray([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]], jnp.float32)
    moved = {
        name: jnp.einsum("ij,bjk->bik", shift, batch[name], precision="highest") for name in ("K0", "K1", "Hq_aug")
    }
    return batch | moved | {"Hq_aug": jnp.einsum("bij,jk->bik", moved["Hq_aug"], back, precision="highest")}


def mix(batch: dict, posed: Any, video: Any) -> jax.Array:
    """Weigh the losses of the two kinds by their share of the batch: each pair counts the same (GIM)."""
    share = batch["posed"].astype(jnp.float32).mean()
    return share * posed + (1 - share) * video
