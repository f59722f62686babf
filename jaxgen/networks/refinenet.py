"""The network of NCSN, a dilated RefineNet conditioned on the noise level (Song & Ermon 2019, arXiv 1907.05600).

See its appendix A.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.conditions import OneHot
from jaxgen.networks.fields import Channels
from jaxgen.networks.layers import Conv, Dense, downsample_mean, look_up

Array = jax.Array
Condition = tuple[Array, Array | None]

# As torch starts kernels: uniform in +-1 / sqrt(fan in).
INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def mean_5x5(x: Array) -> Array:
    """Mean of the 5x5 pixels around each one, zeros beyond the edge counted: [n, H, W, C] to the same."""
    # Along one axis, then the other: 10 sums for 25.
    return nn.avg_pool(nn.avg_pool(x, (5, 1), padding='SAME'), (1, 5), padding='SAME')


def enlarge(x: Array, height: int, width: int) -> Array:
    """Bilinear, corners on corners (torch's `align_corners`): [n, H, W, C] to [n, height, width, C]."""

    def weights(size: int, old: int) -> Array:
        """[size, old]: weights of the old pixels in the new ones."""
        positions = np.linspace(0, old - 1, size)
        return jnp.asarray(np.maximum(1 - np.abs(positions[:, None] - np.arange(old)), 0), x.dtype)

    if x.shape[1:3] == (height, width):
        return x
    x = jnp.einsum('ih,nhwc->niwc', weights(height, x.shape[1]), x)
    return jnp.einsum('jw,niwc->nijc', weights(width, x.shape[2]), x)


class Norm(nn.Module):
    """Conditional instance normalisation++ (appendix A.1): [n, H, W, C] and the condition to the same.

    Every channel is brought to mean 0 and variance 1 over its positions. What that takes away, how the
    channels' means differ, is added again, with a factor. Then come a scale and a shift. These three are looked
    up by the noise level, and by the class too where it is a condition. Statistics are taken in float32.

    Attributes:
      levels: number of noise levels.
    """

    levels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, condition: Condition) -> Array:
        """condition: the noise level int32 [n], and one-hot classes [n, classes] or None."""
        level, classes = condition
        channels = x.shape[-1]

        def start(key, shape):  # factors near 1, shifts 0
            return jnp.pad(1 + 0.02 * jax.random.normal(key, (shape[0], 2 * channels)), ((0, 0), (0, channels)))

        table = look_up(self.param('level', start, (self.levels, 3 * channels)), level)  # [n, 3 C]
        if classes is not None:  # what they add starts at zero; the published network has none
            table = table + classes @ self.param('label', nn.initializers.zeros, (classes.shape[-1], 3 * channels))
        scale, factor, shift = jnp.split(table, 3, -1)  # [n, C] each

        # Both moments in one pass, the values shifted by one of their own against cancellation, as in GroupNorm; then
        # all is one product and one sum. On CPUs that takes half the time, and half the compile time of the network.
        x = x.astype(jnp.float32)
        pixels = x.reshape(len(x), -1, channels)
        first = jax.lax.stop_gradient(pixels[:, 0])
        shifted = pixels - first[:, None]
        offsets = shifted.mean(1)
        variance = jnp.square(shifted).mean(1) - jnp.square(offsets)
        means = first + offsets
        scale, factor = scale * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-5), scale * factor
        # The channels' means are compared as they are; x is scaled from its shifted values, whose digits are all left.
        centred = means - means.mean(1, keepdims=True)
        variance = jnp.square(centred).sum(1, keepdims=True) / (channels - 1)
        shift = shift - scale * offsets + factor * centred * jax.lax.rsqrt(variance + 1e-5)
        return (shifted * scale[:, None] + shift[:, None]).reshape(x.shape).astype(self.dtype)


class Layer(nn.Module):
    """Norm, `act`, 3x3 convolution: [n, H, W, C] to [n, H, W, features]. All of the network is made of these."""

    features: int
    norm: Callable
    act: Callable = nn.elu
    dilation: int = 1
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, condition: Condition) -> Array:
        h = self.act(self.norm(name='norm')(x, condition))
        return Conv(
            self.features, dilation=self.dilation, bias=self.bias, init=INIT, dtype=self.dtype, name='conv'
        )(h)  # fmt: skip


class Residual(nn.Module):
    """Two layers and a shortcut: [n, H, W, C] to [n, H', W', features].

    Attributes:
      first: of its stage. Then the shortcut is a convolution, and without dilation the size is halved. A
        dilation stands in for the halving (section 4.1): the size stays, and kernels reach as far.
    """

    features: int
    layer: Callable
    dilation: int = 1
    first: bool = False

    @nn.compact
    def __call__(self, x: Array, condition: Condition) -> Array:
        h = self.layer(x.shape[-1], dilation=self.dilation, name='layer1')(x, condition)
        h = self.layer(self.features, dilation=self.dilation, name='layer2')(h, condition)
        if not self.first:
            return x + h
        options = {'init': INIT, 'dtype': h.dtype, 'name': 'shortcut'}
        if self.dilation == 1:
            return Dense(self.features, **options)(downsample_mean(x)) + downsample_mean(h)
        return Conv(self.features, dilation=self.dilation, **options)(x) + h


