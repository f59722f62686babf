"""InfoGAN: a GAN whose codes mean something (Chen et al. 2016, arXiv 1606.03657).

The generator draws from noise z and from codes c: categories, each of its values as likely, and numbers uniform on
[-1, 1]. Beside the game of `gan.py` a recogniser Q(c | x) guesses the codes of samples, and both players raise the
bound on the mutual information between codes and pictures (eq. 5 and 6)

    L_I = E_c,z log Q(c | G(z, c)) + H(c) <= I(c; G(z, c)),

so that a code must change the picture in a way of its own. Nothing says in which: which code came to stand for which
factor is measured afterwards (jaxgen/metrics/disentanglement.py, where the data have factors).

Q is a small head on the discriminator's features (section 6 of the paper, appendix C has the sizes). It learns in the
discriminator's step, with it, as in the published code; the generator's step changes the generator alone. Of a number
Q gives mean and deviation of a normal, not less than LEAST_DEVIATION, so that the bound cannot run away to precision.

All three networks are averaged, and the averages are run once on each batch for the statistics of their batch
normalisation, as in `gan.py`: the generator on the update's noise, discriminator and recogniser on data.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, advance, gradient_step, new_state, running_mean, shard_batch
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import check_penalties, non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks.infogan import Discriminator, Generator, Recogniser
from jaxgen.networks.layers import STATISTICS_DECAY, apply_in_training
from jaxgen.randomness import example_keys

Array = jax.Array

PLAYERS = ('generator', 'discriminator', 'recogniser')
LEAST_DEVIATION = 0.1  # of Q's normals; codes are within [-1, 1]


def build(
    context: Context,
    *,
    noise: int = 62,
    categories: tuple[int, ...] = (10,),
    continuous: int = 2,
    width: int = 64,
    levels: int = 2,
    hidden: int = 1024,
    recogniser_hidden: int = 128,
    discriminator_norm: bool = True,
    r1: float = 0.0,
    category_weight: float = 1.0,
    continuous_weight: float = 0.1,
    slope: float = 0.1,
    unit_deviation: bool = False,
) -> Family:
    """InfoGAN.

    Args:
      noise: dimensions of z, uniform on [-1, 1].
      categories: number of values of each categorical code.
      continuous: how many codes are numbers.
      width, levels, hidden, recogniser_hidden: of the networks, see there.
      discriminator_norm: batch normalisation of the discriminator, as published.
      r1: weight of the penalty of losses/adversarial.py, for a discriminator without it.
      category_weight, continuous_weight: lambda, the weights of L_I for the two kinds of code.
      slope: of the leaky ReLUs: 0.1 in the paper, 0.01 in the released code.
      unit_deviation: Q's normals have a deviation of 1, as in the released code, and it learns their means alone.

    encode gives the codes that Q finds likeliest, float32 [n, len(categories) + continuous]: of a category its number,
    of a number its mean. decode takes such codes, categories rounded, with one draw of the noise for all, by its key:
    what differs between two pictures is by their codes.

    Logs: 'information/categories' and '/continuous', L_I in nats; of categories it is at most the sum of the logs of
    their numbers of values. evaluate gives 'discriminator', the value of the image, and 'information', of the codes of
    a sample with the example's number.

    Raises:
      UserError: a value that cannot work.
    """
    divisor = 2**levels
    if min(noise, width, levels, hidden, recogniser_hidden) < 1 or continuous < 0:
        raise UserError(
            'config.model: noise, width, levels, hidden and recogniser_hidden must be 1 or more, continuous 0 or more'
        )
    if min(categories, default=2) < 2 or not len(categories) + continuous:
        raise UserError('config.model: categories must have 2 values or more each, and there must be a code at all')
    if not 0 <= slope < 1:
        raise UserError(f'config.model.slope must be from 0 to below 1; it is {slope}')
    if min(category_weight, continuous_weight, r1) < 0:
        raise UserError('config.model: category_weight, continuous_weight and r1 must be 0 or more')
    check_penalties(discriminator_norm, r1=r1)
    check_size(context.image, divisor, f'config.model.levels = {levels}')
    sizes = (width, levels, hidden)
    networks = {
        'generator': Generator(context.image, *sizes, dtype=context.dtype),
        'discriminator': Discriminator(*sizes, norm=discriminator_norm, slope=slope, dtype=context.dtype),
        'recogniser': Recogniser(sum(categories) + 2 * continuous, recogniser_hidden, slope=slope, dtype=context.dtype),
    }
    entropies = (sum(math.log(k) for k in categories), continuous * math.log(2))  # nats
    edges = [sum(categories[:i]) for i in range(1, len(categories) + 1)]

    def play(params, name: str, x: Array) -> tuple[Any, dict]:
        return apply_in_training(networks[name], params[name], x)

    def fixed(state, name: str, x: Array):
        """What an averaged network gives, with the running statistics."""
        return networks[name].apply({'params': state.ema[name], 'batch_stats': state.extra[name]}, x)

    def one_hot(chosen: Array) -> Array:
        """Categories, integers [n, len(categories)], as [n, sum(categories)]."""
        parts = [jax.nn.one_hot(chosen[:, i], k) for i, k in enumerate(categories)]
        return jnp.concatenate([jnp.zeros((len(chosen), 0)), *parts], -1)

    def draw(rng: Array, n: int) -> Array:
        """z and c of n samples, [n, noise + sum(categories) + continuous]; c stands at the end."""
        noise_rng, number_rng, *category_rngs = jax.random.split(rng, 2 + len(categories))
        chosen = [jax.random.randint(key, (n,), 0, k) for key, k in zip(category_rngs, categories, strict=True)]
        chosen = jnp.stack(chosen, -1) if chosen else jnp.zeros((n, 0), jnp.int32)
        z = jax.random.uniform(noise_rng, (n, noise), minval=-1, maxval=1)
        numbers = jax.random.uniform(number_rng, (n, continuous), minval=-1, maxval=1)
        # By examples over the devices: left to itself XLA may cut the columns, and then mixes up what it puts together.
        return shard_batch(jnp.concatenate([z, one_hot(chosen), numbers], -1))

    def split(found: Array) -> tuple[list[Array], Array, Array]:
        """Q's outputs: logits of each category [n, k], means and log deviations of the numbers [n, continuous]."""
        *logits, numbers = jnp.split(found, edges, -1)
        mean, raw = jnp.split(numbers, 2, -1)
        if unit_deviation:
            return logits, mean, jnp.zeros_like(raw)
        # A softplus: smooth down to the least deviation, about 0.8 at the start.
        return logits, mean, jnp.log(LEAST_DEVIATION + jax.nn.softplus(raw))

    def information(found: Array, z: Array) -> tuple[Array, Array]:
        """log Q(c | x) + H(c) of each example [n], nats: of the categories and of the numbers that are in `z`."""
        logits, mean, log_deviation = split(found)
        *hot, numbers = jnp.split(z[:, noise:], edges, -1)
        pairs = zip(logits, hot, strict=True)
        of_categories = sum((jax.nn.log_softmax(a) * b).sum(-1) for a, b in pairs) + jnp.zeros(len(z))
        error = (numbers - mean) * jnp.exp(-log_deviation)
        of_numbers = -(0.5 * jnp.square(error) + log_deviation + 0.5 * math.log(2 * math.pi)).sum(-1)
        return of_categories + entropies[0], of_numbers + entropies[1]

    def bound(params, features: Array, z: Array) -> tuple[Array, dict]:
        """The weighted L_I, and its parts for the logs."""
        of_categories, of_numbers = (a.mean() for a in information(play(params, 'recogniser', features)[0], z))
        logs = {'information/categories': of_categories, 'information/continuous': of_numbers}
        return category_weight * of_categories + continuous_weight * of_numbers, logs

    def discriminator_loss(params, state, frozen, batch, rng):
        x = batch['image']
        z = draw(rng, len(x))
        (real, _), _ = play(params, 'discriminator', x)
        (fake, features), _ = play(params, 'discriminator', play(params, 'generator', z)[0])
        value = vanilla_discriminator(real, fake)
        known, logs = bound(params, features, z)
        logs = {'discriminator_loss': value, **logs}
        if r1:
            logs['r1'] = r1_penalty(lambda x: play(params, 'discriminator', x)[0][0], x).mean()
            value = value + r1 * logs['r1']
        return value - known, Aux(logs)

    def generator_loss(params, state, frozen, batch, rng):
        z = batch['z']
        (fake, features), _ = play(params, 'discriminator', play(params, 'generator', z)[0])
        value = non_saturating_generator(fake)
        return value - bound(params, features, z)[0], Aux({'generator_loss': value})

    discriminator_step = gradient_step(discriminator_loss, context.optim, 'discriminator', 'recogniser')
    generator_step = gradient_step(generator_loss, context.optim, 'generator')

    def init(rng, batch, frozen):
        inputs = {
            'generator': jnp.zeros((1, noise + sum(categories) + continuous)),
            'discriminator': batch['image'][:1],
            'recogniser': jnp.zeros((1, hidden)),
        }
        keys = dict(zip(PLAYERS, jax.random.split(rng, 3), strict=True))
        variables = {name: networks[name].init(keys[name], inputs[name]) for name in PLAYERS}
        params = {name: variables[name]['params'] for name in PLAYERS}
        return new_state(
            params, context.optim, extra={name: variables[name].get('batch_stats', {}) for name in PLAYERS}
        )

    def update(state, frozen, batch, rng):
        discriminator_rng, z_rng, generator_rng = jax.random.split(rng, 3)
        x = batch['image']
        z = draw(z_rng, len(x))
        state, discriminator = discriminator_step(state, frozen, {'image': x}, discriminator_rng)
        state, generator = generator_step(state, frozen, {'z': z}, generator_rng)
        averaged = advance(state, context.optim)
        (_, features), of_discriminator = play(averaged.ema, 'discriminator', x)
        new = {
            'generator': play(averaged.ema, 'generator', z)[1],
            'discriminator': of_discriminator,
            'recogniser': play(averaged.ema, 'recogniser', features)[1],
        }
        extra = running_mean(state, state.extra, new, STATISTICS_DECAY)
        return averaged.replace(extra=extra), discriminator.logs | generator.logs

    def encode(state, frozen, batch, rng):
        _, features = fixed(state, 'discriminator', batch['image'])
        logits, mean, _ = split(fixed(state, 'recogniser', features))
        return jnp.concatenate([*(a.argmax(-1, keepdims=True).astype(jnp.float32) for a in logits), mean], -1)

    def decode(state, frozen, batch, latents, rng):
        chosen, numbers = latents[:, : len(categories)], latents[:, len(categories) :]
        most = jnp.array(categories, jnp.float32) - 1
        chosen = jnp.clip(jnp.round(chosen), 0, most).astype(jnp.int32)
        z = jnp.broadcast_to(jax.random.uniform(rng, (noise,), minval=-1, maxval=1), (len(latents), noise))
        return fixed(state, 'generator', jnp.concatenate([z, one_hot(chosen), numbers], -1))

    def drawn(batch, rng) -> Array:
        """z and c of the samples with the numbers of a batch."""
        return jax.vmap(lambda key: draw(key, 1)[0])(example_keys(rng, batch))

    def sample(state, frozen, batch, rng):
        return fixed(state, 'generator', drawn(batch, rng))

    def evaluate(state, frozen, batch, rng):
        z = drawn(batch, rng)
        value, _ = fixed(state, 'discriminator', batch['image'])
        _, features = fixed(state, 'discriminator', fixed(state, 'generator', z))
        of_categories, of_numbers = information(fixed(state, 'recogniser', features), z)
        return {'discriminator': value, 'information': of_categories + of_numbers}

    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        divisor=divisor,
        statistics=True,
        latents=Latents(shape=(len(categories) + continuous,)),
    )
