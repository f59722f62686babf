"""VQGAN and the KL autoencoder: first stages, whose latents other models are trained on.

Esser et al. 2021, Taming Transformers for High-Resolution Image Synthesis (arXiv 2012.09841): `regulariser` = 'vq', a
map of codes out of one codebook. Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models
(arXiv 2112.10752), section 3.1 and appendix G: 'kl', a map of real numbers with a very small weight of the KL
divergence to N(0, I); and VQ-f4, which is 'vq' with a large codebook of few dimensions. Tian et al. 2024, Visual
Autoregressive Modeling (arXiv 2404.02905), section 3.2: 'vq' with `scales`, codes on grids of several sizes whose
vectors add up to the map (networks/multiscale.py). One network, one loss:

    nll + regulariser + adversarial * weight * L_G,  weight = |d nll / d w| / (|d L_G / d w| + 1e-4)

with L_G the generator's adversarial loss against a discriminator, and w the kernel of the decoder's last layer (VQGAN's
eq. 7). The differences of pixels and of a network's features make one value of each image, the reconstruction error
d = mean |x - y| + perceptual * distance(x, y), see `jaxgen/losses/perceptual.py`; or of squares (`pixels` = 'l2', as
later VQGANs have it). The negative log-likelihood and the regulariser are:

- 'vq': nll = d, and the regulariser is codebook_weight * (codebook loss + beta * commitment). The released code of
  VQGAN has the two the other way round: beta = 0.25 weights the codebook loss, the commitment counts in full. That is
  codebook_weight = 0.25 and beta = 4 here.
- 'kl': nll = D (d / s + log s), with D values in an image and s = 1: sums over the image, as the KL term is a sum over
  its latents, and kl_weight = 1e-6 is meant beside sums. s can be learned (`learn_scale`); in the released code it is a
  parameter that no optimiser has.

From update `discriminator_start` on a PatchGAN learns to tell x from y, by a hinge loss, and the decoder to make images
that it takes for real. Both have their own optimiser (`config.optim.networks.discriminator`), and neither step touches
the other's weights. Half the sum of both parts is the discriminator's loss in the released code: the same to Adam.

`sample` is no model of images. Codes are drawn independently by their frequency in training, latents from normals of
their channels' mean and variance. Images come from a prior: a transformer over the codes, a diffusion of the latents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_discriminator, check_size
from jaxgen.contract import (
    Aux,
    Context,
    Family,
    Latents,
    Posterior,
    State,
    advance,
    gradient_step,
    new_state,
    running_mean,
)
from jaxgen.errors import UserError
from jaxgen.losses import perceptual as perception
from jaxgen.losses.adversarial import ADVERSARIAL_LOSSES, adaptive_weight
from jaxgen.losses.divergences import normal_kl
from jaxgen.networks import patchgan, quantise
from jaxgen.networks.first_stage import Decoder, Encoder, last_layer
from jaxgen.networks.layers import STATISTICS_DECAY, apply_in_training, check_groups
from jaxgen.networks.multiscale import MultiScale, grids_of
from jaxgen.options import Count, NonNegative, OneOf, Positive, Rule
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array

LATENTS_DECAY = 0.99  # of the running statistics of latents and codes, slower than those of batches
LOG_VAR_BOUNDS = (-30.0, 20.0)  # of the encoder's log variances, as in the published code

FORMER = {'game': 'adversarial_loss'}


class Networks(NamedTuple):
    """The networks, and the sizes of the latents between them."""

    encoder: Encoder
    decoder: Decoder
    last: nn.Module  # the decoder's last layer by itself, see `last_layer_gradient`
    quantiser: MultiScale  # of 'vq'
    discriminator: patchgan.PatchGAN
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of each grid of codes, coarse first; the last: of the latents
    latent: int  # channels of the latents
    vocabulary: int  # codes of the codebook; 0: 'kl'
    scales: bool  # several grids of codes, whose vectors are convolved ('phi') before they add up

    @property
    def count_shape(self) -> tuple[int, ...]:
        """Of `State.extra['count']`."""
        return (len(self.grids), self.vocabulary) if self.scales else (self.vocabulary,)


class Terms(NamedTuple):
    """The terms of both losses and their weights; those that are not explained here are arguments of `build`."""

    regularise: Callable  # (params, x, rng) -> Regularised
    nll_size: int  # values of an image, for nll as a sum over them; 0: d itself
    learn_scale: bool
    pixels: str
    distance: Callable | None  # (frozen, x, y) -> [n], the perceptual distance
    perceptual: float
    adversarial: float
    discriminator_loss: Callable  # (values of data, values of reconstructions) -> scalar
    generator_loss: Callable  # (values of reconstructions) -> scalar
    discriminator_start: int


# --- latents: a posterior, or codes


class Regularised(NamedTuple):
    """Latents in training."""

    z: Array  # the decoder's input, [n, h, w, latent]
    loss: Array  # the regulariser's, scalar
    logs: dict[str, Array]
    kept: dict  # statistics of the batch, for State.extra


def posterior(networks: Networks, params, x: Array) -> tuple[Array, Array]:
    """Mean and log variance of q(z | x), [n, h, w, latent] both."""
    mean, log_var = jnp.split(networks.encoder.apply({'params': params['encoder']}, x), 2, -1)
    return mean, jnp.clip(log_var, *LOG_VAR_BOUNDS)


def draw_posterior(mean: Array, log_var: Array, rng: Array) -> Array:
    return mean + jnp.exp(0.5 * log_var) * jax.random.normal(rng, mean.shape)


def regularise_by_kl(networks: Networks, params, x: Array, rng: Array, *, kl_weight: float) -> Regularised:
    """z ~ q(z | x) with the KL divergence of q to N(0, I), nats per image (Rombach et al. 2022, section 3.1)."""
    mean, log_var = posterior(networks, params, x)
    z = draw_posterior(mean, log_var, rng)
    kl = normal_kl(mean, log_var).mean()
    statistics = {'mean': z.mean((0, 1, 2)), 'square': jnp.square(z).mean((0, 1, 2))}
    return Regularised(z, kl_weight * kl, {'kl': kl}, {'latents': jax.lax.stop_gradient(statistics)})


class Quantised(NamedTuple):
    """Latents and their codes; the lists have one entry for each grid, coarse first."""

    z: Array  # the encoder's output, [n, h, w, latent]
    inputs: list[Array]  # vectors whose nearest codes were taken, [n, *grid, latent]
    sums: list[Array]  # the decoder's input if this grid were the last one, [n, h, w, latent]
    codes: list[Array]  # int32 [n, *grid]


def quantise_latents(networks: Networks, params, z: Array) -> Quantised:
    phi, codebook = params.get('phi', {}), params['codebook']['embedding']
    return Quantised(z, *networks.quantiser.apply({'params': phi}, z, codebook))


def encode_quantised(networks: Networks, params, x: Array) -> Quantised:
    return quantise_latents(networks, params, networks.encoder.apply({'params': params['encoder']}, x))


def embed_codes(networks: Networks, params, codes: Array, k: int) -> Array:
    """What the codes of grid k add to the map that is decoded, [n, h, w, latent]."""
    phi, codebook = params.get('phi', {}), params['codebook']['embedding']
    return networks.quantiser.apply({'params': phi}, codes, codebook, k, method='added')


def regularise_by_codebook(
    networks: Networks, params, x: Array, rng: Array, *, codebook_weight: float, beta: float
) -> Regularised:
    """Quantised latents with codebook loss and commitment, means over grids (Esser et al. 2021, eq. 4)."""
    z, inputs, sums, codes = encode_quantised(networks, params, x)
    terms = [quantise.losses(z, vectors) for vectors in sums]
    codebook_loss, commitment = (sum(t) / len(t) for t in zip(*terms, strict=True))
    counts = [quantise.statistics(*pair, networks.vocabulary)['count'] for pair in zip(inputs, codes, strict=True)]
    return Regularised(
        quantise.straight_through(z, sums[-1]),
        codebook_weight * (codebook_loss + beta * commitment),
        {'commitment': commitment},
        {'count': jnp.stack(counts).reshape(networks.count_shape)},
    )


# --- images


def reconstruct(networks: Networks, params, z: Array) -> tuple[Array, Array]:
    """Images [n, H, W, C], not clipped, and the input of the decoder's last layer."""
    return networks.decoder.apply({'params': params['decoder']}, z)


