"""Match with DKM: both directions, a second pass at a larger size, and balanced samples of the dense warp."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from gim_jax.models.dkm_network import CONFIGS, DKM, IMAGENET_MEAN, IMAGENET_STD, DKMConfig, position_grid
from gim_jax.ops.density import gaussian_density
from gim_jax.ops.resize import resize

__all__ = ["CONFIGS", "DKM", "DKMConfig", "dense_match", "match", "prepare", "sample"]

BLACK = 0.03125  # 8 of 256: GIM matches nothing where R, G and B are all below
SURE = 0.05  # certainties above count as one when sampling
DENSITY_STD = 0.1  # of the kernel density, in [-1, 1] units of the four coordinates
MIN_DENSITY = 10.0  # samples with less company are chosen last
OVERSAMPLING = 4  # candidates of a sample


def prepare(config: DKMConfig, images: jax.Array, mask: jax.Array | None, size: tuple[int, int]) -> jax.Array:
    """Turn images [B, H, W, 3] in [0, 1] into the network's input of `size` = (width, height), by the convention
    of the model's family; `mask` as in `dense_match`."""
    valid = None if mask is None else valid_size(images, mask)
    images = resize(images, (size[1], size[0]), valid, antialias_cubic=config.official)
    if not config.official:
        return images
    images = jnp.clip(images, 0, 1)  # cubic interpolation overshoots
    return (images - jnp.asarray(IMAGENET_MEAN, images.dtype)) / jnp.asarray(IMAGENET_STD, images.dtype)


def predict_warp(module: DKM, variables, small0, small1, large0=None, large1=None):
    """Predict the warp in both directions (or one, as configured), from images that have the network's sizes.

    One image and one direction after the other (they fill a device by themselves), so memory does not grow with
    the batch.

    Args:
      small0, small1: [B, h, w, 3] normalised images of the first pass.
      large0, large1: [B, H, W, 3] those of the second pass, None for one pass.

    Returns:
      warp: [B, H, 2 W, 4] float32, (x0, y0, x1, y1) in [-1, 1]; left half from each pixel of image 0, right half
        from each pixel of image 1. One direction: [B, H, W, 4], the left half.
      certainty: [B, H, 2 W] (or [B, H, W]) float32 in [0, 1], zero where the warp leaves the other image.
    """
    batch = small0.shape[0]

    def apply(method, *args):
        out = module.apply(variables, *[jax.tree.map(lambda x: x[None], a) for a in args], method=method)
        return jax.tree.map(lambda x: x[0], out)

    def encode(image0, image1, strides):
        return jax.lax.map(
            lambda image: {s: x for s, x in apply("encode", image).items() if s in strides},
            jnp.concatenate([image0, image1]),
        )

    def at(maps, item):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, item, keepdims=False), maps)

    def first_pass(direction):
        query, support = at(maps, direction), at(maps, (direction + batch) % (2 * batch))
        out = apply("decode", query, support, at(maps, direction % batch + batch))
        return {s: out[s] for s in (16, 1)}

    def second_pass(direction_and_start):
        direction, start = direction_and_start
        return apply("refine", at(maps, direction), at(maps, (direction + batch) % (2 * batch)), start)[1]

    maps = encode(small0, small1, (1, 2, 4, 8, 16, 32))
    directions = jnp.arange(2 * batch if module.config.symmetric else batch)
    out = jax.lax.map(first_pass, directions)
    coarse, fine = out[16]["certainty"], out[1]
    if large0 is not None:
        maps = encode(large0, large1, (1, 2, 4, 8))
        fine = jax.lax.map(second_pass, (directions, fine))
    return assemble(coarse, fine["flow"], fine["certainty"], module.config.symmetric)


def assemble(coarse: jax.Array, flow: jax.Array, logits: jax.Array, symmetric: bool = True):
    """Join the last predictions of both directions, [2 B, ...] first 0 -> 1 then 1 -> 0, into one warp.

    Not `symmetric`: those of the direction 0 -> 1 alone, [B, ...].

    Args:
      coarse: [2 B, h, w] certainty logits after stride 16 of the first pass: where negative, half of them is
        taken from `logits`.
      flow, logits: [2 B, H, W, 2] and [2 B, H, W] of stride 1.

    Returns:
      warp, certainty: see `predict_warp`.
    """
    height, width = logits.shape[1:]
    batch = len(logits) // 2 if symmetric else len(logits)
    coarse = resize(coarse[..., None], (height, width))[..., 0]
    certainty = jax.nn.sigmoid(logits - 0.5 * jnp.minimum(coarse, 0))
    certainty = jnp.where((jnp.abs(flow) > 1).any(-1), 0, certainty)
    flow = jnp.clip(flow, -1, 1)
    grid = jnp.broadcast_to(position_grid(height, width), (batch, height, width, 2))
    forward = jnp.concatenate([grid, flow[:batch]], -1)
    if not symmetric:
        return forward, certainty
    backward = jnp.concatenate([flow[batch:], grid], -1)
    return jnp.concatenate([forward, backward], 2), jnp.concatenate([certainty[:batch], certainty[batch:]], 2)


