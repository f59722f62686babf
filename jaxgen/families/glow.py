"""Glow: a normalising flow with invertible 1x1 convolutions (Kingma & Dhariwal 2018, arXiv 1807.03039).

An invertible network f turns an image into noise of the same size, so that its density is exact:

    log p(y) = log p(f(y)) + log |det df/dy|.

Each of `levels` levels turns 2x2 squares of pixels into channels, makes `depth` steps, and but for the last one gives
half of the channels away as noise z, whose mean and deviation a convolution reads off the other half. A step is

    actnorm       (x + b) e^logs per channel, with mean 0 and deviation 1 on the first batch (section 3.1)
    1x1           a learned matrix of the channels (section 3.2)
    coupling      the second half of the channels is shifted, and scaled by sigmoid(h + 2), by what a network makes of
                  the first half (section 3.3; the scale is that of the authors' code)

The mean and deviation of the last z are learned as well, and depend on the class where `conditional` says so.

Training minimises -log p(y) of images with uniform noise between their 256 levels, in bits per dimension: a bound on
what their levels cost. Bits are those of 256 levels always.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.contract import Aux, Context, Family, check_labels, example_keys, make_update, new_state, normal
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import gaussian
from jaxgen.networks.couplings import (
    ActNorm,
    EdgeConv,
    InvertibleConv,
    ZeroConv,
    affine,
    bits_per_dim,
    squeeze,
    to_image,
    to_unit,
    unsqueeze,
)
from jaxgen.networks.layers import Dense

Array = jax.Array

COUPLINGS, MIXING = ('affine', 'additive'), ('matrix', 'lu')


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
      label: int32 [n], or None for what all classes have in common.
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
            # A convolution of zeros, as in the authors' code: of its kernel only the part that sees the edge learns.
            out = ZeroConv(2 * c, self.edge, name='conv')(out)
        if label is not None and self.classes:
            zeros = nn.initializers.zeros
            by_class = Dense(2 * c, init=zeros, name='label')(jax.nn.one_hot(label, self.classes))
            out = out + (by_class * jnp.exp(3 * self.param('logs', zeros, (2 * c,))))[:, None, None]
        return tuple(jnp.split(out, 2, -1))


class Flow(nn.Module):
    """y [n, H, W, C] around 0 to latents [n, H W C], standard normal by the model, and log p(y) [n], nats.

    With `inverse` it takes latents, and gives images and None. Latents are those of the finest level first.
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
        """Mean and log deviation of the z that level i gives away, from the half x that it keeps."""
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


