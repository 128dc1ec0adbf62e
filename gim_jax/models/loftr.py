"""LoFTR: detector-free matching, coarse cells by a transformer, then a sub-pixel refinement (Sun et al., CVPR
2021).

Three forms, one code: the official one (dual softmax or optimal transport, outdoor and indoor), GIM's with a
ResNet-50 encoder on RGB, and a small one that a CPU trains in minutes. Attribute names are the official ones,
see `gim_jax.weights.convert`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from gim_jax.models.backbones import ResNetFPN, recomputed
from gim_jax.ops import assignment, attention
from gim_jax.ops.pairing import join, part
from gim_jax.ops.precision import at_least_float32
from gim_jax.ops.sampling import gather_windows

COARSE = 8  # px per coarse cell
FINE = 2  # px per fine cell
FINE_CHUNK = 256  # matches per pair that `match` refines at a time


@dataclass(frozen=True)
class LoFTRConfig:
    """Structure and inference rules; the defaults are the official outdoor ones (`src/config/default.py`)."""

    encoder: str = "basic"  # "basic": ResNetFPN_8_2, "resnet50": GIM's
    in_channels: int = 1  # 1: gray, 3: RGB; both in [0, 1] without further normalisation
    initial_dim: int = 128
    block_dims: tuple[int, int, int] = (128, 196, 256)  # widths at 1/2 (fine), 1/4, 1/8 (coarse)
    num_heads: int = 8
    coarse_layers: tuple[str, ...] = ("self", "cross") * 4
    fine_layers: tuple[str, ...] = ("self", "cross")
    attention: str = "linear"  # or "full"
    temp_bug_fix: bool = True  # False: the position encoding as first released, with a misplaced division
    fine_concat_coarse_feat: bool = True  # windows see the coarse features of their cell
    fine_window_size: int = 5
    match_type: str = "dual_softmax"  # or "sinkhorn"
    temperature: float = 0.1  # of the dual softmax
    skh_iters: int = 3
    skh_init_bin_score: float = 1.0
    skh_prefilter: bool = False
    thr: float = 0.2
    border_rm: int = 2  # coarse cells along the border that never match
    max_matches: int = 4096  # static capacity of `match`
    conf_floor: float = 1e-6  # training: smaller confidences have no gradient
    max_fine_matches: int = 4096  # training: correspondences per pair that the fine stage sees
    remat: str = "none"  # training: of blocks and attention layers, see `backbones.recomputed`
    dtype: str = "float32"  # of convolutions and linear layers; scores and statistics are float32

    def __post_init__(self):
        for field, known in (
            ("encoder", ("basic", "resnet50")),
            ("attention", ("linear", "full")),
            ("match_type", ("dual_softmax", "sinkhorn")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"LoFTRConfig.{field}: {getattr(self, field)!r}, expected one of {', '.join(known)}")
        for name, dim in (("coarse", self.block_dims[2]), ("fine", self.block_dims[0])):
            if dim % 4 or dim % self.num_heads:
                expected = f"a multiple of 4 and of num_heads = {self.num_heads}"
                raise ValueError(f"LoFTRConfig.block_dims: {name} width {dim}, expected {expected}")


def position_encoding(height: int, width: int, dim: int, temp_bug_fix: bool) -> tuple[np.ndarray, np.ndarray]:
    """Make LoFTR's sinusoidal position encoding: the sum of [height, 1, dim] and [1, width, dim], float32.

    Channels 0::4 sin(x w_k), 1::4 cos(x w_k), 2::4 sin(y w_k), 3::4 cos(y w_k); positions count from 1.
    Frequencies fall from 1 to 1e-4 as published; without `temp_bug_fix` they are exp(-2k), as in the first
    released weights.
    """
    k = np.arange(0, dim // 2, 2, dtype=np.float32)
    step = -np.log(10000.0) / (dim // 2) if temp_bug_fix else -1.0
    frequency = np.exp(k * np.float32(step))
    x = np.arange(1, width + 1, dtype=np.float32)[:, None] * frequency
    y = np.arange(1, height + 1, dtype=np.float32)[:, None] * frequency
    rows, columns = np.zeros((height, 1, dim), np.float32), np.zeros((1, width, dim), np.float32)
    columns[0, :, 0::4], columns[0, :, 1::4] = np.sin(x), np.cos(x)
    rows[:, 0, 2::4], rows[:, 0, 3::4] = np.sin(y), np.cos(y)
    return rows, columns


class EncoderLayer(nn.Module):
    """One attention layer: x attends to source, the message passes an MLP beside x and is added to x."""

    dim: int
    num_heads: int
    attention: str = "linear"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        def linear(features):
            return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(self.dim), linear(self.dim), linear(self.dim)
        self.merge = linear(self.dim)
        self.mlp = [linear(2 * self.dim), nn.relu, linear(self.dim)]
        self.norm1 = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.norm2 = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)

    def __call__(self, x, source, x_mask=None, source_mask=None):
        """x [B, L, C], source [B, S, C], masks [B, L] and [B, S] -> [B, L, C]."""
        heads = lambda t: t.reshape(*t.shape[:2], self.num_heads, -1)  # noqa: E731
        query, key, value = heads(self.q_proj(x)), heads(self.k_proj(source)), heads(self.v_proj(source))
        if self.attention == "linear":
            message = attention.linear_attention(query, key, value, x_mask, source_mask)
        else:
            message = attention.full_attention(query, key, value, source_mask)
        message = self.norm1(self.merge(message.reshape(x.shape)))
        message = jnp.concatenate([x, message], -1)
        for layer in self.mlp:
            message = layer(message)
        return x + self.norm2(message)


class LocalFeatureTransformer(nn.Module):
    """Layers that turn in each image's tokens by attention within and between the images."""

    dim: int
    num_heads: int
    kinds: tuple[str, ...]
    attention: str = "linear"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        layer = recomputed(EncoderLayer, self.remat)
        self.layers = [layer(self.dim, self.num_heads, self.attention, self.dtype) for _ in self.kinds]

    def __call__(self, x0, x1, mask0=None, mask1=None):
        for layer, kind in zip(self.layers, self.kinds):
            if kind == "self" and x0.shape == x1.shape and (mask0 is None) == (mask1 is None):
                both = join(x0, x1)
                mask = None if mask0 is None or mask1 is None else join(mask0, mask1)
                x0, x1 = part(layer(both, both, mask, mask))
            elif kind == "self":
                x0, x1 = layer(x0, x0, mask0, mask0), layer(x1, x1, mask1, mask1)
            else:  # one after the other: image 1 sees the new tokens of image 0
                x0 = layer(x0, x1, mask0, mask1)
                x1 = layer(x1, x0, mask1, mask0)
        return x0, x1


