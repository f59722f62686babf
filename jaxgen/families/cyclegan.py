"""CycleGAN: translation between two domains of unpaired images (Zhu et al. 2017, arXiv 1703.10593).

X are the images of the feature 'other', Y those of 'image', and none of X has a counterpart in Y. Two generators
G: X -> Y and F: Y -> X learn to undo each other, so that a translation keeps the image's content, and each of two
discriminators classifies images of its domain as real or translated. With the least-squares loss (section 4), the
generators minimise

    E (D_Y(G(x)) - 1)^2 + E (D_X(F(y)) - 1)^2 + cycle * (E |F(G(x)) - x| + E |G(F(y)) - y|)
        + cycle * identity * (E |G(y) - y| + E |F(x) - x|)

(eq. 3; the last line is section 5.2's identity loss: an image of the target domain stays as it is) and the
discriminators

    1/2 (E (D_Y(y) - 1)^2 + E D_Y(G(x))^2) + the same of D_X.

Their inputs are a history of translations, not only the newest (Shrivastava et al. 2017): a pool in State.extra holds
some of each domain. While it is not full, new translations are inputs and kept; then every second one is an input and
not kept, and the others replace an older one, which is the input instead. It is saved with the weights, and filled
image by image in the order of the batch, so that neither stopping nor the number of devices changes what is in it.

There is no noise: a sample is G(x), of the domain of `image`, and a function of its x in the test split. Of a person's
own images those called 'image' are translated the other way, F(y).

The published generators have instance norms, which remove the mean of every map. In photographs much else is left; in
drawings with flat colours hardly anything, and `norm` = 'group', of several channels at once, keeps it. The same holds
for the discriminators (`discriminator_norm`).
"""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size, size_text
from jaxgen.contract import Aux, Context, Family, Input, advance, gradient_step, new_state, shard_batch
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import least_squares_discriminator, least_squares_generator
from jaxgen.networks import patchgan
from jaxgen.networks.cyclegan import Generator
from jaxgen.networks.layers import NORMS, apply_in_training
from jaxgen.options import Count, NonNegative, OneOf

Array = jax.Array

# {domain: (the generator that translates into it, the one that translates from it)}
GENERATORS = {'image': ('forward', 'backward'), 'other': ('backward', 'forward')}
OPPOSITE = {'image': 'other', 'other': 'image'}


class Networks(NamedTuple):
    """Both generators and both discriminators, as functions of their own weights."""

    generator: Generator
    discriminator: patchgan.PatchGAN

    def translate(self, weights, x: Array) -> Array:
        """G(x) or F(y), images [n, H, W, C]."""
        return self.generator.apply({'params': weights}, x)

    def discriminate(self, weights, x: Array) -> Array:
        """D(x), values by patch [n, h, w]; batch norms are by this batch."""
        return apply_in_training(self.discriminator, weights, x)[0]


def query_pool(pool: Array, filled: Array, images: Array, rng: Array) -> tuple[Array, Array, Array]:
    """A discriminator's inputs in place of images [n, H, W, C], one after another, and the pool and the number of its
    entries that are filled afterwards; see above.

    Args:
      pool: [size, H, W, C].
      filled: int32 scalar.
    """
    chex.assert_equal_shape_suffix([pool, images], 3)
    size = len(pool)

    def one(carry, step):
        pool, filled = carry
        image, key = step
        coin_key, index_key = jax.random.split(key)
        full, swap = filled == size, jax.random.bernoulli(coin_key)
        index = jnp.where(full, jax.random.randint(index_key, (), 0, size), filled)
        old = pool[index]
        pool = pool.at[index].set(jnp.where(full & ~swap, old, image))
        return (pool, jnp.minimum(filled + 1, size)), jnp.where(full & swap, old, image)

    (pool, filled), inputs = jax.lax.scan(one, (pool, filled), (images, jax.random.split(rng, len(images))))
    return inputs, pool, filled


def absolute(x: Array, y: Array) -> Array:
    """Mean absolute difference of each example, [n]."""
    chex.assert_equal_shape([x, y])
    return jnp.abs(x - y).mean((1, 2, 3))


def generator_loss(nets: Networks, params, state, frozen, batch, rng, *, cycle: float, identity: float):
    """Full objective of both generators (eq. 3, with the identity loss of section 5.2)."""
    adversarial, cycle_error, identity_error = 0.0, 0.0, 0.0
    for domain, (into, back) in GENERATORS.items():
        x = batch[OPPOSITE[domain]]
        translated = nets.translate(params[into], x)
        # Twice: the paper's least-squares loss has no half here.
        adversarial += 2 * least_squares_generator(nets.discriminate(params[f'discriminator_{domain}'], translated))
        cycle_error += absolute(nets.translate(params[back], translated), x).mean()
        if identity:
            identity_error += absolute(nets.translate(params[into], batch[domain]), batch[domain]).mean()
    value = adversarial + cycle * (cycle_error + identity * identity_error)
    logs = {'generator_loss': value, 'adversarial': adversarial, 'cycle_error': cycle_error}
    return value, Aux(logs | ({'identity_error': identity_error} if identity else {}))


def discriminator_loss(nets: Networks, params, state, frozen, batch, rng):
    """Least-squares losses of both discriminators, on images of their domains and on translations into them."""
    value = 0.0
    for domain in GENERATORS:
        weights = params[f'discriminator_{domain}']
        real, fake = (nets.discriminate(weights, batch[name]) for name in (domain, f'translated_{domain}'))
        value += least_squares_discriminator(real, fake)
    return value, Aux({'discriminator_loss': value})


