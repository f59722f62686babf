"""The network and the noise schedule of variational diffusion models (Kingma et al. 2021, arXiv 2107.00630)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxgen.networks.attention import SelfAttention
from jaxgen.networks.conditions import OneHot
from jaxgen.networks.embeddings import sinusoidal
from jaxgen.networks.fields import Channels, GroupSize
from jaxgen.networks.layers import Conv, Dense, GroupNorm
from jaxgen.options import Count, Positive, Rate

Array = jax.Array

ZEROS = nn.initializers.zeros
LECUN = nn.initializers.lecun_normal()


def fourier_features(z: Array, exponents: tuple[int, ...]) -> Array:
    """Sines, then cosines, of 2^k 2 pi z for each k: float32 [n, H, W, C] to [n, H, W, 2 C K].

    Within the sines, and within the cosines, channels come first: all k of the first, then of the next.
    The angles are float32 whatever the dtype of computation: half precision has no digits left at hundreds.
    """
    frequencies = 2 * math.pi * 2.0 ** jnp.asarray(exponents, jnp.float32)
    angles = rearrange(z[..., None] * frequencies, '... c k -> ... (c k)')
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class ResBlock(nn.Module):
    """Pre-activation residual block conditioned on an embedding: [n, H, W, C], [n, E] to [n, H, W, features].

    What the condition adds and the second convolution start at zero.
    """

    features: int
    dropout: float
    train: bool
    dtype: Any
    normalisation: Callable = GroupNorm

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        conv = functools.partial(Conv, self.features, dtype=self.dtype)
        h = nn.silu(self.normalisation(dtype=self.dtype, name='norm1')(x))
        h = conv(init=LECUN, name='conv1')(h)
        shift = Dense(self.features, bias=False, init=ZEROS, dtype=self.dtype, name='condition')(condition)
        h = nn.silu(self.normalisation(dtype=self.dtype, name='norm2')(h + shift[:, None, None, :]))
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        h = conv(init=ZEROS, name='conv2')(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, init=LECUN, dtype=self.dtype, name='shortcut')(x)
        return x + h


class Layer(nn.Module):
    """One step of the scan over a half of the network: a block, with or without attention.

    On the way down `skip` is None. The second result is the output again: the way down keeps it for the way up.
    """

    features: int
    attention: bool
    dropout: float
    train: bool
    dtype: Any
    normalisation: Callable = GroupNorm

    @nn.compact
    def __call__(self, h: Array, skip: Array | None, condition: Array) -> tuple[Array, Array | None]:
        x = h if skip is None else jnp.concatenate([h, skip], -1)
        own = (self.features, self.dropout, self.train, self.dtype, self.normalisation)
        h = ResBlock(*own, name='block')(x, condition)
        if self.attention:
            h = SelfAttention(self.dtype, normalisation=self.normalisation, init=LECUN, name='attention')(h)
        return h, h if skip is None else None


class VDMNet(nn.Module):
    """z_t, its time and conditions to what is added to z_t to make the estimate of eps; a map of z_t's size, float32.

    A U-Net that stays at one resolution (appendix B): `blocks` residual blocks, two in the middle with attention
    between them, blocks + 1 that each take an output of the first half too. Published, as channels and blocks:
    CIFAR-10 128, 32; ImageNet 32x32 256, 32; 64x64 256, 64.

    The weights of a half lie in one stack, [blocks, ...], which a scan goes through: the depth costs no
    compile time.

    Attributes:
      channels: an even number, at least 4.
      blocks: of the first half.
      fourier: k of the features 2^k 2 pi z that z_t is joined by; (): none. Of 256 grey levels 6 has a period of two,
        7 of one: they show where z_t lies between two grey levels, which steps next to the data are about.
      attention: after every block. The middle always has it.
      dropout: rate of dropout of the second convolution's inputs, in training.
      groups, group_size, eps: of the group norms, see GroupNorm (`least` is group_size there). Published with 32 groups
        at every width, group_size 0.
      remat: recompute each block's activations in the backward pass.
    """

    channels: Channels = 128
    blocks: Count = 32
    fourier: tuple[int, ...] = (6, 7)
    attention: bool = False
    dropout: Rate = 0.1
    groups: Count = 32
    group_size: GroupSize = 4
    eps: Positive = 1e-6
    remat: bool = False
    dtype: Any = jnp.float32

    takes: ClassVar = ('vector',)

    @property
    def vector_features(self) -> int:
        return self.channels  # any number: a vector is concatenated to the embedding of time

    @nn.nowrap
    def class_embedding(self, classes: int) -> nn.Module:
        """A module of int32 [n] in [0, classes) to one-hot vectors [n, classes]."""
        return OneHot(classes)

    @nn.compact
    def __call__(self, z: Array, t: Array, vector: Array | None = None, *, train: bool) -> Array:
        """Args:
        z: float32 [n, H, W, C].
        t: [n], the level of noise, from 0 to about 1000.
        vector: of the conditions, [n, features], concatenated to the embedding of time; None: there is no condition.
        train: with dropout; needs the rng 'dropout'.
        """
        channels, image_channels = self.channels, z.shape[-1]
        dense = functools.partial(Dense, 4 * channels, init=LECUN, dtype=self.dtype)
        norm = functools.partial(GroupNorm, self.groups, self.eps, least=self.group_size)
        rest = (self.dropout, train, self.dtype, norm)
        # The published network has one input more, for a condition that is always 0 there.
        vector = jnp.zeros((len(z), 1)) if vector is None else vector
        condition = jnp.concatenate([sinusoidal(t, channels), vector], -1)
        condition = nn.silu(dense(name='time1')(condition))
        condition = nn.silu(dense(name='time2')(condition))  # [n, 4 channels]

        def half(name: str, length: int) -> Callable:
            layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
            stack = nn.scan(
                layer,
                variable_axes={'params': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(0, nn.broadcast),
                length=length,
            )
            return stack(channels, self.attention, *rest, name=name)

        res_block = nn.remat(ResBlock) if self.remat else ResBlock
        attention = nn.remat(SelfAttention) if self.remat else SelfAttention

        h = jnp.concatenate([z, fourier_features(z, self.fourier)], -1) if self.fourier else z
        first = Conv(channels, init=LECUN, dtype=self.dtype, name='first')(h)
        h, outputs = half('down', self.blocks)(first, None, condition)  # outputs: [blocks, n, H, W, channels]
        h = res_block(channels, *rest, name='middle_0')(h, condition)
        h = attention(self.dtype, normalisation=norm, init=LECUN, name='middle_attention')(h)
        h = res_block(channels, *rest, name='middle_1')(h, condition)
        skips = jnp.concatenate([outputs[::-1], first[None]])  # the latest comes first
        h, _ = half('up', self.blocks + 1)(h, skips, condition)

        h = nn.silu(norm(dtype=self.dtype, name='norm')(h))
        h = Conv(image_channels, init=ZEROS, dtype=self.dtype, name='last')(h)
        return h.astype(jnp.float32)


class Schedule(nn.Module):
    """gamma(t) = log(sigma_t^2 / alpha_t^2) = -log SNR(t) of t in [0, 1], increasing (section 3.2, appendix H).

        gamma(t) = gamma_0 + (gamma_1 - gamma_0) u(t),  u(0) = 0, u(1) = 1

    Methods: `ends`, gamma_0 and gamma_1, and `normalised`, u(t), which has no weights unless kind is 'network'.

    Attributes:
      kind: 'fixed': the ends are constants and u(t) = t; 'scalar': the ends are learned; 'network': u is too, y(t)
        moved to go from 0 to 1 with y(t) = l_1(t) + l_3(sigmoid(l_2(l_1(t)))), where l_1 and l_3 have one output, l_2
        has `features`, and weights are taken by their absolute values. Only l_2 has biases: one of l_1 could do nothing
        that they cannot, and one of l_3 falls out.
      gamma_min, gamma_max: gamma_0 and gamma_1 at the start.
    """

    kind: str
    gamma_min: float
    gamma_max: float
    features: int = 1024

    def setup(self):
        constant, normal = nn.initializers.constant, nn.initializers.normal
        if self.kind != 'fixed':
            self.start = self.param('start', constant(self.gamma_min), ())
            self.span = self.param('span', constant(self.gamma_max - self.gamma_min), ())
        if self.kind == 'network':
            # With weights of about 0 around it, l_1 begins as all there is: a straight line.
            self.l1 = self.param('l1', constant(1.0), ())
            self.l2 = self.param('l2', normal(1.0), (self.features,))
            self.l2_bias = self.param('l2_bias', normal(1.0), (self.features,))
            self.l3 = self.param('l3', normal(0.01), (self.features,))

    def __call__(self) -> tuple[Array, Array]:
        return self.ends()

    def ends(self) -> tuple[Array, Array]:
        """gamma_0 and gamma_1."""
        if self.kind == 'fixed':
            return jnp.float32(self.gamma_min), jnp.float32(self.gamma_max)
        return self.start, self.start + jnp.abs(self.span)

    def normalised(self, t: Array) -> Array:
        """u(t), float32 [n] in [0, 1], of t [n] in [0, 1]."""
        if self.kind != 'network':
            return t

        def y(t):
            h = jnp.abs(self.l1) * (2 * t - 1)  # [-1, 1]: the sigmoids' slopes lie on both sides of 0
            bumps = nn.sigmoid(h[:, None] * jnp.abs(self.l2) + self.l2_bias)
            return h + (bumps * jnp.abs(self.l3)).mean(-1)

        bottom, top = y(jnp.array([0.0, 1.0]))
        return (y(t) - bottom) / (top - bottom)
