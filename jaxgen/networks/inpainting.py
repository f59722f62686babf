"""Inpainting networks: gated convolutions, contextual attention, and the discriminator of SN-PatchGAN.

Yu et al. 2018, Free-Form Image Inpainting with Gated Convolution (arXiv 1806.03589), sections 3.1 to 3.3; the
attention is that of Yu et al. 2018, Generative Image Inpainting with Contextual Attention (arXiv 1801.07892, section
4). Sizes are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv, upsample_nearest

Array = jax.Array


class GatedConv(nn.Module):
    """Features and gates by one convolution, activation(features) * sigmoid(gates): [n, H, W, C] to
    [n, H', W', features] (eq. 2).

    With the mask among the channels the gates can close at positions without known pixels, layer by layer.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    activation: Callable = nn.elu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sizes = dict(stride=self.stride, dilation=self.dilation, dtype=self.dtype)
        x, gate = jnp.split(Conv(2 * self.features, self.kernel, **sizes, name='conv')(x), 2, -1)
        return self.activation(x) * nn.sigmoid(gate)


class GatedConvs(nn.Module):
    """A sequence of gated convolutions.

    Attributes:
      layers: (features, kernel, stride, dilation) of each.
      last: activation of the last one.
    """

    layers: tuple[tuple[int, int, int, int], ...]
    last: Callable = nn.elu
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = nn.remat(GatedConv) if self.remat else GatedConv
        for i, layer in enumerate(self.layers):
            activation = self.last if i == len(self.layers) - 1 else nn.elu
            x = conv(*layer, activation, self.dtype, name=f'conv{i}')(x)
        return x


