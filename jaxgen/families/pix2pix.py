"""pix2pix: image-to-image translation with conditional adversarial networks (Isola et al. 2017, arXiv 1611.07004).

An input c (edges, a map of labels, a spoilt picture) is turned into an image x. The generator G has dropout for its
only noise z, and the discriminator D judges an image beside its input, patch by patch. They minimise

    D: 1/2 (-E log s(D(c, x)) - E log(1 - s(D(c, G(c, z)))))
    G: -E log s(D(c, G(c, z))) + l1 * E |x - G(c, z)|

(eq. 1 to 4; s is the sigmoid). L1 sees to the picture at large, D to what L1 leaves blurred; what the input does not
say, like a colour, G decides by itself.

The input is a feature of the data, whatever its channels; or, with `condition` = 'image', the image itself under a
blur and noise: recovery of pictures, as Schawinski et al. 2017 (arXiv 1702.00403) do for galaxies.

The published code normalises by the batch, in sampling too, and its batches are of one image: that is a norm of each
channel of each image, `norm` = 'instance', here in batches of any size, and a sample depends on nothing but its input
and its own noise. Such a norm takes from a map what is the same all over it: in pictures of flat colours that is
nearly all there is, and `norm` = 'group', of several channels at once, leaves it. Dropout stays on in sampling, as
published. The discriminator normalises by the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.augmentation.corruptions import blurred
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, advance, gradient_step, new_state
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import non_saturating_generator, vanilla_discriminator
from jaxgen.networks import patchgan
from jaxgen.networks.layers import NORMS, apply_in_training
from jaxgen.networks.pix2pix import UNet
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array


def build(
    context: Context,
    *,
    condition: str = 'edges',
    blur: float = 0.0,
    noise: float = 0.0,
    width: int = 64,
    full: int = 0,
    halvings: int = 8,
    dropouts: int = 3,
    dropout: float = 0.5,
    norm: str = 'instance',
    l1: float = 100.0,
    discriminator_channels: int = 64,
    discriminator_layers: int = 3,
    discriminator_norm: str = 'batch',
) -> Family:
    """pix2pix.

    Args:
      condition: the feature that is turned into the image; or 'image', where blur and noise spoil it.
      blur, noise: standard deviations of the Gaussian that blurs the input, pixels, and of the Gaussian noise that is
        then added to it, of pixels in [-1, 1].
      width, full, halvings, dropouts, dropout: of the generator, see UNet.
      norm: 'instance' | 'group', of the generator, see above.
      l1: weight of the absolute error.
      discriminator_channels, discriminator_layers, discriminator_norm: see networks/patchgan.py.

    sample turns inputs of the test split, each with noise and dropout by its own key. evaluate gives per image
    'squared_error' and 'absolute_error' of the output against the image, means over pixels in [-1, 1], and for
    recovery 'squared_error/input', that of the spoilt image itself.

    Raises:
      UserError: a value that cannot work.
    """
    height, _, channels = context.image
    divisor = 2**halvings
    if min(width, halvings) < 1 or min(full, dropouts) < 0 or not 0 <= dropout < 1:
        raise UserError(
            'config.model: width and halvings must be 1 or more, full and dropouts 0 or more, dropout from 0 to below 1'
        )
    if norm not in NORMS:
        raise UserError(f'config.model.norm must be one of {NORMS}; it is {norm!r}')
    if min(blur, noise, l1) < 0:
        raise UserError('config.model: blur, noise and l1 must be 0 or more')
    if condition == 'image' and not blur and not noise:
        raise UserError("config.model.condition = 'image' needs config.model.blur or noise, or there is nothing to do")
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    patchgan.check('discriminator_', context.image, discriminator_channels, discriminator_layers, discriminator_norm)

    generator = UNet(channels, width, full, halvings, dropouts, dropout, norm, context.remat, context.dtype)
    discriminator = patchgan.PatchGAN(
        discriminator_channels, discriminator_layers, discriminator_norm, dtype=context.dtype
    )

    def given(batch, keys: Array) -> Array:
        """The generator's input [n, H, W, C] by keys [n]."""
        x = blurred(batch[condition], blur)
        return x + noise * normal(jax.vmap(lambda key: stream(key, 'input'))(keys), x.shape[1:]) if noise else x

    def turn(weights, c: Array, keys: Array) -> Array:
        return generator.apply({'params': weights}, c, keys)

    def judge(weights, c: Array, x: Array) -> Array:
        """Logits by patch, normalised by this batch."""
        pair = jnp.concatenate([c, x], -1)
        return apply_in_training(discriminator, weights, pair)[0]

    def discriminator_loss(params, state, frozen, batch, rng):
        c, x = batch['input'], batch['image']
        y = turn(params['generator'], c, jax.random.split(rng, len(x)))
        real, fake = judge(params['discriminator'], c, x), judge(params['discriminator'], c, y)
        value = 0.5 * vanilla_discriminator(real, fake)
        logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
        return value, Aux(logs)

    def generator_loss(params, state, frozen, batch, rng):
        c, x = batch['input'], batch['image']
        y = turn(params['generator'], c, jax.random.split(rng, len(x)))
        absolute = jnp.abs(x - y).mean()
        value = non_saturating_generator(judge(params['discriminator'], c, y)) + l1 * absolute
        return value, Aux({'generator_loss': value, 'absolute_error': absolute})

    discriminator_step = gradient_step(discriminator_loss, context.optim, 'discriminator')
    generator_step = gradient_step(generator_loss, context.optim, 'generator')

    def init(rng, batch, frozen):
        generator_rng, discriminator_rng = jax.random.split(rng)
        if batch[condition].shape[:3] != batch['image'].shape[:3] or batch[condition].ndim != 4:
            raise UserError(f'config.model.condition = {condition!r} is no picture of config.data.size = {height}')
        c, x = batch[condition][:1], batch['image'][:1]
        params = {
            'generator': generator.init(generator_rng, c, jax.random.split(rng, 1))['params'],
            'discriminator': discriminator.init(discriminator_rng, jnp.concatenate([c, x], -1))['params'],
        }
        # Only the generator makes pictures; an averaged discriminator would serve nothing.
        return new_state(params, context.optim, ema=('generator',))

    def update(state, frozen, batch, rng):
        input_rng, discriminator_rng, generator_rng = jax.random.split(rng, 3)
        c = given(batch, jax.random.split(input_rng, len(batch['image'])))
        batch = {'input': c, 'image': batch['image']}
        state, discriminator = discriminator_step(state, frozen, batch, discriminator_rng)
        state, generator = generator_step(state, frozen, batch, generator_rng)
        return advance(state, context.optim), discriminator.logs | generator.logs

    def translate(state, batch, rng) -> tuple[Array, Array]:
        """Inputs and outputs, [n, H, W, C], each by its own key."""
        keys = example_keys(rng, batch)
        c = given(batch, keys)
        return c, turn(state.ema['generator'], c, keys)

    def sample(state, frozen, batch, rng):
        return translate(state, batch, rng)[1]

    def trajectory(state, frozen, batch, rng):
        """{'image': [3, n, H, W, C]}: the input, what is made of it, and the truth."""
        c, y = translate(state, batch, rng)
        shown = c if c.shape == y.shape else jnp.broadcast_to(c.mean(-1, keepdims=True), y.shape)
        return {'image': jnp.stack([shown, y, batch['image']])}

    def evaluate(state, frozen, batch, rng):
        x = batch['image']
        c, y = translate(state, batch, rng)
        figures = {
            'squared_error': jnp.square(x - y).mean((1, 2, 3)),
            'absolute_error': jnp.abs(x - y).mean((1, 2, 3)),
        }
        if condition == 'image':
            figures['squared_error/input'] = jnp.square(x - c).mean((1, 2, 3))
        return figures

    conditions = tuple(dict.fromkeys((condition, 'image')))  # the image itself is shown as the truth
    return Family(init, update, sample, evaluate, trajectory=trajectory, conditions=conditions, divisor=divisor)