def build(
    context: Context,
    *,
    width: int = 512,
    depth: int = 32,
    levels: int = 3,
    coupling: str = 'affine',
    mixing: str = 'matrix',
    edge: bool = True,
    learn_top: bool = True,
    conditional: bool = False,
    temperature: float = 1.0,
    draws: int = 1,
) -> Family:
    """Glow. The defaults are those for CIFAR-10.

    Args:
      width: channels inside the couplings' networks.
      depth, levels: steps of a level, and levels (K and L of the paper).
      coupling: 'affine', or 'additive', which has no scale.
      mixing: of the channels: 'matrix', or 'lu', a matrix kept as the product of its factors.
      edge: tell 3x3 convolutions where the image ends.
      learn_top: learn the last z's mean and deviation.
      conditional: they depend on the class, `batch['label']`, too.
      temperature: what the noise of samples is multiplied by. Below 1 samples are fewer kinds of better pictures.
      draws: noises between levels that evaluate takes the mean over, for each image.

    evaluate gives 'bits_per_dim'. encode puts every pixel into the middle of its level and gives what the model takes
    for standard normal noise, float32 [n, H W C], without the class's part; decode is its inverse. With `conditional`,
    classify gives log p(y | class), by Bayes' rule the logits of even classes, up to what they have in common.

    Raises:
      UserError: a value out of range, no labels.
    """
    if coupling not in COUPLINGS:
        raise UserError(f'config.model.coupling must be one of {COUPLINGS}; it is {coupling!r}')
    if mixing not in MIXING:
        raise UserError(f'config.model.mixing must be one of {MIXING}; it is {mixing!r}')
    if min(width, depth, levels, draws) < 1:
        raise UserError('config.model: width, depth, levels and draws must be 1 or more')
    if temperature < 0:
        raise UserError(f'config.model.temperature {temperature} must be 0 or more')
    check_labels(context, conditional)
    if context.image[0] % 2**levels or context.image[1] % 2**levels:
        raise UserError(
            f'config.data.size = {context.image[0]} must be a multiple of {2**levels} '
            f'for config.model.levels = {levels}'
        )

    size, last = math.prod(context.image), latent_shapes(context.image, levels)[-1]
    top = Top(last, context.classes if conditional else 0, learn_top, edge)
    net = Flow(context.image, width, depth, levels, coupling, mixing, edge, top, context.dtype, context.remat)

    def variables(params, fixed) -> dict:
        return {'params': params['flow'], **(fixed or {})}

    def density(params, fixed, x: Array, noise: Array | float, label: Array | None = None) -> tuple[Array, Array]:
        """Latents [n, D] and log p(y), nats [n], of images in [-1, 1]."""
        return net.apply(variables(params, fixed), to_unit(x, noise) - 0.5, label)

    def labels(batch) -> Array | None:
        return batch['label'] if conditional else None

    # Where others have earlier stages' weights, this loss has the matrices that stay as they are.
    def loss(params, state, frozen, batch, rng):
        x = batch['image']
        _, log_p = density(params, state.extra, x, jax.random.uniform(rng, x.shape), labels(batch))
        bits = bits_per_dim(log_p, size).mean()
        return bits, Aux({'loss': bits})

    update = make_update(loss, context.optim, 'flow')

    def init(rng, batch, frozen):
        weights_rng, noise_rng = jax.random.split(rng)
        y = to_unit(batch['image'], jax.random.uniform(noise_rng, batch['image'].shape)) - 0.5
        fixed = net.init(weights_rng, y, labels(batch))
        return new_state({'flow': fixed.pop('params')}, context.optim, extra=fixed or None)

    def evaluate(state, frozen, batch, rng):
        def draw(keys):
            noise = jax.vmap(lambda key: jax.random.uniform(key, context.image))(keys)
            _, log_p = density(state.ema, state.extra, batch['image'], noise, labels(batch))
            return bits_per_dim(log_p, size)

        keys = jax.vmap(jax.random.split, (0, None), 1)(example_keys(rng, batch), draws)  # [draws, n]
        return {'bits_per_dim': jax.lax.map(draw, keys).mean(0)}

    def pictures(state, latents, label=None) -> Array:
        y, _ = net.apply(variables(state.ema, state.extra), latents, label, inverse=True)
        # The scales of couplings have no lower bound: an unlikely draw can grow past all float32 numbers on its way
        # back. The inverse itself is that of the density, exactly; only here, where values beyond an image's are cut,
        # what is no number any more becomes grey.
        return to_image(jnp.nan_to_num(y, posinf=1.0, neginf=-1.0) + 0.5)

    def sample(state, frozen, batch, rng):
        return pictures(state, temperature * normal(example_keys(rng, batch), (size,)), labels(batch))

    def encode(state, frozen, batch, rng):
        """Latents, float32 [n, H W C]."""
        return density(state.ema, state.extra, batch['image'], 0.5)[0]

    def decode(state, frozen, latents, rng):
        return pictures(state, latents)

    def classify(state, frozen, batch, rng):
        """Logits, float32 [n, classes]: the last z is all that depends on the class."""
        weights = {'params': state.ema['flow']['top']}
        z = encode(state, frozen, batch, rng)[:, -math.prod(last) :].reshape(-1, *last)
        mean, log_std = top.apply(weights)
        z = mean + jnp.exp(log_std) * z
        means, log_stds = top.apply(weights, jnp.arange(context.classes))
        return jax.vmap(lambda mean, log_std: gaussian(mean, log_std, z), out_axes=1)(means, log_stds)

    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        classify=classify if conditional else None,
        conditions=('label',) if conditional else (),
        divisor=2**levels,
        free=('temperature', 'draws'),
        latent=(size,),
    )