def decode_clipped(networks: Networks, params, z: Array) -> Array:
    """Images [n, H, W, C] in [-1, 1]."""
    return jnp.clip(reconstruct(networks, params, z)[0], -1, 1)


def decode_codes(networks: Networks, params, codes: tuple[Array, ...]) -> Array:
    return decode_clipped(networks, params, sum(embed_codes(networks, params, c, k) for k, c in enumerate(codes)))


def reconstruction_error(terms: Terms, frozen, x: Array, y: Array) -> tuple[Array, dict]:
    """d, mean over the batch, and its parts."""
    chex.assert_equal_shape([x, y])
    absolute = jnp.abs(x - y).mean()
    of_pixels = absolute if terms.pixels == 'l1' else jnp.square(x - y).mean()
    distance = terms.distance(frozen, x, y).mean() if terms.perceptual else jnp.zeros(())
    return of_pixels + terms.perceptual * distance, {'absolute_error': absolute, 'perceptual': distance}


# --- the adversarial loss and its weight


def discriminate(networks: Networks, params, x: Array) -> tuple[Array, dict]:
    """Values by patch, [n, rows, columns], with the statistics of this batch, and these."""
    return apply_in_training(networks.discriminator, params['discriminator'], x)


def with_gradient(f: Callable, y: Array) -> tuple[Array, dict, Array]:
    """f(y) -> (scalar, aux) together with d f / d y, each computed once.

    Gradients go from the returned scalar to y and to nothing else that f reads. The loss needs d f / d y for its
    weights, and a second pass through the perceptual network and the discriminator would cost as much as the first.
    """
    fixed = jax.lax.stop_gradient(y)
    (value, aux), gradient = jax.value_and_grad(f, has_aux=True)(fixed)
    value, aux, gradient = jax.lax.stop_gradient((value, aux, gradient))
    return value + jnp.vdot(gradient, y - fixed), aux, gradient


