"""LightGlue: match keypoints with a transformer that may stop early and drop points.

Lindenberger et al., ICCV 2023, arXiv 2306.13643. GIM trains this network on videos (GIM_LightGlue).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gim_jax.models import sparse
from gim_jax.models.backbones import linear, recomputed
from gim_jax.models.disk import Disk, DiskConfig
from gim_jax.models.sparse import as_one_batch
from gim_jax.models.superpoint import SuperPoint, SuperPointConfig
from gim_jax.ops.assignment import log_double_softmax, mutual_matches
from gim_jax.ops.attention import full_attention

LN_EPS = 1e-5  # torch's LayerNorm


@dataclass(frozen=True)
class LightGlueConfig:
    """Settings of `LightGlue`.

    Attributes:
      extractor: of the keypoints; None where they come from elsewhere (SIFT).
      input_dim: of the descriptors.
      dim, num_layers, num_heads: of the transformer.
      add_scale_ori: keypoints come with `scales` and `oris`, which are encoded like places (SIFT).
      kpt_offset: px added to keypoints: 0.5 where the network was trained with (0, 0) at the image's corner (GIM).
      threshold: of a match's probability.
      depth_confidence: share of confident points at which a pair stops, -1 for never.
      width_confidence: points surely unmatchable to 1 - this are dropped, -1 for none.
      remat: of each layer, see `backbones.recomputed`.
      dtype: of the layers; places, attention weights and assignments are float32.
    """

    extractor: SuperPointConfig | DiskConfig | None = None
    input_dim: int = 256
    dim: int = 256
    num_layers: int = 9
    num_heads: int = 4
    add_scale_ori: bool = False
    kpt_offset: float = 0.0
    threshold: float = 0.1
    depth_confidence: float = -1.0
    width_confidence: float = -1.0
    remat: str = "none"
    dtype: str = "float32"


GIM_SUPERPOINT = SuperPointConfig(2048, nms_radius=3, threshold=0.0, border_of="image")
CVG_SUPERPOINT = SuperPointConfig(2048, nms_radius=4, threshold=0.0005, border_of="image")
ADAPTIVE: dict[str, Any] = {"depth_confidence": 0.95, "width_confidence": 0.99}  # the official defaults

CONFIGS = {
    "gim_lightglue": LightGlueConfig(GIM_SUPERPOINT, kpt_offset=0.5),
    "lightglue_superpoint": LightGlueConfig(CVG_SUPERPOINT),
    "lightglue_superpoint_adaptive": LightGlueConfig(CVG_SUPERPOINT, **ADAPTIVE),
    "lightglue_disk": LightGlueConfig(DiskConfig(), input_dim=128, **ADAPTIVE),
    "lightglue_aliked": LightGlueConfig(None, input_dim=128, **ADAPTIVE),
    "lightglue_sift": LightGlueConfig(None, input_dim=128, add_scale_ori=True, **ADAPTIVE),
    "lightglue_doghardnet": LightGlueConfig(None, input_dim=128, add_scale_ori=True, **ADAPTIVE),
}


class Positions(nn.Module):
    """Learned Fourier features of places [B, N, 2 or 4]: cosines and sines [B, N, head dim / 2]."""

    config: LightGlueConfig

    def setup(self):
        half = self.config.dim // self.config.num_heads // 2
        self.Wr = nn.Dense(half, use_bias=False, kernel_init=nn.initializers.normal(1.0), precision="highest")

    def __call__(self, places):
        angles = self.Wr(places)
        return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cosines, sines):
    """Turn pairs of neighbouring channels of [B, N, heads, dim] by angles [B, N, dim / 2].

    Cosines first, then sines: the order of channels does not matter to the products of queries and keys.
    """
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cosines, sines = cosines[:, :, None], sines[:, :, None]
    return jnp.concatenate([even * cosines - odd * sines, odd * cosines + even * sines], -1).astype(x.dtype)


def feed_forward(dim: int, dtype) -> list:
    """Layers that turn [x; message] into an update of x."""
    exact_gelu = lambda x: nn.gelu(x, approximate=False)  # noqa: E731
    return [
        linear(2 * dim, 2 * dim, dtype),
        nn.LayerNorm(epsilon=LN_EPS, dtype=dtype),
        exact_gelu,
        linear(2 * dim, dim, dtype),
    ]


def update(layers, x, message):
    out = jnp.concatenate([x, message], -1)
    for layer in layers:
        out = layer(out)
    return x + out


class SelfAttention(nn.Module):
    config: LightGlueConfig

    def setup(self):
        dim, dtype = self.config.dim, self.config.dtype
        self.Wqkv = linear(dim, 3 * dim, dtype)
        self.out_proj = linear(dim, dim, dtype)
        self.ffn = feed_forward(dim, dtype)

    def __call__(self, x, positions, mask):
        # the official layout: heads, then channels of a head, then query, key, value
        qkv = self.Wqkv(x).reshape(*x.shape[:2], self.config.num_heads, -1, 3)
        query, key, value = rotate(qkv[..., 0], *positions), rotate(qkv[..., 1], *positions), qkv[..., 2]
        message = full_attention(query, key, value, mask).reshape(x.shape)
        return update(self.ffn, x, self.out_proj(message))


class CrossAttention(nn.Module):
    config: LightGlueConfig

    def setup(self):
        dim, dtype = self.config.dim, self.config.dtype
        self.to_qk = linear(dim, dim, dtype)
        self.to_v = linear(dim, dim, dtype)
        self.to_out = linear(dim, dim, dtype)
        self.ffn = feed_forward(dim, dtype)

    def __call__(self, x0, x1, mask0, mask1):
        def heads(x):
            return [f(x).reshape(*x.shape[:2], self.config.num_heads, -1) for f in (self.to_qk, self.to_v)]

        def attend(x, query, key, value, mask):
            message = full_attention(query, key, value, mask).reshape(x.shape)
            return update(self.ffn, x, self.to_out(message))

        (qk0, v0), (qk1, v1) = as_one_batch(heads, (x0, x1))
        return as_one_batch(attend, (x0, x1), (qk0, qk1), (qk1, qk0), (v1, v0), (mask1, mask0))


class Layer(nn.Module):
    """Self attention in both images, then cross attention both ways."""

    config: LightGlueConfig

    def setup(self):
        self.self_attn = SelfAttention(self.config)
        self.cross_attn = CrossAttention(self.config)

    def __call__(self, x0, x1, positions0, positions1, mask0, mask1):
        x0, x1 = as_one_batch(self.self_attn, (x0, x1), (positions0, positions1), (mask0, mask1))
        return self.cross_attn(x0, x1, mask0, mask1)


class Assignment(nn.Module):
    """Similarities and matchabilities of the descriptors of one layer."""

    config: LightGlueConfig

    def setup(self):
        self.final_proj = linear(self.config.dim, self.config.dim, self.config.dtype)
        self.matchability = linear(self.config.dim, 1, precision="highest")

    def project(self, x):
        """[B, N, dim] -> projected descriptors [B, N, dim], logits of being matchable [B, N]."""
        return self.final_proj(x) / self.config.dim**0.25, self.matchable(x)

    def matchable(self, x):
        return self.matchability(x.astype(jnp.float32))[..., 0]

    def __call__(self, x0, x1, mask0, mask1):
        return assign(self.project(x0), self.project(x1), mask0, mask1)


def assign(projected0, projected1, mask0, mask1):
    """Log-assignment [B, M+1, N+1] of what `Assignment.project` gives for two images."""
    (x0, logits0), (x1, logits1) = projected0, projected1
    similarity = jnp.einsum("bmd,bnd->bmn", x0, x1, preferred_element_type=jnp.float32)
    return log_double_softmax(similarity, logits0, logits1, mask0, mask1)


class TokenConfidence(nn.Module):
    """Logits [B, N] of a point's match being final."""

    dim: int

    def setup(self):
        self.token = [linear(self.dim, 1, precision="highest")]

    def __call__(self, x):
        return self.token[0](jax.lax.stop_gradient(x).astype(jnp.float32))[..., 0]


