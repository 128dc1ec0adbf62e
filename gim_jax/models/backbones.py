"""Convolutional backbones and layers shared by the networks, with PyTorch's numerics, names and initial values.

Convolutions pad symmetrically by `kernel // 2` ("SAME" of XLA is lopsided at stride 2), maps are NHWC.
"""

from __future__ import annotations

import jax
from flax import linen as nn
from jax import numpy as jnp

from gim_jax.ops.precision import at_least_float32
from gim_jax.ops.sampling import resize_align_corners

kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # as LoFTR and torchvision's ResNet start
uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1 / sqrt(fan_in)), PyTorch's start


def uniform_bias(fan_in: int):
    """PyTorch's start of a bias."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def linear(features_in: int, features: int, dtype=jnp.float32, **settings) -> nn.Dense:
    """Make a linear layer, also a 1x1 convolution: as a matrix product up to three times as fast on a CPU at odd
    widths."""
    return nn.Dense(
        features, **{"dtype": dtype, "kernel_init": uniform, "bias_init": uniform_bias(features_in), **settings}
    )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch has it.

    Normalises with the biased variance, stores the unbiased one. Statistics are float32. Under `jit` with a
    sharded batch they are those of the whole batch (synchronised).
    """

    momentum: float = 0.9  # of the old value; PyTorch's 0.1 of the new one
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if train:
            axes = tuple(range(x.ndim - 1))
            values = at_least_float32(x)
            mean = values.mean(axes)
            var = jnp.square(values - mean).mean(axes)
            if not self.is_initializing():
                count = x.size // channels
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((x - mean) * factor + bias).astype(x.dtype)


RECOMPUTED = {  # `remat` of a network: what the backward pass stores of a block beside its input
    "none": None,
    "all": jax.checkpoint_policies.nothing_saveable,
    "cheap": lambda primitive, *_, **__: primitive.name in ("conv_general_dilated", "dot_general"),
}


def recomputed(block: type[nn.Module], remat: str, **settings) -> type[nn.Module]:
    """Make a block that computes its values again in the backward pass instead of storing them.

    Args:
      remat: "none" stores all of them, "all" none, "cheap" the results of convolutions and products.
      settings: of `flax.linen.remat`.

    Raises: ValueError for another word.
    """
    if remat not in RECOMPUTED:
        raise ValueError(f"remat: found {remat!r}, expected one of {', '.join(RECOMPUTED)}")
    return block if remat == "none" else nn.remat(block, policy=RECOMPUTED[remat], **settings)


