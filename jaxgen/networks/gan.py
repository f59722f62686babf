"""Generators and discriminators of GANs: perceptrons, DCGAN, residual networks, BigGAN.

A generator maps z [n, latent] and, where there are classes, c [n, classes] (one-hot) to images float32 [n, H, W, C] in
(-1, 1). A discriminator maps images, and c, to values float32 [n]. Both take `train`: batch normalisation is then by
this batch, see layers.BatchNorm.

Conditioning on the class ('concat': Mirza & Osindero 2014, arXiv 1411.1784; 'projection': Miyato & Koyama 2018,
arXiv 1802.05637):

    concat       generator: c beside z; discriminator: c beside the image, a map for each class
    projection   discriminator: psi(h) + <embedding of c, h> with its last features h (the latter's eq. 2);
                 generator: c sets gains and shifts of residual networks' batch normalisation, and is beside z in others

`NETWORKS` has the pairs by name. Gains of batch normalisation start at 1; DCGAN's torch port draws them from
N(1, 0.02^2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxgen.checks import check_size
from jaxgen.errors import UserError
from jaxgen.imports import OwnToo
from jaxgen.networks.attention import attend
from jaxgen.networks.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    downsample_mean,
    max_pool,
    upsample_nearest,
    variance_scaling,
)
from jaxgen.options import Count, OneOf, Rule

Array = jax.Array


def concat_condition(x: Array, c: Array | None) -> Array:
    """x [n, ..., C] with c [n, d] as more channels, [n, ..., C + d]; x alone where c is None."""
    if c is None:
        return x
    chex.assert_shape(c, (len(x), None))  # of one example it would be broadcast to all
    c = c.reshape(len(c), *[1] * (x.ndim - 2), -1)
    return jnp.concatenate([x, jnp.broadcast_to(c, (*x.shape[:-1], c.shape[-1])).astype(x.dtype)], -1)


class ProjectionHead(nn.Module):
    """Features [n, d] to values [n], in float32; with a class c [n, classes] by projection."""

    bias: bool = True
    kernel_init: Callable | None = None

    @nn.compact
    def __call__(self, h: Array, c: Array | None = None) -> Array:
        h = h.astype(jnp.float32)
        value = Dense(1, bias=self.bias, init=self.kernel_init, name='value')(h)[:, 0]
        if c is not None:
            chex.assert_shape(c, (len(h), None))
            value = value + (Dense(h.shape[-1], bias=False, init=self.kernel_init, name='embedding')(c) * h).sum(-1)
        return value


# --- perceptrons (Goodfellow et al. 2014)


class PerceptronGenerator(nn.Module):
    """z, and c beside it, through ReLU layers of the sizes `hidden`."""

    image: tuple[int, int, int]
    hidden: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, c: Array | None = None, train: bool = False) -> Array:
        x = concat_condition(z, c)
        for features in self.hidden:
            x = nn.relu(Dense(features, init=variance_scaling(2.0), dtype=self.dtype)(x))
        x = Dense(math.prod(self.image), dtype=self.dtype)(x).astype(jnp.float32)
        return jnp.tanh(x).reshape(-1, *self.image)


class PerceptronDiscriminator(nn.Module):
    """Leaky ReLU layers of the sizes `hidden`; the paper has maxout and dropout."""

    hidden: tuple[int, ...]
    projection: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, c: Array | None = None, train: bool = False) -> Array:
        x = x.reshape(len(x), -1)
        x = x if self.projection else concat_condition(x, c)
        for features in self.hidden:
            x = nn.leaky_relu(Dense(features, init=variance_scaling(2.0), dtype=self.dtype)(x), 0.2)
        return ProjectionHead(name='verdict')(x, c if self.projection else None)


# --- DCGAN (Radford et al. 2015, arXiv 1511.06434), with the 4x4 kernels of the torch port that is widely used


class DcganGenerator(nn.Module):
    """A linear layer to the smallest map, then transposed convolutions, each to twice the size.

    Attributes:
      width, multipliers: channels of the maps are width * multipliers, from the smallest map to the one before the
        image: the image is 2 ** len(multipliers) times as large as the first.
    """

    image: tuple[int, int, int]
    width: int = 64
    multipliers: tuple[int, ...] = (8, 4, 2, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, c: Array | None = None, train: bool = False) -> Array:
        common = dict(bias=False, init=nn.initializers.normal(0.02), dtype=self.dtype)
        levels = len(self.multipliers)
        height, columns, channels = self.image[0] >> levels, self.image[1] >> levels, self.image[2]
        features = [self.width * m for m in self.multipliers] + [channels]
        x = Dense(height * columns * features[0], **common, name='first')(concat_condition(z, c))
        x = x.reshape(-1, height, columns, features[0])
        for i in range(levels):
            x = nn.relu(BatchNorm(train=train, dtype=self.dtype, name=f'norm{i}')(x))
            x = ConvTranspose(features[i + 1], **common, name=f'up{i}')(x)
        return jnp.tanh(x.astype(jnp.float32))


class DcganDiscriminator(nn.Module):
    """The generator's mirror image: convolutions of stride 2, leaky ReLUs of slope 0.2, a linear layer.

    Attributes:
      multipliers: as the generator has them, from the smallest map on.
      norm: batch normalisation after all convolutions but the first.
    """

    width: int = 64
    multipliers: tuple[int, ...] = (8, 4, 2, 1)
    norm: bool = True
    projection: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, c: Array | None = None, train: bool = False) -> Array:
        init = nn.initializers.normal(0.02)
        x = x if self.projection else concat_condition(x, c)
        for i, m in enumerate(reversed(self.multipliers)):
            common = dict(stride=2, padding=((1, 1), (1, 1)), bias=not self.norm, init=init, dtype=self.dtype)
            x = Conv(self.width * m, 4, **common, name=f'conv{i}')(x)
            if self.norm and i:
                x = BatchNorm(train=train, dtype=self.dtype, name=f'norm{i}')(x)
            x = nn.leaky_relu(x, 0.2)
        x = x.reshape(len(x), -1)
        return ProjectionHead(bias=not self.norm, kernel_init=init, name='verdict')(x, c if self.projection else None)


# --- residual networks (Gulrajani et al. 2017, appendix F; Miyato et al. 2018; BigGAN, Brock et al. 2018)


class Block(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions, [n, H, W, C] -> [n, H', W', features].

    Attributes:
      resample: 'up' doubles H and W, 'down' halves them, '' keeps them.
      norm: with batch normalisation, on the statistics of the batch if `train`. Given c [n, d], its gains 1 + A c and
        shifts B c are those of the example (de Vries et al. 2017).
      first: no normalisation and activation before the first convolution, as the input is an image.
      kernel_init: of all kernels; None: He's for convolutions, no effect of c at the start.
    """

    features: int
    resample: str = ''
    norm: bool = False
    first: bool = False
    train: bool = False
    kernel_init: Callable | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, c: Array | None = None) -> Array:
        def by_class(features, name):
            if self.kernel_init:
                return Dense(features, bias=False, init=self.kernel_init, dtype=self.dtype, name=name)(c)[:, None, None]
            # An embedding and no kernel: spectral normalisation finds no direction in zeros.
            table = self.param(name, nn.initializers.zeros, (c.shape[-1], features))
            return (c @ table).astype(self.dtype)[:, None, None]

        def activate(h, name):
            if not self.norm:
                return nn.relu(h)
            h = BatchNorm(train=self.train, affine=c is None, dtype=self.dtype, name=name)(h)
            if c is not None:
                h = h * (1 + by_class(h.shape[-1], f'{name}_gain')) + by_class(h.shape[-1], f'{name}_shift')
            return nn.relu(h)

        he = self.kernel_init or variance_scaling(2.0)

        h = x if self.first else activate(x, 'norm1')
        h = upsample_nearest(h) if self.resample == 'up' else h
        h = Conv(self.features, init=he, dtype=self.dtype, name='conv1')(h)
        h = activate(h, 'norm2')
        h = Conv(self.features, init=he, dtype=self.dtype, name='conv2')(h)
        h = downsample_mean(h) if self.resample == 'down' else h

        # A 1x1 convolution and resampling may change places: it runs where there are fewer pixels.
        # (The authors' code pools last except in the critic's first block; the result is the same.)
        x = downsample_mean(x) if self.resample == 'down' else x
        if self.resample or x.shape[-1] != self.features:
            x = Dense(self.features, init=self.kernel_init, dtype=self.dtype, name='shortcut')(x)
        x = upsample_nearest(x) if self.resample == 'up' else x
        return x + h