class Upsampler(nn.Module):
    """Maps [n, h, w, C] to images float32 [n, 4h, 4w, features] in (-1, 1), doubled twice."""

    features: int
    width: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rest, w = dict(remat=self.remat, dtype=self.dtype), self.width
        x = GatedConvs(((4 * w, 3, 1, 1),) * 2, **rest, name='coarse')(x)
        x = GatedConvs(((2 * w, 3, 1, 1),) * 2, **rest, name='middle')(upsample_nearest(x))
        x = GatedConvs(((w, 3, 1, 1), (w // 2, 3, 1, 1)), **rest, name='fine')(upsample_nearest(x))
        return jnp.tanh(Conv(self.features, dtype=self.dtype, name='last')(x).astype(jnp.float32))


def patches(x: Array, kernel: int, stride: int) -> Array:
    """Patches of kernel x kernel pixels, zeros beyond the border: [n, H, W, C] to [n, H / stride, W / stride, kernel^2,
    C].

    kernel - stride is even; as many pixels lie beyond each side.
    """
    pad = (kernel - stride) // 2
    y = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = x.shape[1], x.shape[2]
    return jnp.stack(
        [y[:, i : i + height : stride, j : j + width : stride] for i in range(kernel) for j in range(kernel)], 3
    )


def fuse(scores: Array) -> Array:
    """Attention propagation: scores of positions p for positions q, [n, P, Q], each the sum of those of (p - 1, q - 1),
    (p, q) and (p + 1, q + 1)."""
    padded = jnp.pad(scores, ((0, 0), (1, 1), (1, 1)))
    rows, columns = scores.shape[1:]
    return sum(padded[:, i : i + rows, i : i + columns] for i in range(3))


def contextual_attention(x: Array, mask: Array, scale: float = 10.0) -> Array:
    """Every position as a weighted sum of known patches, by their similarity: x [n, H, W, C] to the same.

    Similarities are those of patches of 3 x 3 at half the size, cosines but for the length of the query. The sums are
    of patches of 4 x 4, of which four overlap.

    Args:
      x: H and W are even.
      mask: [n, H, W, 1], 1 where nothing is known: patches with any such pixel are not attended to.
      scale: of the scores in the softmax.
    """
    chex.assert_rank(x, 4)
    chex.assert_shape(mask, (*x.shape[:3], 1))
    x = x.astype(jnp.float32)
    small, holes = x[:, ::2, ::2], mask.astype(jnp.float32)[:, ::2, ::2]
    h, w = small.shape[1:3]

    def flat(patches: Array) -> Array:
        return einops.rearrange(patches, 'n h w k c -> n (h w) (k c)')

    queries = flat(patches(small, 3, 1))
    length = jnp.sqrt(jnp.square(queries).sum(-1, keepdims=True) + 1e-12)
    scores = jnp.einsum('npc,nqc->npq', queries, queries / jnp.maximum(length, 1e-4))

    def across(scores: Array, rows: int) -> Array:
        """Positions in row-major order to column-major order, on both sides."""
        return einops.rearrange(scores, 'n (i j) (k l) -> n (j i) (l k)', i=rows, k=rows)

    scores = across(fuse(across(fuse(scores), h)), w)
    known = einops.reduce(patches(holes, 3, 1), 'n h w k c -> n 1 (h w)', 'max') == 0
    attention = nn.softmax(scale * jnp.where(known, scores, 0)) * known

    def squares(x: Array) -> Array:
        return flat(patches(x, 4, 2))

    sums = jnp.einsum('npq,nqc->npc', attention, squares(x))
    # The transpose of cutting patches is the sum of overlapping ones.
    (out,) = jax.linear_transpose(squares, jax.ShapeDtypeStruct(x.shape, x.dtype))(sums)
    return out / 4


class Generator(nn.Module):
    """Images [n, H, W, C] and masks [n, H, W, 1], 1 in holes and else 0, to two images float32 [n, H, W, C] in (-1, 1):
    a coarse one, and a fine one, whose input is the coarse one within the hole and the image outside of it.

    Attributes:
      width: channels of the first convolution after its gates, 24 in the authors' code (48 with the gates).
      dilations: of the convolutions in the middle.
      attention: the second half has a branch of contextual attention; H and W are then multiples of 8, else of 4.
    """

    width: int = 24
    dilations: tuple[int, ...] = (2, 4, 8, 16)
    attention: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
        chex.assert_rank(x, 4)
        chex.assert_shape(mask, (*x.shape[:3], 1))
        w, rest = self.width, dict(remat=self.remat, dtype=self.dtype)
        x = x * (1 - mask)
        wide = tuple((4 * w, 3, 1, d) for d in (1, 1, *self.dilations))

        def down(middle: int, last: int) -> tuple:
            return (w, 5, 1, 1), (middle, 3, 2, 1), (2 * w, 3, 1, 1), (last, 3, 2, 1)

        inputs = jnp.concatenate([x, jnp.ones_like(mask), mask], -1)
        h = GatedConvs((*down(2 * w, 4 * w), *wide), **rest, name='coarse')(inputs)
        coarse = Upsampler(x.shape[-1], w, **rest, name='coarse_painter')(h)

        pasted = x + coarse * mask
        h = GatedConvs((*down(w, 2 * w), *wide), **rest, name='fine')(pasted)
        if self.attention:
            attended = GatedConvs((*down(w, 4 * w), *wide[:2]), nn.relu, **rest, name='looking')(pasted)
            attended = contextual_attention(attended, mask[:, ::4, ::4]).astype(self.dtype)
            attended = GatedConvs(wide[:2], **rest, name='looked')(attended)
            h = jnp.concatenate([h, attended], -1)
        return coarse, Upsampler(x.shape[-1], w, **rest, name='fine_painter')(h)


class Discriminator(nn.Module):
    """Images with their masks [n, H, W, C] to values float32 [n, h, w, features], of parts of them (SN-PatchGAN). Its
    kernels are normalised from outside, see networks/spectral.py.

    Attributes:
      channels: of the first convolution; the second has twice as many and all others four times as many.
      layers: convolutions of kernel 5 and stride 2.
    """

    channels: int = 64
    layers: int = 6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = Conv(self.channels * min(2**i, 4), 5, stride=2, dtype=self.dtype, name=f'conv{i}')(x)
            x = nn.leaky_relu(x, 0.2)
        return x.astype(jnp.float32)