class FinePreprocess(nn.Module):
    """Mix the coarse feature of a match into the fine windows."""

    dim: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.down_proj = nn.Dense(self.dim, kernel_init=init, dtype=self.dtype)
        self.merge_feat = nn.Dense(self.dim, kernel_init=init, dtype=self.dtype)

    def __call__(self, windows, coarse):
        """windows [N, WW, C], coarse [N, D] -> [N, WW, C]."""
        context = jnp.broadcast_to(self.down_proj(coarse)[:, None], windows.shape)
        return self.merge_feat(jnp.concatenate([windows, context], -1))


class CoarseMatching(nn.Module):
    """Holds the dustbin score of the optimal-transport form."""

    init_bin_score: float

    def setup(self):
        self.bin_score = self.param("bin_score", nn.initializers.constant(self.init_bin_score), ())

    def __call__(self):
        return self.bin_score


class LoFTR(nn.Module):
    """The network. `encode` gives features, `refine` transformed windows; `match` below is the whole matcher."""

    config: LoFTRConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        fine, _, coarse = c.block_dims
        self.backbone = ResNetFPN(c.initial_dim, c.block_dims, c.encoder, dtype, c.remat)
        self.loftr_coarse = LocalFeatureTransformer(coarse, c.num_heads, c.coarse_layers, c.attention, dtype, c.remat)
        if c.match_type == "sinkhorn":
            self.coarse_matching = CoarseMatching(c.skh_init_bin_score)
        if c.fine_concat_coarse_feat:
            self.fine_preprocess = FinePreprocess(fine, dtype)
        self.loftr_fine = LocalFeatureTransformer(fine, c.num_heads, c.fine_layers, c.attention, dtype, c.remat)

    def encode(self, image0, image1, mask0=None, mask1=None, train: bool = False) -> dict:
        """Compute coarse features after attention and fine maps.

        Args:
          image0, image1: [B, H, W, C] in [0, 1], H and W multiples of 8, sizes may differ.
          mask0, mask1: [B, H/8, W/8] bool, valid cells, or None.
          train: BatchNorm uses statistics of the batch, of both images together where their sizes agree.

        Returns:
          coarse0, coarse1 [B, H/8, W/8, C3], fine0, fine1 [B, H/2, W/2, C1].
        """
        if image0.shape == image1.shape:
            coarse, fine = self.backbone(join(image0, image1), train)
            (coarse0, coarse1), (fine0, fine1) = part(coarse), part(fine)
        else:
            coarse0, fine0 = self.backbone(image0, train)
            coarse1, fine1 = self.backbone(image1, train)
        tokens0, tokens1 = (self._tokens(c) for c in (coarse0, coarse1))
        flat = lambda mask: None if mask is None else mask.reshape(mask.shape[0], -1)  # noqa: E731
        tokens0, tokens1 = self.loftr_coarse(tokens0, tokens1, flat(mask0), flat(mask1))
        return {
            "coarse0": tokens0.reshape(coarse0.shape),
            "coarse1": tokens1.reshape(coarse1.shape),
            "fine0": fine0,
            "fine1": fine1,
        }

    def _tokens(self, coarse):
        """Add the position encoding and flatten row by row."""
        batch, height, width, dim = coarse.shape
        rows, columns = position_encoding(height, width, dim, self.config.temp_bug_fix)
        encoding = jnp.asarray(rows) + jnp.asarray(columns)
        return (coarse + encoding.astype(coarse.dtype)).reshape(batch, height * width, dim)

    def refine(self, features: dict, cells0: jax.Array, cells1: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cut the fine windows of matched cells and pass them through the fine transformer.

        Args:
          features: output of `encode`. cells0, cells1: [B, K] int32 indices of coarse cells (y * width + x).

        Returns:
          windows0, windows1 [B, K, W * W, C1].
        """
        windows = [self._windows(features, cells, side) for side, cells in ((0, cells0), (1, cells1))]
        shape = windows[0].shape
        x0, x1 = self.loftr_fine(*(w.reshape(-1, *shape[2:]) for w in windows))
        return x0.reshape(shape), x1.reshape(shape)

    def offsets(self, features: dict, cells0: jax.Array, cells1: jax.Array) -> jax.Array:
        """Locate the centres of cells0 in the fine windows of cells1: [B, K, 2] (x, y), +-1 = border of the window."""
        windows0, windows1 = self.refine(features, cells0, cells1)
        return fine_offset(windows0[:, :, windows0.shape[2] // 2], windows1)[..., :2]

    def _offsets_of_found(self, features: dict, found: dict) -> jax.Array:
        """Compute `offsets` piece by piece and only as far as there are matches, which come first."""
        module, variables = self.unbind()  # flax modules cannot be called in the control flow of jax

        def piece(part):
            cells0, cells1, mask = part
            return jax.lax.cond(
                mask.any(),
                lambda: module.apply(variables, features, cells0, cells1, method="offsets"),
                lambda: at_least_float32(jnp.zeros((*mask.shape, 2), features["fine0"].dtype)),
            )

        return assignment.map_rows(piece, (found["cells0"], found["cells1"], found["mask"]), FINE_CHUNK)

    def _windows(self, features: dict, cells: jax.Array, side: int) -> jax.Array:
        """Cut the windows of one image, before the transformer."""
        coarse, fine = features[f"coarse{side}"], features[f"fine{side}"]
        centres = jnp.stack([cells % coarse.shape[2], cells // coarse.shape[2]], -1) * (COARSE // FINE)
        windows = gather_windows(fine, centres, self.config.fine_window_size)
        if not self.config.fine_concat_coarse_feat:
            return windows
        flat = coarse.reshape(coarse.shape[0], -1, coarse.shape[-1])
        picked = jnp.take_along_axis(flat, cells[..., None], axis=1)
        batch, num = cells.shape
        merged = self.fine_preprocess(windows.reshape(batch * num, *windows.shape[2:]), picked.reshape(batch * num, -1))
        return merged.reshape(windows.shape)

    def bin_score(self) -> jax.Array:
        """Read the dustbin score of the optimal-transport form."""
        return self.coarse_matching()

    def __call__(self, image0, image1, mask0=None, mask1=None) -> dict:
        """Match two batches of images; see `match`."""
        return self.match_features(self.encode(image0, image1, mask0, mask1), mask0, mask1)

    def match_features(self, features: dict, mask0=None, mask1=None) -> dict:
        """Match features of `encode`; see `match`."""
        bin_score = self.coarse_matching() if self.config.match_type == "sinkhorn" else None
        found = coarse_matches(self.config, features, mask0, mask1, bin_score)
        if self.is_initializing():
            offset = self.offsets(features, found["cells0"], found["cells1"])
        else:
            offset = self._offsets_of_found(features, found)
        width0, width1 = features["coarse0"].shape[2], features["coarse1"].shape[2]
        kpts0, kpts1 = cell_points(found["cells0"], width0), cell_points(found["cells1"], width1)
        kpts1 = kpts1 + offset * (self.config.fine_window_size // 2 * FINE)
        return {"kpts0": kpts0, "kpts1": kpts1, "conf": found["conf"], "mask": found["mask"]}


def cell_points(cells: jax.Array, width: int) -> jax.Array:
    """Place coarse cells [...] at their top-left pixel [..., 2] (x, y), float32 px."""
    return jnp.stack([cells % width, cells // width], -1).astype(jnp.float32) * COARSE


def logits(config: LoFTRConfig, features: dict) -> tuple[jax.Array, jax.Array]:
    """Flatten the coarse features to float32 tokens whose products are the logits of the dual softmax.

    `a_i . b_j = f0_i . f1_j / C / temperature`, C the number of channels.
    """
    a, b = (f.reshape(f.shape[0], -1, f.shape[-1]) for f in (features["coarse0"], features["coarse1"]))
    scale = 1 / (a.shape[-1] * config.temperature)
    return at_least_float32(a) * scale, at_least_float32(b)


def interior(mask: jax.Array | None, shape: tuple[int, int, int], border: int) -> jax.Array:
    """Mark the coarse cells at least `border` away from the border of the valid area, [B, h * w] bool."""
    batch, height, width = shape
    if mask is None:
        rows, columns = jnp.full((batch, 1), height), jnp.full((batch, 1), width)
        mask = jnp.ones(shape, bool)
    else:
        rows, columns = mask.sum(1).max(-1)[:, None], mask.sum(2).max(-1)[:, None]
    y, x = jnp.arange(height), jnp.arange(width)
    inside = ((y >= border) & (y < rows - border))[:, :, None] & ((x >= border) & (x < columns - border))[:, None]
    return (inside & mask).reshape(batch, -1)


def coarse_matches(config: LoFTRConfig, features: dict, mask0=None, mask1=None, bin_score=None) -> dict:
    """Choose mutually best cells above the threshold and away from the borders (LoFTR section 3.3).

    Returns:
      cells0, cells1 [B, K] int32, conf [B, K], mask [B, K] bool, by falling confidence; masked entries are
      cell 0.
    """
    shape0, shape1 = features["coarse0"].shape[:3], features["coarse1"].shape[:3]
    flat0, flat1 = (None if m is None else m.reshape(m.shape[0], -1) for m in (mask0, mask1))
    a, b = logits(config, features)
    if config.match_type == "dual_softmax":
        index, conf, mutual = assignment.dual_softmax_best(a, b, flat0, flat1)
    else:
        scores = jnp.einsum("blc,bsc->bls", a * config.temperature, b)
        matrix = transport_confidence(config, scores, bin_score, flat0, flat1)
        index, conf, mutual = assignment.mutual_nearest(matrix)
    keep = interior(mask0, shape0, config.border_rm)
    keep &= jnp.take_along_axis(interior(mask1, shape1, config.border_rm), index, axis=1)
    keep &= mutual & (conf > config.thr)
    num = min(config.max_matches, a.shape[1], b.shape[1])
    conf, cells0 = jax.lax.top_k(jnp.where(keep, conf, 0), num)
    mask = conf > 0
    cells0 = jnp.where(mask, cells0, 0)
    cells1 = jnp.where(mask, jnp.take_along_axis(index, cells0, axis=1), 0)
    return {"cells0": cells0, "cells1": cells1, "conf": conf, "mask": mask}


def transport_confidence(config: LoFTRConfig, scores, bin_score, mask0=None, mask1=None) -> jax.Array:
    """Turn scores [B, L, S] into confidences by optimal transport; masked entries are zero."""
    log_assignment = assignment.log_optimal_transport(scores, bin_score, config.skh_iters, mask0, mask1)
    matrix = jnp.exp(log_assignment[:, :-1, :-1])
    if config.skh_prefilter:  # cells that prefer the dustbin match nothing
        rows = log_assignment.argmax(2)[:, :-1] != scores.shape[2]
        columns = log_assignment.argmax(1)[:, :-1] != scores.shape[1]
        matrix = matrix * (rows[:, :, None] & columns[:, None])
    valid = assignment.pair_mask(mask0, mask1, scores.shape)
    return matrix if valid is None else jnp.where(valid, matrix, 0)


def fine_offset(query: jax.Array, windows: jax.Array) -> jax.Array:
    """Locate a query feature in a window: expected position and spread (LoFTR section 3.4).

    Args:
      query: [..., C]. windows: [..., W * W, C].

    Returns:
      [..., 3] float32: x, y in [-1, 1] of the window, and the sum of both standard deviations.
    """
    query, windows = at_least_float32(query), at_least_float32(windows)
    products = jnp.einsum("...c,...wc->...w", query, windows, precision="highest")
    heat = jax.nn.softmax(products / query.shape[-1] ** 0.5, axis=-1)
    size = round(windows.shape[-2] ** 0.5)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    grid = jnp.asarray(np.stack([np.tile(axis, size), np.repeat(axis, size)], -1))
    mean = jnp.matmul(heat, grid, precision="highest")
    # Not the official mean of squares less the square of the mean: of sharp windows that leaves only rounding.
    var = jnp.einsum("...w,...wc->...c", heat, jnp.square(grid - mean[..., None, :]), precision="highest")
    std = jnp.sqrt(jnp.maximum(var, 1e-10)).sum(-1, keepdims=True)
    return jnp.concatenate([mean, std], -1)


def match(module: LoFTR, variables: dict, image0, image1, mask0=None, mask1=None) -> dict:
    """Match two batches of images. Pure: jit it with `module` bound.

    Args:
      image0, image1: [B, H, W, C] float32 in [0, 1], sizes multiples of 8. mask0, mask1: [B, H/8, W/8] bool
      or None.

    Returns:
      kpts0, kpts1 [B, K, 2] float32 px of these images, conf [B, K] falling, mask [B, K] bool;
      K = min(max_matches, number of cells).
    """
    out = module.apply(variables, image0, image1, mask0, mask1)
    assert isinstance(out, dict)  # nothing is mutable
    return out


OUTDOOR = LoFTRConfig(temp_bug_fix=False)
CONFIGS = {
    "loftr_outdoor": OUTDOOR,  # outdoor_ds.ckpt
    "loftr_outdoor_ot": replace(OUTDOOR, match_type="sinkhorn"),  # outdoor_ot.ckpt
    "loftr_indoor": OUTDOOR,  # indoor_ds.ckpt: other weights, the same network
    "loftr_indoor_ot": replace(OUTDOOR, match_type="sinkhorn"),  # indoor_ot.ckpt
    "loftr_indoor_new": LoFTRConfig(),  # indoor_ds_new.ckpt, trained with the corrected position encoding
    "gim_loftr": LoFTRConfig(
        encoder="resnet50", in_channels=3, temp_bug_fix=False, fine_concat_coarse_feat=False
    ),  # gim_loftr_50h.ckpt
    "loftr_tiny": LoFTRConfig(
        initial_dim=16,
        block_dims=(16, 24, 48),
        num_heads=4,
        coarse_layers=("self", "cross") * 2,
        thr=0.05,  # minutes of training leave it right more often than sure
        max_matches=1024,
        conf_floor=0.0,  # with the official floor a network of this size hardly starts to learn
    ),
}