def reconstructions(nets: Networks, weights, batch: dict) -> dict[str, Array]:
    """{domain: [3, n, H, W, C]}: its images, these translated, and translated back, of the domains in the batch."""
    out = {}
    for domain, (back, from_it) in GENERATORS.items():
        if domain not in batch:
            continue
        translated = nets.translate(weights[from_it], batch[domain])
        out[domain] = jnp.stack([batch[domain], translated, nets.translate(weights[back], translated)])
    return out


def evaluate(nets: Networks, state, frozen, batch, rng):
    """Errors of cycle consistency and of the identity, see `build`."""
    metrics = {}
    for domain, (x, _, back) in reconstructions(nets, state.ema, batch).items():
        metrics[f'cycle/{domain}'] = absolute(back, x)
        metrics[f'identity/{domain}'] = absolute(nets.translate(state.ema[GENERATORS[domain][0]], x), x)
    return metrics


@options.checked
def build(
    context: Context,
    *,
    width: Count = 64,
    halvings: Annotated[int, '[0, inf)'] = 2,
    blocks: Count = 9,
    norm: Annotated[str, OneOf(*NORMS)] = 'instance',
    cycle: NonNegative = 10.0,
    identity: NonNegative = 0.5,
    pool: Annotated[int, '[0, inf)'] = 50,
    discriminator_channels: Count = 64,
    discriminator_layers: Count = 3,
    discriminator_norm: Annotated[str, OneOf(*patchgan.NORMS)] = 'instance',
) -> Family:
    """CycleGAN.

    Args:
      width: channels of the generators' first convolution.
      halvings: of the image, before the residual blocks.
      blocks: residual blocks of the generators.
      norm: of the generators, see above.
      cycle: weight of the cycle consistency loss.
      identity: weight of the identity loss, as a multiple of `cycle`; 0: none.
      pool: older translations among each discriminator's inputs; 0: none.
      discriminator_channels, discriminator_layers, discriminator_norm: see networks/patchgan.py.

    sample translates images 'other' of the test split into the domain of 'image'. trajectory displays both cycles.
    evaluate returns for each example 'cycle/other' and 'cycle/image', the absolute error of each image translated and
    translated back, and 'identity/image' and 'identity/other', that of an image of the target domain, which should stay
    as it is: means over pixels in [-1, 1]. They do not measure how good translations look.

    Raises:
      UserError: a value that cannot work.
    """
    divisor = 2**halvings
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    if min(context.image[:2]) < max(4, 2 * divisor):
        raise UserError(
            f'config.data.size = {size_text(context.image)} is too small for config.model.halvings = {halvings}: '
            f'it must be {max(4, 2 * divisor)} or more'
        )
    patchgan.check('model.discriminator_layers', context.image, discriminator_layers)

    nets = Networks(
        Generator(width, halvings, blocks, norm, context.remat, context.dtype),
        patchgan.PatchGAN(discriminator_channels, discriminator_layers, discriminator_norm, dtype=context.dtype),
    )
    generator_step = gradient_step(
        functools.partial(generator_loss, nets, cycle=cycle, identity=identity), context.optim, 'forward', 'backward'
    )
    discriminator_step = gradient_step(
        functools.partial(discriminator_loss, nets), context.optim, 'discriminator_image', 'discriminator_other'
    )

    def init(rng, batch, frozen):
        x = batch['image'][:1]
        keys = dict(zip(('forward', 'backward', *GENERATORS), jax.random.split(rng, 4), strict=True))
        params = {
            **{name: nets.generator.init(keys[name], x)['params'] for name in ('forward', 'backward')},
            **{f'discriminator_{name}': nets.discriminator.init(keys[name], x)['params'] for name in GENERATORS},
        }
        extra = {name: jnp.zeros((pool, *context.image)) for name in GENERATORS} | {'filled': jnp.zeros((), jnp.int32)}
        return new_state(params, context.optim, extra=extra if pool else None, ema=('forward', 'backward'))

    def update(state, frozen, batch, rng):
        generator_rng, discriminator_rng, *pool_rngs = jax.random.split(rng, 4)
        fake = {
            domain: nets.translate(state.params[into], batch[OPPOSITE[domain]])
            for domain, (into, _) in GENERATORS.items()
        }
        state, generator = generator_step(state, frozen, batch, generator_rng)
        if pool:
            extra = dict(state.extra)
            for domain, pool_rng in zip(GENERATORS, pool_rngs, strict=True):
                old = state.extra[domain], state.extra['filled']
                fake[domain], extra[domain], extra['filled'] = query_pool(*old, fake[domain], pool_rng)
            state = state.replace(extra=extra)
        # What comes out of the pools, one by one, lies on every device.
        batch = batch | {f'translated_{domain}': shard_batch(images) for domain, images in fake.items()}
        state, discriminator = discriminator_step(state, frozen, batch, discriminator_rng)
        return advance(state, context.optim), generator.logs | discriminator.logs

    def sample(state, frozen, batch, rng):
        domain = 'other' if 'other' in batch else 'image'
        return nets.translate(state.ema[GENERATORS[domain][1]], batch[domain])

    def trajectory(state, frozen, batch, rng):
        cycles = reconstructions(nets, state.ema, batch)
        return {domain: cycles[domain] for domain in ('other', 'image') if domain in cycles}

    return Family(
        init,
        update,
        sample,
        functools.partial(evaluate, nets),
        trajectory=trajectory,
        conditions=('other',),
        inputs=(Input('image', context.image, 'other'),),
        displayed=('image',),
        divisor=divisor,
    )
