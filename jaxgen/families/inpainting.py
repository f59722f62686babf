"""Inpainting with gated convolutions: DeepFill v2 (Yu et al. 2018, arXiv 1806.03589).

Pixels of an image x under a mask m are not known, and the generator G completes them, first coarsely, y_1, then finely,
y_2 (networks/inpainting.py). The completed image keeps what is known, y = m y_2 + (1 - m) x, and a discriminator D,
whose input is the mask too, has values for parts of it at several scales:

    G: l1 * (E |x - y_1| + E |x - y_2|) - E D(y, m)
    D: 1/2 (E max(0, 1 - D(x, m)) + E max(0, 1 + D(y, m)))

(section 3.3). D's kernels are divided by their largest singular values (SN-PatchGAN); the vectors of that iteration
are State.extra and go on with each of D's steps, which come first.

Masks are strokes of a brush that goes to and fro, as free-form as a person's, and a square (section 3.4); or they are a
feature of the data, for training on masks of one's own. `sample` completes test images, each under the mask of its own
key, or under 'mask' where the batch holds it.
Unlike in the authors' code squares are of one size, and each image of a batch has a mask of its own.
"""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.augmentation.corruptions import holes, strokes
from jaxgen.checks import check_size, size_text
from jaxgen.contract import Aux, Context, Family, Input, advance, gradient_step, new_state, shard_batch, store
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import hinge_discriminator, wasserstein_generator
from jaxgen.networks import spectral
from jaxgen.networks.inpainting import Discriminator, Generator
from jaxgen.options import Count, NonNegative, Rule
from jaxgen.randomness import example_keys

Array = jax.Array

MASKS = ('strokes', 'square', 'both')  # that are drawn here


class Networks(NamedTuple):
    """The two networks, as functions of their own weights."""

    generator: Generator
    discriminator: Discriminator

    def complete(self, weights, x: Array, mask: Array) -> tuple[Array, Array, Array]:
        """Coarse images y_1, fine ones y_2, and completed ones y, [n, H, W, C]."""
        coarse, fine = self.generator.apply({'params': weights}, x, mask)
        return coarse, fine, x + (fine - x) * mask

    def discriminate(self, weights, x: Array, mask: Array) -> Array:
        """D(x, m), values [n, h, w, features]."""
        return self.discriminator.apply({'params': weights}, jnp.concatenate([x, mask], -1))


def draw_masks(keys: Array, size: tuple[int, int], kind: str, brush: tuple[float, float], hole: int) -> Array:
    """Masks float32 [n, H, W, 1], 1 in holes and else 0, from keys [n]; the other arguments are fields of `build`."""
    stroke_keys, hole_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    masks = jnp.zeros((len(keys), *size, 1), bool)
    if kind != 'square':
        masks |= strokes(stroke_keys, size, brush)
    if kind != 'strokes':
        masks |= holes(hole_keys, size, hole)
    return masks.astype(jnp.float32)


def discriminator_loss(nets: Networks, params, state, frozen, batch, rng):
    """Hinge loss of D on images and completed ones; keeps the singular vectors after their iteration."""
    x, mask = batch['image'], batch['mask']
    weights, vectors = spectral.normalise(params['discriminator'], state.extra)
    _, _, y = nets.complete(params['generator'], x, mask)
    real, fake = nets.discriminate(weights, x, mask), nets.discriminate(weights, y, mask)
    value = 0.5 * hinge_discriminator(real, fake)
    logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
    return value, Aux(logs, vectors)


def generator_loss(nets: Networks, params, state, frozen, batch, rng, *, l1: float):
    """Absolute errors of the coarse and the fine image with weight `l1`, and the adversarial loss of the completed."""
    x, mask = batch['image'], batch['mask']
    weights, _ = spectral.normalise(params['discriminator'], state.extra)
    coarse, fine, y = nets.complete(params['generator'], x, mask)
    errors = jnp.abs(x - coarse).mean() + jnp.abs(x - fine).mean()
    value = l1 * errors + wasserstein_generator(nets.discriminate(weights, y, mask))
    return value, Aux({'generator_loss': value, 'absolute_errors': errors})


def errors(x: Array, y: Array, mask: Array) -> dict[str, Array]:
    """Metrics [n] of completed images y against x, see `build`."""
    chex.assert_equal_shape([x, y])
    square = jnp.square(y - x).mean((1, 2, 3))
    fraction = mask.mean((1, 2, 3))
    return {
        'squared_error': square,
        'squared_error/hole': square / jnp.maximum(fraction, 1 / (x.shape[1] * x.shape[2])),
        'absolute_error': jnp.abs(y - x).mean((1, 2, 3)),
        'hole': fraction,
    }