def last_layer_gradient(networks: Networks, params, h: Array, gradient: Array) -> Array:
    """Gradient by the last layer's kernel, from the gradient by the images that it made of h."""
    weights = jax.lax.stop_gradient(params['decoder']['last'])
    h = jax.lax.stop_gradient(h)
    last = networks.last
    image, back = jax.vjp(lambda w: last.apply({'params': {**weights, 'kernel': w}}, h), weights['kernel'])
    return back(gradient.astype(image.dtype))[0]


def generator_loss(networks: Networks, terms: Terms, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """nll + regulariser + adversarial * weight * L_G, see the module's docstring; logs 'reconstruction', d there."""
    x = batch['image']
    z, regulariser, logs, kept = terms.regularise(params, x, rng)
    y, h = reconstruct(networks, params, z)

    d, parts, d_gradient = with_gradient(lambda y: reconstruction_error(terms, frozen, x, y), y)
    log_scale = params['scale']['log_scale'] if terms.learn_scale else jnp.zeros(())
    by_scale = terms.nll_size * jnp.exp(-log_scale) if terms.nll_size else 1.0
    nll = by_scale * d + terms.nll_size * log_scale
    value = nll + regulariser
    if terms.adversarial:

        def adversarial_loss(y):
            return terms.generator_loss(discriminate(networks, params, y)[0]), {}

        adversarial, _, adversarial_gradient = with_gradient(adversarial_loss, y)
        weight = adaptive_weight(  # VQGAN's eq. 7
            last_layer_gradient(networks, params, h, by_scale * d_gradient),
            last_layer_gradient(networks, params, h, adversarial_gradient),
        )
        started = state.step >= terms.discriminator_start
        value = value + jnp.where(started, terms.adversarial * weight, 0.0) * adversarial
        logs |= {'generator_loss': adversarial, 'adaptive_weight': weight}
    if terms.learn_scale:
        logs['log_scale'] = log_scale
    return value, Aux({'loss': value, 'reconstruction': d, **parts, **logs}, kept)


def discriminator_loss(networks: Networks, terms: Terms, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """The discriminator's adversarial loss between images and their reconstructions; 0 before its start."""
    x = batch['image']
    y = jax.lax.stop_gradient(reconstruct(networks, params, terms.regularise(params, x, rng).z)[0])
    real, real_statistics = discriminate(networks, params, x)
    fake, fake_statistics = discriminate(networks, params, y)
    value = terms.discriminator_loss(real, fake)
    logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
    kept = {'discriminator': jax.tree.map(lambda a, b: (a + b) / 2, real_statistics, fake_statistics)}
    return jnp.where(state.step >= terms.discriminator_start, value, 0.0), Aux(logs, kept)


# --- how often codes are used


def counts_by_grid(networks: Networks, count: Array) -> Array:
    """Number of latents of each code, [grids, vocabulary]."""
    return count.reshape(-1, networks.vocabulary)


def code_probabilities(networks: Networks, state: State) -> Array:
    """Frequency of each code in training, [grids, vocabulary], none 0; each grid's sum is 1."""
    return jax.vmap(quantise.probabilities)(counts_by_grid(networks, state.extra['count']))


def codebook_logs(networks: Networks, count: Array) -> dict[str, Array]:
    """'perplexity', the exp of the entropy of the batch's codes, and 'usage', the fraction of codes that it uses; with
    scales also those of each, 'usage/scale0', ..."""
    counts, logs = counts_by_grid(networks, count), {}
    by_scale = [(f'/scale{k}', counts[k]) for k in range(len(networks.grids))] if networks.scales else []
    for suffix, count in [('', counts.sum(0)), *by_scale]:
        logs[f'perplexity{suffix}'] = quantise.perplexity(count)
        logs[f'usage{suffix}'] = quantise.usage(count)
    return logs


def restart_dead_codes(networks: Networks, state: State, x: Array, rng: Array, threshold: float) -> State:
    """The state with codes below the threshold replaced by latents of the images x, see quantise.restart."""

    def restarted(state: State) -> State:
        inputs = encode_quantised(networks, state.params, x).inputs
        z = jnp.concatenate([v.reshape(-1, networks.latent) for v in inputs])
        counts = counts_by_grid(networks, state.extra['count'])
        state, count, dead = quantise.restart_learned(state, 'embedding', counts.sum(0), z, rng, threshold)
        counts = jnp.where(dead, count / len(networks.grids), counts).reshape(networks.count_shape)
        return state.replace(extra={**state.extra, 'count': counts})

    # The batch's latents are computed only where a code is dead: most updates go without.
    dead = (counts_by_grid(networks, state.extra['count']).sum(0) < threshold).any()
    return jax.lax.cond(dead, restarted, lambda s: s, state)


# --- the functions of the family


def init(networks: Networks, terms: Terms, optim, first_log_var: float, rng: Array, batch: dict, frozen: dict) -> State:
    encoder_rng, decoder_rng, codebook_rng, discriminator_rng = jax.random.split(rng, 4)
    latent, vocabulary = networks.latent, networks.vocabulary
    z = jnp.zeros((1, *networks.grids[-1], latent))
    params = {
        'encoder': networks.encoder.init(encoder_rng, batch['image'][:1])['params'],
        'decoder': networks.decoder.init(decoder_rng, z)['params'],
    }
    if vocabulary:
        bound = 1 / vocabulary  # the published code's start, close together
        codebook = jax.random.uniform(codebook_rng, (vocabulary, latent), minval=-bound, maxval=bound)
        params['codebook'] = {'embedding': codebook}
        if networks.scales:
            params['phi'] = networks.quantiser.init(stream(rng, 'phi'), z, codebook)['params']
        extra = {'count': jnp.ones(networks.count_shape)}
    else:
        moments = 'to_latent' if 'to_latent' in params['encoder'] else 'last'  # the layer that puts them out
        bias = params['encoder'][moments]['bias']
        params['encoder'][moments] |= {'bias': bias.at[latent:].add(first_log_var)}
        extra = {'latents': {'mean': jnp.zeros(latent), 'square': jnp.ones(latent)}}
    if terms.learn_scale:
        params['scale'] = {'log_scale': jnp.zeros(())}
    averaged = tuple(params)
    if terms.adversarial:
        variables = networks.discriminator.init(discriminator_rng, batch['image'][:1])
        params['discriminator'] = variables['params']
        extra['discriminator'] = variables.get('batch_stats', {})
    return new_state(params, optim, extra, averaged)


def make_update(networks: Networks, terms: Terms, optim, restart: float) -> Callable:
    """The update: a step of the autoencoder, one of the discriminator, running statistics, dead codes."""
    there = {'encoder': True, 'decoder': True, 'codebook': networks.vocabulary, 'phi': networks.scales}
    trained = [name for name, exists in (there | {'scale': terms.learn_scale}).items() if exists]
    generator_step = gradient_step(functools.partial(generator_loss, networks, terms), optim, *trained)
    discriminator_step = gradient_step(functools.partial(discriminator_loss, networks, terms), optim, 'discriminator')

    def update(state, frozen, batch, rng):
        generator_rng, discriminator_rng, restart_rng = jax.random.split(rng, 3)
        state, (logs, kept) = generator_step(state, frozen, batch, generator_rng)
        decays = dict.fromkeys(kept, LATENTS_DECAY)
        if terms.adversarial:
            state, discriminator_aux = discriminator_step(state, frozen, batch, discriminator_rng)
            kept |= discriminator_aux.kept
            decays['discriminator'] = STATISTICS_DECAY
            logs |= discriminator_aux.logs
        if networks.vocabulary:
            # Means over the parts of an accumulated gradient; counts are of the whole batch.
            kept['count'] = kept['count'] * optim.accumulate
            logs |= codebook_logs(networks, kept['count'])
        extra = {name: running_mean(state, state.extra[name], kept[name], decays[name]) for name in kept}
        state = advance(state.replace(extra=extra), optim)
        if networks.vocabulary and restart:
            state = restart_dead_codes(networks, state, batch['image'], restart_rng, restart)
        return state, logs

    return update


def evaluate(networks: Networks, terms: Terms, state: State, frozen, batch, rng) -> dict[str, Array]:
    """Metrics per image [n], of its reconstruction from the mean latents or codes.

    'squared_error' and 'absolute_error', means over pixels in [-1, 1]; 'perceptual', the distance; 'kl', nats;
    'bits_per_code', -log2 of the frequencies of codes in training (in their grid), mean over codes;
    'discriminator_real' and 'discriminator_fake', the discriminator's values of the image and of its reconstruction,
    means over patches.
    """
    x, metrics = batch['image'], {}
    if networks.vocabulary:
        _, _, sums, codes = encode_quantised(networks, state.ema, x)
        z, probabilities = sums[-1], code_probabilities(networks, state)
        bits = sum(-jnp.log2(p)[c].sum((1, 2)) for p, c in zip(probabilities, codes, strict=True))
        metrics['bits_per_code'] = bits / sum(math.prod(grid) for grid in networks.grids)
    else:
        z, log_var = posterior(networks, state.ema, x)
        metrics['kl'] = normal_kl(z, log_var)
    y = decode_clipped(networks, state.ema, z)
    metrics['squared_error'] = jnp.square(x - y).mean((1, 2, 3))
    metrics['absolute_error'] = jnp.abs(x - y).mean((1, 2, 3))
    if terms.perceptual:
        metrics['perceptual'] = terms.distance(frozen, x, y)
    if terms.adversarial:
        check_discriminator(state.params)
        variables = {'params': state.params['discriminator'], 'batch_stats': state.extra['discriminator']}
        for name, images in (('real', x), ('fake', y)):
            metrics[f'discriminator_{name}'] = networks.discriminator.apply(variables, images).mean((1, 2))
    return metrics


def kl_family(networks: Networks) -> dict:
    """The Family's fields about latents of 'kl', real numbers [n, h, w, latent]."""
    shape = (*networks.grids[-1], networks.latent)

    def encode(state, frozen, batch, rng):
        """Means of the posterior."""
        return posterior(networks, state.ema, batch['image'])[0]

    def moments(state, frozen, batch, rng):
        mean, log_var = posterior(networks, state.ema, batch['image'])
        return {'mean': mean, 'log_var': log_var}

    def draw(moments, rng):
        """Latents drawn from the posterior; a draw for each position of the batch."""
        return draw_posterior(moments['mean'], moments['log_var'], rng)

    def decode(state, frozen, batch, latents, rng):
        return decode_clipped(networks, state.ema, latents)

    def sample(state, frozen, batch, rng):
        mean, square = state.extra['latents']['mean'], state.extra['latents']['square']
        std = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0))
        return decode(state, frozen, batch, mean + std * normal(example_keys(rng, batch), shape), rng)

    return dict(
        sample=sample, encode=encode, posterior=Posterior(moments, draw), decode=decode, latents=Latents(shape=shape)
    )


