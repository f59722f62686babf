"""Autoencoders: an encoder to continuous latents and a decoder, both without noise of their own.

Without corruption the pair learns to reconstruct the image from fewer numbers (Hinton & Salakhutdinov 2006). With one
the input is a corrupted image and the target the clean one (Vincent et al. 2008, Extracting and Composing Robust
Features with Denoising Autoencoders); the corruption makes the task:

- 'noise': Gaussian noise is added: denoising.
- 'low_resolution': means of squares in place of the pixels: super-resolution.
- 'grey': luma (Rec. 601) in place of colour: colourisation.
- 'mask': a square somewhere is grey: completion.

The last three are projections P: P x is known, and the decoder's image d has to add the rest alone. The restored image
is d + P x - P d, whose means of squares, luma or pixels outside the hole are the known ones.

The loss is the squared error against the clean image, so that where several images fit the input, the optimum is their
mean: blurred edges and pale colours. Nothing shapes the latents' distribution: without corruption `sample` decodes
latents from N(0, I), which shows that an autoencoder alone is no generative model. With one, `sample` restores held-out
images, corrupted by each sample's key; or images that are corrupted already ('corrupted', 'low_resolution'), or under a
mask of one's own ('mask').
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import chex
import einops
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.augmentation.corruptions import grey, holes, low_resolution
from jaxgen.checks import check_size, size_text
from jaxgen.contract import Aux, Context, Family, Input, Latents, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.networks.resnet_autoencoder import Pyramid, PyramidDecoder
from jaxgen.options import Count, OneOf, Positive
from jaxgen.randomness import example_keys, normal

Array = jax.Array

CORRUPTIONS = ('none', 'noise', 'low_resolution', 'grey', 'mask')
PROJECTIONS = ('low_resolution', 'grey', 'mask')


class Networks(NamedTuple):
    """Encoder and decoder, as functions of the weights {network: weights}."""

    encoder: Pyramid
    decoder: PyramidDecoder

    def encode(self, params, x: Array) -> Array:
        """Latents z [n, h, w, latent]."""
        return self.encoder.apply({'params': params['encoder']}, x, lambda level, z: z)[0]

    def decode(self, params, z: Array) -> Array:
        """Images [n, H, W, C], not bounded."""
        return self.decoder.apply({'params': params['decoder']}, (z,))


def corrupted(x: Array, keys: Array, corruption: str, noise: float, factor: int, hole: int) -> Array:
    """The encoder's inputs for images x [n, H, W, C] by keys [n]; the other arguments are fields of `build`."""
    chex.assert_rank(x, 4)
    if corruption == 'noise':
        return x + noise * normal(keys, x.shape[1:])
    if corruption == 'low_resolution':
        return low_resolution(x, factor)
    if corruption == 'grey':
        return grey(x)
    if corruption == 'mask':
        return jnp.where(holes(keys, x.shape[1:3], hole), 0.0, x)
    return x


