"""Inpainting with gated convolutions: DeepFill v2 (Yu et al. 2018, arXiv 1806.03589).

Of an image x what lies under a mask m is not given, and the generator paints it, first coarsely, y_1, then finely,
y_2 (networks/inpainting.py). The result keeps what is given, y = m y_2 + (1 - m) x, and a discriminator D, which sees
the mask too, judges every part of it at several scales:

    G: l1 * (E |x - y_1| + E |x - y_2|) - E D(y, m)
    D: 1/2 (E max(0, 1 - D(x, m)) + E max(0, 1 + D(y, m)))

(section 3.3). D's kernels are divided by their largest singular values (SN-PatchGAN); the vectors of that iteration
are State.extra and go on with each of D's steps, which come first.

Masks are strokes of a brush that goes to and fro, as free-form as a person's, and a square (section 3.4); or they are a
feature of the data, for masks of one's own. `sample` completes test images, each under the mask of its own key.
Unlike in the authors' code squares are of one size, and each image of a batch has a mask of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.augmentation.corruptions import holes, strokes
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, advance, gradient_step, new_state, shard_batch, store
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import hinge_discriminator, wasserstein_generator
from jaxgen.networks import spectral
from jaxgen.networks.inpainting import Discriminator, Generator
from jaxgen.randomness import example_keys

Array = jax.Array

MASKS = ('strokes', 'square', 'both')


def build(
    context: Context,
    *,
    masks: str = 'both',
    brush: tuple[float, float] = (12.0, 40.0),
    hole: int = 128,
    width: int = 24,
    dilations: tuple[int, ...] = (2, 4, 8, 16),
    attention: bool = True,
    l1: float = 1.0,
    discriminator_channels: int = 64,
    discriminator_layers: int = 6,
) -> Family:
    """DeepFill v2.

    Args:
      masks: 'strokes' | 'square' | 'both', made here; or a feature of the data, whose brighter half is the hole.
      brush: least and largest width of the brush, pixels.
      hole: side of the square, pixels.
      width, dilations, attention: of the generator, see networks/inpainting.py.
      l1: weight of the absolute errors.
      discriminator_channels, discriminator_layers: see there.

    evaluate gives per image, of its completion: 'squared_error' and 'absolute_error', means over all pixels in
    [-1, 1]; 'squared_error/hole', the mean over those of the hole alone; and 'hole', its share of the image.

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, _ = context.image
    divisor = 8 if attention else 4
    made = masks in MASKS
    if min(width, discriminator_channels) < 1 or width % 2 or discriminator_layers < 1 or min(dilations, default=1) < 1:
        raise UserError(
            'config.model: width, dilations, discriminator_channels and discriminator_layers must be 1 or more, width '
            'even'
        )
    if l1 < 0:
        raise UserError(f'config.model.l1 must be 0 or more; it is {l1}')
    if masks in ('strokes', 'both') and (len(brush) != 2 or not 0 < brush[0] <= brush[1]):
        raise UserError(f'config.model.brush must be the least and the largest width, more than 0; it is {brush}')
    if masks in ('square', 'both') and not 1 <= hole <= min(height, columns):
        raise UserError(f'config.model.hole must be from 1 to config.data.size = {height}; it is {hole}')
    check_size(context.image, divisor, f'config.model.attention = {attention}')

    generator = Generator(width, dilations, attention, context.remat, context.dtype)
    discriminator = Discriminator(discriminator_channels, discriminator_layers, context.dtype)

    def masked(batch, keys: Array) -> Array:
        """1 in holes, 0 elsewhere: float32 [n, H, W, 1]."""
        size = (height, columns)
        if not made:
            return (batch[masks].mean(-1, keepdims=True) > 0).astype(jnp.float32)
        stroke_keys, hole_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        found = jnp.zeros((len(keys), *size, 1), bool)
        if masks != 'square':
            found |= strokes(stroke_keys, size, brush)
        if masks != 'strokes':
            found |= holes(hole_keys, size, hole)
        return found.astype(jnp.float32)

    def paint(weights, x: Array, mask: Array) -> tuple[Array, Array, Array]:
        """The coarse image, the fine one, and the image that is completed with it."""
        coarse, fine = generator.apply({'params': weights}, x, mask)
        return coarse, fine, x + (fine - x) * mask

    def judge(weights, x: Array, mask: Array) -> Array:
        return discriminator.apply({'params': weights}, jnp.concatenate([x, mask], -1))

    def discriminator_loss(params, state, frozen, batch, rng):
        x, mask = batch['image'], batch['mask']
        weights, vectors = spectral.normalise(params['discriminator'], state.extra)
        _, _, y = paint(params['generator'], x, mask)
        real, fake = judge(weights, x, mask), judge(weights, y, mask)
        value = 0.5 * hinge_discriminator(real, fake)
        logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
        return value, Aux(logs, vectors)

    def generator_loss(params, state, frozen, batch, rng):
        x, mask = batch['image'], batch['mask']
        weights, _ = spectral.normalise(params['discriminator'], state.extra)
        coarse, fine, y = paint(params['generator'], x, mask)
        errors = jnp.abs(x - coarse).mean() + jnp.abs(x - fine).mean()
        value = l1 * errors + wasserstein_generator(judge(weights, y, mask))
        return value, Aux({'generator_loss': value, 'absolute_errors': errors})

    discriminator_step = store(gradient_step(discriminator_loss, context.optim, 'discriminator'))
    generator_step = gradient_step(generator_loss, context.optim, 'generator')

    def init(rng, batch, frozen):
        generator_rng, discriminator_rng, vectors_rng = jax.random.split(rng, 3)
        if not made and (batch[masks].shape[:3] != batch['image'].shape[:3] or batch[masks].ndim != 4):
            raise UserError(
                f'config.model.masks = {masks!r} is neither one of {MASKS} nor a picture of config.data.size = {height}'
            )
        x, mask = batch['image'][:1], jnp.zeros((1, height, columns, 1))
        params = {
            'generator': generator.init(generator_rng, x, mask)['params'],
            'discriminator': discriminator.init(discriminator_rng, jnp.concatenate([x, mask], -1))['params'],
        }
        vectors = spectral.start(vectors_rng, params['discriminator'])
        # Only the generator makes pictures; an averaged discriminator would serve nothing.
        return new_state(params, context.optim, extra=vectors, ema=('generator',))

    def update(state, frozen, batch, rng):
        mask_rng, discriminator_rng, generator_rng = jax.random.split(rng, 3)
        mask = shard_batch(masked(batch, jax.random.split(mask_rng, len(batch['image']))))
        batch = {'image': batch['image'], 'mask': mask}
        state, discriminator_aux = discriminator_step(state, frozen, batch, discriminator_rng)
        state, generator_aux = generator_step(state, frozen, batch, generator_rng)
        return advance(state, context.optim), discriminator_aux.logs | generator_aux.logs

    def complete(state, batch, rng) -> tuple[Array, Array, Array]:
        """Masks, coarse images and completed ones."""
        mask = masked(batch, example_keys(rng, batch))
        coarse, _, y = paint(state.ema['generator'], batch['image'], mask)
        return mask, coarse, y

    def sample(state, frozen, batch, rng):
        return complete(state, batch, rng)[2]

    def trajectory(state, frozen, batch, rng):
        """{'image': [4, n, H, W, C]}: what is given, with it the coarse image, what is made of both, and the truth."""
        mask, coarse, y = complete(state, batch, rng)
        x = batch['image']
        return {'image': jnp.stack([x * (1 - mask), x + (coarse - x) * mask, y, x])}

    def evaluate(state, frozen, batch, rng):
        mask, _, y = complete(state, batch, rng)
        square = jnp.square(y - batch['image']).mean((1, 2, 3))
        share = mask.mean((1, 2, 3))
        return {
            'squared_error': square,
            'squared_error/hole': square / jnp.maximum(share, 1 / (height * columns)),
            'absolute_error': jnp.abs(y - batch['image']).mean((1, 2, 3)),
            'hole': share,
        }

    conditions = ('image',) if made else ('image', masks)
    return Family(init, update, sample, evaluate, trajectory=trajectory, conditions=conditions, divisor=divisor)
