"""AttnGAN's networks (Xu et al. 2017, arXiv 1711.10485), those of StackGAN++ (Zhang et al. 2017, arXiv 1710.10916) with
attention to words.

    generator      z, a sentence and words -> images of every stage, each twice as large as that before
    discriminator  an image of one stage -> values with and without its caption
    image encoder  an image of the last stage -> features of its regions and of the whole, in the space of the text's

Kernels start orthogonal, as in the published code; gains of norms start at 1, there by N(1, 0.02^2). Convolutions
before a norm have no bias.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxgen.networks.attention import attend
from jaxgen.networks.gan import ProjectionHead, concat_condition
from jaxgen.networks.layers import BatchNorm, Conv, Dense, GroupNorm, upsample_nearest

Array = jax.Array

INIT = nn.initializers.orthogonal()


class Block(nn.Module):
    """3x3 convolution, batch norm and a gated linear unit: [n, H, W, C] to [n, H', W', features].

    Attributes:
      double: the size first.
      gated: twice as many channels, one half of which opens the other (Dauphin et al. 2016, arXiv 1612.08083); else
        there is no nonlinearity.
    """

    features: int
    double: bool = False
    gated: bool = True
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = upsample_nearest(x) if self.double else x
        x = Conv(self.features * (1 + self.gated), bias=False, init=INIT, dtype=self.dtype, name='conv')(x)
        x = BatchNorm(train=self.train, dtype=self.dtype, name='norm')(x)
        return nn.glu(x) if self.gated else x


class Residual(nn.Module):
    """Two blocks, the second without a gate, and the identity: [n, H, W, C] to the same."""

    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Block(x.shape[-1], train=self.train, dtype=self.dtype, name='block1')(x)
        return x + Block(x.shape[-1], gated=False, train=self.train, dtype=self.dtype, name='block2')(h)


class WordAttention(nn.Module):
    """Word context of every position of a map [n, H, W, C]: the sum of words [n, T, d] with the position's attention
    weights, [n, H, W, C] (section 3.1). Logits are not scaled.

    mask: bool [n, T], true where there is a word.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, words: Array, mask: Array) -> Array:
        chex.assert_shape(words, (len(x), *mask.shape[1:], None))
        e = Dense(x.shape[-1], bias=False, init=INIT, dtype=self.dtype, name='words')(words)
        e = e[:, :, None]
        h = attend(x.reshape(len(x), -1, 1, x.shape[-1]), e, e, mask=mask[:, None, None], scale=1)
        return h.reshape(x.shape)


class Augmented(nn.Module):
    """Conditioning augmentation: mean and log variance [n, features] of a Gaussian about a sentence [n, d] (StackGAN,
    Zhang et al. 2016, arXiv 1612.03242, section 3.2)."""

    features: int

    @nn.compact
    def __call__(self, sentence: Array) -> tuple[Array, Array]:
        h = nn.glu(Dense(4 * self.features, init=INIT, name='gaussian')(sentence))
        return tuple(jnp.split(h, 2, -1))


