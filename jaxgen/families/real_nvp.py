"""Real NVP: a normalising flow of affine couplings (Dinh et al. 2016, arXiv 1605.08803).

An invertible network f turns an image into noise of the same size, so that its density is exact:

    log p(y) = log N(f(y); 0, I) + log |det df/dy|.

A coupling leaves a part of the numbers alone, and shifts and scales the others by what a residual network makes of that
part: (x + t) e^s, s = r tanh(.) with a learned r per channel. At each scale (section 3.6) three couplings take turns by
the colours of a checkerboard; 2x2 squares become channels; three take turns by halves of the channels; and half of the
numbers, one colour of the checkerboard, go away as noise. The last scale has four of checkerboards.

Pixels: of y in (0, 1) the flow sees logit((1 - a)/2 + a y), a = 0.9 (section 4.1), whose derivative is in log p(y). A
little of the density lies outside of the image's range: bits are too high by it, never too low. Training minimises
-log p(y) of images with uniform noise between their 256 levels, in bits per dimension: a bound on what the levels cost.

Batch norm stands in the networks and, with its determinant, after each coupling (section 3.7). In training it takes the
statistics of the batch, and then no example has a density of its own; what is measured and sampled has statistics held
fixed, running means of those of the averaged weights, and is exact. Networks start at 0, the whole as a normalisation.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.contract import Aux, Context, Family, advance, example_keys, gradient_step, new_state, normal, running
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import gaussian
from jaxgen.networks.couplings import (
    FlowBatchNorm,
    WeightNormConv,
    affine,
    bits_per_dim,
    checkerboard,
    squeeze,
    squeeze_diagonals,
    to_image,
    to_unit,
    total,
    unsqueeze,
    unsqueeze_diagonals,
)
from jaxgen.networks.layers import BatchNorm

Array = jax.Array

STATISTICS_DECAY = 0.99


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
    """[n, H, W, C] -> shift and what log-scales are made of, float32 [n, H, W, C] each, 0 at the start."""

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
    """Affine coupling and, with `norm`, batch norm of what it changed; made to be scanned.

    Maps (x [n, H, W, C], log-determinant [n]) to the same. Couplings take turns by `first`, 0 or 1: the number at the
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
            changed, seen, part = 1 - kept, x * kept, x
        else:
            changed, (part, seen) = None, swapped(*jnp.split(x, 2, -1), first)
        log_scale, shift = ResNet(self.width, self.blocks, board, self.dtype, name='net')(seen, self.train)
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
        return (part if board else jnp.concatenate(swapped(part, seen, first), -1), log_det), None


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
    """Shapes [h, w, c] of the noise of each scale, the finest first."""
    h, w, c = image
    return [(h >> i + 1, w >> i + 1, c << i + 1) for i in range(scales - 1)] + [
        (h >> scales - 1, w >> scales - 1, c << scales - 1)
    ]


def to_logit(y: Array, constraint: float) -> tuple[Array, Array]:
    """logit((1 - a)/2 + a y) with a = constraint, and its log-determinant [n]. y: [n, ...] in [0, 1]."""
    p = (1 - constraint) / 2 + constraint * y
    x = jnp.log(p) - jnp.log1p(-p)
    # The derivative of the logit is 1 / (p (1 - p)), by x itself: log p = -softplus(-x).
    return x, total(jax.nn.softplus(x) + jax.nn.softplus(-x) + math.log(constraint))


def from_logit(x: Array, constraint: float) -> Array:
    return (jax.nn.sigmoid(x) - (1 - constraint) / 2) / constraint