class Attention(nn.Module):
    """Residual attention of every pixel to all 2x2 squares, [n, H, W, C] (SAGAN, Zhang et al. 2018, arXiv 1805.08318).

    Queries and keys have C / 8 channels, values C / 2; keys and values are the largest of each square. Logits are not
    scaled. `gain` starts at 0: a new block passes its input on unchanged.
    """

    kernel_init: Callable | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]

        def project(name, part, pool):
            h = Dense(max(features // part, 1), bias=False, init=self.kernel_init, dtype=self.dtype, name=name)(x)
            return rearrange(max_pool(h) if pool else h, 'n h w c -> n (h w) c')

        query, key, value = project('query', 8, False), project('key', 8, True), project('value', 2, True)
        # Gradient penalties take second derivatives.
        h = attend(query[:, :, None], key[:, :, None], value[:, :, None], scale=1, kernels=False)
        h = rearrange(h, 'n (h w) 1 c -> n h w c', h=x.shape[1])
        h = Dense(features, bias=False, init=self.kernel_init, dtype=self.dtype, name='out')(h)
        gain = self.param('gain', nn.initializers.zeros, ())
        return x + gain.astype(self.dtype) * h


class ResidualGenerator(nn.Module):
    """Blocks that double the size, from a linear layer's map.

    Attributes:
      width, multipliers: channels are width * multipliers, first those of the first map, then those after each block.
      attention: heights of maps that get Attention.
      projection: c sets gains and shifts of the blocks' norms; else it is beside z.
      embedding: with projection: dimensions of one embedding of the class for all norms (BigGAN); 0: each norm has its
        own gains and shifts of every class.
      skip: z is cut into equal pieces, one for the first map and one for each block, which is conditioned on its piece
        beside the class (BigGAN, appendix B).
      kernel_init: of all kernels, see Block.
    """

    image: tuple[int, int, int]
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 1, 1)
    attention: tuple[int, ...] = ()
    projection: bool = False
    embedding: int = 0
    skip: bool = False
    kernel_init: Callable | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, z: Array, c: Array | None = None, train: bool = False) -> Array:
        block = nn.remat(Block) if self.remat else Block
        levels = len(self.multipliers) - 1
        height, columns, channels = self.image[0] >> levels, self.image[1] >> levels, self.image[2]
        if c is not None and not self.projection:
            z, c = concat_condition(z, c), None
        if c is not None and self.embedding:
            table = self.param('embedding', nn.initializers.orthogonal(), (c.shape[-1], self.embedding))
            c = c @ table
        pieces = jnp.split(z, levels + 1, -1) if self.skip else [z]
        conditions = [c] * levels
        if self.skip:
            conditions = [piece if c is None else concat_condition(piece, c) for piece in pieces[1:]]

        x = Dense(
            height * columns * self.width * self.multipliers[0], init=self.kernel_init, dtype=self.dtype, name='first'
        )(pieces[0])
        x = x.reshape(-1, height, columns, self.width * self.multipliers[0])
        for i, m in enumerate(self.multipliers[1:]):
            common = dict(norm=True, train=train, kernel_init=self.kernel_init, dtype=self.dtype)
            x = block(self.width * m, 'up', **common, name=f'block{i}')(x, conditions[i])
            if x.shape[1] in self.attention:
                x = Attention(kernel_init=self.kernel_init, dtype=self.dtype, name=f'attention{i}')(x)
        x = nn.relu(BatchNorm(train=train, dtype=self.dtype, name='norm')(x))
        return jnp.tanh(Conv(channels, init=self.kernel_init, dtype=self.dtype, name='last')(x).astype(jnp.float32))


