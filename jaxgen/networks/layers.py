"""Convolutions, dense layers, norms and resampling: every network is built from these.

So an improvement or a correction here is one for all of them. Images are NHWC. Weights are float32; `dtype` is that of
the computation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen import fsdp
from jaxgen.contract import State, running_mean
from jaxgen.errors import UserError
from jaxgen.networks.convolution import convolve, platform, product

Array = jax.Array

NORMS = ('instance', 'group')  # kinds of Norm


def variance_scaling(scale: float = 1.0) -> Callable:
    """Uniform init with variance scale / mean(fan in, fan out), the default of DDPM and others.

    A scale of 0 stands for 1e-10: the layer's initial output is all but zero, yet no weight is dead.
    """
    return nn.initializers.variance_scaling(scale or 1e-10, 'fan_avg', 'uniform')


def Conv(
    features: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    bias: bool = True,
    init: Callable | None = None,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Module:
    """Convolution of [n, H, W, C] to [n, H', W', features] with a square kernel.

    Args:
      dilation: distance between the pixels of a kernel's neighbouring taps.
      padding: 'SAME', 'VALID' or ((top, bottom), (left, right)). With stride 2, 'SAME' pads an
        even size at the bottom and right only, as TensorFlow does; ((1, 1), (1, 1)) is torch's
        `padding=1`.
      init: of the kernel; None: variance_scaling(1). The bias starts at 0.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding,
        kernel_dilation=dilation,
        use_bias=bias,
        kernel_init=init or variance_scaling(),
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


