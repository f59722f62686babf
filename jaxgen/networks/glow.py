"""The network of Glow (Kingma & Dhariwal 2018, arXiv 1807.03039): resolution levels of steps, priors of their latents.

A step is actnorm, an invertible 1x1 convolution and a coupling; see jaxgen/families/glow.py.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.losses.likelihoods import gaussian
from jaxgen.networks.couplings import ActNorm, EdgeConv, InvertibleConv, ZeroConv, affine, squeeze, unsqueeze
from jaxgen.networks.layers import Dense

Array = jax.Array


class Step(nn.Module):
    """One step of flow, made to be scanned: (x [n, H, W, C], log-determinant [n]) to the same."""

    width: int
    coupling: str
    mixing: str
    edge: bool
    inverse: bool
    dtype: Any

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], _) -> tuple[tuple[Array, Array], None]:
        x, log_det = carry
        layers = [ActNorm(name='actnorm'), InvertibleConv(self.mixing == 'lu', name='mix'), self.couple]
        for layer in reversed(layers) if self.inverse else layers:
            x, more = layer(x, self.inverse)
            log_det += more
        return (x, log_det), None

    def couple(self, x: Array, inverse: bool) -> tuple[Array, Array]:
        first, second = jnp.split(x, 2, -1)
        h, init = first.astype(self.dtype), nn.initializers.normal(0.05)
        for name, kernel in (('1', 3), ('2', 1)):
            h = EdgeConv(self.width, kernel, edge=self.edge, init=init, dtype=self.dtype, name=f'conv{name}')(h)
            h = nn.relu(ActNorm(name=f'norm{name}')(h)[0]).astype(self.dtype)
        features = second.shape[-1] * (2 if self.coupling == 'affine' else 1)
        h = ZeroConv(features, self.edge, self.dtype, name='out')(h)
        if self.coupling == 'affine':
            shift, log_scale = h[..., 0::2], jax.nn.log_sigmoid(h[..., 1::2] + 2)
        else:
            shift, log_scale = h, jnp.zeros_like(h)
        second, log_det = affine(second, shift, log_scale, inverse)
        return jnp.concatenate([first, second], -1), log_det


class Top(nn.Module):
    """Mean and log standard deviation of the last z, [n, h, w, C] each; n is 1 without labels.

    Args:
      label: int32 [n], or None for the part that all classes have in common.
    """

    shape: tuple[int, int, int]
    classes: int
    learn: bool
    edge: bool

    @nn.compact
    def __call__(self, label: Array | None = None) -> tuple[Array, Array]:
        h, w, c = self.shape
        out = jnp.zeros((1, h, w, 2 * c))
        if self.learn:
            # A convolution of zeros, as in the authors' code: of its kernel only the weights of the border learn.
            out = ZeroConv(2 * c, self.edge, name='conv')(out)
        if label is not None and self.classes:
            zeros = nn.initializers.zeros
            by_class = Dense(2 * c, init=zeros, name='label')(jax.nn.one_hot(label, self.classes))
            out = out + (by_class * jnp.exp(3 * self.param('logs', zeros, (2 * c,))))[:, None, None]
        return tuple(jnp.split(out, 2, -1))


class Flow(nn.Module):
    """y [n, H, W, C] around 0 to latents [n, H W C], standard normal by the model, and log p(y) [n], nats.

    With `inverse` it takes latents and returns images and None. Latents are those of the finest level first.
    """

    image: tuple[int, int, int]
    width: int
    depth: int
    levels: int
    coupling: str
    mixing: str
    edge: bool
    top: Top
    dtype: Any
    remat: bool

    def steps(self, i: int, inverse: bool) -> nn.Module:
        body = nn.remat(Step, prevent_cse=False) if self.remat else Step
        scanned = nn.scan(
            body,
            variable_axes={'params': 0, 'fixed': 0},
            split_rngs={'params': True},
            length=self.depth,
            reverse=inverse,
        )
        return scanned(self.width, self.coupling, self.mixing, self.edge, inverse, self.dtype, name=f'steps{i}')

    def prior(self, i: int, x: Array) -> tuple[Array, Array]:
        """Mean and log standard deviation of the z that level i factors out, conditioned on the other half x."""
        h = ZeroConv(2 * x.shape[-1], self.edge, self.dtype, name=f'prior{i}')(x)
        return h[..., 0::2], h[..., 1::2]

    @nn.compact
    def __call__(self, x: Array, label: Array | None = None, inverse: bool = False) -> tuple[Array, Array | None]:
        last, shapes, log_p, latents = self.levels - 1, latent_shapes(self.image, self.levels), jnp.zeros(len(x)), []
        if inverse:
            ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
            latents = jnp.split(x, ends, -1)
        for i in reversed(range(self.levels)) if inverse else range(self.levels):
            if inverse:
                mean, log_std = self.top(label) if i == last else self.prior(i, x)
                z = mean + jnp.exp(log_std) * latents[i].reshape(-1, *shapes[i])
                x = z if i == last else jnp.concatenate([x, z], -1)
                (x, _), _ = self.steps(i, True)((x, log_p), None)
                x = unsqueeze(x)
            else:
                (x, log_p), _ = self.steps(i, False)((squeeze(x), log_p), None)
                x, z = (x, x) if i == last else jnp.split(x, 2, -1)
                mean, log_std = self.top(label) if i == last else self.prior(i, x)
                log_p += gaussian(mean, log_std, z)
                latents.append(((z - mean) * jnp.exp(-log_std)).reshape(len(x), -1))
        return (x, None) if inverse else (jnp.concatenate(latents, -1), log_p)


def latent_shapes(image: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
    """Shapes [h, w, c] of the z of each level, the finest first."""
    h, w, c = image
    shapes = [(h >> i + 1, w >> i + 1, c << i + 1) for i in range(levels)]
    return [*shapes[:-1], (*shapes[-1][:2], 2 * shapes[-1][2])]