def build(
    context: Context,
    *,
    width: int = 64,
    blocks: int = 8,
    scales: int = 2,
    norm: bool = True,
    constraint: float = 0.9,
    scale_penalty: float = 5e-5,
    temperature: float = 1.0,
    draws: int = 1,
) -> Family:
    """Real NVP. The defaults are those for CIFAR-10.

    Args:
      width, blocks: channels of the residual networks at the first scale, doubled by every squeeze, and their blocks.
      scales: how often the image's numbers are cut in two, and one more.
      norm: batch norm after the couplings.
      constraint: a, the share of (0, 1) that grey levels take before the logit, so that it stays finite.
      scale_penalty: of the sum of squares of weight normalisation's scales, added to the nats of an image, as the
        authors do: here to the bits per dimension, it is divided by H W C log 2.
      temperature: what the noise of samples is multiplied by. Below 1 samples are fewer kinds of better pictures.
      draws: noises between levels that evaluate takes the mean over, for each image.

    evaluate gives 'bits_per_dim'. encode puts every pixel into the middle of its level and gives what the model takes
    for standard normal noise, float32 [n, H W C]; decode is its inverse.

    Raises:
      UserError: a value out of range.
    """
    if min(width, blocks, scales, draws) < 1:
        raise UserError('config.model: width, blocks, scales and draws must be 1 or more')
    if not 0 < constraint < 1:
        raise UserError(f'config.model.constraint {constraint} must be between 0 and 1')
    if min(temperature, scale_penalty) < 0:
        raise UserError('config.model: temperature and scale_penalty must be 0 or more')
    divisor = 2 ** (scales - 1)
    if context.image[0] % divisor or context.image[1] % divisor:
        raise UserError(
            f'config.data.size = {context.image[0]} must be a multiple of {divisor} for config.model.scales = {scales}'
        )
    if math.prod(context.image[:2]) < 2 * divisor**2:
        raise UserError(
            f'config.data.size = {context.image[0]}: half of the pixels stand still, so the smallest map of '
            f'config.model.scales = {scales} must have 2 or more'
        )

    size = math.prod(context.image)
    net = Flow(context.image, scales, width, blocks, norm, context.dtype, context.remat)

    def log_density(latents: Array, *log_dets: Array) -> Array:
        return gaussian(0.0, 0.0, latents) + sum(log_dets)

    def exact(state, x: Array, noise: Array | float) -> tuple[Array, Array]:
        """Latents [n, D] and log p(y), nats [n], of images in [-1, 1]."""
        logits, log_slope = to_logit(to_unit(x, noise), constraint)
        latents, log_det = net.apply({'params': state.ema['flow'], **state.extra}, logits)
        return latents, log_density(latents, log_det, log_slope)

    def trained(weights, x: Array) -> tuple[tuple[Array, Array], dict]:
        """As in training, of logits x: latents and log-determinant, and the statistics of the batch."""
        return net.apply({'params': weights}, x, train=True, mutable=['batch_stats'])

    def noisy_logits(rng, x: Array) -> tuple[Array, Array]:
        return to_logit(to_unit(x, jax.random.uniform(rng, x.shape)), constraint)

    def loss(params, state, frozen, batch, rng):
        logits, log_slope = noisy_logits(rng, batch['image'])
        (latents, log_det), _ = trained(params['flow'], logits)
        bits = bits_per_dim(log_density(latents, log_det, log_slope), size).mean()
        scales = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params['flow']) if is_scale(path)]
        nats = scale_penalty * sum(jnp.square(scale).sum() for scale in scales)
        penalty = nats / (size * math.log(2))
        return bits + penalty, Aux({'loss': bits + penalty, 'bits_per_dim': bits})

    step = gradient_step(loss, context.optim, 'flow')

    def init(rng, batch, frozen):
        weights_rng, noise_rng = jax.random.split(rng)
        logits, _ = noisy_logits(noise_rng, batch['image'])
        params = net.init(weights_rng, logits[:1])['params']
        _, statistics = trained(params, logits)
        return new_state({'flow': params}, context.optim, extra=statistics)

    def update(state, frozen, batch, rng):
        step_rng, noise_rng = jax.random.split(rng)
        state, aux = step(state, frozen, batch, step_rng)
        state = advance(state, context.optim)
        # Statistics are those of the averaged weights, which are what is measured; those of init, of the first batch,
        # count too.
        _, new = trained(state.ema['flow'], noisy_logits(noise_rng, batch['image'])[0])
        return state.replace(extra=running(state, state.extra, new, STATISTICS_DECAY)), aux.logs

    def evaluate(state, frozen, batch, rng):
        def draw(keys):
            noise = jax.vmap(lambda key: jax.random.uniform(key, context.image))(keys)
            return bits_per_dim(exact(state, batch['image'], noise)[1], size)

        keys = jax.vmap(jax.random.split, (0, None), 1)(example_keys(rng, batch), draws)  # [draws, n]
        return {'bits_per_dim': jax.lax.map(draw, keys).mean(0)}

    def encode(state, frozen, batch, rng):
        """Latents, float32 [n, H W C]."""
        return exact(state, batch['image'], 0.5)[0]

    def decode(state, frozen, latents, rng):
        logits, _ = net.apply({'params': state.ema['flow'], **state.extra}, latents, inverse=True)
        return to_image(from_logit(logits, constraint))

    def sample(state, frozen, batch, rng):
        return decode(state, frozen, temperature * normal(example_keys(rng, batch), (size,)), rng)

    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        divisor=divisor,
        free=('temperature', 'draws'),
        latent=(size,),
        statistics=True,
    )


def is_scale(path: tuple) -> bool:
    """Whether a leaf of the weights is a scale of weight normalisation: batch norm's are called so too."""
    names = [key.key for key in path]
    return names[-1] == 'scale' and not names[-2].startswith('norm')
