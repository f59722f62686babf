"""pix2pix: image-to-image translation with conditional adversarial networks (Isola et al. 2017, arXiv 1611.07004).

An input c (edges, a map of labels, a degraded image) is translated into an image x. The generator G has dropout for its
only noise z, and the discriminator D, conditioned on c, classifies patches of an image as real or generated. They
minimise

    D: 1/2 (-E log s(D(c, x)) - E log(1 - s(D(c, G(c, z)))))
    G: -E log s(D(c, G(c, z))) + l1 * E |x - G(c, z)|

(eq. 1 to 4; s is the sigmoid). L1 is for the coarse structure, D for the detail that L1 leaves blurred; what c leaves
open, like a colour, G decides by itself.

The input is a feature of the data, whatever its channels; or, with `condition` = 'image', the image itself under a
blur and noise: recovery of images, as Schawinski et al. 2017 (arXiv 1702.00403) do for galaxies.

The published code normalises by the batch, in sampling too, and its batches are of one image: that is an instance
norm, `norm` = 'instance', here in batches of any size, and a sample depends on nothing but its input and its own noise.
Such a norm removes the mean of every map: in images of flat colours that is nearly all there is, and `norm` = 'group',
of several channels at once, keeps it. Dropout stays on in sampling, as published. The discriminator normalises by the
batch.
"""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.augmentation.corruptions import blurred
from jaxgen.checks import check_size, size_text
from jaxgen.contract import Aux, Context, Family, Input, advance, gradient_step, new_state
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import non_saturating_generator, vanilla_discriminator
from jaxgen.networks import patchgan
from jaxgen.networks.layers import NORMS, apply_in_training
from jaxgen.networks.pix2pix import UNet
from jaxgen.options import Count, NonNegative, OneOf, Rate
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array


class Networks(NamedTuple):
    """The two networks, as functions of their own weights."""

    generator: UNet
    discriminator: patchgan.PatchGAN

    def translate(self, weights, c: Array, keys: Array) -> Array:
        """G(c, z), images [n, H, W, C], with dropout z by keys [n]."""
        return self.generator.apply({'params': weights}, c, keys)

    def discriminate(self, weights, c: Array, x: Array) -> Array:
        """D(c, x), logits by patch [n, h, w]; batch norms are by this batch."""
        chex.assert_equal_shape_prefix([c, x], 3)
        return apply_in_training(self.discriminator, weights, jnp.concatenate([c, x], -1))[0]


def degraded(x: Array, keys: Array, blur: float, noise: float) -> Array:
    """Images [n, H, W, C] after a Gaussian blur and with Gaussian noise by keys [n], of these standard deviations."""
    x = blurred(x, blur)
    return x + noise * normal(jax.vmap(lambda key: stream(key, 'input'))(keys), x.shape[1:]) if noise else x


def discriminator_loss(nets: Networks, params, state, frozen, batch, rng):
    """Half of the adversarial loss of D (eq. 1), on images and on translations of their inputs."""
    c, x = batch['input'], batch['image']
    y = nets.translate(params['generator'], c, jax.random.split(rng, len(x)))
    real, fake = (nets.discriminate(params['discriminator'], c, image) for image in (x, y))
    value = 0.5 * vanilla_discriminator(real, fake)
    logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
    return value, Aux(logs)


def generator_loss(nets: Networks, params, state, frozen, batch, rng, *, l1: float):
    """Adversarial loss of G, and the absolute error with weight `l1` (eq. 4)."""
    c, x = batch['input'], batch['image']
    y = nets.translate(params['generator'], c, jax.random.split(rng, len(x)))
    absolute = jnp.abs(x - y).mean()
    value = non_saturating_generator(nets.discriminate(params['discriminator'], c, y)) + l1 * absolute
    return value, Aux({'generator_loss': value, 'absolute_error': absolute})