def conv(features: int, kernel: int, stride: int = 1, dtype=jnp.float32) -> nn.Conv:
    """Make a convolution without bias, padded by `kernel // 2` on each side."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=kaiming,
        dtype=dtype,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015, figure 5 left)."""

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.conv1 = conv(self.features, 3, self.stride, self.dtype)
        self.bn1 = BatchNorm()
        self.conv2 = conv(self.features, 3, 1, self.dtype)
        self.bn2 = BatchNorm()
        if self.stride != 1:
            self.downsample = [conv(self.features, 1, self.stride, self.dtype), BatchNorm()]

    def __call__(self, x, train: bool = False):
        y = nn.relu(self.bn1(self.conv1(x), train))
        y = self.bn2(self.conv2(y), train)
        if self.stride != 1:
            x = self.downsample[1](self.downsample[0](x), train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut, the stride in the 3x3 one (ResNet v1.5)."""

    width: int
    stride: int = 1
    shortcut: bool = False  # a convolution in the shortcut: the first block of a layer
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.conv1 = conv(self.width, 1, 1, self.dtype)
        self.bn1 = BatchNorm()
        self.conv2 = conv(self.width, 3, self.stride, self.dtype)
        self.bn2 = BatchNorm()
        self.conv3 = conv(4 * self.width, 1, 1, self.dtype)
        self.bn3 = BatchNorm()
        if self.shortcut:
            self.downsample = [conv(4 * self.width, 1, self.stride, self.dtype), BatchNorm()]

    def __call__(self, x, train: bool = False):
        y = nn.relu(self.bn1(self.conv1(x), train))
        y = nn.relu(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        if self.shortcut:
            x = self.downsample[1](self.downsample[0](x), train)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 v1.5 up to a layer, without its head.

    Returns a list of maps: the stem at 1/2 (before pooling), then the output of each layer. With `max_pool`
    the layers are at 1/4, 1/8, 1/16, 1/32 (DKM); without at 1/2, 1/4, 1/8 (GIM's LoFTR).
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    max_pool: bool = True
    dtype: jnp.dtype = jnp.float32
    stem: int = 64  # width of the stem; the layers follow
    remat: str = "none"  # see `recomputed`

    def setup(self):
        self.conv1 = conv(self.stem, 7, 2, self.dtype)
        self.bn1 = BatchNorm()
        block = recomputed(Bottleneck, self.remat, static_argnums=2)
        for layer, count in enumerate(self.blocks, 1):
            stride = 1 if layer == 1 else 2
            blocks = [
                block(self.stem * 2 ** (layer - 1), stride if i == 0 else 1, i == 0, self.dtype) for i in range(count)
            ]
            setattr(self, f"layer{layer}", blocks)

    def __call__(self, x, train: bool = False) -> list[jax.Array]:
        x = nn.relu(self.bn1(self.conv1(x), train))
        maps = [x]
        if self.max_pool:
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])  # pyright: ignore[reportArgumentType]
        for layer in range(1, len(self.blocks) + 1):
            for block in getattr(self, f"layer{layer}"):
                x = block(x, train)
            maps.append(x)
        return maps


class ResNetFPN(nn.Module):
    """LoFTR's backbone: three scales, the coarse map at 1/8 and, through a feature pyramid, the fine map at
    1/2.

    `block_dims` are the widths at 1/2, 1/4, 1/8; `encoder` "basic" is the official one of `BasicBlock`s
    (LoFTR supplementary 1.1), "resnet50" GIM's.
    """

    initial_dim: int = 128
    block_dims: tuple[int, int, int] = (128, 196, 256)
    encoder: str = "basic"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # see `recomputed`

    def setup(self):
        fine, middle, coarse = self.block_dims
        if self.encoder == "resnet50":
            self.encode = ResNet50((3, 4, 6), max_pool=False, dtype=self.dtype, remat=self.remat)
        else:
            self.conv1 = conv(self.initial_dim, 7, 2, self.dtype)
            self.bn1 = BatchNorm()
            self.layer1 = [self._block(fine, self.initial_dim, 1), self._block(fine, fine, 1)]
            self.layer2 = [self._block(middle, fine, 2), self._block(middle, middle, 1)]
            self.layer3 = [self._block(coarse, middle, 2), self._block(coarse, coarse, 1)]
        self.layer3_outconv = conv(coarse, 1, 1, self.dtype)
        self.layer2_outconv = conv(coarse, 1, 1, self.dtype)
        self.layer2_outconv2 = self._smooth(coarse, middle)
        self.layer1_outconv = conv(middle, 1, 1, self.dtype)
        self.layer1_outconv2 = self._smooth(middle, fine)

    def _block(self, features: int, features_in: int, stride: int) -> nn.Module:
        if stride == 1 and features != features_in:
            raise ValueError(f"initial_dim: {features_in}, expected block_dims[0] = {features}")
        block = recomputed(BasicBlock, self.remat, static_argnums=2)
        return block(features, stride, self.dtype)

    def _smooth(self, hidden: int, features: int) -> list:
        return [conv(hidden, 3, 1, self.dtype), BatchNorm(), nn.leaky_relu, conv(features, 3, 1, self.dtype)]

    def __call__(self, x, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, C] -> coarse [B, H/8, W/8, C3], fine [B, H/2, W/2, C1]; H and W are multiples of 8."""
        x = x.astype(self.dtype)
        if self.encoder == "resnet50":
            x1, x2, x3 = self.encode(x, train)[1:]
        else:
            x = nn.relu(self.bn1(self.conv1(x), train))
            maps = []
            for layer in (self.layer1, self.layer2, self.layer3):
                for block in layer:
                    x = block(x, train)
                maps.append(x)
            x1, x2, x3 = maps
        coarse = self.layer3_outconv(x3)
        out = self._merge(self.layer2_outconv(x2), coarse, self.layer2_outconv2, train)
        fine = self._merge(self.layer1_outconv(x1), out, self.layer1_outconv2, train)
        return coarse, fine

    @staticmethod
    def _merge(lateral, top, smooth, train):
        first, norm, activation, second = smooth
        x = lateral + resize_align_corners(top, lateral.shape[1:3])
        return second(activation(norm(first(x), train)))
