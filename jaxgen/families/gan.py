"""GANs: a generator and a discriminator in a game (Goodfellow et al. 2014, arXiv 1406.2661).

The discriminator D tells data x from samples G(z), z ~ N(0, I); the generator G learns to be taken for data. Systems
are configs of this one family:

    game             what D maximises, what G minimises, see losses/adversarial.py
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
    conditional      '' | concat (1411.1784) | projection (1802.05637), how the class is told

One update makes `discriminator_steps` = k steps of D, each on its own k-th of the batch, and one of G, on
`generator_batch` latents for each image of such a part. Samples that D sees have the classes of the data beside them.

Both players have their own optimiser, and neither step touches the other's weights.

Batch normalisation: training normalises by the batch; D sees data and samples in batches of their own. Samples are
drawn with fixed statistics, so that an image does not depend on what is drawn with it: after each update the
averaged generator (the one that samples) runs once on the update's latents, and the running average of those
statistics is in State.extra. Statistics gathered in training instead would belong to other weights than those that
sample. They would belong to other latents too where samples are truncated: their statistics are gathered anew in
sampling, from truncated latents (standing statistics, as BigGAN's release gathers them). The papers normalise their
samples by their own batch. The vectors of spectral normalisation are kept in the same way: those of a player go on by
one iteration with each of its own steps.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxgen.augmentation.diff_augment import AUGMENTATIONS, augment
from jaxgen.checks import check_labels, check_parts, check_size
from jaxgen.contract import (
    Aux,
    Context,
    Family,
    Latents,
    advance,
    gradient_step,
    new_state,
    repeat,
    running_mean,
    shard_batch,
    store,
)
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import ADVERSARIAL_LOSSES, check_penalties, gradient_penalty, lazily, r1_penalty
from jaxgen.networks import gan as networks
from jaxgen.networks import spectral as spectral_norm
from jaxgen.networks.layers import STATISTICS_DECAY, apply_in_training
from jaxgen.optim import steps_within_update
from jaxgen.randomness import example_keys

Array = jax.Array

NETWORKS = ('mlp', 'dcgan', 'resnet', 'biggan')
CONDITIONALS = ('', 'concat', 'projection')
PLAYERS = ('generator', 'discriminator')
# Of truncated samples: batches whose statistics are averaged, and latents of each. The release takes 16 batches.
STANDING_BATCHES, STANDING_SIZE = 16, 64


def build(
    context: Context,
    *,
    game: str = 'non_saturating',
    network: str = 'dcgan',
    latent: int = 100,
    hidden: tuple[int, ...] = (256, 256),
    width: int = 64,
    discriminator_width: int = 0,
    multipliers: tuple[int, ...] = (8, 4, 2, 1),
    halvings: int = 0,
    attention: tuple[int, ...] = (),
    embedding: int = 0,
    pooling: str = 'mean',
    discriminator_norm: bool = True,
    conditional: str = '',
    discriminator_steps: int = 1,
    generator_batch: int = 1,
    weight_clip: float = 0.0,
    penalty: float = 0.0,
    one_sided: bool = False,
    r1: float = 0.0,
    r1_every: int = 1,
    spectral: tuple[str, ...] = (),
    orthogonal: float = 0.0,
    augmentation: tuple[str, ...] = (),
    dequantise: bool = False,
    truncation: float = 0.0,
) -> Family:
    """A generative adversarial network.

    Args:
      game: see above.
      network: 'mlp', of the sizes `hidden`; 'dcgan'; 'resnet', the residual networks of WGAN-GP and SN-GAN; 'biggan',
        these with z in pieces to every block, a shared embedding of the class and orthogonal initialisation.
      latent: dimensions of z.
      hidden: units of the generator's layers; the discriminator has them in reverse order.
      width, multipliers: channels of the generator's maps, from the smallest, are width * multipliers; the
        discriminator has the same in reverse order, with discriminator_width (0: the same) for width. The first map is
        smaller than the image by 2 ** len(multipliers) for 'dcgan', by 2 ** (len(multipliers) - 1) for the others.
      halvings: times that the residual discriminator halves the image; 0: one fewer than the generator doubles it.
      attention: heights of maps of the residual networks that have self-attention.
      embedding: dimensions of the shared embedding of 'biggan'; 0: the class itself goes to every norm.
      pooling: 'mean' | 'sum', of the residual discriminator's last map.
      discriminator_norm: batch normalisation in the discriminator of 'dcgan'.
      conditional: see networks/gan.py.
      weight_clip: 0: none.
      penalty, one_sided: weight of the gradient penalty; whether it is of slopes above 1 only.
      r1, r1_every: gamma, the weight of R1; taken in every r1_every-th update only, where it counts as often (lazy
        regularisation, Karras et al. 2020).
      spectral: players that are normalised, of 'generator' and 'discriminator'.
      orthogonal: weight of the orthogonal regularisation of the generator (BigGAN, eq. 3).
      augmentation: of what the discriminator sees, of 'colour', 'translation' and 'cutout', see losses/augmentation.py.
        Penalties are then taken at the changed images.
      dequantise: real pixels get uniform noise as wide as one of 256 levels.
      truncation: samples are drawn with numbers of z beyond it drawn again (BigGAN, section 3.1); 0: all of N(0, I).
        Where there is batch normalisation every call of `sample` then also gathers its statistics, from 1,024 truncated
        latents with classes that are drawn evenly: draw large batches.

    Logs: the losses with their penalties, the discriminator's mean values of data and samples (their difference is
    the estimate of the Wasserstein distance in that game), and the penalties without their weights.

    evaluate gives 'discriminator' per image: its value, of meaning only next to that of other
    images under the same discriminator (test images well below training images: it overfits).

    Raises:
      UserError: a value that cannot work.
    """
    height = context.image[0]
    residual = network in ('resnet', 'biggan')
    levels = {'mlp': 0, 'dcgan': len(multipliers)}.get(network, len(multipliers) - 1)
    halvings = halvings or max(levels - 1, 1)
    divisor = 2 ** (max(levels, halvings) if residual else levels)
    choices = [
        ('game', game, tuple(ADVERSARIAL_LOSSES)),
        ('network', network, NETWORKS),
        ('conditional', conditional, CONDITIONALS),
    ]
    choices += [('pooling', pooling, ('mean', 'sum')), *(('spectral', name, PLAYERS) for name in spectral)]
    choices += [('augmentation', name, tuple(AUGMENTATIONS)) for name in augmentation]
    for field, value, allowed in choices:
        if value not in allowed:
            raise UserError(f'config.model.{field} must be of {allowed}; it is {value!r}')
    check_labels(context, bool(conditional))
    if min(latent, width, discriminator_steps, generator_batch, r1_every, *hidden, *multipliers) < 1:
        raise UserError(
            'config.model: latent, hidden, width, multipliers, discriminator_steps, generator_batch and r1_every must '
            'be 1 or more'
        )
    if min(discriminator_width, halvings, embedding, weight_clip, penalty, r1, orthogonal, truncation) < 0:
        raise UserError(
            'config.model: discriminator_width, halvings, embedding, weight_clip, penalty, r1, orthogonal and '
            'truncation must be 0 or more'
        )
    if (network != 'mlp' and levels < 1) or (residual and halvings > levels + 1):
        raise UserError(
            f'config.model.multipliers = {multipliers} are too few for config.model.network = {network!r}'
            + (f' with halvings = {halvings}' if residual else '')
        )
    reason = f'config.model.multipliers = {multipliers}' + (f' and halvings = {halvings}' if residual else '')
    check_size(context.image, divisor, reason)
    sizes = [height >> i for i in range(levels)]
    if residual and any(size not in sizes or size % 2 for size in attention):
        raise UserError(f'config.model.attention: sizes must be even ones of {sizes}; they are {attention}')
    if network == 'biggan' and (latent % (levels + 1) or conditional == 'concat'):
        raise UserError(
            f"config.model.network = 'biggan' cuts z into {levels + 1} pieces and knows classes by projection: "
            f'config.model.latent = {latent} must be a multiple, config.model.conditional is {conditional!r}'
        )
    check_penalties(network == 'dcgan' and discriminator_norm, penalty=penalty, r1=r1)

    told = conditional == 'projection'
    of_dtype = dict(dtype=context.dtype)
    judge_width = discriminator_width or width
    if network == 'mlp':
        generator = networks.PerceptronGenerator(context.image, hidden, **of_dtype)
        discriminator = networks.PerceptronDiscriminator(hidden[::-1], told, **of_dtype)
    elif network == 'dcgan':
        generator = networks.DcganGenerator(context.image, width, multipliers, **of_dtype)
        discriminator = networks.DcganDiscriminator(judge_width, multipliers, discriminator_norm, told, **of_dtype)
    else:
        big = network == 'biggan'
        start = nn.initializers.orthogonal() if big else None
        both = dict(
            multipliers=multipliers, attention=attention, projection=told, kernel_init=start, remat=context.remat
        )
        generator = networks.ResidualGenerator(
            context.image, width, embedding=embedding if big else 0, skip=big, **both, **of_dtype
        )
        discriminator = networks.ResidualDiscriminator(
            judge_width, halvings=halvings, pooling=pooling, **both, **of_dtype
        )
    discriminator_objective, generator_objective = ADVERSARIAL_LOSSES[game]

    def clipping(name: str, times: int = 1) -> optax.GradientTransformation:
        tx = context.optim.tx(name, times)
        if name != 'discriminator':
            return tx
        clip = optax.stateless(
            lambda updates, params: jax.tree.map(
                lambda u, w: jnp.clip(w + u, -weight_clip, weight_clip) - w, updates, params
            )
        )
        return optax.chain(tx, clip)

    optim = context.optim._replace(tx=clipping) if weight_clip else context.optim

    def classes(batch) -> Array | None:
        """One-hot [n, classes], or None."""
        return jax.nn.one_hot(batch['label'], context.classes) if conditional else None

    def discriminator_loss(params, state, frozen, batch, rng):
        extra = state.extra
        z_rng, pixel_rng, penalty_rng, augment_rng = jax.random.split(rng, 4)
        x, c = batch['image'], classes(batch)
        if dequantise:
            x = x + jax.random.uniform(pixel_rng, x.shape, minval=-1 / 255, maxval=1 / 255)
        weights, _ = spectral_norm.normalise(params['generator'], extra['generator']['vectors'])
        fake, _ = apply_in_training(generator, weights, shard_batch(jax.random.normal(z_rng, (len(x), latent))), c)
        x, fake = (augment(y, k, augmentation) for y, k in zip((x, fake), jax.random.split(augment_rng), strict=True))

        weights, vectors = spectral_norm.normalise(params['discriminator'], extra['discriminator']['vectors'])

        def f(x):
            return apply_in_training(discriminator, weights, x, c)[0]

        real_values, statistics = apply_in_training(discriminator, weights, x, c)
        fake_values = f(fake)
        value = discriminator_objective(real_values, fake_values)
        logs = {'discriminator_real': real_values.mean(), 'discriminator_fake': fake_values.mean()}
        if penalty:
            logs['penalty'] = gradient_penalty(f, x, fake, penalty_rng, one_sided).mean()
            value = value + penalty * logs['penalty']
        if r1:
            logs['r1'] = lazily(lambda: r1_penalty(f, x).mean(), state.step, r1_every)
            value = value + r1 * logs['r1']
        return value, Aux({'discriminator_loss': value, **logs}, {'vectors': vectors, 'batch_stats': statistics})

    def generator_loss(params, state, frozen, batch, rng):
        extra = state.extra
        weights, vectors = spectral_norm.normalise(params['generator'], extra['generator']['vectors'])
        images, _ = apply_in_training(generator, weights, batch['z'], classes(batch))
        images = augment(images, rng, augmentation)
        weights, _ = spectral_norm.normalise(params['discriminator'], extra['discriminator']['vectors'])
        value = generator_objective(apply_in_training(discriminator, weights, images, classes(batch))[0])
        if orthogonal:
            value = value + orthogonal * spectral_norm.orthogonality(params['generator'])
        return value, Aux({'generator_loss': value}, {'vectors': vectors, 'batch_stats': {}})

    def entry(name: str, state, kept: dict) -> dict:
        """{name: entry of State.extra} after a step: vectors as they are, batch statistics in their running mean."""
        statistics = running_mean(state, state.extra[name]['batch_stats'], kept['batch_stats'], STATISTICS_DECAY)
        return {name: {'vectors': kept['vectors'], 'batch_stats': statistics}}

    def player_step(loss, name: str, times: int):
        step = gradient_step(loss, steps_within_update(optim, times), name)
        return repeat(store(step, functools.partial(entry, name)), times)

    discriminator_step = player_step(discriminator_loss, 'discriminator', discriminator_steps)
    generator_step = player_step(generator_loss, 'generator', 1)

    def init(rng, batch, frozen):
        generator_rng, discriminator_rng, *vector_rngs = jax.random.split(rng, 4)
        parts = discriminator_steps * optim.accumulate
        check_parts(len(batch['image']), parts, 'config.model.discriminator_steps (by config.optim.accumulate)')
        one = {name: x[:1] for name, x in batch.items()}
        variables = {
            'generator': generator.init(generator_rng, jnp.zeros((1, latent)), classes(one)),
            'discriminator': discriminator.init(discriminator_rng, one['image'], classes(one)),
        }
        params = {name: variables[name]['params'] for name in PLAYERS}
        vectors = {
            name: spectral_norm.start(k, params[name]) if name in spectral else {}
            for name, k in zip(PLAYERS, vector_rngs, strict=True)
        }
        statistics = {name: variables[name].get('batch_stats', {}) for name in PLAYERS}
        extra = {
            'generator': {'vectors': vectors['generator'], 'batch_stats': {}},
            'average': {
                'vectors': jax.tree.map(jnp.copy, vectors['generator']),
                'batch_stats': statistics['generator'],
            },
            'discriminator': {'vectors': vectors['discriminator'], 'batch_stats': statistics['discriminator']},
        }
        # Only the generator makes pictures; an averaged discriminator would serve nothing.
        return new_state(params, optim, extra, ema=('generator',))

    def update(state, frozen, batch, rng):
        discriminator_rng, z_rng, generator_rng = jax.random.split(rng, 3)
        batch = {name: batch[name] for name in ('image', *conditions)}
        n = len(batch['image']) // discriminator_steps * generator_batch
        given = {'z': shard_batch(jax.random.normal(z_rng, (n, latent)))}
        if conditional:
            given['label'] = shard_batch(jnp.resize(batch['label'], n))
        state, discriminator_aux = discriminator_step(state, frozen, batch, discriminator_rng)
        state, generator_aux = generator_step(state, frozen, given, generator_rng)
        after = advance(state, optim)
        weights, vectors = spectral_norm.normalise(after.ema['generator'], state.extra['average']['vectors'])
        _, statistics = apply_in_training(generator, weights, given['z'], classes(given))
        extra = {**state.extra, **entry('average', state, {'vectors': vectors, 'batch_stats': statistics})}
        return after.replace(extra=extra), discriminator_aux.logs | generator_aux.logs

    def paint(state, z: Array, c: Array | None, statistics=None) -> Array:
        weights, _ = spectral_norm.normalise(state.ema['generator'], state.extra['average']['vectors'])
        statistics = statistics or state.extra['average']['batch_stats']
        return generator.apply({'params': weights, 'batch_stats': statistics}, z, c)

    def standing_statistics(state):
        """Batch statistics of the averaged generator on truncated latents, those of any call and seed."""
        weights, _ = spectral_norm.normalise(state.ema['generator'], state.extra['average']['vectors'])

        def one(total, key):
            z_rng, label_rng = jax.random.split(key)
            z = shard_batch(jax.vmap(draw)(jax.random.split(z_rng, STANDING_SIZE)))
            labels = jax.random.randint(label_rng, (STANDING_SIZE,), 0, max(context.classes, 1))
            found = apply_in_training(generator, weights, z, classes({'label': shard_batch(labels)}))[1]
            return jax.tree.map(jnp.add, total, found), None

        start = jax.tree.map(jnp.zeros_like, state.extra['average']['batch_stats'])
        keys = jax.random.split(jax.random.key(0), STANDING_BATCHES)
        total, _ = jax.lax.scan(one, start, keys)
        return jax.tree.map(lambda x: x / STANDING_BATCHES, total)

    def decode(state, frozen, batch, latents, rng):
        return paint(state, latents, classes(batch))

    def draw(key) -> Array:
        if truncation:
            return jax.random.truncated_normal(key, -truncation, truncation, (latent,))
        return jax.random.normal(key, (latent,))

    def sample(state, frozen, batch, rng):
        # Those of training are of N(0, I), and with truncation the generator's activations have other ones.
        gather = truncation and state.extra['average']['batch_stats']
        statistics = standing_statistics(state) if gather else None
        return paint(state, jax.vmap(draw)(example_keys(rng, batch)), classes(batch), statistics)

    def evaluate(state, frozen, batch, rng):
        weights, _ = spectral_norm.normalise(state.params['discriminator'], state.extra['discriminator']['vectors'])
        variables = {'params': weights, 'batch_stats': state.extra['discriminator']['batch_stats']}
        return {'discriminator': discriminator.apply(variables, batch['image'], classes(batch))}

    conditions = ('label',) if conditional else ()
    return Family(
        init,
        update,
        sample,
        evaluate,
        decode=decode,
        conditions=conditions,
        divisor=divisor,
        free=('truncation',),
        statistics=network != 'mlp' or 'generator' in spectral,
        latents=Latents(shape=(latent,)),
    )