def vq_family(networks: Networks, interface: str) -> dict:
    """The Family's fields about latents of 'vq': a tuple of codes int32 [n, *grid], or real numbers [n, h, w, latent]
    before they are quantised."""
    shape, grids = (*networks.grids[-1], networks.latent), networks.grids

    def encode(state, frozen, batch, rng):
        quantised = encode_quantised(networks, state.ema, batch['image'])
        return tuple(quantised.codes) if interface == 'codes' else quantised.z

    def decode(state, frozen, batch, latents, rng):
        """Images [n, H, W, C] in [-1, 1]. Latents need not be any that `encode` returned."""
        if interface == 'codes':
            return decode_codes(networks, state.ema, latents)
        return decode_clipped(networks, state.ema, quantise_latents(networks, state.ema, latents).sums[-1])

    def embed(state, frozen, codes, k):
        return embed_codes(networks, state.ema, codes, k)

    def sample(state, frozen, batch, rng):
        log_p = jnp.log(code_probabilities(networks, state))

        def draw(key, k):
            return jax.random.categorical(jax.random.fold_in(key, k), log_p[k], shape=grids[k])

        keys = example_keys(rng, batch)
        codes = tuple(jax.vmap(functools.partial(draw, k=k))(keys) for k in range(len(grids)))
        return decode_codes(networks, state.ema, codes)

    functions = dict(sample=sample, encode=encode, decode=decode)
    if interface == 'latents':
        return functions | dict(latents=Latents(shape=shape))
    return functions | dict(
        embed=embed if networks.scales else None, latents=Latents(grids=grids, vocabulary=networks.vocabulary)
    )