def valid_size(image: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Measure the valid top-left part of each image [B, H, W, C] by its mask [B, h, w] (pixels or cells, H a
    multiple of h): [B, 2] float32 (width, height) px."""
    batch, height, width = image.shape[:3]
    if mask is None:
        return jnp.full((batch, 2), jnp.asarray([width, height]), jnp.float32)
    columns, rows = mask.any(1).sum(-1), mask.any(2).sum(-1)
    cell = jnp.asarray([width / mask.shape[2], height / mask.shape[1]], jnp.float32)
    return jnp.stack([columns, rows], -1) * cell


def black(images: jax.Array, mask: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
    """Find pixels of `shape` = (height, width) whose nearest one of `images` [B, H, W, 3] is black: bool."""
    size_in = images.shape[1:3]
    scale = valid_size(images, mask) / jnp.asarray([shape[1], shape[0]], jnp.float32)
    column = jnp.floor(jnp.arange(shape[1]) * scale[:, :1]).astype(jnp.int32)  # torch's "nearest" takes the floor
    row = jnp.floor(jnp.arange(shape[0]) * scale[:, 1:]).astype(jnp.int32)
    dark = (images < BLACK).all(-1)
    dark = jnp.take_along_axis(dark, jnp.minimum(row, size_in[0] - 1)[:, :, None], axis=1)
    return jnp.take_along_axis(dark, jnp.minimum(column, size_in[1] - 1)[:, None, :], axis=2)


def dense_match(module: DKM, variables, image0, image1, mask0=None, mask1=None):
    """Warp each image into the other.

    Args:
      module, variables: the network and its weights.
      image0, image1: [B, H, W, 3] float32 in [0, 1], of any sizes; resized here to the configured ones.
      mask0, mask1: [B, h, w] bool, True on the valid top-left part of padded images (pixels or cells, as
        `valid_size` says); what is padded has no influence. None: all valid.

    Returns:
      warp, certainty: see `predict_warp`; [-1, 1] spans the valid parts.
    """
    config = module.config
    pairs = ((image0, mask0), (image1, mask1))
    inputs = [prepare(config, *pair, size) for size in (config.size, config.upsample_size) if size for pair in pairs]
    warp, certainty = predict_warp(module, variables, *inputs)
    if not config.official:
        seen = pairs if config.symmetric else pairs[:1]
        height, width = certainty.shape[1], certainty.shape[2] // len(seen)
        dark = jnp.concatenate([black(*pair, (height, width)) for pair in seen], 2)
        certainty = jnp.where(dark, 0, certainty)
    return warp, certainty


def sample(warp: jax.Array, certainty: jax.Array, key: jax.Array, num_matches: int, official: bool = False):
    """Draw matches from a dense warp without replacement, evenly over the images (DKM, section 3.4).

    Candidates are drawn by certainty, those above 0.05 alike, and thinned out by the inverse of their density in
    the four coordinates; both draws are Gumbel-top-k. Only matches of certainty 0 are drawn where no others exist.

    Args:
      warp: [N, 4] in [-1, 1].
      certainty: [N] in [0, 1].
      key: of the random numbers.
      num_matches: K; all N where there are fewer.
      official: return the thresholded certainty, as the official code does.

    Returns:
      matches: [K, 4].
      conf: [K].
    """
    warp, certainty = jnp.asarray(warp), jnp.asarray(certainty)
    weight = jnp.where(certainty > SURE, 1.0, certainty)
    key0, key1 = jax.random.split(key)
    chosen = _draw(key0, jnp.log(weight), OVERSAMPLING * num_matches)
    density = gaussian_density(warp[chosen], DENSITY_STD)
    balance = jnp.where(density < MIN_DENSITY, 1e-7, 1 / (density + 1))
    # a candidate of no certainty was drawn for lack of others: it stays behind those that have some
    chosen = chosen[_draw(key1, jnp.where(weight[chosen] > 0, jnp.log(balance), -jnp.inf), num_matches)]
    return warp[chosen], (weight if official else certainty)[chosen]


def _draw(key, logits, num: int):
    """Draw `num` indices without replacement with probabilities exp(logits), unnormalised."""
    noise = jax.random.gumbel(key, logits.shape)
    return jax.lax.top_k(logits + noise, min(num, logits.shape[0]))[1]


def match(
    module: DKM, variables, image0, image1, mask0=None, mask1=None, key=None, dense: bool = False
) -> dict[str, jax.Array]:
    """Match image pairs.

    Args:
      image0, image1, mask0, mask1: see `dense_match`.
      key: of the samples; a fixed one if None.
      dense: return `warp` and `certainty` of `dense_match`, too.

    Returns:
      kpts0, kpts1: [B, K, 2] float32 px of the given images, (0, 0) = centre of the top-left pixel. The official
        code leaves out the half pixel between its corner convention and this one.
      conf: [B, K] float32 in [0, 1].
      mask: [B, K] bool, False where a match has no certainty.
    """
    config = module.config
    warp, certainty = dense_match(module, variables, image0, image1, mask0, mask1)
    batch = warp.shape[0]
    keys = jax.random.split(jax.random.key(0) if key is None else key, batch)
    matches, conf = jax.lax.map(
        lambda item: sample(*item, num_matches=config.num_matches, official=config.official),
        (warp.reshape(batch, -1, 4), certainty.reshape(batch, -1), keys),
    )
    size0, size1 = valid_size(image0, mask0)[:, None], valid_size(image1, mask1)[:, None]
    kpts0 = size0 * (matches[..., :2] + 1) / 2 - 0.5
    kpts1 = size1 * (matches[..., 2:] + 1) / 2 - 0.5
    out = {"kpts0": kpts0, "kpts1": kpts1, "conf": conf, "mask": conf > 0}
    return out | {"warp": warp, "certainty": certainty} if dense else out
