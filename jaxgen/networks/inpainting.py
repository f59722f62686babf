"""Networks that fill holes: gated convolutions, contextual attention, and the discriminator of SN-PatchGAN.

Yu et al. 2018, Free-Form Image Inpainting with Gated Convolution (arXiv 1806.03589), sections 3.1 to 3.3; the
attention is that of Yu et al. 2018, Generative Image Inpainting with Contextual Attention (arXiv 1801.07892, section
4). Sizes are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv, upsample_nearest

Array = jax.Array


class GatedConv(nn.Module):
    """Features and gates by one convolution, activation(features) * sigmoid(gates): [n, H, W, C] to
    [n, H', W', features] (eq. 2).

    A mask that is among the channels can so close places that hold nothing, layer by layer.
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


class Gated(nn.Module):
    """Gated convolutions one after another.

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


class Painter(nn.Module):
    """Maps [n, h, w, C] to images float32 [n, 4h, 4w, features] in (-1, 1), by two doublings."""

    features: int
    width: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rest, w = dict(remat=self.remat, dtype=self.dtype), self.width
        x = Gated(((4 * w, 3, 1, 1),) * 2, **rest, name='coarse')(x)
        x = Gated(((2 * w, 3, 1, 1),) * 2, **rest, name='middle')(upsample_nearest(x))
        x = Gated(((w, 3, 1, 1), (w // 2, 3, 1, 1)), **rest, name='fine')(upsample_nearest(x))
        return jnp.tanh(Conv(self.features, dtype=self.dtype, name='last')(x).astype(jnp.float32))


def patches(x: Array, kernel: int, stride: int) -> Array:
    """Squares of pixels, zeros beyond the border: [n, H, W, C] to [n, H / stride, W / stride, kernel^2, C].

    kernel - stride is even; as many pixels lie beyond each side.
    """
    pad = (kernel - stride) // 2
    y = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = x.shape[1], x.shape[2]
    return jnp.stack(
        [y[:, i : i + height : stride, j : j + width : stride] for i in range(kernel) for j in range(kernel)], 3
    )


def fuse(scores: Array) -> Array:
    """Scores of places p for places q, [n, P, Q], each with those of the next ones of both and of the ones before:
    that a neighbour is like q's neighbour speaks for q too."""
    padded = jnp.pad(scores, ((0, 0), (1, 1), (1, 1)))
    rows, columns = scores.shape[1:]
    return sum(padded[:, i : i + rows, i : i + columns] for i in range(3))


def contextual_attention(x: Array, mask: Array, scale: float = 10.0) -> Array:
    """Every place as a sum of what is known elsewhere, by how alike they are: x [n, H, W, C] to the same.

    Places are compared at half the size, by the cosine of squares of 3 x 3 (of those that are looked at; of those that
    look, the length counts), and squares of 4 x 4 are put down, four of them one on another.

    Args:
      x: H and W are even.
      mask: [n, H, W, 1], 1 where nothing is known: squares that hold any of it are not taken.
      scale: of the scores in the softmax.
    """
    n, x = len(x), x.astype(jnp.float32)
    small, holes = x[:, ::2, ::2], mask.astype(jnp.float32)[:, ::2, ::2]
    h, w = small.shape[1], small.shape[2]
    looking = patches(small, 3, 1).reshape(n, h * w, -1)
    length = jnp.sqrt(jnp.square(looking).sum(-1, keepdims=True) + 1e-12)
    scores = jnp.einsum('npc,nqc->npq', looking, looking / jnp.maximum(length, 1e-4))

    def across(scores: Array, rows: int, columns: int) -> Array:
        """Places counted row by row are counted column by column, on both sides."""
        return scores.reshape(n, rows, columns, rows, columns).transpose(0, 2, 1, 4, 3).reshape(n, h * w, h * w)

    scores = across(fuse(across(fuse(scores), h, w)), w, h)
    known = (patches(holes, 3, 1).max((3, 4)) == 0).reshape(n, 1, h * w)
    attention = nn.softmax(scale * jnp.where(known, scores, 0)) * known

    def squares(x: Array) -> Array:
        return patches(x, 4, 2).reshape(n, h * w, -1)

    put = jnp.einsum('npq,nqc->npc', attention, squares(x))
    # The transpose of taking squares is putting them down.
    (out,) = jax.linear_transpose(squares, jax.ShapeDtypeStruct(x.shape, x.dtype))(put)
    return out / 4


class Generator(nn.Module):
    """Images [n, H, W, C] and where they are unknown, mask [n, H, W, 1] of 0 and 1, to two images float32
    [n, H, W, C] in (-1, 1): a coarse one, and one that is made from the coarse one within the hole and the given one
    outside of it.

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
        w, rest = self.width, dict(remat=self.remat, dtype=self.dtype)
        x = x * (1 - mask)
        wide = tuple((4 * w, 3, 1, d) for d in (1, 1, *self.dilations))

        def down(middle: int, last: int) -> tuple:
            return (w, 5, 1, 1), (middle, 3, 2, 1), (2 * w, 3, 1, 1), (last, 3, 2, 1)

        seen = jnp.concatenate([x, jnp.ones_like(mask), mask], -1)
        h = Gated((*down(2 * w, 4 * w), *wide), **rest, name='coarse')(seen)
        coarse = Painter(x.shape[-1], w, **rest, name='coarse_painter')(h)

        pasted = x + coarse * mask
        h = Gated((*down(w, 2 * w), *wide), **rest, name='fine')(pasted)
        if self.attention:
            looked = Gated((*down(w, 4 * w), *wide[:2]), nn.relu, **rest, name='looking')(pasted)
            looked = contextual_attention(looked, mask[:, ::4, ::4]).astype(self.dtype)
            looked = Gated(wide[:2], **rest, name='looked')(looked)
            h = jnp.concatenate([h, looked], -1)
        return coarse, Painter(x.shape[-1], w, **rest, name='fine_painter')(h)


class Discriminator(nn.Module):
    """Images with their masks [n, H, W, C] to float32 [n, h, w, features], each number of which judges a part of them
    (SN-PatchGAN). Its kernels are normalised from outside, see networks/spectral.py.

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
