"""GANs: a generator and a discriminator in adversarial training (Goodfellow et al. 2014, arXiv 1406.2661).

The discriminator D separates data x from samples G(z), z ~ N(0, I); the generator G learns samples that D takes for
data. Systems are configs of this one family:

    adversarial      what D maximises, what G minimises, see losses/adversarial.py
      minimax          E log s(D(x)) + E log(1 - s(D(G))), and E log(1 - s(D(G)))         GAN, eq. 1; s is the sigmoid
      non_saturating   the same, and -E log s(D(G))                                       GAN, section 3; DCGAN
      wasserstein      E D(x) - E D(G), and -E D(G)                                       WGAN, 1701.07875; WGAN-GP
      hinge            -E max(0, 1 - D(x)) - E max(0, 1 + D(G)), and -E D(G)              SN-GAN, BigGAN
      least_squares    -E (D(x) - 1)^2 / 2 - E D(G)^2 / 2, and E (D(G) - 1)^2 / 2         LSGAN, 1611.04076

    what keeps D smooth
      weight_clip      its weights stay within this after each of its steps               WGAN
      penalty          E (|grad D| - 1)^2 on lines between data and samples               WGAN-GP, 1704.00028, eq. 3
      r1               E |grad D|^2 / 2 at data                                           Mescheder et al., 1801.04406
      spectral         kernels divided by their largest singular value                    SN-GAN, 1802.05957

    network          mlp | dcgan | resnet | biggan, see networks/gan.py
    conditional      '' | concat (1411.1784) | projection (1802.05637), conditioning on the class

One update makes `discriminator_steps` = k steps of D, each on its own k-th of the batch, and one of G, on
`generator_batch` latents for each image of such a part. Samples in a step of D have the classes of the data beside
them. Both networks have their own optimiser, and neither step touches the other's weights.

Batch normalisation: training normalises by the batch; data and samples go through D in batches of their own. Samples
are drawn with fixed statistics, those of the averaged generator on the latents of each update in a running mean, see
`layers.apply_averaged`. They would belong to other latents where samples are truncated: their statistics are gathered
anew in sampling, from truncated latents (standing statistics, as BigGAN's release gathers them). The papers normalise
their samples by their own batch. State.extra holds, for the generator, its average and the discriminator, batch
statistics and the vectors of spectral normalisation: those of a network go on by one iteration with each of its own
steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxgen import options
from jaxgen.augmentation.diff_augment import AUGMENTATIONS, augment
from jaxgen.checks import check_discriminator, check_labels, check_parts
from jaxgen.contract import (
    Aux,
    Context,
    Family,
    Latents,
    advance,
    by_settings,
    gradient_step,
    new_state,
    repeat,
    running_mean,
    shard_batch,
    store,
)
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import ADVERSARIAL_LOSSES, check_penalties, gradient_penalty, lazily, r1_penalty
from jaxgen.networks.gan import NETWORKS
from jaxgen.networks.layers import STATISTICS_DECAY, apply_averaged, apply_in_training
from jaxgen.networks.spectral import normalise, orthogonality, start
from jaxgen.optim import Optim, steps_within_update
from jaxgen.options import TRACED, Component, Count, NonNegative, OneOf, Section
from jaxgen.randomness import example_keys

Array = jax.Array

# Of truncated samples: batches whose statistics are averaged, and latents of each. The release takes 16 batches.
STANDING_BATCHES, STANDING_SIZE = 16, 64

OF_NETWORK = (
    *('hidden', 'width', 'discriminator_width', 'multipliers', 'discriminator_norm'),
    *('halvings', 'attention', 'pooling', 'embedding'),
)
FORMER = {'game': 'adversarial', 'network': 'network.name', **{name: f'network.{name}' for name in OF_NETWORK}}


class Networks(NamedTuple):
    """Both networks, and what they take."""

    generator: nn.Module
    discriminator: nn.Module
    latent: int  # dimensions of z
    classes: int = 0  # of the condition; 0: there is none

    def condition(self, batch: dict[str, Array]) -> Array | None:
        """The class, one-hot [n, classes], or None."""
        return jax.nn.one_hot(batch['label'], self.classes) if self.classes else None


class Objective(NamedTuple):
    """What the networks minimise; the fields of `build` of these names."""

    adversarial: str
    penalty: float
    one_sided: bool
    r1: float
    r1_every: int
    orthogonal: float
    augmentation: tuple[str, ...]
    dequantise: bool


def discriminator_loss(networks: Networks, objective: Objective, params, state, frozen, batch, rng):
    """Loss of D on images of data and as many samples, with its penalties."""
    z_rng, pixel_rng, penalty_rng, augment_rng = jax.random.split(rng, 4)
    x, c = batch['image'], networks.condition(batch)
    if objective.dequantise:
        x = x + jax.random.uniform(pixel_rng, x.shape, minval=-1 / 255, maxval=1 / 255)
    z = shard_batch(jax.random.normal(z_rng, (len(x), networks.latent)))
    weights, _ = normalise(params['generator'], state.extra['generator']['vectors'])
    fake, _ = apply_in_training(networks.generator, weights, z, c)
    kinds = objective.augmentation
    x, fake = (augment(y, k, kinds) for y, k in zip((x, fake), jax.random.split(augment_rng), strict=True))

    weights, vectors = normalise(params['discriminator'], state.extra['discriminator']['vectors'])

    def critic(x):
        return apply_in_training(networks.discriminator, weights, x, c)[0]

    real_values, statistics = apply_in_training(networks.discriminator, weights, x, c)
    fake_values = critic(fake)
    value = ADVERSARIAL_LOSSES[objective.adversarial][0](real_values, fake_values)
    logs = {'discriminator_real': real_values.mean(), 'discriminator_fake': fake_values.mean()}
    if objective.penalty:
        logs['penalty'] = gradient_penalty(critic, x, fake, penalty_rng, objective.one_sided).mean()
        value = value + objective.penalty * logs['penalty']
    if objective.r1:
        logs['r1'] = lazily(lambda: r1_penalty(critic, x).mean(), state.step, objective.r1_every)
        value = value + objective.r1 * logs['r1']
    return value, Aux({'discriminator_loss': value, **logs}, {'vectors': vectors, 'batch_stats': statistics})


def generator_loss(networks: Networks, objective: Objective, params, state, frozen, batch, rng):
    """Loss of G on latents batch['z']."""
    c = networks.condition(batch)
    weights, vectors = normalise(params['generator'], state.extra['generator']['vectors'])
    images, _ = apply_in_training(networks.generator, weights, batch['z'], c)
    images = augment(images, rng, objective.augmentation)
    weights, _ = normalise(params['discriminator'], state.extra['discriminator']['vectors'])
    values, _ = apply_in_training(networks.discriminator, weights, images, c)
    value = ADVERSARIAL_LOSSES[objective.adversarial][1](values)
    if objective.orthogonal:
        value = value + objective.orthogonal * orthogonality(params['generator'])
    return value, Aux({'generator_loss': value}, {'vectors': vectors, 'batch_stats': {}})


def clipped(optim: Optim, limit: float) -> Optim:
    """`optim`, with the discriminator's weights within [-limit, limit] after each step (WGAN, algorithm 1)."""

    def clip(updates, params):
        return jax.tree.map(lambda u, w: jnp.clip(w + u, -limit, limit) - w, updates, params)

    def tx(name: str, times: int = 1) -> optax.GradientTransformation:
        own = optim.tx(name, times)
        return optax.chain(own, optax.stateless(clip)) if name == 'discriminator' else own

    return optim._replace(tx=tx)


