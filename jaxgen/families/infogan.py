"""InfoGAN: a GAN with interpretable codes (Chen et al. 2016, arXiv 1606.03657).

The generator draws from noise z and from codes c: categories, each of its values as likely, and continuous codes,
uniform on [-1, 1]. A recognition network Q(c | x) infers the codes of samples, and beside the adversarial loss both
generator and discriminator raise the bound on the mutual information between codes and samples (eq. 5 and 6)

    L_I = E_c,z log Q(c | G(z, c)) + H(c) <= I(c; G(z, c)),

so that a code must change the sample in a manner of its own. Nothing says in which: which factor a code came to stand
for is measured afterwards (jaxgen/metrics/disentanglement.py, where the data have factors).

Q is a small head on the discriminator's features (section 6 of the paper, appendix C has the sizes). It learns in the
discriminator's step, with it, as in the published code; the generator's step changes the generator alone. Of a
continuous code Q has mean and standard deviation of a normal, not less than LEAST_DEVIATION, so that the bound cannot
grow without limit.

All three networks are averaged. State.extra holds the batch statistics of the averages, see `layers.apply_averaged`: of
the generator on the update's latents, of discriminator and recogniser on data.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, advance, gradient_step, new_state, shard_batch
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import check_penalties, non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks.infogan import Discriminator, Generator, Recogniser
from jaxgen.networks.layers import apply_averaged, apply_in_training
from jaxgen.optim import Optim
from jaxgen.options import Count, NonNegative, Rate
from jaxgen.randomness import example_keys

Array = jax.Array

LEAST_DEVIATION = 0.1  # of Q's normals; codes are within [-1, 1]


class Codes(NamedTuple):
    """The generator's input: noise z, then codes c, categories as one-hot vectors before continuous codes."""

    noise: int  # dimensions of z
    categories: tuple[int, ...]  # values of each categorical code
    continuous: int  # number of continuous codes

    @property
    def size(self) -> int:
        return self.noise + sum(self.categories) + self.continuous

    @property
    def edges(self) -> list[int]:
        """Where the categories end, in c."""
        return [sum(self.categories[: i + 1]) for i in range(len(self.categories))]

    def one_hot(self, chosen: Array) -> Array:
        """Categories, integers [n, len(categories)], as [n, sum(categories)]."""
        parts = [jax.nn.one_hot(chosen[:, i], k) for i, k in enumerate(self.categories)]
        return jnp.concatenate([jnp.zeros((len(chosen), 0)), *parts], -1)

    def draw(self, rng: Array, n: int) -> Array:
        """z and c of n samples, [n, size]."""
        noise_rng, number_rng, *category_rngs = jax.random.split(rng, 2 + len(self.categories))
        pairs = zip(category_rngs, self.categories, strict=True)
        chosen = [jax.random.randint(key, (n,), 0, k) for key, k in pairs]
        chosen = jnp.stack(chosen, -1) if chosen else jnp.zeros((n, 0), jnp.int32)
        z = jax.random.uniform(noise_rng, (n, self.noise), minval=-1, maxval=1)
        numbers = jax.random.uniform(number_rng, (n, self.continuous), minval=-1, maxval=1)
        # By examples over the devices: left to itself XLA may cut the columns, and then mixes up what it concatenates.
        return shard_batch(jnp.concatenate([z, self.one_hot(chosen), numbers], -1))

    def drawn(self, batch: dict[str, Array], rng: Array) -> Array:
        """z and c of the samples with the indices of a batch."""
        return jax.vmap(lambda key: self.draw(key, 1)[0])(example_keys(rng, batch))