class ResidualDiscriminator(nn.Module):
    """Blocks, the first `halvings` of which halve the size; no batch normalisation: a value is of one image alone.

    Attributes:
      multipliers: as the generator has them; its last is the first here.
      pooling: 'mean' | 'sum', of the last map over its positions.
      attention, kernel_init: as the generator's.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 1, 1)
    halvings: int = 2
    attention: tuple[int, ...] = ()
    pooling: str = 'mean'
    projection: bool = False
    kernel_init: Callable | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, c: Array | None = None, train: bool = False) -> Array:
        block = nn.remat(Block) if self.remat else Block
        x = x if self.projection else concat_condition(x, c)
        for i, m in enumerate(reversed(self.multipliers)):
            common = dict(first=i == 0, kernel_init=self.kernel_init, dtype=self.dtype)
            x = block(self.width * m, 'down' if i < self.halvings else '', **common, name=f'block{i}')(x)
            if x.shape[1] in self.attention:
                x = Attention(kernel_init=self.kernel_init, dtype=self.dtype, name=f'attention{i}')(x)
        x = nn.relu(x).astype(jnp.float32)
        x = x.mean((1, 2)) if self.pooling == 'mean' else x.sum((1, 2))  # [n, width]
        return ProjectionHead(kernel_init=self.kernel_init, name='verdict')(x, c if self.projection else None)


# --- pairs


class Pair(NamedTuple):
    """A generator, its discriminator, and what the image's height and width must be multiples of."""

    generator: nn.Module
    discriminator: nn.Module
    divisor: int = 1