def network_step(loss, optim: Optim, name: str, times: int = 1):
    """So many steps of one network, each followed by its entry of State.extra: vectors as they are, batch statistics in
    their running mean."""

    def entry(state, kept):
        statistics = running_mean(state, state.extra[name]['batch_stats'], kept['batch_stats'], STATISTICS_DECAY)
        return {name: {'vectors': kept['vectors'], 'batch_stats': statistics}}

    return repeat(store(gradient_step(loss, steps_within_update(optim, times), name), entry), times)


def init(networks: Networks, optim: Optim, spectral: tuple[str, ...], discriminator_steps: int, rng, batch, frozen):
    """The state before the first update: both networks, and of the generator an average."""
    generator_rng, discriminator_rng, *vector_rngs = jax.random.split(rng, 4)
    parts = discriminator_steps * optim.accumulate
    check_parts(len(batch['image']), parts, 'config.model.discriminator_steps (by config.optim.accumulate)')
    one = {name: x[:1] for name, x in batch.items()}
    c = networks.condition(one)
    variables = {
        'generator': networks.generator.init(generator_rng, jnp.zeros((1, networks.latent)), c),
        'discriminator': networks.discriminator.init(discriminator_rng, one['image'], c),
    }
    params = {name: variables[name]['params'] for name in variables}
    vectors = {
        name: start(key, params[name]) if name in spectral else {}
        for name, key in zip(variables, vector_rngs, strict=True)
    }
    statistics = {name: variables[name].get('batch_stats', {}) for name in variables}
    extra = {
        'generator': {'vectors': vectors['generator'], 'batch_stats': {}},
        'average': {
            'vectors': jax.tree.map(jnp.copy, vectors['generator']),
            'batch_stats': statistics['generator'],
        },
        'discriminator': {'vectors': vectors['discriminator'], 'batch_stats': statistics['discriminator']},
    }
    # Only the generator makes samples; an averaged discriminator would serve nothing.
    return new_state(params, optim, extra, ema=('generator',))


