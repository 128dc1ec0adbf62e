"""SuperGlue: match keypoints with a graph neural network and optimal transport.

Sarlin et al., CVPR 2020, arXiv 1911.11763. Written from the paper and published facts about the released network.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from gim_jax.models import sparse
from gim_jax.models.backbones import linear, recomputed, uniform, uniform_bias
from gim_jax.models.sparse import as_one_batch
from gim_jax.models.superpoint import SuperPoint, SuperPointConfig
from gim_jax.ops.assignment import log_optimal_transport, mutual_matches
from gim_jax.ops.attention import full_attention

HEADS = 4


@dataclass(frozen=True)
class SuperGlueConfig:
    """Settings of `SuperGlue`.

    Attributes:
      extractor: of the keypoints; None where they come from elsewhere (RootSIFT).
      dim: of the descriptors.
      keypoint_encoder: hidden sizes of the network that encodes places and scores.
      num_layers: graph layers; self and cross attention take turns.
      sinkhorn_iters: 100 in training, 20 in the official scripts.
      threshold: of a match's probability.
      remat: of each layer, see `backbones.recomputed`.
      dtype: of the layers; places, attention weights and transport are float32.
    """

    extractor: SuperPointConfig | None = None
    dim: int = 256
    keypoint_encoder: tuple[int, ...] = (32, 64, 128, 256)
    num_layers: int = 18
    sinkhorn_iters: int = 20
    threshold: float = 0.2
    remat: str = "none"
    dtype: str = "float32"


CONFIGS = {
    "superglue_indoor": SuperGlueConfig(SuperPointConfig(1024)),
    "superglue_outdoor": SuperGlueConfig(SuperPointConfig(2048, nms_radius=3)),
    "gim_superglue": SuperGlueConfig(SuperPointConfig(2048, nms_radius=3, threshold=0.0)),
    "superglue_open": SuperGlueConfig(SuperPointConfig(2048, nms_radius=3, sampling="exact", open=True)),
    "superglue_rootsift": SuperGlueConfig(None, dim=128, keypoint_encoder=(32, 64, 128)),
}


class KeypointEncoder(nn.Module):
    """Encode places and scores [B, N, 3] as vectors [B, N, dim], in float32: bfloat16 knows places to 4 px only."""

    config: SuperGlueConfig

    def setup(self):
        layers, before = [], 3
        for size in self.config.keypoint_encoder:
            layers += [linear(before, size, precision="highest"), nn.BatchNorm(momentum=0.9, epsilon=1e-5), nn.relu]
            before = size
        zeros = nn.initializers.zeros
        self.encoder = [*layers, linear(before, self.config.dim, precision="highest", bias_init=zeros)]

    def __call__(self, x, mask, train: bool):
        return sequence(self.encoder, x, mask, train)


def sequence(layers, x, mask, train: bool):
    """Apply layers in turn; BatchNorm leaves masked rows out of its statistics."""
    for layer in layers:
        if isinstance(layer, nn.BatchNorm):
            x = layer(x, use_running_average=not train, mask=None if mask is None else mask[..., None])
        else:
            x = layer(x)
    return x


class Attention(nn.Module):
    """Attend from [B, N, dim] to a source [B, M, dim]; channel c belongs to head c % 4."""

    config: SuperGlueConfig

    def setup(self):
        dim, dtype = self.config.dim, self.config.dtype
        key = self.make_rng("params") if self.is_initializing() else jax.random.key(0)  # then for shapes alone
        start = {  # one for all four, as in the official code
            "kernel_init": lambda _, *form: uniform(key, *form),
            "bias_init": lambda _, *form: uniform_bias(dim)(jax.random.fold_in(key, 1), *form),
        }
        self.proj = [linear(dim, dim, dtype, **start) for _ in range(3)]
        self.merge = linear(dim, dim, dtype, **start)

    def __call__(self, x, source, source_mask):
        dim = self.config.dim

        def heads(values):
            return values.reshape(*values.shape[:2], dim // HEADS, HEADS).swapaxes(2, 3)

        query, key, value = (heads(proj(t)) for proj, t in zip(self.proj, (x, source, source)))
        message = full_attention(query, key, value, source_mask)
        return self.merge(message.swapaxes(2, 3).reshape(x.shape))


class Layer(nn.Module):
    """Update for [B, N, dim] from a source [B, M, dim]."""

    config: SuperGlueConfig

    def setup(self):
        dim, dtype = self.config.dim, self.config.dtype
        self.attn = Attention(self.config)
        self.mlp = [
            linear(2 * dim, 2 * dim, dtype),
            nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=dtype),
            nn.relu,
            linear(2 * dim, dim, dtype, bias_init=nn.initializers.zeros),
        ]

    def __call__(self, x, source, mask, source_mask, train: bool):
        message = self.attn(x, source, source_mask)
        return sequence(self.mlp, jnp.concatenate([x, message], -1), mask, train)


class Graph(nn.Module):
    """Alternate self and cross attention; both images are updated from the previous values."""

    config: SuperGlueConfig

    def setup(self):
        layer = recomputed(Layer, self.config.remat, static_argnums=(5,))
        self.layers = [layer(self.config) for _ in range(self.config.num_layers)]

    def __call__(self, desc0, desc1, mask0, mask1, train: bool):
        for i, layer in enumerate(self.layers):
            sides = [(desc0, desc1), (desc0, desc1), (mask0, mask1), (mask0, mask1)]
            if i % 2:  # the source is the other image
                sides[1::2] = (desc1, desc0), (mask1, mask0)
            if train:  # BatchNorm on the statistics of each image by itself
                delta0, delta1 = (layer(*side, train) for side in zip(*sides))
            else:
                delta0, delta1 = as_one_batch(lambda *side, layer=layer: layer(*side, train), *sides)
            desc0, desc1 = desc0 + delta0, desc1 + delta1
        return desc0, desc1


class SuperGlueMatcher(nn.Module):
    """Match two sets of features (the part that `superglue_*.pth` holds)."""

    config: SuperGlueConfig

    def setup(self):
        self.kenc = KeypointEncoder(self.config)
        self.gnn = Graph(self.config)
        self.final_proj = linear(self.config.dim, self.config.dim, self.config.dtype)
        self.bin_score = self.param("bin_score", nn.initializers.ones, ())

    def scores(self, features0, features1, size0, size1, train: bool = False):
        """Compute similarities [B, M, N] float32 before the transport; arguments as of a call."""
        desc0 = self.encode(features0, size0, train)
        desc1 = self.encode(features1, size1, train)
        desc0, desc1 = self.gnn(desc0, desc1, features0["mask"], features1["mask"], train)
        desc0, desc1 = self.final_proj(desc0), self.final_proj(desc1)
        products = jnp.einsum("bmd,bnd->bmn", desc0, desc1, preferred_element_type=jnp.float32)
        return products / self.config.dim**0.5

    def encode(self, features, size, train: bool = False):
        size = size.astype(jnp.float32)[:, None]
        places = (features["kpts"] - size / 2) / (0.7 * size.max(-1, keepdims=True))  # official normalisation
        inputs = jnp.concatenate([places, features["scores"][..., None]], -1)
        return features["desc"] + self.kenc(inputs, features["mask"], train)

    def __call__(self, features0, features1, size0, size1, train: bool = False):
        """Match.

        Args:
          features0, features1: dicts of kpts [B, M, 2] px, scores [B, M], desc [B, M, dim] of unit length and
            mask [B, M] bool or None.
          size0, size1: [B, 2] (width, height) px.
          train: use and update the statistics of the batch.

        Returns:
          dict of log_assignment [B, M+1, N+1], matches0 [B, M] (-1 for none), matches1 [B, N], scores0, scores1.
        """
        mask0, mask1 = features0["mask"], features1["mask"]
        scores = self.scores(features0, features1, size0, size1, train)
        log_p = log_optimal_transport(scores, self.bin_score, self.config.sinkhorn_iters, mask0, mask1)
        matches0, matches1, scores0, scores1 = mutual_matches(log_p[:, :-1, :-1], self.config.threshold, mask0, mask1)
        return {
            "log_assignment": log_p,
            "matches0": matches0,
            "matches1": matches1,
            "scores0": scores0,
            "scores1": scores1,
        }

    def supervised(self, features0, features1, size0, size1, train: bool = False):
        """Give the one answer as `LightGlueMatcher.supervised` gives those of its layers."""
        log_p = self(features0, features1, size0, size1, train)["log_assignment"]
        return [(log_p, jnp.zeros(log_p.shape[:1]), jnp.zeros(log_p.shape[:1]))]


class SuperGlue(sparse.Pipeline):
    """SuperPoint and SuperGlue, see `sparse.Pipeline`."""

    config: SuperGlueConfig

    def setup(self):
        if self.config.extractor is not None:
            self.extractor = SuperPoint(self.config.extractor)
        self.matcher = SuperGlueMatcher(self.config)


match, match_features = sparse.match, sparse.match_features
