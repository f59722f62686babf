"""What is diffused: images, or the latents of an earlier stage (Rombach et al. 2021, arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import stages
from jaxgen.contract import Context, Prepare
from jaxgen.errors import UserError

Array = jax.Array


class Space(NamedTuple):
    """The space of x_0."""

    shape: tuple[int, ...]  # of one x_0
    divisor: int  # of an image's height and width, by the stage; 1 without one
    latent: bool
    encode: Callable  # (frozen, batch, rng) -> x_0 [n, ...]
    prepare: Prepare | None  # what `encode_drawn` may be given in place of images
    encode_drawn: Callable  # as encode, drawn from the stage's posterior where it has one: for training
    decode: Callable  # (frozen, x_0, rng) -> images [n, H, W, C] in [-1, 1]
    image: tuple[int, ...]  # shape of an image


def bind(context: Context, scale: float, shift: float = 0.0) -> Space:
    """The latents of `config.stages.first` less `shift`, times `scale`, or images where there is no such stage.

    Raises:
      UserError: the stage has no maps of continuous latents.
    """
    stage = context.stages.get('first')
    if stage is None:

        def images(frozen, batch, rng) -> Array:
            return batch['image']

        def in_range(frozen, x_0, rng) -> Array:
            return jnp.clip(x_0, -1, 1)

        return Space(context.image, 1, False, images, None, images, in_range, context.image)
    if not (stage.latents.shape and stage.encode and stage.decode):
        raise UserError('config.stages.first must be the run of an autoencoder with continuous latents')
    if len(stage.latents.shape) != 3:
        raise UserError(
            f'config.stages.first: its latents {stage.latents.shape} are no maps [h, w, c], and the networks want maps'
        )

    def scaled(latents: Array) -> Array:
        return scale * (latents - shift) if shift else scale * latents

    def encode(frozen, batch, rng) -> Array:
        return scaled(stage.encode(*frozen['first'], batch, rng))

    first = stages.encoder(stage, 'first')

    def encode_drawn(frozen, batch, rng) -> Array:
        return scaled(first.encode(frozen, batch, rng))

    def decode(frozen, x_0, rng) -> Array:
        latents = x_0 / scale + shift if shift else x_0 / scale
        return jnp.clip(stage.decode(*frozen['first'], {}, latents, rng), -1, 1)

    return Space(stage.latents.shape, stage.divisor, True, encode, first.prepare, encode_drawn, decode, context.image)
