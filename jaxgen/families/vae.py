"""VAE: variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114).

p(x, z) = p(x | z) N(z; 0, I), and an encoder q(z | x) = N(mean(x), diag exp(log_var(x))). Training
maximises the evidence lower bound (eq. 10)

    ELBO = E_q log p(x | z) - KL(q(z | x) || N(0, I)) <= log p(x)

with z = mean + exp(log_var / 2) eps, or, with `samples` = k > 1, the tighter importance weighted
bound (Burda et al. 2015, eq. 8)

    L_k = E log 1/k sum_i p(x, z_i) / q(z_i | x),  ELBO = L_1 <= L_k <= log p(x).

`beta` other than 1 weights the KL term (beta-VAE, Higgins et al. 2017): no bound any more, but a
more factored code. What is measured is the bound (beta = 1) always.

Pixels, and what the units mean:
- 'bernoulli' with `binarise`: every image is drawn as bits with P(1) = (x + 1) / 2, anew in every
  update and once in evaluation. Bounds are on the log-likelihood of the bits, in nats per image.
- 'bernoulli' without: grey levels (x + 1) / 2 in [0, 1] go into the cross-entropy as they are. A
  common loss, in nats per image, but not a likelihood: compare it with nothing else.
- 'gaussian': density of x in [-1, 1], in nats per image. It depends on the pixels' scale and has no
  upper bound.
- 'discretised_gaussian': probability of the 256 levels; bits per dimension are given too.
One log standard deviation is shared by all pixels (Rybkin et al. 2020), learned or fixed at `scale`.

Samples and reconstructions are the decoder's mean images, not draws from p(x | z): no pixel noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.contract import Context, Family, advance, example_keys, gradient_step, new_state, normal
from jaxgen.errors import UserError
from jaxgen.losses import likelihoods
from jaxgen.losses.divergences import normal_kl
from jaxgen.networks.layers import Conv, Dense, upsample_nearest

Array = jax.Array


class Down(nn.Module):
    """[n, H, W, C] -> [n, H/2, W/2, features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(Conv(self.features, stride=2, dtype=self.dtype)(x))
        return nn.relu(Conv(self.features, dtype=self.dtype)(x))


class Up(nn.Module):
    """[n, H, W, C] -> [n, 2H, 2W, features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(Conv(self.features, dtype=self.dtype)(x))
        return nn.relu(Conv(self.features, dtype=self.dtype)(upsample_nearest(x)))


class ConvEncoder(nn.Module):
    """[n, H, W, C] -> mean and log_var [n, latent], float32."""

    latent: int
    width: int
    levels: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        block = nn.remat(Down) if self.remat else Down
        x = nn.relu(Conv(self.width, dtype=self.dtype)(x))
        for i in range(self.levels):
            x = block(self.width * 2 ** (i + 1), self.dtype, name=f'down{i}')(x)
        x = x.reshape(len(x), -1)
        x = Dense(2 * self.latent, dtype=self.dtype)(x).astype(jnp.float32)
        return tuple(jnp.split(x, 2, -1))


class ConvDecoder(nn.Module):
    """[n, latent] -> one number per pixel and channel, float32 [n, H, W, C]."""

    image: tuple[int, int, int]
    width: int
    levels: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        block = nn.remat(Up) if self.remat else Up
        height, width, channels = self.image
        shape = (height >> self.levels, width >> self.levels, self.width << self.levels)
        x = nn.relu(Dense(math.prod(shape), dtype=self.dtype)(z))
        x = x.reshape(-1, *shape)
        for i in reversed(range(self.levels)):
            x = block(self.width * 2**i, self.dtype, name=f'up{i}')(x)
        return Conv(channels, dtype=self.dtype)(x).astype(jnp.float32)


class MlpEncoder(nn.Module):
    """[n, H, W, C] -> mean and log_var [n, latent], float32."""

    latent: int
    hidden: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = x.reshape(len(x), -1)
        for features in self.hidden:
            x = nn.relu(Dense(features, dtype=self.dtype)(x))
        x = Dense(2 * self.latent, dtype=self.dtype)(x).astype(jnp.float32)
        return tuple(jnp.split(x, 2, -1))


class MlpDecoder(nn.Module):
    """[n, latent] -> one number per pixel and channel, float32 [n, H, W, C]."""

    image: tuple[int, int, int]
    hidden: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, z: Array) -> Array:
        for features in reversed(self.hidden):
            z = nn.relu(Dense(features, dtype=self.dtype)(z))
        x = Dense(math.prod(self.image), dtype=self.dtype)(z).astype(jnp.float32)
        return x.reshape(-1, *self.image)


class Pixels(nn.Module):
    """A decoder and the log standard deviation that all pixels share: z -> ([n, H, W, C], scalar)."""

    decoder: nn.Module
    log_scale: float
    learn_scale: bool

    @nn.compact
    def __call__(self, z: Array) -> tuple[Array, Array]:
        log_scale = jnp.float32(self.log_scale)
        if self.learn_scale:
            log_scale = self.param('log_scale', nn.initializers.constant(self.log_scale), ())
        return self.decoder(z), log_scale


def reparameterise(mean: Array, log_var: Array, noise: Array) -> Array:
    """z ~ N(mean, exp(log_var)) as a differentiable function of both; noise ~ N(0, I), all [n, latent]."""
    return mean + jnp.exp(0.5 * log_var) * noise


def weigh(log_likelihood: Callable, mean: Array, log_var: Array, noise: Array) -> tuple[Array, Array]:
    """One importance sample z ~ q(z | x) per example.

    Args:
      log_likelihood: z [n, latent] -> log p(x | z) [n].
      mean, log_var: of q, [n, latent].
      noise: standard normal, [n, latent].

    Returns:
      log p(x, z) - log q(z | x), and log p(x | z); both [n], nats.
    """
    z = reparameterise(mean, log_var, noise)
    log_x = log_likelihood(z)
    log_prior = likelihoods.gaussian(0.0, 0.0, z)
    log_posterior = likelihoods.gaussian(mean, 0.5 * log_var, z)
    return log_x + log_prior - log_posterior, log_x


def importance_bound(log_weights: Array) -> Array:
    """[k, n] -> [n]: log of the mean weight (Burda et al. 2015, eq. 8)."""
    return jax.nn.logsumexp(log_weights, 0) - math.log(len(log_weights))


def build(
    context: Context,
    *,
    network: str = 'conv',
    latent: int = 16,
    width: int = 32,
    levels: int = 2,
    hidden: tuple[int, ...] = (400,),
    likelihood: str = 'bernoulli',
    binarise: bool = False,
    scale: float = 0.1,
    learn_scale: bool = True,
    beta: float = 1.0,
    samples: int = 1,
    iwae_samples: int = 64,
) -> Family:
    """VAE.

    Args:
      network: 'conv' | 'mlp', for both encoder and decoder.
      latent: dimensions of z.
      width, levels: of 'conv': channels at full size, doubled each of `levels` times that the
        image is halved.
      hidden: of 'mlp': layer widths of the encoder; the decoder has them in reverse.
      likelihood: 'bernoulli' | 'gaussian' | 'discretised_gaussian', see the module's docstring.
      binarise: bits for pixels, with 'bernoulli' only.
      scale, learn_scale: standard deviation of the gaussian ones, at the start or for good.
      beta: weight of the KL term in training.
      samples: k of the bound that is trained, 1: the ELBO.
      iwae_samples: k of 'nll_iwae' in evaluate.

    evaluate gives per image, in nats (see above for what of): 'nll_elbo' and 'nll_iwae', upper
    bounds on -log p(x), the second with iwae_samples; 'kl'; 'reconstruction' = E_q -log p(x | z);
    'squared_error', of the image decoded from q's mean, mean over pixels in [-1, 1];
    'bits_per_dim' for 'discretised_gaussian', from 'nll_iwae'.

    Raises:
      UserError: a value that cannot work.
    """
    log_probs = {
        'bernoulli': lambda pixels, log_scale, x: likelihoods.bernoulli(pixels, x),
        'gaussian': likelihoods.gaussian,
        'discretised_gaussian': likelihoods.discretised_gaussian,
    }
    height, columns, _ = context.image
    divisor = 2**levels if network == 'conv' else 1
    if network not in ('conv', 'mlp'):
        raise UserError(f"config.model.network must be 'conv' or 'mlp'; it is {network!r}")
    if likelihood not in log_probs:
        raise UserError(f'config.model.likelihood must be one of {tuple(log_probs)}; it is {likelihood!r}')
    if binarise and likelihood != 'bernoulli':
        raise UserError("config.model.binarise needs config.model.likelihood = 'bernoulli'")
    if latent < 1 or levels < 0 or width < 1 or scale <= 0 or samples < 1 or iwae_samples < 1:
        raise UserError(
            'config.model: latent, width, scale, samples, iwae_samples must be more than 0, levels 0 or more'
        )
    if samples > 1 and beta != 1:
        raise UserError('config.model.samples > 1 trains a bound without a KL term: set config.model.beta to 1')
    if height % divisor or columns % divisor:
        raise UserError(
            f'config.data.size = {height} must be a multiple of {divisor} for config.model.levels = {levels}'
        )

    if network == 'conv':
        encoder = ConvEncoder(latent, width, levels, context.dtype, context.remat)
        decoder = ConvDecoder(context.image, width, levels, context.dtype, context.remat)
    else:
        encoder = MlpEncoder(latent, hidden, context.dtype)
        decoder = MlpDecoder(context.image, hidden, context.dtype)
    pixels = Pixels(decoder, math.log(scale), learn_scale and likelihood != 'bernoulli')

    def target(x: Array, keys: Array) -> Array:
        """Images in [-1, 1] as the likelihood takes them: [0, 1], bits by keys [n], or as they are."""
        if likelihood != 'bernoulli':
            return x
        x = (x + 1) / 2
        return jax.vmap(jax.random.bernoulli)(keys, x).astype(jnp.float32) if binarise else x

    def q(params, x: Array) -> tuple[Array, Array]:
        # The encoder sees what the decoder is to explain, in [-1, 1] again.
        return encoder.apply({'params': params['encoder']}, 2 * x - 1 if likelihood == 'bernoulli' else x)

    def log_likelihood(params, x: Array) -> Callable:
        return lambda z: log_probs[likelihood](*pixels.apply({'params': params['decoder']}, z), x)

    def mean_image(params, z: Array) -> Array:
        out, _ = pixels.apply({'params': params['decoder']}, z)
        return 2 * jax.nn.sigmoid(out) - 1 if likelihood == 'bernoulli' else jnp.clip(out, -1, 1)

    def loss(params, frozen, batch, rng):
        pixel_rng, z_rng = jax.random.split(rng)
        x = target(batch['image'], jax.random.split(pixel_rng, len(batch['image'])))
        mean, log_var = q(params, x)
        log_p = log_likelihood(params, x)
        kl = normal_kl(mean, log_var)
        if samples == 1:
            log_x = log_p(reparameterise(mean, log_var, jax.random.normal(z_rng, mean.shape)))
            value = (beta * kl - log_x).mean()
        else:
            noise = jax.random.normal(z_rng, (samples, *mean.shape))
            log_w, log_x = jax.vmap(lambda noise: weigh(log_p, mean, log_var, noise))(noise)  # [k, n]
            value = -importance_bound(log_w).mean()
        return value, {'loss': value, 'kl': kl.mean(), 'reconstruction': -log_x.mean()}

    step = gradient_step(loss, context.optim, 'encoder', 'decoder')

    def init(rng, batch, frozen):
        encoder_rng, decoder_rng = jax.random.split(rng)
        params = {
            'encoder': encoder.init(encoder_rng, batch['image'])['params'],
            'decoder': pixels.init(decoder_rng, jnp.zeros((1, latent)))['params'],
        }
        return new_state(params, context.optim)

    def update(state, frozen, batch, rng):
        state, logs = step(state, frozen, batch, rng)
        return advance(state, context.optim), logs

    def sample(state, frozen, batch, rng):
        return mean_image(state.ema, normal(example_keys(rng, batch), (latent,)))

    def evaluate(state, frozen, batch, rng):
        pixel_rng, z_rng = jax.random.split(rng)
        x = target(batch['image'], example_keys(pixel_rng, batch))
        mean, log_var = q(state.ema, x)
        log_p = log_likelihood(state.ema, x)
        # One sample after another: [k, n] numbers are kept, never k batches of images.
        keys = jax.vmap(jax.random.split, (0, None), 1)(example_keys(z_rng, batch), iwae_samples)  # [k, n]
        log_w, log_x = jax.lax.map(lambda keys: weigh(log_p, mean, log_var, normal(keys, (latent,))), keys)
        kl, reconstruction = normal_kl(mean, log_var), -log_x.mean(0)
        shown = 2 * x - 1 if likelihood == 'bernoulli' else x
        results = {
            'nll_elbo': reconstruction + kl,
            'nll_iwae': -importance_bound(log_w),
            'kl': kl,
            'reconstruction': reconstruction,
            'squared_error': jnp.square(mean_image(state.ema, mean) - shown).mean((1, 2, 3)),
        }
        if likelihood == 'discretised_gaussian':
            results['bits_per_dim'] = results['nll_iwae'] / (math.prod(context.image) * math.log(2))
        return results

    def encode(state, frozen, batch, rng):
        """Mean of q(z | x), [n, latent]."""
        return q(state.ema, target(batch['image'], jax.random.split(rng, len(batch['image']))))[0]

    def decode(state, frozen, latents, rng):
        return mean_image(state.ema, latents)

    return Family(
        init, update, sample, evaluate, encode, decode, divisor=divisor, free=('iwae_samples',), latent=(latent,)
    )
