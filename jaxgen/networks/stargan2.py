"""StarGAN v2's networks (Choi et al. 2020, arXiv 1912.01865, appendix C).

    generator      image and style [n, d] -> image: an encoder, and a decoder with AdaIN, by the style, in every layer
    mapping        z [n, latent] -> a style, by the layers of the target domain
    encoder        image -> its style, by the layer of its domain
    discriminator  image -> logit [n], real or generated, by the output of its domain

Residual blocks are divided by sqrt(2), which keeps their variance. Kernels start as He et al. 2015 have it
(arXiv 1502.01852), biases at 0.

As published every norm of the generator is an instance norm, that before its last layer too: it removes the mean of
every map, and with it the colours of flat drawings. `norm` = 'group', of several channels at once, keeps them.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.hourglass import hourglass
from jaxgen.networks.layers import Conv, Dense, Norm, downsample_mean, upsample_nearest

Array = jax.Array

HE = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


def leaky(x: Array) -> Array:
    return nn.leaky_relu(x, 0.2)


def halvings(height: int, columns: int) -> int:
    """Halvings of an image by encoder and discriminator: 4 pixels of its shorter side are left, or up to 7."""
    return max(min(height, columns).bit_length() - 3, 0)


def of_domain(x: Array, label: Array) -> Array:
    """Entries [n, ...] of x [n, domains, ...] at the domain label [n] of each example."""
    chex.assert_shape(label, (len(x),))
    own = jnp.arange(x.shape[1]) == label[:, None]
    return jnp.where(own.reshape(*own.shape, *[1] * (x.ndim - 2)), x, 0).sum(1)


def edges(x: Array) -> Array:
    """High-pass filtered maps [n, H, W, C]: nine times each pixel less the sum of the 3 x 3 around it, 0 outside."""
    y = x
    for axis in (1, 2):
        size = x.shape[axis]
        y = jnp.pad(y, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        y = sum(jax.lax.slice_in_dim(y, i, i + size, 1, axis) for i in range(3))
    return 9 * x - y


class AdaIN(nn.Module):
    """Adaptive norm of [n, H, W, C], its gains and shifts linear in a style [n, d] (Huang & Belongie 2017, arXiv
    1703.06868)."""

    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, s: Array) -> Array:
        features = x.shape[-1]
        gain, shift = jnp.split(Dense(2 * features, init=HE, name='style')(s)[:, None, None], 2, -1)
        y = Norm(self.norm, features, affine=False, dtype=self.dtype)(x)
        return (1 + gain).astype(self.dtype) * y + shift.astype(self.dtype)


class Down(nn.Module):
    """Residual block, [n, H, W, C] to [n, H', W', features]: half the size where `half`.

    Attributes:
      norm: 'instance' | 'group' | '', none.
    """

    features: int
    half: bool = True
    norm: str = ''
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rest = dict(init=HE, dtype=self.dtype)

        def normed(x):
            return Norm(self.norm, x.shape[-1], dtype=self.dtype)(x) if self.norm else x

        h = leaky(normed(x))
        h = Conv(x.shape[-1], **rest, name='conv1')(h)
        if self.half:
            h, x = downsample_mean(h), downsample_mean(x)
        h = leaky(normed(h))
        h = Conv(self.features, **rest, name='conv2')(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, bias=False, **rest, name='shortcut')(x)
        return (x + h) / math.sqrt(2)


class Styled(nn.Module):
    """Block with AdaIN by a style [n, d], [n, H, W, C] to [n, H', W', features]: twice the size where `double`.

    Attributes:
      norm: 'instance' | 'group'.
      residual: with a shortcut; without one, all that passes is normalised and scaled by the style.
    """

    features: int
    double: bool = True
    norm: str = 'instance'
    residual: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, s: Array) -> Array:
        rest = dict(init=HE, dtype=self.dtype)
        h = leaky(AdaIN(self.norm, self.dtype, name='norm1')(x, s))
        h = upsample_nearest(h) if self.double else h
        h = Conv(self.features, **rest, name='conv1')(h)
        h = leaky(AdaIN(self.norm, self.dtype, name='norm2')(h, s))
        h = Conv(self.features, **rest, name='conv2')(h)
        if not self.residual:
            return h
        if x.shape[-1] != self.features:
            x = Dense(self.features, bias=False, **rest, name='shortcut')(x)
        x = upsample_nearest(x) if self.double else x
        return (x + h) / math.sqrt(2)


class Generator(nn.Module):
    """Images [n, H, W, C] and styles [n, d] to images float32 [n, H, W, C], not bounded.

    Attributes:
      width, max_width: channels at full size, doubled with every halving up to the latter.
      halvings: of the image.
      blocks: at the smallest size, in the encoder and again in the decoder.
      norm: 'instance' | 'group', see above.
      high_pass: 0, or the divisor of the encoder's edges that are added to the decoder's maps. The decoder has then no
        shortcuts: published for faces, whose identity the edges keep.
      skips: heights of the maps whose edges are added.
    """

    width: int = 64
    max_width: int = 512
    halvings: int = 4
    blocks: int = 2
    norm: str = 'instance'
    high_pass: float = 0.0
    skips: tuple[int, ...] = ()
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, s: Array, mask: Array | None = None) -> Array:
        """mask: [n, H, W, 1] from 0 to 1, where edges are added; None: everywhere."""
        chex.assert_rank([x, s], [4, 2])
        if mask is not None:
            chex.assert_shape(mask, (*x.shape[:3], 1))
        down_block, up_block = (nn.remat(block) if self.remat else block for block in (Down, Styled))
        channels, widths = x.shape[-1], [min(self.width * 2**i, self.max_width) for i in range(self.halvings + 1)]
        common = dict(norm=self.norm, dtype=self.dtype)

        def down(i, x):
            return down_block(widths[i + 1], **common, name=f'down{i}')(x)

        def middle(x):
            for i in range(self.blocks):
                x = down_block(widths[-1], half=False, **common, name=f'inner{i}')(x)
            for i in range(self.blocks):
                x = up_block(widths[-1], False, residual=not self.high_pass, **common, name=f'outer{i}')(x, s)
            return x

        def up(i, x, skip):
            x = up_block(widths[i], residual=not self.high_pass, **common, name=f'up{i}')(x, s)
            if not (self.high_pass and skip.shape[1] in self.skips):
                return x
            if mask is not None:
                small = jax.image.resize(mask, (*skip.shape[:3], 1), 'linear', antialias=False)
                skip = skip * small.astype(skip.dtype)
            return x + edges(skip) / self.high_pass

        x = Conv(widths[0], init=HE, dtype=self.dtype, name='first')(x)
        x = hourglass(x, self.halvings, down, middle, up)
        x = leaky(Norm(self.norm, x.shape[-1], dtype=self.dtype)(x))
        return Dense(channels, init=HE, dtype=self.dtype, name='last')(x).astype(jnp.float32)


class MLP(nn.Module):
    """Linear layers of these sizes with ReLUs between them, [n, d] to [n, sizes[-1]], float32."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, size in enumerate(self.sizes):
            x = Dense(size, init=HE, name=f'layer{i}')(nn.relu(x) if i else x)
        return x


