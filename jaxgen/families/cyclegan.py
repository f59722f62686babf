"""CycleGAN: translation between two sets of pictures that are not paired (Zhu et al. 2017, arXiv 1703.10593).

X are the pictures of the feature 'other', Y those of 'image', and no picture of one belongs to one of the other. Two
generators G: X -> Y and F: Y -> X learn to undo each other, so that what is turned keeps what it shows, and two
discriminators see to it that the results look like the other set. With the game of least squares (section 4), the
generators minimise

    E (D_Y(G(x)) - 1)^2 + E (D_X(F(y)) - 1)^2 + cycle * (E |F(G(x)) - x| + E |G(F(y)) - y|)
        + cycle * identity * (E |G(y) - y| + E |F(x) - x|)

(eq. 3; the last line is section 5.2's: what is of the right set already stays as it is) and the discriminators

    1/2 (E (D_Y(y) - 1)^2 + E D_Y(G(x))^2) + the same of D_X.

They see a history of translations, not only the newest (Shrivastava et al. 2017): a pool in State.extra holds some of
each kind. While it is not full what comes is shown and kept; then every second one is shown and not kept, and the
others take the place of an older one, which is shown instead. It is saved with the weights, and filled picture by
picture in the order of the batch, so that neither stopping nor the number of devices changes what is in it.

There is no noise: a sample is G(x), one of `image`, and a function of its x in the test split.

The published generators normalise each channel of each image, and so take from every map what is the same all over it.
Photographs survive that; of drawings with flat colours hardly anything is left to be told apart, and `norm` = 'group',
of several channels at once, keeps it. The same holds for the discriminators (`discriminator_norm`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, advance, gradient_step, new_state, shard_batch
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import least_squares_discriminator, least_squares_generator
from jaxgen.networks import patchgan
from jaxgen.networks.cyclegan import Generator
from jaxgen.networks.layers import NORMS, apply_in_training

Array = jax.Array


def through_pool(pool: Array, filled: Array, images: Array, rng: Array) -> tuple[Array, Array, Array]:
    """What a discriminator is shown of images [n, H, W, C], one after another, and the pool and how much of it is
    filled afterwards; see above.

    Args:
      pool: [size, H, W, C].
      filled: int32 scalar.
    """
    size = len(pool)

    def one(carry, step):
        pool, filled = carry
        image, key = step
        coin_key, slot_key = jax.random.split(key)
        full, swap = filled == size, jax.random.bernoulli(coin_key)
        slot = jnp.where(full, jax.random.randint(slot_key, (), 0, size), filled)
        old = pool[slot]
        pool = pool.at[slot].set(jnp.where(full & ~swap, old, image))
        return (pool, jnp.minimum(filled + 1, size)), jnp.where(full & swap, old, image)

    (pool, filled), shown = jax.lax.scan(one, (pool, filled), (images, jax.random.split(rng, len(images))))
    return shown, pool, filled


def build(
    context: Context,
    *,
    width: int = 64,
    halvings: int = 2,
    blocks: int = 9,
    norm: str = 'instance',
    cycle: float = 10.0,
    identity: float = 0.5,
    pool: int = 50,
    discriminator_channels: int = 64,
    discriminator_layers: int = 3,
    discriminator_norm: str = 'instance',
) -> Family:
    """CycleGAN.

    Args:
      width, halvings, blocks, norm: of the generators, see Generator.
      cycle: weight of the way there and back.
      identity: weight of the identity loss, as a multiple of `cycle`; 0: none.
      pool: older translations that each discriminator may be shown; 0: none.
      discriminator_channels, discriminator_layers, discriminator_norm: see networks/patchgan.py.

    sample turns pictures 'other' of the test split into such as 'image'. trajectory shows both ways there and back.
    evaluate gives per example 'cycle/other' and 'cycle/image', the absolute error of each picture after the way there
    and back, and 'identity/image' and 'identity/other', that of what should have stayed as it was: means over pixels
    in [-1, 1]. How good the translations look they cannot say.

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, _ = context.image
    divisor = 2**halvings
    if min(width, blocks) < 1 or min(halvings, pool) < 0:
        raise UserError('config.model: width and blocks must be 1 or more, halvings and pool 0 or more')
    if norm not in NORMS:
        raise UserError(f'config.model.norm must be one of {NORMS}; it is {norm!r}')
    if min(cycle, identity) < 0:
        raise UserError('config.model: cycle and identity must be 0 or more')
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    if min(height, columns) < max(4, 2 * divisor):
        raise UserError(
            f'config.data.size = {height} is too small for config.model.halvings = {halvings}: '
            f'it must be {max(4, 2 * divisor)} or more'
        )
    patchgan.check('discriminator_', context.image, discriminator_channels, discriminator_layers, discriminator_norm)

    generator = Generator(width, halvings, blocks, norm, context.remat, context.dtype)
    discriminator = patchgan.PatchGAN(
        discriminator_channels, discriminator_layers, discriminator_norm, dtype=context.dtype
    )
    # Each set, the generator that makes pictures of it, and that which makes others of them.
    ways = {'image': ('forward', 'backward'), 'other': ('backward', 'forward')}
    opposite = {'image': 'other', 'other': 'image'}

    def turn(weights, x: Array) -> Array:
        return generator.apply({'params': weights}, x)

    def judge(weights, x: Array) -> Array:
        """Values by patch, normalised by this batch where they are."""
        return apply_in_training(discriminator, weights, x)[0]

    def absolute(x: Array, y: Array) -> Array:
        """[n]"""
        return jnp.abs(x - y).mean((1, 2, 3))

    def generator_loss(params, state, frozen, batch, rng):
        deceit, back, same = 0.0, 0.0, 0.0
        for name, (make, undo) in ways.items():
            x = batch[opposite[name]]
            made = turn(params[make], x)
            # Twice: the paper's game has no half here.
            deceit += 2 * least_squares_generator(judge(params[f'discriminator_{name}'], made))
            back += absolute(turn(params[undo], made), x).mean()
            same += absolute(turn(params[make], batch[name]), batch[name]).mean() if identity else 0.0
        value = deceit + cycle * (back + identity * same)
        logs = {'generator_loss': value, 'deceit': deceit, 'cycle_error': back}
        return value, Aux(logs | ({'identity_error': same} if identity else {}))

    def discriminator_loss(params, state, frozen, batch, rng):
        value = 0.0
        for name in ways:
            weights = params[f'discriminator_{name}']
            value += least_squares_discriminator(judge(weights, batch[name]), judge(weights, batch[f'made_{name}']))
        return value, Aux({'discriminator_loss': value})

    generator_step = gradient_step(generator_loss, context.optim, 'forward', 'backward')
    discriminator_step = gradient_step(discriminator_loss, context.optim, 'discriminator_image', 'discriminator_other')

    def init(rng, batch, frozen):
        x = batch['image'][:1]
        keys = dict(zip(('forward', 'backward', *ways), jax.random.split(rng, 4), strict=True))
        params = {
            **{name: generator.init(keys[name], x)['params'] for name in ('forward', 'backward')},
            **{f'discriminator_{name}': discriminator.init(keys[name], x)['params'] for name in ways},
        }
        extra = {name: jnp.zeros((pool, *context.image)) for name in ways} | {'filled': jnp.zeros((), jnp.int32)}
        return new_state(params, context.optim, extra=extra if pool else None, ema=('forward', 'backward'))

    def update(state, frozen, batch, rng):
        generator_rng, discriminator_rng, *pool_rngs = jax.random.split(rng, 4)
        made = {name: turn(state.params[make], batch[opposite[name]]) for name, (make, _) in ways.items()}
        state, generator = generator_step(state, frozen, batch, generator_rng)
        if pool:
            extra = dict(state.extra)
            for name, pool_rng in zip(ways, pool_rngs, strict=True):
                old = state.extra[name], state.extra['filled']
                made[name], extra[name], extra['filled'] = through_pool(*old, made[name], pool_rng)
            state = state.replace(extra=extra)
        # What comes out of the pools, one by one, lies on every device.
        shown = batch | {f'made_{name}': shard_batch(images) for name, images in made.items()}
        state, discriminator = discriminator_step(state, frozen, shown, discriminator_rng)
        return advance(state, context.optim), generator.logs | discriminator.logs

    def sample(state, frozen, batch, rng):
        return turn(state.ema['forward'], batch['other'])

    def there_and_back(state, batch) -> dict[str, Array]:
        """By set, [3, n, H, W, C]: its pictures, these turned, and turned back."""
        found = {}
        for name, (undo, make) in ways.items():
            made = turn(state.ema[make], batch[name])
            found[name] = jnp.stack([batch[name], made, turn(state.ema[undo], made)])
        return found

    def trajectory(state, frozen, batch, rng):
        found = there_and_back(state, batch)
        return {name: found[name] for name in ('other', 'image')}

    def evaluate(state, frozen, batch, rng):
        figures = {}
        for name, (x, _, back) in there_and_back(state, batch).items():
            figures[f'cycle/{name}'] = absolute(back, x)
            figures[f'identity/{name}'] = absolute(turn(state.ema[ways[name][0]], x), x)
        return figures

    # 'image' is for the way back, which trajectory shows.
    return Family(init, update, sample, evaluate, trajectory=trajectory, conditions=('other', 'image'), divisor=divisor)
