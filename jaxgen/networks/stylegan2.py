"""StyleGAN2's networks (Karras et al. 2020, arXiv 1912.04958, section 2 and appendix B).

    mapping        z [n, latent] (and a class) -> w [n, latent], styles that lie less entangled than z
    synthesis      w for every layer, noise for every layer -> images: the generator proper
    discriminator  images (and a class) -> values [n]

Images are square, 4 pixels or a power of two times that. At size s all maps have min(channel_base // s, channel_max)
channels. Weights have the equalised learning rate of Karras et al. 2018 (arXiv 1710.10196, section 4.1): they start
from N(0, 1), and the deviation that He et al. would start them with is multiplied in whenever they are used, so that an
optimiser that scales gradients moves all layers alike.

A convolution is made the style's own by scaling its weights: w'_io = s_i w_io, then w''_io = w'_io / |w'_o| (eqs. 1
to 3). Weights of an example's own would make a convolution of its own for each. Scaling the maps instead gives the same
and is one convolution for all: s_i x_i before it, 1 / |w'_o| after it, with |w'_o|^2 = sum_i s_i^2 |w_io|^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxgen.networks.convolution import convolve
from jaxgen.networks.layers import normalised, smooth, upsample_smooth

Array = jax.Array

ARCHITECTURES = ('orig', 'skip', 'resnet')  # figure 7: the layers alone, with skips of the image, residual
EPS = 1e-8
MAPPING_RATE = 0.01  # learning rate of the mapping network, relative to the rest


def sizes(size: int) -> list[int]:
    """Sizes of the maps on the way to images of this size: 4, 8, ..., size."""
    return [2**i for i in range(2, size.bit_length())]


def styles(size: int) -> int:
    """Number of layers that get a style, of images of this size: two a size, and one for the image at the end."""
    return 2 * len(sizes(size))


def noise_sizes(size: int) -> list[int]:
    """Sizes of the noise that the synthesis network gets, layer by layer."""
    return [s for s in sizes(size) for _ in range(2)][1:]


def clamped(x: Array, clamp: float) -> Array:
    """x within [-clamp, clamp]; 0: as it is."""
    return jnp.clip(x, -clamp, clamp) if clamp else x


def leaky(x: Array, clamp: float = 0.0) -> Array:
    """Leaky ReLU of slope 0.2, times sqrt(2) for the variance that it takes away, `clamped`."""
    return clamped(nn.leaky_relu(x, 0.2) * math.sqrt(2), clamp)


def modulated(x: Array, kernel: Array, style: Array, *, demodulate: bool = True, up: bool = False) -> Array:
    """Convolution with a kernel that each example scales by its style (eqs. 1 to 3).

    Args:
      x: [n, H, W, C], in the dtype of the computation.
      kernel: float32 [k, k, C, O]; k is 3 where `up`.
      style: float32 [n, C].
      demodulate: brings every kernel of [k, k, C] to length 1.
      up: at twice the size. Zeros between the pixels, the convolution and the filter [1, 3, 3, 1] / 4 along both axes;
        what lies outside of x is 0, what lies outside of the enlarged image is not.

    Returns:
      [n, H, W, O] or [n, 2H, 2W, O].
    """
    chex.assert_shape(style, (len(x), x.shape[-1]))
    y = x * style[:, None, None, :].astype(x.dtype)
    if up:
        y = convolve(y, kernel.astype(x.dtype), (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2))  # [n, 2H + 1, 2W + 1, O]
        y = 4 * smooth(y, 1, 1)
    else:
        y = convolve(y, kernel.astype(x.dtype), (1, 1), 'SAME')
    if demodulate:
        square = jnp.matmul(jnp.square(style), jnp.square(kernel).sum((0, 1)), precision='highest')  # [n, O]
        y = y * jax.lax.rsqrt(square + EPS)[:, None, None, :].astype(x.dtype)
    return y


def minibatch_deviation(x: Array, group: int) -> Array:
    """Standard deviation over the images of a group, mean over positions and channels, float32 [n].

    Karras et al. 2018 (arXiv 1710.10196, section 3); groups as in StyleGAN2, here of neighbours in the batch.

    Args:
      x: [n, H, W, C].
      group: images of a group at most; the largest divisor of n that is not larger is taken.
    """
    n = len(x)
    size = max(g for g in range(1, min(group, n) + 1) if n % g == 0)
    y = rearrange(x.astype(jnp.float32), '(g m) h w c -> g m h w c', m=size)
    deviation = jnp.sqrt(y.var(1) + EPS).mean((1, 2, 3))  # [n / size]
    return jnp.repeat(deviation, size)


class Dense(nn.Module):
    """Linear map [n, C] -> [n, features] with equalised learning rate, in float32.

    Attributes:
      rate: learning rate relative to that of the other layers.
      bias: where the bias starts.
    """

    features: int
    rate: float = 1.0
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param('kernel', nn.initializers.normal(1 / self.rate), (x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.constant(self.bias / self.rate), (self.features,))
        return x @ (kernel * (self.rate / math.sqrt(x.shape[-1]))) + bias * self.rate


class Conv(nn.Module):
    """Convolution [n, H, W, C] -> [n, H', W', features] with equalised learning rate.

    Attributes:
      down: halves the image, with the filter [1, 3, 3, 1] / 8 along both axes before it.
    """

    features: int
    kernel: int = 3
    down: bool = False
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.normal(1), shape)
        kernel = (kernel / math.sqrt(math.prod(shape[:3]))).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.down and self.kernel == 1:
            x = convolve(smooth(x, 1, 2), kernel, (1, 1), 'VALID')
        elif self.down:
            # The filter is padded by as much as the convolution's receptive field extends beyond the image.
            x = convolve(smooth(x, 1 + self.kernel // 2, 1), kernel, (2, 2), 'VALID')
        else:
            x = convolve(x, kernel, (1, 1), 'SAME')
        if self.bias:
            x = x + self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return x


class Mapping(nn.Module):
    """z [n, d] or None, label int32 [n] or None -> [n, width], float32.

    Attributes:
      classes: 0: the label is not read.
    """

    width: int
    layers: int
    classes: int = 0

    @nn.compact
    def __call__(self, z: Array | None, label: Array | None = None) -> Array:
        inputs = [] if z is None else [normalised(z)]
        if self.classes:
            embedding = Dense(self.width, name='embedding')(jax.nn.one_hot(label, self.classes))
            inputs.append(normalised(embedding))
        w = jnp.concatenate(inputs, -1)
        for i in range(self.layers):
            w = leaky(Dense(self.width, rate=MAPPING_RATE, name=f'layer{i}')(w))
        return w


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise [n or 1, H', W', 1] and activation, [n, H, W, C] -> [n, H', W', features]."""

    features: int
    up: bool = False
    clamp: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, w: Array, noise: Array) -> Array:
        style = Dense(x.shape[-1], bias=1.0, name='style')(w)
        kernel = self.param('kernel', nn.initializers.normal(1), (3, 3, x.shape[-1], self.features))
        strength = self.param('noise_strength', nn.initializers.zeros, ())
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        x = modulated(x, kernel, style, up=self.up)
        return leaky(x + (strength * noise).astype(self.dtype) + bias.astype(self.dtype), self.clamp)