class LightGlueMatcher(nn.Module):
    """Match two sets of features (the part that `*_lightglue.pth` holds)."""

    config: LightGlueConfig

    def setup(self):
        config = self.config
        if config.input_dim != config.dim:
            self.input_proj = linear(config.input_dim, config.dim, config.dtype)
        self.posenc = Positions(config)
        layer = recomputed(Layer, config.remat)
        assignment = recomputed(Assignment, config.remat)
        self.transformers = [layer(config) for _ in range(config.num_layers)]
        self.log_assignment = [assignment(config) for _ in range(config.num_layers)]
        self.token_confidence = [TokenConfidence(config.dim) for _ in range(config.num_layers - 1)]

    def encode(self, features, size):
        """Descriptors [B, N, dim] and the rotations of their places; arguments as of a call."""
        size = size.astype(jnp.float32)[:, None]
        kpts = features["kpts"] + self.config.kpt_offset
        places = (kpts - size / 2) / (size.max(-1, keepdims=True) / 2)
        if self.config.add_scale_ori:
            places = jnp.concatenate([places, features["scales"][..., None], features["oris"][..., None]], -1)
        desc = features["desc"].astype(self.config.dtype)
        if self.config.input_dim != self.config.dim:
            desc = self.input_proj(desc)
        return desc, self.posenc(places)

    def supervised(self, features0, features1, size0, size1, train: bool = False):
        """Every layer's answer, for training; arguments as of a call.

        Returns:
          list over layers of (log_assignment [B, M+1, N+1], confidence logits [B, M], [B, N]); the last layer has
          no confidences: zeros.
        """
        mask0, mask1 = features0["mask"], features1["mask"]
        (x0, positions0), (x1, positions1) = as_one_batch(self.encode, (features0, features1), (size0, size1))
        answers = []
        for i, layer in enumerate(self.transformers):
            x0, x1 = layer(x0, x1, positions0, positions1, mask0, mask1)
            log_p = self.log_assignment[i](x0, x1, mask0, mask1)
            if i + 1 < self.config.num_layers:
                logits = self.token_confidence[i](x0), self.token_confidence[i](x1)
            else:
                logits = jnp.zeros(x0.shape[:2]), jnp.zeros(x1.shape[:2])
            answers.append((log_p, *logits))
        return answers

    def __call__(self, features0, features1, size0, size1, train: bool = False):
        """Match.

        Args:
          features0, features1: dicts of kpts [B, M, 2] px, desc [B, M, input_dim] and mask [B, M] bool or None;
            with `add_scale_ori` also scales [B, M] px and oris [B, M] radians.
          size0, size1: [B, 2] (width, height) px.
          train: run all layers on all points, whatever the settings.

        Returns:
          dict of log_assignment [B, M+1, N+1], matches0 [B, M] (-1 for none), matches1 [B, N], scores0, scores1;
          kept0, kept1: bool, points that were not dropped; depth0, depth1: int32, layers each point took part in;
          stop [B] int32, layers run.
        """
        config = self.config
        (x0, positions0), (x1, positions1) = as_one_batch(self.encode, (features0, features1), (size0, size1))
        adaptive = (config.depth_confidence > 0 or config.width_confidence > 0) and not train
        run = self.adaptive if adaptive else self.complete
        out = run(x0, x1, positions0, positions1, features0["mask"], features1["mask"])
        matches0, matches1, scores0, scores1 = mutual_matches(
            out["log_assignment"][:, :-1, :-1], config.threshold, out["kept0"], out["kept1"]
        )
        return {**out, "matches0": matches0, "matches1": matches1, "scores0": scores0, "scores1": scores1}

    def complete(self, x0, x1, positions0, positions1, mask0, mask1):
        """Run all layers on all points."""
        for layer in self.transformers:
            x0, x1 = layer(x0, x1, positions0, positions1, mask0, mask1)
        if self.is_initializing():  # parameters that only training or adaptive matching use
            for head in self.log_assignment:
                head.project(x0)
            for head in self.token_confidence:
                head(x0)
        out = {
            "log_assignment": self.log_assignment[-1](x0, x1, mask0, mask1),
            "stop": jnp.full(len(x0), self.config.num_layers, jnp.int32),
        }
        for i, (x, mask) in enumerate([(x0, mask0), (x1, mask1)]):
            out[f"kept{i}"] = jnp.ones(x.shape[:2], bool) if mask is None else mask
            out[f"depth{i}"] = jnp.full(x.shape[:2], self.config.num_layers, jnp.int32)
        return out

    def adaptive(self, x0, x1, positions0, positions1, mask0, mask1):
        """Run layers until a pair is sure of its matches, dropping points on the way; all by masks.

        A pair that has stopped keeps its descriptors; layers are skipped once all pairs of the batch have.
        """
        config = self.config
        use_depth, use_width = config.depth_confidence > 0, config.width_confidence > 0
        kept = [jnp.ones(x.shape[:2], bool) if m is None else m for x, m in [(x0, mask0), (x1, mask1)]]
        num_points = (kept[0].sum(1) + kept[1].sum(1)).astype(jnp.float32)
        depth = [k.astype(jnp.int32) for k in kept]
        active = jnp.ones(len(x0), bool)
        stop = jnp.ones(len(x0), jnp.int32)
        answer = [(jnp.zeros_like(x), jnp.zeros(x.shape[:2])) for x in (x0, x1)]
        x = (x0, x1)

        def run(layers, i, x, kept):
            x = layers.transformers[i](*x, positions0, positions1, *kept)
            return x, [layers.log_assignment[i].project(v) for v in x]

        for i in range(config.num_layers):
            last = i + 1 == config.num_layers
            # the official loop ends before a layer in which an image has no points left
            stop = jnp.where(active, i + 1, stop)
            active &= kept[0].any(1) & kept[1].any(1)
            if self.is_initializing():
                new, projected = run(self, i, x, kept)
            else:
                new, projected = nn.cond(
                    active.any(),
                    lambda m, x, kept, answer, i=i: run(m, i, x, kept),
                    lambda m, x, kept, answer: (x, answer),
                    self, x, kept, answer,
                )  # fmt: skip
            x = tuple(jnp.where(active[:, None, None], n, v) for n, v in zip(new, x))
            answer = [
                (jnp.where(active[:, None, None], p, a), jnp.where(active[:, None], z, b))
                for (p, z), (a, b) in zip(projected, answer)
            ]
            if last:
                continue
            threshold = confidence_threshold(i, config.num_layers)
            sure = [jax.nn.sigmoid(self.token_confidence[i](v)) for v in x]
            if use_depth:
                unsure = sum((k & (s < threshold)).sum(1) for k, s in zip(kept, sure))
                active &= ~(1 - unsure / num_points > config.depth_confidence)
            if use_width:
                for side in (0, 1):
                    keep = jax.nn.sigmoid(answer[side][1]) > 1 - config.width_confidence
                    if use_depth:
                        keep |= sure[side] <= threshold
                    kept[side] &= keep | ~active[:, None]
                    depth[side] += (kept[side] & active[:, None]).astype(jnp.int32)
        if not use_width:
            depth = [jnp.full_like(d, config.num_layers) for d in depth]
        return {
            "log_assignment": assign(*answer, *kept),
            "kept0": kept[0],
            "kept1": kept[1],
            "depth0": depth[0],
            "depth1": depth[1],
            "stop": stop,
        }


def confidence_threshold(layer: int, num_layers: int) -> float:
    """Confidence above which a point counts as sure after a layer (0, 1, ...); official schedule."""
    return min(max(0.8 + 0.1 * math.exp(-4.0 * layer / num_layers), 0.0), 1.0)


EXTRACTORS = {SuperPointConfig: SuperPoint, DiskConfig: Disk}


class LightGlue(sparse.Pipeline):
    """SuperPoint or DISK, and LightGlue; see `sparse.Pipeline`."""

    config: LightGlueConfig

    def setup(self):
        if self.config.extractor is not None:
            self.extractor = EXTRACTORS[type(self.config.extractor)](self.config.extractor)
        self.matcher = LightGlueMatcher(self.config)


match, match_features = sparse.match, sparse.match_features