class Networks(NamedTuple):
    """All networks, and what they take."""

    generator: Generator
    discriminator: Discriminator
    recogniser: Recogniser
    codes: Codes
    unit_deviation: bool

    def apply(self, params, name: str, x: Array):
        """Output of a network in training mode."""
        return apply_in_training(getattr(self, name), params[name], x)[0]

    def fixed(self, state, name: str, x: Array):
        """Output of an averaged network, with the running statistics."""
        return getattr(self, name).apply({'params': state.ema[name], 'batch_stats': state.extra[name]}, x)

    def posterior(self, outputs: Array) -> tuple[list[Array], Array, Array]:
        """Q(c | x) by the recogniser's outputs: logits of each category [n, k], means and log standard deviations of
        the continuous codes [n, continuous]."""
        *logits, numbers = jnp.split(outputs, self.codes.edges, -1)
        mean, raw = jnp.split(numbers, 2, -1)
        if self.unit_deviation:
            return logits, mean, jnp.zeros_like(raw)
        # A softplus: smooth down to the least deviation, about 0.8 at the start.
        return logits, mean, jnp.log(LEAST_DEVIATION + jax.nn.softplus(raw))

    def information(self, outputs: Array, z: Array) -> tuple[Array, Array]:
        """log Q(c | x) + H(c) of each example [n], nats: of the categories and of the continuous codes in `z`."""
        chex.assert_shape(z, (len(outputs), self.codes.size))
        logits, mean, log_deviation = self.posterior(outputs)
        *hot, numbers = jnp.split(z[:, self.codes.noise :], self.codes.edges, -1)
        pairs = zip(logits, hot, strict=True)
        of_categories = sum((jax.nn.log_softmax(a) * b).sum(-1) for a, b in pairs) + jnp.zeros(len(z))
        error = (numbers - mean) * jnp.exp(-log_deviation)
        of_numbers = -(0.5 * jnp.square(error) + log_deviation + 0.5 * math.log(2 * math.pi)).sum(-1)
        entropies = sum(math.log(k) for k in self.codes.categories), self.codes.continuous * math.log(2)
        return of_categories + entropies[0], of_numbers + entropies[1]

    def bound(self, params, features: Array, z: Array, weights: tuple[float, float]) -> tuple[Array, dict]:
        """L_I (eq. 5) with the weights of its two parts, and these for the logs."""
        outputs = self.apply(params, 'recogniser', features)
        of_categories, of_numbers = (a.mean() for a in self.information(outputs, z))
        logs = {'information/categories': of_categories, 'information/continuous': of_numbers}
        return weights[0] * of_categories + weights[1] * of_numbers, logs


def discriminator_loss(networks: Networks, r1: float, weights: tuple[float, float], params, state, frozen, batch, rng):
    """Of D and Q: the adversarial loss of D, its penalty and the bound L_I (eq. 6)."""
    x = batch['image']
    z = networks.codes.draw(rng, len(x))
    real, _ = networks.apply(params, 'discriminator', x)
    fake, features = networks.apply(params, 'discriminator', networks.apply(params, 'generator', z))
    value = vanilla_discriminator(real, fake)
    bound, logs = networks.bound(params, features, z, weights)
    logs = {'discriminator_loss': value, **logs}
    if r1:
        logs['r1'] = r1_penalty(lambda x: networks.apply(params, 'discriminator', x)[0], x).mean()
        value = value + r1 * logs['r1']
    return value - bound, Aux(logs)


def generator_loss(networks: Networks, weights: tuple[float, float], params, state, frozen, batch, rng):
    """The adversarial loss of G and the bound L_I (eq. 6)."""
    z = batch['z']
    fake, features = networks.apply(params, 'discriminator', networks.apply(params, 'generator', z))
    value = non_saturating_generator(fake)
    return value - networks.bound(params, features, z, weights)[0], Aux({'generator_loss': value})


def init(networks: Networks, optim: Optim, rng, batch, frozen):
    """The state before the first update: all networks, and their averages."""
    inputs = {
        'generator': jnp.zeros((1, networks.codes.size)),
        'discriminator': batch['image'][:1],
        'recogniser': jnp.zeros((1, networks.discriminator.hidden)),
    }
    keys = jax.random.split(rng, 3)
    variables = {
        name: getattr(networks, name).init(key, x) for key, (name, x) in zip(keys, inputs.items(), strict=True)
    }
    params = {name: own['params'] for name, own in variables.items()}
    extra = {name: own.get('batch_stats', {}) for name, own in variables.items()}
    return new_state(params, optim, extra=extra)


def update(networks: Networks, optim: Optim, discriminator_step, generator_step, state, frozen, batch, rng):
    """One update: a step of discriminator and recogniser, one of the generator, and the statistics of the averages."""
    discriminator_rng, z_rng, generator_rng = jax.random.split(rng, 3)
    x = batch['image']
    z = networks.codes.draw(z_rng, len(x))
    state, discriminator_aux = discriminator_step(state, frozen, {'image': x}, discriminator_rng)
    state, generator_aux = generator_step(state, frozen, {'z': z}, generator_rng)
    after, extra = advance(state, optim), {}

    def averaged(name: str, x: Array):
        output, extra[name] = apply_averaged(getattr(networks, name), after.ema[name], state, state.extra[name], x)
        return output

    averaged('generator', z)
    _, features = averaged('discriminator', x)
    averaged('recogniser', features)
    return after.replace(extra=extra), discriminator_aux.logs | generator_aux.logs


def encode(networks: Networks, state, frozen, batch, rng):
    """The codes that are likeliest by Q, [n, len(categories) + continuous]."""
    _, features = networks.fixed(state, 'discriminator', batch['image'])
    logits, mean, _ = networks.posterior(networks.fixed(state, 'recogniser', features))
    return jnp.concatenate([*(a.argmax(-1, keepdims=True).astype(jnp.float32) for a in logits), mean], -1)


