"""Autoencoders: an encoder to continuous latents and a decoder, both without noise of their own.

Without corruption the pair learns to give back the image through fewer numbers (Hinton & Salakhutdinov 2006). With one
it sees a spoilt image and learns the clean one (Vincent et al. 2008, Extracting and Composing Robust Features with
Denoising Autoencoders); what is spoilt makes the task:

- 'noise': Gaussian noise is added: denoising.
- 'low_resolution': means of squares in place of the pixels: super-resolution.
- 'grey': luma (Rec. 601) in place of colour: colouring.
- 'mask': a square somewhere is grey: completion.

The last three are projections P: P x is known, and the decoder's image d is asked for the rest alone. What is restored
is d + P x - P d, whose means of squares, luma or pixels outside the hole are those that were given.

The loss is the squared error against the clean image, so that where several images fit what is seen, the answer is
their mean: blurred edges and pale colours. Nothing shapes the latents' distribution: without corruption `sample`
decodes latents from N(0, I), which shows that an autoencoder alone cannot draw pictures. With one, `sample` restores
held-out images, spoilt by each sample's key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.augmentation.corruptions import grey, holes, low_resolution
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.networks.resnet_autoencoder import Pyramid, PyramidDecoder
from jaxgen.randomness import example_keys, normal

Array = jax.Array

CORRUPTIONS = ('none', 'noise', 'low_resolution', 'grey', 'mask')


def build(
    context: Context,
    *,
    corruption: str = 'none',
    noise: float = 0.5,
    factor: int = 2,
    hole: int = 4,
    width: int = 64,
    blocks: int = 2,
    hidden: int = 32,
    halvings: int = 2,
    latent: int = 4,
) -> Family:
    """Autoencoder.

    Args:
      corruption: 'none' | 'noise' | 'low_resolution' | 'grey' | 'mask': what the encoder sees of an image.
      noise: of 'noise': its standard deviation, of pixels in [-1, 1].
      factor: of 'low_resolution': side of a square that becomes one value, pixels.
      hole: of 'mask': side of the square that is hidden, pixels.
      width, blocks, hidden: channels of encoder and decoder, residual blocks, channels inside these.
      halvings: how often the latents' grid halves the image, 1 or more.
      latent: channels of the latents, [H / 2^halvings, W / 2^halvings, latent].

    evaluate gives per image 'squared_error' of the restored image against the clean one, mean over pixels in [-1, 1],
    and with a corruption 'squared_error/input', that of the spoilt image itself.

    encode and decode know no corruption: images go in as they are.

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, channels = context.image
    divisor = 2**halvings
    if corruption not in CORRUPTIONS:
        raise UserError(f'config.model.corruption must be one of {CORRUPTIONS}; it is {corruption!r}')
    if min(blocks, hidden, halvings, latent) < 1 or width < 2:
        raise UserError('config.model: blocks, hidden, halvings and latent must be 1 or more, width 2 or more')
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    if corruption == 'noise' and noise <= 0:
        raise UserError(f'config.model.noise must be more than 0; it is {noise}')
    if corruption == 'low_resolution' and (factor < 2 or height % factor or columns % factor):
        raise UserError(f'config.model.factor must be 2 or more and divide config.data.size = {height}; it is {factor}')
    if corruption == 'grey' and channels != 3:
        raise UserError("config.model.corruption = 'grey' needs colours: set config.data.channels to 3")
    if corruption == 'mask' and not 1 <= hole <= min(height, columns):
        raise UserError(f'config.model.hole must be from 1 to config.data.size = {height}; it is {hole}')

    sizes = dict(width=width, blocks=blocks, hidden=hidden, halvings=halvings)
    rest = dict(remat=context.remat, dtype=context.dtype)
    encoder = Pyramid(levels=1, latent=latent, **sizes, **rest)
    decoder = PyramidDecoder(features=channels, **sizes, **rest)
    shape = (height // divisor, columns // divisor, latent)

    def spoil(x: Array, keys: Array) -> Array:
        """The images [n, H, W, C] as the encoder sees them; keys [n]."""
        if corruption == 'noise':
            return x + noise * normal(keys, context.image)
        if corruption == 'low_resolution':
            return low_resolution(x, factor)
        if corruption == 'grey':
            return grey(x)
        if corruption == 'mask':
            return jnp.where(holes(keys, (height, columns), hole), 0.0, x)
        return x

    def to_latents(params, x: Array) -> Array:
        return encoder.apply({'params': params['encoder']}, x, lambda level, z: z)[0]

    def to_image(params, z: Array) -> Array:
        """Not bounded."""
        return decoder.apply({'params': params['decoder']}, (z,))

    def restore(params, seen: Array, keys: Array) -> Array:
        """The clean images by spoilt ones and the keys that spoilt them; not bounded."""
        out = to_image(params, to_latents(params, seen))
        return out if corruption in ('none', 'noise') else out + seen - spoil(out, keys)

    def error(out: Array, x: Array) -> Array:
        """[n]"""
        return jnp.square(out - x).mean((1, 2, 3))

    def loss(params, state, frozen, batch, rng):
        x = batch['image']
        keys = jax.random.split(rng, len(x))
        value = error(restore(params, spoil(x, keys), keys), x).mean()
        return value, Aux({'loss': value})

    update = make_update(loss, context.optim, 'encoder', 'decoder')

    def init(rng, batch, frozen):
        encoder_rng, decoder_rng = jax.random.split(rng)
        params = {
            'encoder': encoder.init(encoder_rng, batch['image'], lambda level, z: z)['params'],
            'decoder': decoder.init(decoder_rng, (jnp.zeros((1, *shape)),))['params'],
        }
        return new_state(params, context.optim)

    def sample(state, frozen, batch, rng):
        keys = example_keys(rng, batch)
        if corruption == 'none':
            return decode(state, frozen, batch, normal(keys, shape), rng)
        return jnp.clip(restore(state.ema, spoil(batch['image'], keys), keys), -1, 1)

    def trajectory(state, frozen, batch, rng):
        """{'image': [2, n, H, W, C]}: what is spoilt, then what `sample` makes of it."""
        seen = spoil(batch['image'], example_keys(rng, batch))
        return {'image': jnp.stack([seen, sample(state, frozen, batch, rng)])}

    def evaluate(state, frozen, batch, rng):
        x = batch['image']
        keys = example_keys(rng, batch)
        seen = spoil(x, keys)
        results = {'squared_error': error(jnp.clip(restore(state.ema, seen, keys), -1, 1), x)}
        if corruption != 'none':
            results['squared_error/input'] = error(seen, x)
        return results

    def encode(state, frozen, batch, rng):
        """Latents [n, H / 2^halvings, W / 2^halvings, latent]."""
        return to_latents(state.ema, batch['image'])

    def decode(state, frozen, batch, latents, rng):
        return jnp.clip(to_image(state.ema, latents), -1, 1)

    restores = corruption != 'none'
    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        trajectory=trajectory if restores else None,
        conditions=('image',) if restores else (),
        divisor=divisor,
        latents=Latents(shape=shape),
    )