@options.checked
def build(
    context: Context,
    *,
    masks: str = 'both',
    brush: Annotated[
        tuple[float, float], '(0, inf)', Rule(lambda b: len(b) == 2 and b[0] <= b[1], 'the least and the largest width')
    ] = (12.0, 40.0),
    hole: Count = 128,
    width: Annotated[Count, Rule(lambda w: w % 2 == 0, 'even')] = 24,
    dilations: Annotated[tuple[int, ...], '[1, inf)'] = (2, 4, 8, 16),
    attention: bool = True,
    l1: NonNegative = 1.0,
    discriminator_channels: Count = 64,
    discriminator_layers: Count = 6,
) -> Family:
    """DeepFill v2.

    Args:
      masks: 'strokes' | 'square' | 'both', drawn here; or a feature of the data, whose brighter half is the hole.
      brush: least and largest width of the brush, pixels.
      hole: side of the square, pixels.
      width: channels of the generator's first convolution, after its gates.
      dilations: of the convolutions in the middle of each of the generator's two parts.
      attention: whether the generator has contextual attention.
      l1: weight of the absolute errors.
      discriminator_channels, discriminator_layers: channels of its first convolution, and convolutions.

    evaluate returns for each image, of its completion: 'squared_error' and 'absolute_error', means over all pixels in
    [-1, 1]; 'squared_error/hole', the mean over those of the hole alone; and 'hole', its fraction of the image.

    Raises:
      UserError: a value that cannot work.
    """
    size = context.image[:2]
    divisor = 8 if attention else 4
    check_size(context.image, divisor, f'config.model.attention = {attention}')
    if masks in ('square', 'both') and hole > min(size):
        raise UserError(f'config.model.hole must be from 1 to config.data.size = {size_text(size)}; it is {hole}')

    nets = Networks(
        Generator(width, dilations, attention, context.remat, context.dtype),
        Discriminator(discriminator_channels, discriminator_layers, context.dtype),
    )
    discriminator_step = store(
        gradient_step(functools.partial(discriminator_loss, nets), context.optim, 'discriminator')
    )
    generator_step = gradient_step(functools.partial(generator_loss, nets, l1=l1), context.optim, 'generator')

    def masked(batch, keys: Array, own: str = '') -> Array:
        """Masks [n, H, W, 1] by keys [n], or those of the data, or a person's of the name `own`."""
        if masks in MASKS and own not in batch:
            return draw_masks(keys, size, masks, brush, hole)
        return (batch[own if masks in MASKS else masks].mean(-1, keepdims=True) > 0).astype(jnp.float32)

    def init(rng, batch, frozen):
        generator_rng, discriminator_rng, vectors_rng = jax.random.split(rng, 3)
        if masks not in MASKS and (batch[masks].shape[:3] != batch['image'].shape[:3] or batch[masks].ndim != 4):
            raise UserError(
                f'config.model.masks = {masks!r} is neither one of {MASKS} nor an image of config.data.size = '
                f'{size_text(size)}'
            )
        x, mask = batch['image'][:1], jnp.zeros((1, *size, 1))
        params = {
            'generator': nets.generator.init(generator_rng, x, mask)['params'],
            'discriminator': nets.discriminator.init(discriminator_rng, jnp.concatenate([x, mask], -1))['params'],
        }
        vectors = spectral.start(vectors_rng, params['discriminator'])
        # Only the generator samples; an averaged discriminator would serve nothing.
        return new_state(params, context.optim, extra=vectors, ema=('generator',))

    def update(state, frozen, batch, rng):
        mask_rng, discriminator_rng, generator_rng = jax.random.split(rng, 3)
        mask = shard_batch(masked(batch, jax.random.split(mask_rng, len(batch['image']))))
        batch = {'image': batch['image'], 'mask': mask}
        state, discriminator_aux = discriminator_step(state, frozen, batch, discriminator_rng)
        state, generator_aux = generator_step(state, frozen, batch, generator_rng)
        return advance(state, context.optim), discriminator_aux.logs | generator_aux.logs

    def completed(state, batch, rng, own: str = '') -> tuple[Array, Array, Array]:
        """Masks, coarse images and completed ones, by the averaged weights."""
        mask = masked(batch, example_keys(rng, batch), own)
        coarse, _, y = nets.complete(state.ema['generator'], batch['image'], mask)
        return mask, coarse, y

    def sample(state, frozen, batch, rng):
        return completed(state, batch, rng, 'mask')[2]

    def trajectory(state, frozen, batch, rng):
        """{'image': [4, n, H, W, C]}: the masked image, completed coarsely, completed finely, and the ground truth."""
        mask, coarse, y = completed(state, batch, rng, 'mask')
        x = batch['image']
        return {'image': jnp.stack([x * (1 - mask), x + (coarse - x) * mask, y, x])}

    def evaluate(state, frozen, batch, rng):
        mask, _, y = completed(state, batch, rng)
        return errors(batch['image'], y, mask)

    return Family(
        init,
        update,
        sample,
        evaluate,
        trajectory=trajectory,
        conditions=('image',) if masks in MASKS else ('image', masks),
        inputs=(Input('mask', (*size, 1)),) if masks in MASKS else (),
        divisor=divisor,
    )