class ToImage(nn.Module):
    """Modulated 1x1 convolution without demodulation, [n, H, W, C] -> float32 [n, H, W, channels]."""

    channels: int
    clamp: float = 0.0

    @nn.compact
    def __call__(self, x: Array, w: Array) -> Array:
        style = Dense(x.shape[-1], bias=1.0, name='style')(w) / math.sqrt(x.shape[-1])
        kernel = self.param('kernel', nn.initializers.normal(1), (1, 1, x.shape[-1], self.channels))
        bias = self.param('bias', nn.initializers.zeros, (self.channels,))
        return clamped(modulated(x, kernel, style, demodulate=False).astype(jnp.float32) + bias, self.clamp)


class SynthesisBlock(nn.Module):
    """All layers of one size: x [n, H, W, C] and the image so far -> both at this size.

    Attributes:
      up: this size is twice that of x and of the image so far; else x is of this size and there is no image yet.
      image: this size adds its part to the image.
      residual: x, enlarged, is added to what the layers make of it.
      clamp: see Generator.
    """

    features: int
    channels: int
    up: bool
    image: bool = True
    residual: bool = False
    clamp: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, image: Array | None, w: Array, noise: Sequence[Array]) -> tuple[Array, Array | None]:
        """w: [n, layers, latent], noise: [n or 1, H', W', 1] by layer; the last layer, to the image, has none."""
        before = x
        for i, one in enumerate(noise):
            x = StyledConv(self.features, self.up and i == 0, self.clamp, self.dtype, name=f'conv{i}')(x, w[:, i], one)
        if self.residual:
            before = Conv(self.features, 1, bias=False, dtype=self.dtype, name='shortcut')(before)
            x = (upsample_smooth(before) + x) * math.sqrt(0.5)
        if not self.image:
            return x, image
        part = ToImage(self.channels, self.clamp, name='image')(x, w[:, -1])
        return x, part if image is None else upsample_smooth(image) + part