def ConvTranspose(
    features: int,
    kernel: int = 4,
    *,
    bias: bool = True,
    init: Callable | None = None,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Module:
    """Transposed convolution of [n, H, W, C] to [n, 2H, 2W, features] with stride 2.

    It is torch's `ConvTranspose2d(kernel_size=4, stride=2, padding=1)` with a flipped kernel: a convolution of the
    image with zeros between its pixels.

    Args:
      kernel: 3 is torch's `kernel_size=3, stride=2, padding=1, output_padding=1`.
      init: of the kernel; None: variance_scaling(1). The bias starts at 0.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        padding=((kernel // 2, (kernel + 1) // 2),) * 2,
        input_dilation=(2, 2),
        use_bias=bias,
        kernel_init=init or variance_scaling(),
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


def Dense(
    features: int,
    *,
    bias: bool = True,
    init: Callable | None = None,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Module:
    """Linear map of the last axis: [..., C] to [..., features]. On an image it is a 1x1 convolution.

    Args:
      init: of the kernel; None: variance_scaling(1). The bias starts at 0.
    """
    return nn.Dense(
        features,
        use_bias=bias,
        kernel_init=init or variance_scaling(),
        dtype=dtype,
        dot_general=product,
        name=name,
    )


# Jitted, so that it is traced once for each shape, not once for each layer of a network.
@functools.partial(jax.jit, static_argnames=('groups', 'eps'))
def group_norm(x: Array, scale: Array | float, bias: Array | float, groups: int, eps: float) -> Array:
    """Group normalisation of [n, ..., C] with scale and bias [C], in float32."""
    channels = x.shape[-1]

    def to_channels(z):  # [n, groups] to [n, 1, C]
        return jnp.repeat(z, channels // groups, axis=1)[:, None]

    def of_groups(z):  # mean over positions, then channels: [n, positions, C] to [n, groups]
        return z.mean(1).reshape(len(z), groups, -1).mean(-1)

    y = x.astype(jnp.float32).reshape(len(x), -1, channels)  # [n, positions, C]
    # One pass over x gives both moments, and the channels stay innermost: half the time of the
    # two-pass form on a CPU. E[y^2] - E[y]^2 loses all digits when the mean is large beside the
    # deviation, so the values are first shifted by one of their own: no moment depends on it.
    y = y - computed_once(jax.lax.stop_gradient(to_channels(y[:, 0, :: channels // groups])))
    mean = of_groups(y)
    variance = jnp.maximum(of_groups(jnp.square(y)) - jnp.square(mean), 0)
    factor = to_channels(jax.lax.rsqrt(variance + eps)) * scale  # [n, 1, C]
    factor, offset = computed_once(factor), computed_once(bias - to_channels(mean) * factor)
    return (y * factor + offset).reshape(x.shape)


def computed_once(x: Array) -> Array:
    """x, as an array of its own on CPUs: XLA would compute its numbers again for every number of what reads them."""
    return jax.lax.optimization_barrier(x) if platform() == 'cpu' else x


def group_count(channels: int, groups: int, least: int) -> int:
    """Number of groups of a GroupNorm with so many channels.

    Raises:
      UserError: with `least` 0, `groups` does not divide the channels.
    """
    if not least:
        if channels % groups:
            raise UserError(f'{groups} groups do not divide {channels} channels of a group normalisation')
        return groups
    most = max(1, min(groups, channels // least))
    return next(g for g in range(most, 0, -1) if channels % g == 0)


def check_groups(where: str, groups: int, group_size: int, eps: float, widths: Sequence[int]) -> None:
    """Raises UserError where fields of group norms, in the section `where`, do not fit norms of `widths` channels."""
    if groups < 1 or group_size < 0 or not 0 < eps < math.inf:
        raise UserError(
            f'{where}: groups must be 1 or more, group_size 0 or more, eps more than 0; they are {groups}, '
            f'{group_size} and {eps}'
        )
    for width in widths:
        if not group_size and width % groups:
            raise UserError(
                f'{where}.groups = {groups} does not divide {width} channels: change the channels, or let narrow '
                f'resolutions have fewer groups by {where}.group_size = 4, the least channels of a group'
            )


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) of [n, ..., C] over each group's channels and all positions.

    Statistics are taken in float32 whatever the dtype.

    Attributes:
      groups: their number; with `least` above 0 the largest number.
      eps: added to the variance. 1e-6 in TensorFlow's code, and so in DDPM's; 1e-5 in torch.
      dtype: of the result.
      least: smallest number of channels of a group: C channels have min(groups, C // least) groups, or the next smaller
        number that divides C, so that narrow networks work too. 4 in score_sde and EDM: 32 groups from 128 channels
        on, 8 at 32. 0: `groups` of them at every width, as in DDPM, ADM, VQGAN, latent diffusion and diffusers.
      affine: with a learned scale and bias.
    """

    groups: int = 32
    eps: float = 1e-6
    dtype: Any = jnp.float32
    least: int = 4
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        groups = group_count(channels, self.groups, self.least)
        scale, bias = 1.0, 0.0
        if self.affine:
            scale = self.param('scale', nn.initializers.ones, (channels,))
            bias = self.param('bias', nn.initializers.zeros, (channels,))

        return group_norm(x, scale, bias, groups, self.eps).astype(self.dtype)


def Norm(
    kind: str, channels: int, *, affine: bool = True, dtype: Any = jnp.float32, name: str | None = None
) -> nn.Module:
    """Norm of [n, ..., channels] by its kind: 'instance', over each channel of each image, or 'group', over groups of
    four or more channels, so that features constant over an image survive; eps as in torch.

    Args:
      affine: with a learned scale and bias.
    """
    groups, least = (channels, 1) if kind == 'instance' else (32, 4)
    return GroupNorm(groups, 1e-5, dtype, least, affine, name=name)


class ShiftedLayerNorm(nn.LayerNorm):
    """flax's, of vectors shifted by their first number: no result depends on the shift, and the mean of the shifted
    numbers is exact where one far from 0 would lose digits."""

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        return super().__call__(x - jax.lax.stop_gradient(x[..., :1]))


def LayerNorm(
    *, eps: float = 1e-6, affine: bool = True, dtype: Any = jnp.float32, name: str | None = None
) -> nn.Module:
    """Layer normalisation over the last axis, statistics in float32.

    The variance is the mean of squared differences from the mean, as everywhere here: E[x^2] - E[x]^2, flax's default,
    keeps no digit of a variance that is 1e-7 of the squared mean. The mean itself is that of shifted numbers, see
    `ShiftedLayerNorm`.

    Args:
      eps: 1e-6 in TensorFlow's and Flax's default, 1e-5 in torch's.
      affine: with a learned scale and bias.
    """
    return ShiftedLayerNorm(
        epsilon=eps, use_bias=affine, use_scale=affine, dtype=dtype, use_fast_variance=False, name=name
    )


def mean_of_first(x: Array) -> Array:
    """The mean [C] of the first example of [n, ..., C]. Where the batch is cut over devices with the weights, it is a
    sum with zeros for the others: one vector is sent, and not what each device has."""
    if fsdp.parts() == 1:
        return x[:1].mean(tuple(range(x.ndim - 1)))
    means = x.mean(tuple(range(1, x.ndim - 1)))
    return jnp.where(jnp.arange(len(x))[:, None] == 0, means, 0).sum(0)


class RMSNorm(nn.Module):
    """Tokens over their root mean square, times a learned scale (Zhang & Sennrich 2019), statistics in float32."""

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) of [..., C] over all axes but the last, statistics in float32.

    Training uses the statistics of the batch, over all devices, and leaves just these in the
    collection 'batch_stats' (so `mutable=['batch_stats']`): the family averages them over updates,
    by its own rule, in State.extra. Otherwise the statistics given in 'batch_stats' are used, and
    an example's result does not depend on the others.

    In training moments are those of numbers shifted by the mean of the first example: no result depends on the shift,
    and a mean far from 0 costs no digits.

    Attributes:
      affine: with a learned scale and bias.
      dtype: of the result.
    """

    train: bool
    eps: float = 1e-5
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, axes = x.shape[-1], tuple(range(x.ndim - 1))
        stored_mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        stored_var = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        if self.train:
            first = jax.lax.stop_gradient(mean_of_first(x))
            x = x - first
            mean = x.mean(axes)
            variance = jnp.square(x - mean).mean(axes)
            if not self.is_initializing():
                stored_mean.value, stored_var.value = first + mean, variance
        else:
            mean, variance = stored_mean.value, stored_var.value
        factor = jax.lax.rsqrt(variance + self.eps)
        if self.affine:
            factor = factor * self.param('scale', nn.initializers.ones, (channels,))
        x = (x - mean) * factor
        if self.affine:
            x = x + self.param('bias', nn.initializers.zeros, (channels,))
        return x.astype(self.dtype)


# Decay of running means of batch statistics (`contract.running_mean`), over about ten updates. As in torch.
STATISTICS_DECAY = 0.9


def apply_in_training(network: nn.Module, weights: Any, *inputs: Any) -> tuple[Any, dict]:
    """(output, batch statistics) of a network in training mode, normalised by the batch; the statistics are {} if it
    has no batch normalisation."""
    output, new = network.apply({'params': weights}, *inputs, train=True, mutable=['batch_stats'])
    return output, new.get('batch_stats', {})


def apply_averaged(network: nn.Module, weights: Any, state: State, statistics: Any, *inputs: Any) -> tuple[Any, Any]:
    """(output, statistics) of a network with averaged weights in training mode on the inputs of one update; the latter
    are the running mean `statistics` with the batch statistics of this update in it.

    Samples are normalised by fixed statistics, so that one does not depend on those drawn with it. Statistics gathered
    in training belong to the trained weights, whose activations are others than those of the averaged ones that sample:
    so these run once on the inputs of each update (a generator on its latents).

    Args:
      weights: averages after the update.
      state: before `advance`, see `contract.running_mean`.
    """
    output, new = apply_in_training(network, weights, *inputs)
    return output, running_mean(state, statistics, new, STATISTICS_DECAY)


def instance_norm(x: Array, eps: float = 1e-5) -> Array:
    """Each channel of each example [n, H, W, C] to mean 0 and variance 1 over its positions, without weights.

    Ulyanov et al. 2016, arXiv 1607.08022. Statistics in float32, result in x's dtype.
    """
    y = x.astype(jnp.float32)
    y = y - jax.lax.stop_gradient(y[:, :1, :1])  # a mean far from 0 costs no digits
    y = y - y.mean((1, 2), keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean((1, 2), keepdims=True) + eps)).astype(x.dtype)


def normalised(x: Array, eps: float = 1e-8) -> Array:
    """Vectors [..., d] scaled to a mean square of 1, without weights; 0 stays 0.

    Statistics in float32, result in x's dtype.
    """
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


@jax.custom_vjp
def look_up(table: Array, indices: Array) -> Array:
    """Rows [..., C] of a table [K, C] by their indices int [...]; NaN where there is no such row.

    The gradient is a product with one-hot vectors: that of indexing adds up in an order which changes on GPUs from run
    to run (see sharding.overlapping_writes).
    """
    return jnp.take(table, jnp.where(indices < 0, len(table), indices), axis=0, mode='fill')


def _look_up_backward(residuals, gradient):
    table, indices = residuals
    one_hot = jax.nn.one_hot(indices.reshape(-1), len(table), dtype=gradient.dtype)
    gradient = jnp.matmul(one_hot.T, gradient.reshape(-1, table.shape[-1]), precision='highest')
    return gradient.astype(table.dtype), None


look_up.defvjp(lambda table, indices: (look_up(table, indices), (table, indices)), _look_up_backward)


class Embed(nn.Embed):
    """flax's, by `look_up`: int [...] to [..., features].

    Args:
      added: rows [n, features] behind those of the table; None: there are none.
    """

    def __call__(self, indices: Array, added: Array | None = None) -> Array:
        table = self.embedding.astype(self.dtype or self.embedding.dtype)
        if added is None:
            return look_up(table, indices)
        rows = look_up(table, jnp.minimum(indices, len(table) - 1))
        new = look_up(added.astype(table.dtype), jnp.maximum(indices - len(table), 0))
        return jnp.where((indices >= len(table))[..., None], new, rows)


def max_pool(x: Array) -> Array:
    """Maximum of every 2x2 square: [n, H, W, C] to [n, H // 2, W // 2, C]; an odd last row or column is left out.

    Its gradient, unlike that of flax's, has no overlapping writes (see sharding.overlapping_writes).
    """
    _, h, w, _ = x.shape
    even = x[:, : h // 2 * 2, : w // 2 * 2]
    return einops.reduce(even, 'n (h a) (w b) c -> n h w c', 'max', a=2, b=2)


def upsample_nearest(x: Array) -> Array:
    """Every pixel four times: [n, H, W, C] to [n, 2H, 2W, C]."""
    # A broadcast costs a copy; jax.image.resize costs a gather or a matrix product.
    return einops.repeat(x, 'n h w c -> n (h a) (w b) c', a=2, b=2)


def downsample_mean(x: Array) -> Array:
    """Mean of every 2x2 square: [n, H, W, C] to [n, H/2, W/2, C]. H and W are even."""
    return einops.reduce(x, 'n (h a) (w b) c -> n h w c', 'mean', a=2, b=2)


def smooth(x: Array, pad: int, stride: int) -> Array:
    """The filter [1, 3, 3, 1] / 8 along height and width: [n, H, W, C] to [n, H', W', C].

    Args:
      pad: zeros at each of the four sides. H' is (H + 2 pad - 4) // stride + 1.
      stride: step between results; 2 with pad 1 is the downsampling of NCSN++ and StyleGAN2.
    """
    for axis in (1, 2):
        y = jnp.pad(x, [(pad, pad) if i == axis else (0, 0) for i in range(4)])
        extent = (y.shape[axis] - 4) // stride * stride + 1
        a, b, c, d = (jax.lax.slice_in_dim(y, i, i + extent, stride, axis) for i in range(4))
        x = ((a + d) + 3 * (b + c)) / 8
    return x


def upsample_smooth(x: Array) -> Array:
    """Zeros between pixels, then [1, 3, 3, 1] / 4 along height and width: [n, H, W, C] to [n, 2H, 2W, C]."""
    for axis in (1, 2):
        size = x.shape[axis]
        y = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        before, after = (jax.lax.slice_in_dim(y, i, i + size, 1, axis) for i in (0, 2))
        # Every other tap falls on a zero: two of the four remain for a pixel.
        pairs = jnp.stack([(before + 3 * x) / 4, (3 * x + after) / 4], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x


def to_patches(x: Array, size: int) -> Array:
    """Patches of size x size pixels as vectors, row by row, colours innermost: [n, H, W, C] to
    [n, H/size, W/size, size^2 C]."""
    return einops.rearrange(x, 'n (h a) (w b) c -> n h w (a b c)', a=size, b=size)


def from_patches(x: Array, size: int) -> Array:
    """The inverse of `to_patches`: [n, h, w, size^2 C] to [n, h size, w size, C]."""
    return einops.rearrange(x, 'n h w (a b c) -> n (h a) (w b) c', a=size, b=size)