class DomainHeads(nn.Module):
    """An MLP for each domain: [n, d] and label [n] to [n, sizes[-1]]. Their weights are stacked."""

    domains: int
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, label: Array) -> Array:
        over = dict(in_axes=None, out_axes=1, axis_size=self.domains)
        heads = nn.vmap(MLP, variable_axes={'params': 0}, split_rngs={'params': True}, **over)
        return of_domain(heads(self.sizes, name='heads')(x), label)


class Mapping(nn.Module):
    """z [n, latent] and label [n] to styles float32 [n, style]: `layers` shared by all domains, as many for each."""

    domains: int
    style: int = 64
    hidden: int = 512
    layers: int = 4

    @nn.compact
    def __call__(self, z: Array, label: Array) -> Array:
        h = nn.relu(MLP((self.hidden,) * self.layers, name='shared')(z))
        return DomainHeads(self.domains, (*(self.hidden,) * (self.layers - 1), self.style), name='own')(h, label)


class Trunk(nn.Module):
    """Images [n, H, W, C] to features float32 [n, d], by the layers that encoder and discriminator have alike."""

    width: int = 64
    max_width: int = 512
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        down = nn.remat(Down) if self.remat else Down
        times, width = halvings(*x.shape[1:3]), self.width
        x = Conv(width, init=HE, dtype=self.dtype, name='first')(x)
        for i in range(times):
            width = min(2 * width, self.max_width)
            x = down(width, dtype=self.dtype, name=f'down{i}')(x)
        # A convolution whose kernel is the whole map.
        x = leaky(x).reshape(len(x), -1)
        return leaky(Dense(width, init=HE, dtype=self.dtype, name='whole')(x)).astype(jnp.float32)


class StyleEncoder(nn.Module):
    """Images [n, H, W, C] of the domains label [n] to their styles float32 [n, style]."""

    domains: int
    style: int = 64
    width: int = 64
    max_width: int = 512
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array) -> Array:
        h = Trunk(self.width, self.max_width, self.remat, self.dtype, name='trunk')(x)
        return DomainHeads(self.domains, (self.style,), name='own')(h, label)


class Discriminator(nn.Module):
    """Images [n, H, W, C] to logits float32 [n] of being real images of the domains label [n]."""

    domains: int
    width: int = 64
    max_width: int = 512
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array) -> Array:
        h = Trunk(self.width, self.max_width, self.remat, self.dtype, name='trunk')(x)
        return of_domain(Dense(self.domains, init=HE, name='values')(h), label)