class Synthesis(nn.Module):
    """w [n, styles(size), latent], noise by layer -> images float32 [n, size, size, channels], not bounded.

    With 'skip' every size adds its part to the image (figure 7, 'output skips'); else the last one makes it.
    """

    size: int
    channels: int
    channel_base: int
    channel_max: int
    architecture: str = 'skip'
    clamp: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, w: Array, noise: Sequence[Array]) -> Array:
        block = nn.remat(SynthesisBlock) if self.remat else SynthesisBlock
        widths = [min(self.channel_base // s, self.channel_max) for s in sizes(self.size)]
        constant = self.param('constant', nn.initializers.normal(1), (4, 4, widths[0]))
        x = jnp.broadcast_to(constant.astype(self.dtype), (len(w), *constant.shape))
        image, first = None, 0
        for i, width in enumerate(widths):
            last = first + (2 if i else 1)
            makes_image = self.architecture == 'skip' or i == len(widths) - 1
            residual = self.architecture == 'resnet' and i > 0
            build = block(
                width, self.channels, i > 0, makes_image, residual, self.clamp, self.dtype, name=f'block{4 << i}'
            )
            # The style of the image's layer is also that of the next size's first layer.
            x, image = build(x, image, w[:, first : last + 1], noise[first:last])
            first = last
        return image


class Generator(nn.Module):
    """Mapping and synthesis; see there for the attributes. Its methods are to be called by name.

    Attributes:
      architecture: of synthesis, one of ARCHITECTURES.
      clamp: bound of the maps after each activation, so that they fit half precision; 0: none.
    """

    size: int
    channels: int
    latent: int
    mapping_layers: int
    classes: int
    channel_base: int
    channel_max: int
    architecture: str = 'skip'
    clamp: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        self.mapping = Mapping(self.latent, self.mapping_layers, self.classes)
        self.synthesis = Synthesis(
            self.size,
            self.channels,
            self.channel_base,
            self.channel_max,
            self.architecture,
            self.clamp,
            self.dtype,
            self.remat,
        )

    def __call__(self, z: Array, label: Array | None = None) -> Array:
        """Images without noise; for init."""
        w = jnp.repeat(self.map(z, label)[:, None], styles(self.size), 1)
        return self.synthesise(w, [jnp.zeros((1, s, s, 1)) for s in noise_sizes(self.size)])

    def map(self, z: Array, label: Array | None = None) -> Array:
        return self.mapping(z, label)

    def synthesise(self, w: Array, noise: Sequence[Array]) -> Array:
        return self.synthesis(w, noise)


class DiscriminatorBlock(nn.Module):
    """Two layers, [n, H, W, C] -> [n, H/2, W/2, features].

    Attributes:
      residual: the smaller x is added to what they make of it.
      clamp: see Generator.
    """

    features: int
    residual: bool = True
    clamp: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = leaky(Conv(x.shape[-1], dtype=self.dtype, name='conv0')(x), self.clamp)
        h = leaky(Conv(self.features, down=True, dtype=self.dtype, name='conv1')(h), self.clamp)
        if not self.residual:
            return h
        x = Conv(self.features, 1, down=True, bias=False, dtype=self.dtype, name='shortcut')(x)
        return (x + h) * math.sqrt(0.5)


class Discriminator(nn.Module):
    """Images [n, H, W, C] -> values float32 [n], and the deviations [n] of their groups.

    With classes it has a mapping network of its own, and the value is the product with its embedding of the class
    (Miyato & Koyama 2018, arXiv 1802.05637).

    Attributes:
      group: images of the minibatch standard deviation, see minibatch_deviation.
      architecture: one of ARCHITECTURES; with 'skip' every size reads the image, made so small.
      clamp: see Generator.
    """

    channel_base: int
    channel_max: int
    group: int
    mapping_layers: int
    classes: int = 0
    architecture: str = 'resnet'
    clamp: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, label: Array | None = None, deviation: Array | None = None) -> tuple[Array, Array]:
        """deviation: taken in place of those of the groups, [n]; an image's value then depends on no other image."""
        block = nn.remat(DiscriminatorBlock) if self.remat else DiscriminatorBlock
        widths = {s: min(self.channel_base // s, self.channel_max) for s in sizes(x.shape[1])}
        image, skips = x, self.architecture == 'skip'
        x = leaky(Conv(widths[x.shape[1]], 1, dtype=self.dtype, name='first')(x), self.clamp)
        while x.shape[1] > 4:
            s = x.shape[1]
            x = block(widths[s // 2], self.architecture == 'resnet', self.clamp, self.dtype, name=f'block{s}')(x)
            if skips:
                image = smooth(image, 1, 2)
                dtype, clamp = (self.dtype, self.clamp) if s > 8 else (jnp.float32, 0.0)  # of the last, 4 pixels high
                x = x + leaky(Conv(widths[s // 2], 1, dtype=dtype, name=f'first{s // 2}')(image), clamp)

        x = x.astype(jnp.float32)
        if deviation is None:
            deviation = minibatch_deviation(x, self.group)
        chex.assert_shape(deviation, (len(x),))
        plane = jnp.broadcast_to(deviation[:, None, None, None], (*x.shape[:3], 1))
        x = leaky(Conv(widths[4], name='conv')(jnp.concatenate([x, plane], -1)), self.clamp)
        x = leaky(Dense(widths[4], name='dense')(x.reshape(len(x), -1)))
        if not self.classes:
            return Dense(1, name='value')(x)[:, 0], deviation
        of_class = Mapping(widths[4], self.mapping_layers, self.classes, name='mapping')(None, label)
        values = (Dense(widths[4], name='value')(x) * of_class).sum(-1) / math.sqrt(widths[4])
        return values, deviation