def check(regulariser: str, learn_scale: bool, scales: tuple[int, ...], rows: int) -> None:
    """Raises UserError where options do not go together. rows: of the latents."""
    quantised = regulariser == 'vq'
    if learn_scale and quantised:
        raise UserError("config.model.learn_scale needs config.model.regulariser = 'kl'")
    if scales and not quantised:
        raise UserError("config.model.scales needs config.model.regulariser = 'vq'")
    if scales and not (scales[0] >= 1 and scales[-1] == rows and list(scales) == sorted(set(scales))):
        raise UserError(
            f'config.model.scales must rise from 1 or more to {rows}, the rows of the latents; they are {scales}'
        )


def perceptual_distance(context: Context, lpips: tuple[str, ...], weight: float) -> Callable | None:
    """(frozen, x, y) -> [n], by the run or the files that the config names.

    Raises:
      UserError: the distance has a weight, and the config names neither; see losses/perceptual.py for others.
    """
    distance = perception.measure(context.stages, lpips, context.image)
    if weight and distance is None:
        raise UserError(
            'config.model.perceptual needs a network that compares features: name a run of a classifier as '
            'config.stages.perceptual, give weights as config.model.lpips, or set it to 0'
        )
    return distance


@options.checked
def build(
    context: Context,
    *,
    regulariser: Annotated[str, OneOf('vq', 'kl')] = 'kl',
    channels: Count = 128,
    multipliers: Annotated[tuple[int, ...], '[1, inf)', Rule(bool, 'a tuple of one number or more')] = (1, 2, 4, 4),
    blocks: Count = 2,
    attention: tuple[int, ...] = (),
    groups: Count = 32,
    group_size: Annotated[int, '[0, inf)'] = 4,
    eps: Positive = 1e-6,
    latent: Count = 4,
    latent_kernel: Annotated[int, '[0, inf)'] = 1,
    middle_attention: bool = True,
    kl_weight: NonNegative = 1e-6,
    first_log_var: float = 0.0,
    learn_scale: bool = False,
    vocabulary: Annotated[int, '[2, inf)'] = 1024,
    scales: tuple[int, ...] = (),
    beta: NonNegative = 0.25,
    codebook_weight: NonNegative = 1.0,
    restart: NonNegative = 0.0,
    interface: Annotated[str, OneOf('codes', 'latents')] = 'codes',
    pixels: Annotated[str, OneOf('l1', 'l2')] = 'l1',
    perceptual: NonNegative = 1.0,
    lpips: tuple[str, ...] = (),
    adversarial: NonNegative = 0.5,
    adversarial_loss: Annotated[str, OneOf(*ADVERSARIAL_LOSSES)] = 'hinge',
    discriminator_start: Annotated[int, '[0, inf)'] = 0,
    discriminator_channels: Count = 64,
    discriminator_layers: Count = 3,
    discriminator_norm: Annotated[str, OneOf(*patchgan.NORMS)] = 'batch',
) -> Family:
    """VQGAN or KL autoencoder.

    Args:
      regulariser: 'vq', codes of a codebook, or 'kl', a posterior near N(0, I).
      channels: of encoder and decoder at full size.
      multipliers: channels of each resolution level over `channels`; every level but the last halves the image.
      blocks: residual blocks per level of the encoder; the decoder has one more.
      attention: heights in pixels of the maps at which blocks are followed by attention.
      middle_attention: at the smallest size, in the middle.
      groups, group_size, eps: of group norms, see networks/layers.py; published is group_size 0.
      latent: channels of the latents, or dimensions of a code.
      latent_kernel: of the convolutions on either side of the latents: 1, or 3 in VAR's; 0: none, as in SD3's, FLUX's.
      kl_weight: of 'kl': weight of the KL term, in nats per image.
      first_log_var: of 'kl': log variance of the posterior before the first update, about. At the published 0 the noise
        is louder than the latents at first, and a short training learns to do without them: colours are the last thing
        to come. -6 lets them through from the start.
      learn_scale: of 'kl': learn the scale s of the likelihood.
      vocabulary: of 'vq': codes of the codebook.
      scales: of 'vq': rows of each grid of codes, coarse first, the last as many as the latents have; (): one grid.
      beta: of 'vq': weight of the commitment beside the codebook loss.
      codebook_weight: of 'vq': weight of both.
      restart: of 'vq': codes that have fewer latents per update, on average, are replaced by latents of the batch; 0,
        as published: never.
      interface: of 'vq': 'codes' or 'latents', what `encode` returns for later stages and `decode` takes. 'latents' are
        the encoder's output before it is quantised, and `decode` quantises them: so latent diffusion uses VQ-f4.
      pixels: mean of absolute ('l1') or of squared ('l2') differences. The former is content with a median: small
        objects on plain backgrounds come late with it, and their colours last.
      perceptual: weight of the perceptual distance; 0: none. It needs one of two:
      lpips: files with the weights of LPIPS on VGG-16, see losses/perceptual.py; else a run with features, whose
        directory is config.stages.perceptual.
      adversarial: weight of the adversarial loss; 0: there is no discriminator.
      adversarial_loss: see losses/adversarial.py.
      discriminator_start: update from which on the discriminator learns and its loss counts.
      discriminator_channels, discriminator_layers, discriminator_norm: of PatchGAN, see networks/patchgan.py.

    State.extra has 'latents' for 'kl': running mean and square of the latents by channel; a later stage divides by
    their standard deviation. For what is logged and measured see `generator_loss`, `codebook_logs` and `evaluate`.

    Raises:
      UserError: a value that cannot work, or there is nothing to measure the perceptual distance with.
    """
    height, width, image_channels = context.image
    quantised, divisor = regulariser == 'vq', 2 ** (len(multipliers) - 1)
    check_groups('config.model', groups, group_size, eps, [channels * m for m in (1, *multipliers)])
    check_size(context.image, divisor, f'config.model.multipliers = {multipliers}')
    check(regulariser, learn_scale, scales, height // divisor)
    if adversarial:
        patchgan.check('model.discriminator_layers', context.image, discriminator_layers)

    grid = (height // divisor, width // divisor)
    grids = grids_of(scales, grid) if scales else (grid,)
    sizes = dict(channels=channels, multipliers=multipliers, blocks=blocks, attention=attention, groups=groups)
    sizes |= dict(group_size=group_size, eps=eps, latent_kernel=latent_kernel, middle_attention=middle_attention)
    # Blocks with attention are those at these heights in training, whatever the images are.
    rest = dict(height=(context.trained or context.image)[0], remat=context.remat, dtype=context.dtype)
    networks = Networks(
        encoder=Encoder(outputs=latent if quantised else 2 * latent, **sizes, **rest),
        decoder=Decoder(image_channels=image_channels, **sizes, **rest),
        last=last_layer(image_channels, context.dtype),
        quantiser=MultiScale(grids, latent, **({} if scales else dict(phis=0))),
        discriminator=patchgan.PatchGAN(
            discriminator_channels, discriminator_layers, discriminator_norm, dtype=context.dtype
        ),
        grids=grids,
        latent=latent,
        vocabulary=vocabulary if quantised else 0,
        scales=bool(scales),
    )
    by_codebook = functools.partial(regularise_by_codebook, networks, codebook_weight=codebook_weight, beta=beta)
    by_kl = functools.partial(regularise_by_kl, networks, kl_weight=kl_weight)
    terms = Terms(
        regularise=by_codebook if quantised else by_kl,
        nll_size=0 if quantised else math.prod(context.image),
        learn_scale=learn_scale,
        pixels=pixels,
        distance=perceptual_distance(context, lpips, perceptual),
        perceptual=perceptual,
        adversarial=adversarial,
        discriminator_loss=ADVERSARIAL_LOSSES[adversarial_loss][0],
        generator_loss=ADVERSARIAL_LOSSES[adversarial_loss][1],
        discriminator_start=discriminator_start,
    )
    return Family(
        init=functools.partial(init, networks, terms, context.optim, first_log_var),
        update=make_update(networks, terms, context.optim, restart),
        evaluate=functools.partial(evaluate, networks, terms),
        divisor=divisor,
        **(vq_family(networks, interface) if quantised else kl_family(networks)),
    )
