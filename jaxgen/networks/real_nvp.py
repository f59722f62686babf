"""The network of Real NVP (Dinh et al. 2016, arXiv 1605.08803, section 3): affine couplings over several scales."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.couplings import (
    FlowBatchNorm,
    WeightNormConv,
    affine,
    checkerboard,
    squeeze,
    squeeze_diagonals,
    unsqueeze,
    unsqueeze_diagonals,
)
from jaxgen.networks.layers import BatchNorm

Array = jax.Array


class Block(nn.Module):
    """Residual block, made to be scanned: (h, sum of skips), both [n, H, W, width], to the same."""

    width: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], _) -> tuple[tuple[Array, Array], None]:
        x, skips = carry
        h = nn.relu(BatchNorm(train=self.train, dtype=self.dtype, name='norm1')(x))
        h = WeightNormConv(self.width, bias=False, dtype=self.dtype, name='conv1')(h)
        h = nn.relu(BatchNorm(train=self.train, dtype=self.dtype, name='norm2')(h))
        x = x + WeightNormConv(self.width, dtype=self.dtype, name='conv2')(h)
        return (x, skips + WeightNormConv(self.width, 1, dtype=self.dtype, name='skip')(x)), None


class ResNet(nn.Module):
    """[n, H, W, C] -> log-scale (before its tanh) and shift, float32 [n, H, W, C] each, 0 at the start."""

    width: int
    blocks: int
    double: bool  # the input after its norm: half of it is 0 where a checkerboard hides it
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        c = x.shape[-1]
        x = BatchNorm(train=train, dtype=self.dtype, name='norm_in')(x) * (2 if self.double else 1)
        x = nn.relu(jnp.concatenate([x, -x], -1))
        x = WeightNormConv(self.width, dtype=self.dtype, name='conv_in')(x)
        skips = WeightNormConv(self.width, 1, dtype=self.dtype, name='skip_in')(x)
        scanned = nn.scan(
            Block, variable_axes={'params': 0, 'batch_stats': 0}, split_rngs={'params': True}, length=self.blocks
        )
        (_, skips), _ = scanned(self.width, train, self.dtype, name='blocks')((x, skips), None)
        x = nn.relu(BatchNorm(train=train, dtype=self.dtype, name='norm_out')(skips))
        x = WeightNormConv(2 * c, 1, scale=0.0, dtype=self.dtype, name='conv_out')(x).astype(jnp.float32)
        return x[..., :c], x[..., c:]


class Coupling(nn.Module):
    """Affine coupling and, with `norm`, batch norm of the part that it changed; made to be scanned.

    Maps (x [n, H, W, C], log-determinant [n]) to the same. Couplings alternate by `first`, 0 or 1: the number at the
    top left of a checkerboard, where 1 is left alone; or the half of the channels that is changed.

    Attributes:
      mask: 'checkerboard' or 'channels'.
    """

    mask: str
    width: int
    blocks: int
    norm: bool
    train: bool
    inverse: bool
    dtype: Any

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
        x, log_det = carry
        board = self.mask == 'checkerboard'
        if board:
            kept = checkerboard(*x.shape[1:3], first)
            changed, condition, part = 1 - kept, x * kept, x
        else:
            changed, (part, condition) = None, swapped(*jnp.split(x, 2, -1), first)
        log_scale, shift = ResNet(self.width, self.blocks, board, self.dtype, name='net')(condition, self.train)
        rescale = self.param('rescale', nn.initializers.ones, (part.shape[-1],))
        log_scale = rescale * jnp.tanh(log_scale)
        if board:
            log_scale, shift = log_scale * changed, shift * changed

        def couple(x):
            return affine(x, shift, log_scale, self.inverse)

        def normalise(x):
            return FlowBatchNorm(name='norm')(x, changed, self.train, self.inverse)

        layers = [couple, normalise] if self.norm else [couple]
        for layer in reversed(layers) if self.inverse else layers:
            part, more = layer(part)
            log_det += more
        return (part if board else jnp.concatenate(swapped(part, condition, first), -1), log_det), None


def swapped(a: Array, b: Array, swap: Array) -> tuple[Array, Array]:
    """(a, b), or (b, a) where swap is 1."""
    return jnp.where(swap, b, a), jnp.where(swap, a, b)


class Flow(nn.Module):
    """x [n, H, W, C] to latents [n, H W C], those of the finest scale first, and the log-determinant [n].

    With `inverse` latents to x, and minus the log-determinant. The couplings of one kind are one scan, so that their
    number costs no compile.
    """

    image: tuple[int, int, int]
    scales: int
    width: int
    blocks: int
    norm: bool
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False, inverse: bool = False) -> tuple[Array, Array]:
        body = nn.remat(Coupling, prevent_cse=False) if self.remat else Coupling

        def couplings(mask: str, i: int, count: int, width: int, *carry: Array) -> tuple[Array, Array]:
            scanned = nn.scan(
                body,
                variable_axes={'params': 0, 'batch_stats': 0},
                split_rngs={'params': True},
                length=count,
                reverse=inverse,
            )
            module = scanned(mask, width, self.blocks, self.norm, train, inverse, self.dtype, name=f'{mask}{i}')
            return module(carry, jnp.arange(count) % 2)[0]

        def boards(i: int, *carry: Array) -> tuple[Array, Array]:
            return couplings('checkerboard', i, 4 if i == last else 3, self.width << i, *carry)

        def channels(i: int, *carry: Array) -> tuple[Array, Array]:
            return couplings('channels', i, 3, self.width << i + 1, *carry)

        last, log_det = self.scales - 1, jnp.zeros(len(x))
        if inverse:
            shapes = latent_shapes(self.image, self.scales)
            parts = jnp.split(x, np.cumsum([math.prod(shape) for shape in shapes])[:-1], -1)
            latents = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
            x, log_det = boards(last, latents[-1], log_det)
            for i in reversed(range(last)):
                x = squeeze(unsqueeze_diagonals(jnp.concatenate([x, latents[i]], -1)))
                x, log_det = channels(i, x, log_det)
                x, log_det = boards(i, unsqueeze(x), log_det)
            return x, log_det
        latents = []
        for i in range(last):
            x, log_det = boards(i, x, log_det)
            x, log_det = channels(i, squeeze(x), log_det)
            x, z = jnp.split(squeeze_diagonals(unsqueeze(x)), 2, -1)
            latents.append(z)
        x, log_det = boards(last, x, log_det)
        return jnp.concatenate([z.reshape(len(z), -1) for z in (*latents, x)], -1), log_det


def latent_shapes(image: tuple[int, int, int], scales: int) -> list[tuple[int, int, int]]:
    """Shapes [h, w, c] of the latents of each scale, the finest first."""
    h, w, c = image
    return [(h >> i + 1, w >> i + 1, c << i + 1) for i in range(scales - 1)] + [
        (h >> scales - 1, w >> scales - 1, c << scales - 1)
    ]