def decode(networks: Networks, state, frozen, batch, latents, rng):
    """Images [n, H, W, C] of codes as `encode` returns them, all with the same noise."""
    codes = networks.codes
    chosen, numbers = latents[:, : len(codes.categories)], latents[:, len(codes.categories) :]
    most = jnp.array(codes.categories, jnp.float32) - 1
    chosen = jnp.clip(jnp.round(chosen), 0, most).astype(jnp.int32)
    z = jax.random.uniform(rng, (codes.noise,), minval=-1, maxval=1)
    z = jnp.broadcast_to(z, (len(latents), codes.noise))
    return networks.fixed(state, 'generator', jnp.concatenate([z, codes.one_hot(chosen), numbers], -1))


def sample(networks: Networks, state, frozen, batch, rng):
    """Images [n, H, W, C] of the noise and codes drawn for the samples of a batch."""
    return networks.fixed(state, 'generator', networks.codes.drawn(batch, rng))


def evaluate(networks: Networks, state, frozen, batch, rng):
    """{'discriminator': value [n] of each image, 'information': log Q + H [n] of a sample's codes, nats}."""
    z = networks.codes.drawn(batch, rng)
    value, _ = networks.fixed(state, 'discriminator', batch['image'])
    _, features = networks.fixed(state, 'discriminator', networks.fixed(state, 'generator', z))
    of_categories, of_numbers = networks.information(networks.fixed(state, 'recogniser', features), z)
    return {'discriminator': value, 'information': of_categories + of_numbers}


@options.checked
def build(
    context: Context,
    *,
    noise: Count = 62,
    categories: Annotated[tuple[int, ...], '[2, inf)'] = (10,),
    continuous: Annotated[int, '[0, inf)'] = 2,
    width: Count = 64,
    levels: Count = 2,
    hidden: Count = 1024,
    recogniser_hidden: Count = 128,
    discriminator_norm: bool = True,
    r1: NonNegative = 0.0,
    category_weight: NonNegative = 1.0,
    continuous_weight: NonNegative = 0.1,
    slope: Rate = 0.1,
    unit_deviation: bool = False,
) -> Family:
    """InfoGAN.

    Args:
      noise: dimensions of z, uniform on [-1, 1].
      categories: number of values of each categorical code.
      continuous: number of continuous codes.
      width, levels, hidden: of generator and discriminator: channels of the largest map but the image, resolution
        levels, each half as large as the one before, and units of the linear layer; see networks/infogan.py.
      recogniser_hidden: units of Q's linear layer.
      discriminator_norm: batch normalisation of the discriminator, as published.
      r1: weight of R1 (losses/adversarial.py), for a discriminator without batch normalisation.
      category_weight, continuous_weight: lambda, the weights of L_I for the two kinds of code.
      slope: of the leaky ReLUs: 0.1 in the paper, 0.01 in the released code.
      unit_deviation: Q's normals have a standard deviation of 1, as in the released code, and it learns their means
        alone.

    encode returns the codes that are likeliest by Q, float32 [n, len(categories) + continuous]: of a category its
    number, of a continuous code its mean. decode takes such codes, categories rounded, with one draw of the noise for
    all, by its key: two images differ by their codes alone.

    Logs: 'information/categories' and '/continuous', L_I in nats; of categories it is at most the sum of the logs of
    their numbers of values. evaluate returns 'discriminator', the value of the image, and 'information', of the codes
    of a sample with the example's number.

    Raises:
      UserError: values that do not fit each other or the data.
    """
    if not len(categories) + continuous:
        raise UserError('config.model.categories and continuous are no code at all: there must be one or more')
    check_penalties(discriminator_norm, r1=r1)
    check_size(context.image, 2**levels, f'config.model.levels = {levels}')
    sizes, common = (width, levels, hidden), dict(slope=slope, dtype=context.dtype)
    networks = Networks(
        Generator(context.image, *sizes, dtype=context.dtype),
        Discriminator(*sizes, norm=discriminator_norm, **common),
        Recogniser(sum(categories) + 2 * continuous, recogniser_hidden, **common),
        Codes(noise, categories, continuous),
        unit_deviation,
    )
    weights, optim, partial = (category_weight, continuous_weight), context.optim, functools.partial
    steps = (
        gradient_step(partial(discriminator_loss, networks, r1, weights), optim, 'discriminator', 'recogniser'),
        gradient_step(partial(generator_loss, networks, weights), optim, 'generator'),
    )
    return Family(
        partial(init, networks, optim),
        partial(update, networks, optim, *steps),
        partial(sample, networks),
        partial(evaluate, networks),
        partial(encode, networks),
        partial(decode, networks),
        divisor=2**levels,
        statistics=True,
        latents=Latents(shape=(len(categories) + continuous,)),
        larger=('information',),
    )