class Steps(NamedTuple):
    """The optimiser's steps of an update."""

    discriminator: Callable  # all of them
    generator: Callable
    parts: int  # of the batch, one for each step of the discriminator
    generator_batch: int  # latents of the generator's step for each image of such a part


def update(networks: Networks, optim: Optim, steps: Steps, state, frozen, batch, rng):
    """One update, see above: the steps of D, the step of G, and the statistics of the average."""
    discriminator_rng, z_rng, generator_rng = jax.random.split(rng, 3)
    batch = {name: batch[name] for name in (('image', 'label') if networks.classes else ('image',))}
    n = len(batch['image']) // steps.parts * steps.generator_batch
    latents = {'z': shard_batch(jax.random.normal(z_rng, (n, networks.latent)))}
    if networks.classes:
        latents['label'] = shard_batch(jnp.resize(batch['label'], n))
    state, discriminator_aux = steps.discriminator(state, frozen, batch, discriminator_rng)
    state, generator_aux = steps.generator(state, frozen, latents, generator_rng)
    after, average = advance(state, optim), state.extra['average']
    weights, vectors = normalise(after.ema['generator'], average['vectors'])
    c = networks.condition(latents)
    _, statistics = apply_averaged(networks.generator, weights, state, average['batch_stats'], latents['z'], c)
    extra = {**state.extra, 'average': {'vectors': vectors, 'batch_stats': statistics}}
    return after.replace(extra=extra), discriminator_aux.logs | generator_aux.logs


def draw_latents(keys: Array, latent: int, truncation: Array | None) -> Array:
    """z [n, latent] by keys [n], of N(0, I); numbers beyond `truncation` are drawn again where it is not None."""

    def draw(key: Array) -> Array:
        if truncation is not None:
            return jax.random.truncated_normal(key, -truncation, truncation, (latent,))
        return jax.random.normal(key, (latent,))

    return jax.vmap(draw)(keys)


def standing_statistics(networks: Networks, truncation: Array, state):
    """Batch statistics of the averaged generator on truncated latents, the same in any call and for any seed."""
    weights, _ = normalise(state.ema['generator'], state.extra['average']['vectors'])

    def one(total, key):
        z_rng, label_rng = jax.random.split(key)
        z = shard_batch(draw_latents(jax.random.split(z_rng, STANDING_SIZE), networks.latent, truncation))
        labels = shard_batch(jax.random.randint(label_rng, (STANDING_SIZE,), 0, max(networks.classes, 1)))
        _, statistics = apply_in_training(networks.generator, weights, z, networks.condition({'label': labels}))
        return jax.tree.map(jnp.add, total, statistics), None

    zero = jax.tree.map(jnp.zeros_like, state.extra['average']['batch_stats'])
    total, _ = jax.lax.scan(one, zero, jax.random.split(jax.random.key(0), STANDING_BATCHES))
    return jax.tree.map(lambda x: x / STANDING_BATCHES, total)


def generate(networks: Networks, state, z: Array, c: Array | None, statistics=None) -> Array:
    """Images of the averaged generator, by its own running statistics where there are no others."""
    average = state.extra['average']
    weights, _ = normalise(state.ema['generator'], average['vectors'])
    return networks.generator.apply({'params': weights, 'batch_stats': statistics or average['batch_stats']}, z, c)


def sample(networks: Networks, state, frozen, batch, rng, settings: dict):
    """Images [n, H, W, C] of the latents drawn for the samples of a batch."""
    truncation = settings.get('truncation')
    z = draw_latents(example_keys(rng, batch), networks.latent, truncation)
    # Those of training are of N(0, I), and with truncation the generator's activations have other ones.
    gather = truncation is not None and state.extra['average']['batch_stats']
    statistics = standing_statistics(networks, truncation, state) if gather else None
    return generate(networks, state, z, networks.condition(batch), statistics)


def decode(networks: Networks, state, frozen, batch, latents, rng):
    """Images [n, H, W, C] of latents [n, latent], not truncated."""
    return generate(networks, state, latents, networks.condition(batch))


def evaluate(networks: Networks, state, frozen, batch, rng):
    """{'discriminator': value [n] of each image}."""
    check_discriminator(state.params)
    own = state.extra['discriminator']
    weights, _ = normalise(state.params['discriminator'], own['vectors'])
    variables = {'params': weights, 'batch_stats': own['batch_stats']}
    values = networks.discriminator.apply(variables, batch['image'], networks.condition(batch))
    return {'discriminator': values}