class Refine(nn.Module):
    """RefineNet's block (Lin et al. 2017, arXiv 1611.06612): maps [n, H', W', C] to their fusion [n, H, W, features].

    Each map goes through two residual units; two or more are brought to the first one's size and added up;
    means of ever wider surroundings are added (means, where RefineNet has maxima); more units follow.

    Attributes:
      units: of the last part.
    """

    features: int
    layer: Callable
    units: int = 1

    @nn.compact
    def __call__(self, maps: list[Array], condition: Condition) -> Array:
        def residual_units(h, count, name):
            for i in range(count):
                skip = h
                for j in range(2):
                    h = self.layer(h.shape[-1], bias=False, name=f'{name}_{i}{j}')(h, condition)
                h = h + skip
            return h

        height, width = maps[0].shape[1:3]
        maps = [residual_units(h, 2, f'map{i}') for i, h in enumerate(maps)]
        if len(maps) == 1:
            (h,) = maps
        else:
            h = 0
            for i, one in enumerate(maps):
                one = self.layer(self.features, act=lambda x: x, name=f'fuse{i}')(one, condition)
                h = h + enlarge(one, height, width)
        h = path = nn.elu(h)
        for i in range(2):
            path = self.layer(self.features, act=mean_5x5, bias=False, name=f'pool{i}')(path, condition)
            h = h + path
        return residual_units(h, self.units, 'out')


class RefineNet(nn.Module):
    """x_t and the number of its noise level (and class) to a map of x_t's size, float32.

    What the published network puts out is the score itself, for images in [0, 1], where sigma is half as large as
    here. The last line multiplies it by that half: the result is sigma times the score, the prediction 'score', and
    its mean squared distance from -eps is the published loss (eq. 5 and 6) but for a constant factor.

    Published with 128 channels for 32x32 pixels, 64 for MNIST.

    Attributes:
      channels: of the first stage; the others have twice as many.
      stages: up to 4, as published. The second halves the size, the third and the fourth are dilated.
      levels: number of noise levels, of which every norm has a table.
      sigmas: sigma of the first and the last level, over images in [-1, 1]; between them their logarithm is even.
      out_channels: 0: as many as x has.
      remat: recompute each block's activations in the backward pass.
    """

    channels: Channels = 128
    stages: Annotated[int, '[1, 4]'] = 4
    levels: int = 10
    sigmas: tuple[float, float] = (0.02, 2.0)
    out_channels: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    takes: ClassVar = ('vector', 'planes')

    @property
    def vector_features(self) -> int:
        return 0  # any number: one-hot classes, of which every norm has a table

    @nn.nowrap
    def class_embedding(self, classes: int) -> nn.Module:
        """A module of int32 [n] in [0, classes) to one-hot vectors [n, classes]."""
        return OneHot(classes)

    @nn.compact
    def __call__(self, x: Array, t: Array, vector: Array | None = None, *, train: bool = False) -> Array:
        """Args:
        x: float32 [n, H, W, C], H and W even.
        t: [n], number of the noise level, 0 the one with the least noise (published: the most). The table has whole
          numbers only: the nearest is looked up.
        vector: one-hot classes [n, classes], which every norm looks up; None, as published: there is no condition.
        train: changes nothing.
        """
        level = jnp.clip(jnp.round(t).astype(jnp.int32), 0, self.levels - 1)
        condition = level, vector
        norm = functools.partial(Norm, self.levels, self.dtype)
        layer = functools.partial(Layer, norm=norm, dtype=self.dtype)
        residual, refine = (nn.remat(Residual), nn.remat(Refine)) if self.remat else (Residual, Refine)

        h = Conv(self.channels, init=INIT, dtype=self.dtype, name='first')(x)
        maps = []
        for i, (multiplier, dilation) in enumerate([(1, 1), (2, 1), (2, 2), (2, 4)][: self.stages]):
            for j in range(2):
                block = residual(multiplier * self.channels, layer, dilation, i > 0 and j == 0, name=f'stage{i}_{j}')
                h = block(h, condition)
            maps.append(h)

        last = self.stages - 1
        h = refine(maps[last].shape[-1], layer, name=f'refine{last}')([maps[last]], condition)
        for i, multiplier, units in [(2, 2, 1), (1, 1, 1), (0, 1, 3)][3 - last :]:
            h = refine(multiplier * self.channels, layer, units, name=f'refine{i}')([maps[i], h], condition)
        h = layer(self.out_channels or x.shape[-1], name='last')(h, condition).astype(jnp.float32)

        low, high = self.sigmas
        half_sigma = low / 2 * jnp.exp(t * (math.log(high / low) / (self.levels - 1)))
        return half_sigma[:, None, None, None] * h