@options.checked
def build(
    context: Context,
    *,
    condition: str = 'edges',
    blur: NonNegative = 0.0,
    noise: NonNegative = 0.0,
    width: Count = 64,
    full: Annotated[int, '[0, inf)'] = 0,
    halvings: Count = 8,
    dropouts: Annotated[int, '[0, inf)'] = 3,
    dropout: Rate = 0.5,
    norm: Annotated[str, OneOf(*NORMS)] = 'instance',
    l1: NonNegative = 100.0,
    discriminator_channels: Count = 64,
    discriminator_layers: Count = 3,
    discriminator_norm: Annotated[str, OneOf(*patchgan.NORMS)] = 'batch',
) -> Family:
    """pix2pix.

    Args:
      condition: the feature that is translated into the image; or 'image', degraded by blur and noise.
      blur, noise: standard deviations of the Gaussian that blurs the input, pixels, and of the Gaussian noise that is
        then added to it, of pixels in [-1, 1].
      width: channels of the generator's first convolution.
      full: its convolutions at full size, before those that halve the image.
      halvings: of the image; 8 of 256 x 256 pixels leave one.
      dropouts: how many of its transposed convolutions after the innermost one have dropout.
      dropout: rate of it.
      norm: of the generator: 'instance' | 'group', see above.
      l1: weight of the absolute error.
      discriminator_channels, discriminator_layers, discriminator_norm: see networks/patchgan.py.

    sample translates inputs of the test split, each with noise and dropout by its own key; for recovery also images
    that are degraded already, 'corrupted' in the batch, in place of 'image'. evaluate returns for each image
    'squared_error' and 'absolute_error' of the translation against the image, means over pixels in [-1, 1], and for
    recovery 'squared_error/input', that of the degraded image itself.

    Raises:
      UserError: a value that cannot work.
    """
    divisor = 2**halvings
    if condition == 'image' and not blur and not noise:
        raise UserError("config.model.condition = 'image' needs config.model.blur or noise, or there is nothing to do")
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    patchgan.check('model.discriminator_layers', context.image, discriminator_layers)

    nets = Networks(
        UNet(context.image[2], width, full, halvings, dropouts, dropout, norm, context.remat, context.dtype),
        patchgan.PatchGAN(discriminator_channels, discriminator_layers, discriminator_norm, dtype=context.dtype),
    )
    discriminator_step = gradient_step(functools.partial(discriminator_loss, nets), context.optim, 'discriminator')
    generator_step = gradient_step(functools.partial(generator_loss, nets, l1=l1), context.optim, 'generator')

    def init(rng, batch, frozen):
        generator_rng, discriminator_rng = jax.random.split(rng)
        if batch[condition].shape[:3] != batch['image'].shape[:3] or batch[condition].ndim != 4:
            raise UserError(
                f'config.model.condition = {condition!r} is no image of config.data.size = {size_text(context.image)}'
            )
        c, x = batch[condition][:1], batch['image'][:1]
        params = {
            'generator': nets.generator.init(generator_rng, c, jax.random.split(rng, 1))['params'],
            'discriminator': nets.discriminator.init(discriminator_rng, jnp.concatenate([c, x], -1))['params'],
        }
        # Only the generator samples; an averaged discriminator would serve nothing.
        return new_state(params, context.optim, ema=('generator',))

    def update(state, frozen, batch, rng):
        input_rng, discriminator_rng, generator_rng = jax.random.split(rng, 3)
        c = degraded(batch[condition], jax.random.split(input_rng, len(batch['image'])), blur, noise)
        batch = {'input': c, 'image': batch['image']}
        state, discriminator = discriminator_step(state, frozen, batch, discriminator_rng)
        state, generator = generator_step(state, frozen, batch, generator_rng)
        return advance(state, context.optim), discriminator.logs | generator.logs

    def translated(state, batch, rng) -> tuple[Array, Array]:
        """Inputs and their translations, [n, H, W, C], each by its own key and the averaged weights."""
        keys = example_keys(rng, batch)
        already = condition == 'image' and 'corrupted' in batch
        c = batch['corrupted'] if already else degraded(batch[condition], keys, blur, noise)
        return c, nets.translate(state.ema['generator'], c, keys)

    def sample(state, frozen, batch, rng):
        return translated(state, batch, rng)[1]

    def trajectory(state, frozen, batch, rng):
        """{'image': [3, n, H, W, C]}: the input, its translation, and the ground truth, where the batch has it."""
        c, y = translated(state, batch, rng)
        displayed = c if c.shape == y.shape else jnp.broadcast_to(c.mean(-1, keepdims=True), y.shape)
        return {'image': jnp.stack([displayed, y, *([batch['image']] if 'image' in batch else [])])}

    def evaluate(state, frozen, batch, rng):
        x = batch['image']
        c, y = translated(state, batch, rng)
        metrics = {
            'squared_error': jnp.square(x - y).mean((1, 2, 3)),
            'absolute_error': jnp.abs(x - y).mean((1, 2, 3)),
        }
        return metrics | ({'squared_error/input': jnp.square(x - c).mean((1, 2, 3))} if condition == 'image' else {})

    return Family(
        init,
        update,
        sample,
        evaluate,
        trajectory=trajectory,
        conditions=(condition,),
        inputs=(Input('corrupted', context.image, 'image'),) if condition == 'image' else (),
        displayed=('image',),
        divisor=divisor,
    )