def check(context: Context, network: dict, latent: int, conditional: str, penalty: float, r1: float) -> None:
    """Raises UserError for fields that do not fit each other or the data."""
    check_labels(context, bool(conditional))
    check_penalties(network.get('discriminator_norm', False), 'network.discriminator_norm', penalty=penalty, r1=r1)
    pieces = len(network['multipliers']) if network['name'] == 'biggan' else 1
    if latent % pieces or (network['name'] == 'biggan' and conditional == 'concat'):
        raise UserError(
            f"config.model.network.name = 'biggan' cuts z into {pieces} pieces and is conditioned by projection: "
            f'config.model.latent = {latent} must be a multiple, config.model.conditional is {conditional!r}'
        )


@options.checked
def build(
    context: Context,
    *,
    adversarial: Annotated[str, OneOf(*ADVERSARIAL_LOSSES)] = 'non_saturating',
    network: Annotated[Section, Component(NETWORKS)] = 'dcgan',
    latent: Count = 100,
    conditional: Annotated[str, OneOf('', 'concat', 'projection')] = '',
    discriminator_steps: Count = 1,
    generator_batch: Count = 1,
    weight_clip: NonNegative = 0.0,
    penalty: NonNegative = 0.0,
    one_sided: bool = False,
    r1: NonNegative = 0.0,
    r1_every: Count = 1,
    spectral: Annotated[tuple[str, ...], OneOf('generator', 'discriminator')] = (),
    orthogonal: NonNegative = 0.0,
    augmentation: Annotated[tuple[str, ...], OneOf(*AUGMENTATIONS)] = (),
    dequantise: bool = False,
    truncation: Annotated[NonNegative, TRACED] = 0.0,
) -> Family:
    """A generative adversarial network.

    Args:
      adversarial: the adversarial loss, by its name in losses/adversarial.py.
      network: the pair of networks, by its name in networks/gan.py; 'resnet' is that of WGAN-GP and SN-GAN.
      latent: dimensions of z.
      conditional: '', or how the networks are conditioned on the class: 'concat' | 'projection', see networks/gan.py.
      discriminator_steps: of each update.
      generator_batch: latents of the generator's step for each image of a discriminator's.
      weight_clip: limit of the discriminator's weights; 0: none.
      penalty, one_sided: weight of the gradient penalty; whether it is of slopes above 1 only.
      r1, r1_every: gamma, the weight of R1; taken in every r1_every-th update only, where it counts as often (lazy
        regularisation, Karras et al. 2020).
      spectral: networks with spectral normalisation, of 'generator' and 'discriminator'.
      orthogonal: weight of the orthogonal regularisation of the generator (BigGAN, eq. 3).
      augmentation: of the discriminator's inputs, of 'colour', 'translation' and 'cutout', see
        augmentation/diff_augment.py. Penalties are then taken at the augmented images.
      dequantise: real pixels get uniform noise as wide as one of 256 quantisation levels.
      truncation: samples are drawn with numbers of z beyond it drawn again (BigGAN, section 3.1); 0: all of N(0, I).
        Where there is batch normalisation every call of `sample` then also gathers its statistics, from 1,024 truncated
        latents with classes that are drawn evenly: draw large batches.

    Logs: the losses with their penalties, the discriminator's mean values of data and samples (their difference is
    the estimate of the Wasserstein distance where the loss is that), and the penalties without their weights.

    evaluate returns 'discriminator' per image: its value, of meaning only next to that of other images under the same
    discriminator (test images well below training images: it overfits).

    Raises:
      UserError: values that do not fit each other.
    """
    check(context, network, latent, conditional, penalty, r1)
    fields = {name: value for name, value in network.items() if name != 'name'}
    pair = NETWORKS[network['name']](context.image, conditional == 'projection', context.dtype, context.remat, **fields)
    networks = Networks(pair.generator, pair.discriminator, latent, context.classes if conditional else 0)
    objective = Objective(adversarial, penalty, one_sided, r1, r1_every, orthogonal, augmentation, dequantise)
    optim = clipped(context.optim, weight_clip) if weight_clip else context.optim
    partial = functools.partial

    def settings():
        return {'truncation': truncation} if truncation else {}

    steps = Steps(
        network_step(partial(discriminator_loss, networks, objective), optim, 'discriminator', discriminator_steps),
        network_step(partial(generator_loss, networks, objective), optim, 'generator'),
        parts=discriminator_steps,
        generator_batch=generator_batch,
    )
    return Family(
        partial(init, networks, optim, spectral, discriminator_steps),
        partial(update, networks, optim, steps),
        by_settings(partial(sample, networks), settings),
        partial(evaluate, networks),
        decode=partial(decode, networks),
        conditions=('label',) if conditional else (),
        divisor=pair.divisor,
        free=('truncation',),
        sampling=('truncation',),
        settings=settings,
        statistics=network['name'] != 'mlp' or 'generator' in spectral,
        latents=Latents(shape=(latent,)),
    )