def own_inputs(image: tuple[int, int, int], corruption: str, factor: int) -> tuple[Input, ...]:
    """The images that `sample` takes in place of a corruption by its keys."""
    height, columns, channels = image
    return {
        'noise': (Input('corrupted', image, 'image'),),
        'low_resolution': (Input('low_resolution', (height // factor, columns // factor, channels), 'image'),),
        'mask': (Input('mask', (height, columns, 1)),),
    }.get(corruption, ())


def restored(nets: Networks, params, y: Array, keys: Array, projection: Callable | None) -> Array:
    """Estimates of the clean images [n, H, W, C] from corrupted ones y and the keys that corrupted them; not bounded.

    projection: (x, keys) -> P x, the corruption where it is one; None where not.
    """
    d = nets.decode(params, nets.encode(params, y))
    return d + y - projection(d, keys) if projection else d


def squared_error(x: Array, y: Array) -> Array:
    """Mean squared difference of each example, [n]."""
    chex.assert_equal_shape([x, y])
    return jnp.square(x - y).mean((1, 2, 3))


def check(context: Context, corruption: str, factor: int, hole: int) -> None:
    """Raises UserError where the corruption does not go with the images."""
    height, columns, channels = context.image
    if corruption == 'low_resolution' and (height % factor or columns % factor):
        raise UserError(
            f'config.model.factor must divide config.data.size = {size_text(context.image)}; it is {factor}'
        )
    if corruption == 'grey' and channels != 3:
        raise UserError("config.model.corruption = 'grey' needs colours: set config.data.channels to 3")
    if corruption == 'mask' and hole > min(height, columns):
        raise UserError(
            f'config.model.hole must be from 1 to config.data.size = {size_text(context.image)}; it is {hole}'
        )


@options.checked
def build(
    context: Context,
    *,
    corruption: Annotated[str, OneOf(*CORRUPTIONS)] = 'none',
    noise: Positive = 0.5,
    factor: Annotated[int, '[2, inf)'] = 2,
    hole: Count = 4,
    width: Annotated[int, '[2, inf)'] = 64,
    blocks: Count = 2,
    hidden: Count = 32,
    halvings: Count = 2,
    latent: Count = 4,
) -> Family:
    """Autoencoder.

    Args:
      corruption: 'none' | 'noise' | 'low_resolution' | 'grey' | 'mask': of the encoder's inputs.
      noise: of 'noise': its standard deviation, of pixels in [-1, 1].
      factor: of 'low_resolution': side of a square that becomes one value, pixels.
      hole: of 'mask': side of the square that is hidden, pixels.
      width, blocks, hidden: channels of encoder and decoder, residual blocks, channels inside these.
      halvings: how often the latents' grid halves the image.
      latent: channels of the latents, [H / 2^halvings, W / 2^halvings, latent].

    evaluate returns for each image 'squared_error' of the restored image against the clean one, mean over pixels in
    [-1, 1], and with a corruption 'squared_error/input', that of the corrupted image itself.

    encode and decode know no corruption: images are encoded as they are.

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, channels = context.image
    divisor = 2**halvings
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    check(context, corruption, factor, hole)

    sizes = dict(width=width, blocks=blocks, hidden=hidden, halvings=halvings)
    rest = dict(remat=context.remat, dtype=context.dtype)
    nets = Networks(
        Pyramid(levels=1, latent=latent, **sizes, **rest), PyramidDecoder(features=channels, **sizes, **rest)
    )
    shape = (height // divisor, columns // divisor, latent)
    corrupt = functools.partial(corrupted, corruption=corruption, noise=noise, factor=factor, hole=hole)
    restore = functools.partial(restored, nets, projection=corrupt if corruption in PROJECTIONS else None)

    def loss(params, state, frozen, batch, rng):
        x = batch['image']
        keys = jax.random.split(rng, len(x))
        value = squared_error(restore(params, corrupt(x, keys), keys), x).mean()
        return value, Aux({'loss': value})

    update = make_update(loss, context.optim, 'encoder', 'decoder')

    def init(rng, batch, frozen):
        encoder_rng, decoder_rng = jax.random.split(rng)
        params = {
            'encoder': nets.encoder.init(encoder_rng, batch['image'], lambda level, z: z)['params'],
            'decoder': nets.decoder.init(decoder_rng, (jnp.zeros((1, *shape)),))['params'],
        }
        return new_state(params, context.optim)

    def encode(state, frozen, batch, rng):
        return nets.encode(state.ema, batch['image'])

    def decode(state, frozen, batch, latents, rng):
        return jnp.clip(nets.decode(state.ema, latents), -1, 1)

    def corruption_of(batch) -> Callable:
        """The corruption (x, keys) -> y of a batch: as in training, but by its own masks where it holds some."""
        if corruption != 'mask' or 'mask' not in batch:
            return corrupt
        hidden_pixels = batch['mask'] > 0
        return lambda x, keys: jnp.where(hidden_pixels, 0.0, x)

    def corrupted_images(batch, keys: Array) -> Array:
        """The encoder's inputs [n, H, W, C]: images of the batch corrupted by keys [n], or what is so already."""
        if corruption == 'noise' and 'corrupted' in batch:
            return batch['corrupted']
        if corruption == 'low_resolution' and 'low_resolution' in batch:
            return einops.repeat(batch['low_resolution'], 'n h w c -> n (h a) (w b) c', a=factor, b=factor)
        return corruption_of(batch)(batch['image'], keys)

    def sample(state, frozen, batch, rng):
        keys = example_keys(rng, batch)
        if corruption == 'none':
            return decode(state, frozen, batch, normal(keys, shape), rng)
        projection = corruption_of(batch) if corruption in PROJECTIONS else None
        return jnp.clip(restored(nets, state.ema, corrupted_images(batch, keys), keys, projection), -1, 1)

    def trajectory(state, frozen, batch, rng):
        """{'image': [2, n, H, W, C]}: the corrupted images, and their restorations by `sample`."""
        y = corrupted_images(batch, example_keys(rng, batch))
        return {'image': jnp.stack([y, sample(state, frozen, batch, rng)])}

    def evaluate(state, frozen, batch, rng):
        x, keys = batch['image'], example_keys(rng, batch)
        y = corrupt(x, keys)
        metrics = {'squared_error': squared_error(jnp.clip(restore(state.ema, y, keys), -1, 1), x)}
        return metrics | ({'squared_error/input': squared_error(y, x)} if corruption != 'none' else {})

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
        inputs=own_inputs(context.image, corruption, factor),
        divisor=divisor,
        latents=Latents(shape=shape),
    )
