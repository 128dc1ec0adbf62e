"""DKM v3: a dense warp between two images (Edstedt et al., CVPR 2023, arXiv 2202.00667), and GIM's form of it.

Coarse: Gaussian-process regression from features to positions, decoded at strides 32 and 16. Fine: convolutional
refiners at strides 16 to 1, each fed with the warped features, the displacement and a local correlation. Flow is
(x, y) in [-1, 1] of the other image, +-1 its outer borders; certainty is a logit. Matching: `dkm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from gim_jax.models.backbones import BatchNorm, ResNet50, linear, recomputed, uniform, uniform_bias
from gim_jax.ops.correlation import local_correlation
from gim_jax.ops.depthwise import depthwise_conv
from gim_jax.ops.gaussian_process import posterior_mean
from gim_jax.ops.pairing import join, part
from gim_jax.ops.resize import resize
from gim_jax.ops.sampling import grid_sample

Maps = dict[int, jax.Array]  # by stride, [B, H / stride, W / stride, C]
Prediction = dict[str, jax.Array]  # "flow" [B, h, w, 2], "certainty" [B, h, w]
Predictions = dict[int, Prediction]  # by stride

COARSE = (32, 16)  # strides of the Gaussian processes and of the embedding decoder
FINE = (16, 8, 4, 2, 1)  # strides of the refiners
WINDOW = 5  # of the depthwise convolutions
RELEASED_TOKENS = 2000  # above, the released code inverts image by image, and goes wrong
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, torchvision
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DKMConfig:
    """Settings of `DKM`, of its matching and of the named models.

    Attributes:
      size: (width, height) px to which both images are resized for the first pass.
      upsample_size: (width, height) px of the second pass, None for none.
      num_matches: K, sampled from the dense warp.
      official: the official form: images are normalised by ImageNet's mean and std and shrunk with PIL's bicubic
        filter, and the confidence of a sampled match is thresholded as it was for sampling. Otherwise GIM's: plain
        images, bilinear resizing without antialiasing, unmatchable where either image is black, plain confidence.
      symmetric: predict the warp from image 1 to image 0 too, and sample from both; twice the work.
      gp_solve: "correct", or "released": above 2000 tokens at stride 16 (672x896 has 2352) the released code
        solves every image of a batch but the first with the first one's inverse, so the second direction of every
        symmetric match is off; published numbers contain that.
      stem, blocks: width and depth of the ResNet-50.
      proj_dim, gp_dim, feat_dim, context_dim: widths of the projected features, of the Gaussian process, of the
        decoder's features and of its context.
      disp_dims, radii: per refiner, coarse to fine: width of the displacement embedding, radius of the local
        correlation (0 for none).
      num_hidden: blocks of a refiner after its first.
      fine_dim: hidden width of the stride-1 refiner, a multiple of its input's (6 + disp_dims[-1]).
      remat: of the blocks of encoder and refiners, see `backbones.recomputed`.
      dtype: of convolutions; the Gaussian process, the correlation, flow and certainty are float32.
    """

    size: tuple[int, int] = (896, 672)
    upsample_size: tuple[int, int] | None = (1536, 1152)
    num_matches: int = 5000
    official: bool = False
    symmetric: bool = True
    gp_solve: str = "correct"
    stem: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    proj_dim: int = 512
    gp_dim: int = 256
    feat_dim: int = 256
    context_dim: int = 384
    disp_dims: tuple[int, ...] = (128, 64, 32, 16, 6)
    radii: tuple[int, ...] = (7, 3, 2, 0, 0)
    num_hidden: int = 8
    fine_dim: int = 24
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self):
        if self.gp_solve not in ("correct", "released"):
            raise ValueError(f"gp_solve: {self.gp_solve!r}, expected 'correct' or 'released'")


CONFIGS = {
    "gim_dkm": DKMConfig(),  # sizes of GIM's demo, labelling and localisation; its benchmark has 660x880
    "dkm_outdoor": DKMConfig((720, 540), (1152, 864), official=True),
    "dkm_indoor": DKMConfig((640, 480), None, official=True),
    "dkm_tiny": DKMConfig(
        (160, 128),
        None,
        num_matches=512,
        stem=8,
        blocks=(1, 1, 1, 1),
        proj_dim=32,
        gp_dim=32,
        feat_dim=32,
        context_dim=32,
        disp_dims=(16, 16, 8, 8, 2),
        radii=(3, 2, 1, 0, 0),
        num_hidden=2,
        fine_dim=8,
    ),
}


def conv3x3(features_in: int, features: int, dtype=jnp.float32) -> nn.Conv:
    return nn.Conv(
        features,
        (3, 3),
        padding=1,
        dtype=dtype,
        kernel_init=uniform,
        bias_init=uniform_bias(9 * features_in),
    )


def position_grid(height: int, width: int) -> jax.Array:
    """Build [height, width, 2] float32 (x, y): the pixel centres in [-1, 1], +-1 the outer borders."""
    y, x = ((2 * jnp.arange(n, dtype=jnp.float32) + 1) / n - 1 for n in (height, width))
    return jnp.stack(jnp.meshgrid(x, y), -1)


class DepthwiseConv(nn.Module):
    """5x5 convolution of each channel by itself, or of each into several (`features` a multiple of the input's)."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", uniform, (WINDOW, WINDOW, 1, self.features))
        bias = self.param("bias", uniform_bias(WINDOW**2), (self.features,))
        if self.features != x.shape[-1]:  # output channels of one input channel are neighbours
            x = jnp.repeat(x, self.features // x.shape[-1], axis=-1)
        return (depthwise_conv(x.astype(self.dtype), kernel) + bias).astype(self.dtype)


class Block(nn.Module):
    """Depthwise convolution, BatchNorm, ReLU, pointwise convolution; layers named as in the official Sequential."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        x = DepthwiseConv(self.features, self.dtype, name="0")(x)
        if train:  # in one loop with the statistics a TPU needs, by its compiler's estimate, 2.8 times as long
            x = jax.lax.optimization_barrier(x)
        x = nn.relu(BatchNorm(name="1")(x, train))
        return linear(self.features, self.features, self.dtype, name="3")(x)


class ConvRefiner(nn.Module):
    """Correct flow and certainty at one stride from features, displacement and local correlation."""

    features: int
    disp_dim: int
    radius: int
    num_hidden: int
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        block = recomputed(Block, self.remat, static_argnums=2)
        self.disp_emb = linear(2, self.disp_dim, self.dtype)
        self.block1 = block(self.features, self.dtype)
        self.hidden_blocks = [block(self.features, self.dtype) for _ in range(self.num_hidden)]
        self.out_conv = linear(self.features, 3, precision="highest")

    def __call__(self, feat0, feat1, flow, train: bool = False):
        """[B, H, W, C] twice and flow [B, H, W, 2] -> displacement [B, H, W, 2] (unscaled), certainty change
        [B, H, W]."""
        warped = jax.lax.stop_gradient(grid_sample(feat1, flow, align_corners=False))
        displacement = self.disp_emb(flow - position_grid(*flow.shape[1:3]))
        x = [feat0, warped.astype(feat0.dtype), displacement]
        if self.radius:
            x.append(local_correlation(feat0, feat1, flow, self.radius).astype(feat0.dtype))
        x = self.block1(jnp.concatenate(x, -1), train)
        for block in self.hidden_blocks:
            x = block(x, train)
        x = self.out_conv(x.astype(jnp.float32))
        return x[..., 1:], x[..., 0]


class ResidualBlock(nn.Module):
    """The decoder's RRB (Yu et al., CVPR 2018): a 1x1 convolution, then two 3x3 around a shortcut."""

    features_in: int
    features: int
    dtype: Any = jnp.float32

    def setup(self):
        self.conv1 = linear(self.features_in, self.features, self.dtype)
        self.conv2 = conv3x3(self.features, self.features, self.dtype)
        self.bn = BatchNorm()
        self.conv3 = conv3x3(self.features, self.features, self.dtype)

    def __call__(self, x, train: bool):
        x = self.conv1(x)
        return nn.relu(x + self.conv3(nn.relu(self.bn(self.conv2(x), train))))


class ChannelAttention(nn.Module):
    """The decoder's CAB (Yu et al., CVPR 2018): old context plus the new one, gated channel by channel."""

    features: int
    dtype: Any = jnp.float32

    def setup(self):
        self.conv1 = linear(2 * self.features, self.features, self.dtype)
        self.conv2 = linear(self.features, self.features, self.dtype)

    def __call__(self, old, new):
        pooled = jnp.concatenate([old, new], -1).mean((1, 2), keepdims=True)
        return nn.sigmoid(self.conv2(nn.relu(self.conv1(pooled)))) * new + old


class EmbeddingDecoder(nn.Module):
    """Decode the Gaussian process's prediction, with the features beside it, into flow and certainty."""

    config: DKMConfig

    def setup(self):
        c = self.config
        scales = [str(s) for s in COARSE]
        self.feat_input_modules = {s: linear(c.proj_dim, c.feat_dim, c.dtype) for s in scales}
        self.rrb_d = {s: ResidualBlock(c.feat_dim + c.gp_dim, c.context_dim, c.dtype) for s in scales}
        self.cab = {s: ChannelAttention(c.context_dim, c.dtype) for s in scales}
        self.rrb_u = {s: ResidualBlock(c.context_dim, c.context_dim, c.dtype) for s in scales}
        self.terminal_module = {s: linear(c.context_dim, 3, precision="highest") for s in scales}

    def __call__(self, gp, features, context, scale: str, train: bool):
        """Decode one scale: [B, H, W, 3] float32 (certainty, flow x, flow y), and the context for the next."""
        features = self.feat_input_modules[scale](features)
        embedding = self.rrb_d[scale](jnp.concatenate([features, gp.astype(features.dtype)], -1), train)
        context = self.rrb_u[scale](self.cab[scale](context, embedding), train)
        return self.terminal_module[scale](context.astype(jnp.float32)), context


class GaussianProcess(nn.Module):
    """Predict where the other image's positions lie, in a Fourier basis of them."""

    features: int

    def setup(self):
        self.pos_conv = linear(2, self.features, precision="highest")

    def __call__(self, feat0, feat1, solved):
        """[B, H, W, C] features -> [B, H, W, features] float32; `solved`: see `posterior_mean`."""
        _, height, width, channels = feat1.shape
        grid = position_grid(height, width).reshape(-1, 2)
        basis = jnp.cos(8 * np.pi * self.pos_conv(grid))
        tokens = [x.reshape(x.shape[0], -1, channels) for x in (feat0, feat1, solved)]
        return posterior_mean(tokens[0], tokens[1], basis, tokens[2]).reshape(*feat0.shape[:3], -1)


class Encoder(nn.Module):
    """ResNet-50's maps by stride: {1: the images, 2: the stem, 4, 8, 16, 32: its layers}."""

    config: DKMConfig

    def setup(self):
        c = self.config
        self.net = ResNet50(c.blocks, dtype=jnp.dtype(c.dtype), stem=c.stem, remat=c.remat)

    def __call__(self, images, train: bool = False) -> Maps:
        images = images.astype(self.config.dtype)
        return dict(zip((1, 2, 4, 8, 16, 32), [images, *self.net(images, train)]))


class Decoder(nn.Module):
    """From the maps of two images to flow and certainty at each stride."""

    config: DKMConfig

    def setup(self):
        c = self.config
        self.gps = {str(s): GaussianProcess(c.gp_dim) for s in COARSE}
        self.proj = {str(s): linear(s * c.stem, c.proj_dim, c.dtype) for s in COARSE}
        self.embedding_decoder = EmbeddingDecoder(c)
        widths = (c.proj_dim, 8 * c.stem, 4 * c.stem, c.stem, 3)  # of the maps at the refiners' strides
        refiners = {}
        for scale, width, disp_dim, radius in zip(FINE, widths, c.disp_dims, c.radii):
            window = (2 * radius + 1) ** 2 if radius else 0
            hidden = c.fine_dim if scale == 1 else 2 * width + disp_dim + window
            refiners[str(scale)] = ConvRefiner(hidden, disp_dim, radius, c.num_hidden, c.remat, c.dtype)
        self.conv_refiner = refiners

    def __call__(self, maps0: Maps, maps1: Maps, first: Maps, train: bool = False) -> Predictions:
        """Predict from scratch; `first`: the maps whose inverse the released fault uses for all items."""
        predictions, context = {}, None
        for scale in COARSE:
            name = str(scale)
            feat0, feat1 = self.proj[name](maps0[scale]), self.proj[name](maps1[scale])
            faulty = self.config.gp_solve == "released" and feat1.shape[1] * feat1.shape[2] > RELEASED_TOKENS
            solved = self.proj[name](first[scale]) if faulty else feat1
            gp = self.gps[name](feat0, feat1, solved)
            if context is None:
                context = jnp.zeros((*feat0.shape[:3], self.config.context_dim), feat0.dtype)
            context = resize(context, feat0.shape[1:3])
            out, context = self.embedding_decoder(gp, feat0, context, name, train)
            predictions[scale] = {"flow": out[..., 1:], "certainty": out[..., 0]}
        predictions[16] = self._refine(feat0, feat1, 16, maps0[1].shape, predictions[16], train)
        return predictions | self.refine(maps0, maps1, predictions[16], train)

    def refine(self, maps0: Maps, maps1: Maps, start: Prediction, train: bool = False) -> Predictions:
        """Refine `start` (of any size) at strides 8, 4, 2, 1; no gradient passes between strides."""
        predictions = {}
        for scale in FINE[1:]:
            feat0, feat1 = maps0[scale], maps1[scale]
            stacked = jnp.concatenate([start["flow"], start["certainty"][..., None]], -1)
            stacked = jax.lax.stop_gradient(resize(stacked, feat0.shape[1:3]))
            start = {"flow": stacked[..., :2], "certainty": stacked[..., 2]}
            start = self._refine(feat0, feat1, scale, maps0[1].shape, start, train)
            predictions[scale] = start
        return predictions

    def _refine(self, feat0, feat1, scale: int, shape: tuple[int, ...], start: Prediction, train: bool):
        displacement, change = self.conv_refiner[str(scale)](feat0, feat1, start["flow"], train)
        height, width = shape[1:3]  # of the images: a displacement of 4 is one cell of this stride, half of [-1, 1]
        step = np.asarray([scale / (4 * width), scale / (4 * height)], np.float32)
        return {"flow": start["flow"] + step * displacement, "certainty": start["certainty"] + change}


class DKM(nn.Module):
    """Predict the dense warp from image 0 to image 1.

    A call: images [B, H, W, 3] float32 as `dkm.prepare` makes them, of equal sizes, and `train` for
    BatchNorm on the statistics of the batch. Returns {stride: {"flow": [B, h, w, 2], "certainty": [B, h, w]}} for
    strides 32, 16, 8, 4, 2, 1, each refined where there is a refiner, sides ceil(H / stride), ceil(W / stride).
    """

    config: DKMConfig = CONFIGS["gim_dkm"]

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, image0, image1, train: bool = False) -> Predictions:
        maps = {stride: part(x) for stride, x in self.encoder(join(image0, image1), train).items()}
        maps0, maps1 = ({stride: both[i] for stride, both in maps.items()} for i in (0, 1))
        return self.decoder(maps0, maps1, {s: x[:1] for s, x in maps1.items()}, train)

    def encode(self, images) -> Maps:
        return self.encoder(images)

    def decode(self, maps0: Maps, maps1: Maps, first: Maps) -> Predictions:
        return self.decoder(maps0, maps1, first)

    def refine(self, maps0: Maps, maps1: Maps, start: Prediction) -> Predictions:
        return self.decoder.refine(maps0, maps1, start)