def mlp(
    image: tuple[int, int, int],
    projection: bool,
    dtype: Any,
    remat: bool,
    *,
    hidden: Annotated[tuple[int, ...], '[1, inf)'] = (256, 256),
) -> Pair:
    """Two perceptrons.

    Args:
      hidden: units of the generator's layers; the discriminator has them in reverse order.
    """
    generator = PerceptronGenerator(image, hidden, dtype=dtype)
    return Pair(generator, PerceptronDiscriminator(hidden[::-1], projection, dtype=dtype))


def dcgan(
    image: tuple[int, int, int],
    projection: bool,
    dtype: Any,
    remat: bool,
    *,
    width: Count = 64,
    discriminator_width: Annotated[int, '[0, inf)'] = 0,
    multipliers: Annotated[tuple[int, ...], '[1, inf)', Rule(len, 'one number or more')] = (8, 4, 2, 1),
    discriminator_norm: bool = True,
) -> Pair:
    """DCGAN's convolutions.

    Args:
      width, multipliers: channels of the generator's maps, from the smallest, are width * multipliers; the
        discriminator has them in reverse order. The first map is smaller than the image by 2 ** len(multipliers).
      discriminator_width: in place of width in the discriminator; 0: the same.
      discriminator_norm: batch normalisation in the discriminator.
    """
    divisor = 2 ** len(multipliers)
    check_size(image, divisor, f'config.model.network.multipliers = {multipliers}')
    generator = DcganGenerator(image, width, multipliers, dtype=dtype)
    width = discriminator_width or width
    discriminator = DcganDiscriminator(width, multipliers, discriminator_norm, projection, dtype=dtype)
    return Pair(generator, discriminator, divisor)


def residual(
    image: tuple[int, int, int],
    projection: bool,
    dtype: Any,
    remat: bool,
    *,
    big: bool = False,
    width: Count = 64,
    discriminator_width: Annotated[int, '[0, inf)'] = 0,
    multipliers: Annotated[tuple[int, ...], '[1, inf)', Rule(lambda m: len(m) > 1, 'two numbers or more')] = (
        8,
        4,
        2,
        1,
    ),
    halvings: Annotated[int, '[0, inf)'] = 0,
    attention: tuple[int, ...] = (),
    pooling: Annotated[str, OneOf('mean', 'sum')] = 'mean',
    embedding: Annotated[int, '[0, inf)'] = 0,
) -> Pair:
    """The residual networks of WGAN-GP and SN-GAN; `big`: BigGAN's, these with z in pieces to every block, a shared
    embedding of the class and orthogonal initialisation.

    Args:
      width, multipliers: channels of the generator's maps, from the smallest, are width * multipliers; the
        discriminator has them in reverse order. The first map is smaller than the image by
        2 ** (len(multipliers) - 1).
      discriminator_width: in place of width in the discriminator; 0: the same.
      halvings: times that the discriminator halves the image; 0: one fewer than the generator doubles it.
      attention: heights of maps that have self-attention.
      pooling: 'mean' | 'sum', of the discriminator's last map.
      embedding: dimensions of the shared embedding of the class; 0: the class itself goes to every norm.

    Raises:
      UserError: sizes that do not fit each other.
    """
    doublings = len(multipliers) - 1
    halvings = halvings or max(doublings - 1, 1)
    if halvings > len(multipliers):
        raise UserError(
            f'config.model.network.multipliers = {multipliers} are too few for halvings = {halvings}: there must be '
            'as many or more'
        )
    divisor = 2 ** max(doublings, halvings)
    check_size(image, divisor, f'config.model.network.multipliers = {multipliers} and halvings = {halvings}')
    heights = [image[0] >> i for i in range(doublings)]
    if any(height not in heights or height % 2 for height in attention):
        raise UserError(f'config.model.network.attention: heights must be even ones of {heights}; they are {attention}')
    common = dict(
        multipliers=multipliers,
        attention=attention,
        projection=projection,
        kernel_init=nn.initializers.orthogonal() if big else None,
        dtype=dtype,
        remat=remat,
    )
    generator = ResidualGenerator(image, width, embedding=embedding, skip=big, **common)
    width = discriminator_width or width
    return Pair(generator, ResidualDiscriminator(width, halvings=halvings, pooling=pooling, **common), divisor)


# {name: (image, projection, dtype, remat, *, its own fields) -> Pair}
NETWORKS = OwnToo(
    {
        'mlp': mlp,
        'dcgan': dcgan,
        'resnet': functools.partial(residual, big=False, embedding=0),
        'biggan': functools.partial(residual, big=True),
    }
)