class Generator(nn.Module):
    """z [n, latent], noise [n, condition], sentence [n, d], words [n, T, d], mask bool [n, T] -> images float32
    [n, h, w, channels] in (-1, 1), a tuple from the smallest on, and mean and log variance of the condition.

    Attributes:
      image: shape of the last stage's.
      stages: of images, each twice as large as the one before.
      doublings: from the first map to the first image.
      width: channels of the maps that become images; the first map has 2^doublings as many.
      condition: dimensions of the augmented condition.
      blocks: residual blocks of every stage but the first.
      attention: stages are conditioned on the words, position by position; else on the condition, the same everywhere.
    """

    image: tuple[int, int, int]
    stages: int = 3
    doublings: int = 4
    width: int = 32
    condition: int = 100
    blocks: int = 2
    attention: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z, noise, sentence, words, mask, train: bool = False):
        common = dict(train=train, dtype=self.dtype)
        block, residual = (nn.remat(b) if self.remat else b for b in (Block, Residual))
        levels = self.doublings + self.stages - 1
        height, columns, channels = self.image[0] >> levels, self.image[1] >> levels, self.image[2]
        mean, log_variance = Augmented(self.condition, name='condition')(sentence)
        c = mean + jnp.exp(0.5 * log_variance) * noise

        def to_image(x, i):
            x = Conv(channels, bias=False, init=INIT, dtype=self.dtype, name=f'image{i}')(x)
            return jnp.tanh(x.astype(jnp.float32))

        features = self.width * 2**self.doublings
        x = Dense(2 * height * columns * features, bias=False, init=INIT, dtype=self.dtype, name='first')(
            concat_condition(c, z)
        )
        x = BatchNorm(**common, name='first_norm')(x)
        x = nn.glu(x.reshape(-1, height, columns, 2 * features))
        for i in range(self.doublings):
            x = block(self.width * 2 ** (self.doublings - 1 - i), double=True, **common, name=f'up{i}')(x)
        images = [to_image(x, 0)]
        for i in range(1, self.stages):
            if self.attention:
                context = WordAttention(self.dtype, name=f'attention{i}')(x, words, mask)
                x = jnp.concatenate([x, context], -1)
            else:
                # Named so in saved weights.
                projected = Dense(x.shape[-1], bias=False, init=INIT, dtype=self.dtype, name=f'told{i}')(c)
                x = concat_condition(x, projected)
            for j in range(self.blocks):
                x = residual(**common, name=f'stage{i}_residual{j}')(x)
            x = block(self.width, double=True, **common, name=f'stage{i}_up')(x)
            images.append(to_image(x, i))
        return tuple(images), mean, log_variance


class Discriminator(nn.Module):
    """Images [n, H, W, C] and sentences, a list of [n, d] -> values float32 [n] of the images alone, and a list of [n]
    of each with them.

    Its norms take the statistics of the batch: data and samples go through on their own.

    Attributes:
      width: channels of the first map; doubled with every halving.
      halvings: of the image.
      first: halvings of the smallest stage's, whose last channels all stages are narrowed to.
      norm: batch normalisation after all convolutions but the first.
    """

    width: int = 64
    halvings: int = 4
    first: int = 4
    norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, sentences: list[Array]) -> tuple[Array, list[Array]]:
        def normed(name):
            return BatchNorm(train=True, dtype=self.dtype, name=name) if self.norm else lambda x: x

        def activate(x, name):
            return nn.leaky_relu(normed(name)(x), 0.2)

        rest = dict(bias=not self.norm, init=INIT, dtype=self.dtype)
        for i in range(self.halvings):
            x = Conv(self.width * 2**i, 4, stride=2, padding=((1, 1), (1, 1)), **rest, name=f'down{i}')(x)
            x = activate(x, f'down{i}_norm') if i else nn.leaky_relu(x, 0.2)
        for i in range(self.halvings - 2, self.first - 2, -1):
            x = activate(Conv(self.width * 2**i, **rest, name=f'narrow{i}')(x), f'narrow{i}_norm')
        n, features = len(x), x.shape[-1]
        values = ProjectionHead(kernel_init=INIT, name='value')(x.reshape(n, -1))
        joint = Conv(features, **rest, name='joint')
        norm = normed('joint_norm')
        head = ProjectionHead(kernel_init=INIT, name='told_value')  # named so in saved weights
        conditional = [head(nn.leaky_relu(norm(joint(concat_condition(x, s))), 0.2).reshape(n, -1)) for s in sentences]
        return values, conditional


class ImageEncoder(nn.Module):
    """Images [n, H, W, C] -> features of regions [n, r, features] and of the whole [n, features], float32.

    The published one is Inception; this is a plain network that halves the image, without statistics of the batch.
    Regions are the positions of its last map but one.

    Attributes:
      width: channels of the first map, doubled with every halving, up to 8 times as many.
      halvings: of the image.
    """

    width: int = 32
    halvings: int = 3
    features: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        for i in range(self.halvings + 1):
            regions = x
            features = self.width * 2 ** min(i, 3)
            padding = ((1, 1), (1, 1))
            x = Conv(features, stride=1 + (i > 0), padding=padding, dtype=self.dtype, name=f'conv{i}')(x)
            x = nn.silu(GroupNorm(dtype=self.dtype, name=f'norm{i}')(x))
        regions = rearrange(regions, 'n h w c -> n (h w) c').astype(jnp.float32)
        whole = x.reshape(len(x), -1).astype(jnp.float32)
        return Dense(self.features, name='regions')(regions), Dense(self.features, name='whole')(whole)
