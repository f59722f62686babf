"""Editing: sampling that begins from a person's image, and sampling under a mask.

Where a batch holds 'image', and `editing.strength` is below 1, sampling begins at an intermediate level with that image
and its noise (SDEdit, Meng et al. 2022, arXiv 2108.01073). Where it holds 'mask' too, what the mask leaves is known:
after each step it is replaced by the image with the noise of the level that x is at then (Song et al. 2021, arXiv
2011.13456, appendix I.2), the same noise in all steps, as in diffusers' inpainting with networks that read no mask. The
network need not have been trained for either.

A network with a condition of kind 'inpainting' (diffusion/conditioning.py) reads the mask and what is known, and x is
left to it.

Of latents both are of the latents of the image, the mean of the first stage's posterior where it has one (diffusers
draws from it), with the mask at their size by the nearest value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Set
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.contract import Context, Input
from jaxgen.diffusion import levels
from jaxgen.diffusion.conditioning import Conditioning
from jaxgen.diffusion.latents import Space
from jaxgen.diffusion.levels import Sampler
from jaxgen.diffusion.processes import Process, coefficients
from jaxgen.errors import UserError

Array = jax.Array

IMAGE, MASK = 'image', 'mask'  # in a batch; the mask is above 0 where something is missing
TAKEN = (IMAGE, MASK, 'low_resolution')  # conditions of which a person's image is one, or is made into one


@dataclasses.dataclass(frozen=True)
class Editing:
    """How images that a person gives are changed, and how prompts are read.

    Attributes:
      strength: 1: samples are drawn from noise alone; below 1 they begin with the image, of which the last of the noise
        levels, this fraction of them, are visited: the less, the more like the image.
      paste: under a mask, the image itself is put over what is known of the sample. Without it the known part of
        latents is as the first stage decodes it (diffusers' default).
      weighted_prompts: captions in sampling are prompts with weights, '(word:1.3)', see text/emphasis.py; else brackets
        are characters, as published pipelines read them.
      prompt_chunks: texts in sampling, prompts and negative prompts, are cut into so many parts, each with a start and
        an end of its own, which a CLIP's text encoder reads by themselves and the network one behind the other; parts
        of shorter texts are empty. Pooled outputs are those of the first part, and T5 reads one. With 1 what is beyond
        the text encoder's length is left out.
    """

    strength: Annotated[float, '(0, 1]'] = 1.0
    paste: bool = True
    weighted_prompts: bool = False
    prompt_chunks: Annotated[int, '[1, 64]'] = 1


class Edits(NamedTuple):
    """Editing bound to a model."""

    options: Editing
    sampler: Sampler  # which begins at the level that `strength` says
    inputs: tuple[Input, ...]  # that `sample` reads
    keeps: bool = True  # whether what is known is put back after each step
    holes: bool = True  # whether 'mask' of a batch says what is missing; else it is that of a ControlNet


def bind(
    options: Editing,
    context: Context,
    conditioning: Conditioning,
    make: Callable[[int], Sampler],
    whole: bool,
    controls: Set[str] = frozenset(),
) -> Edits:
    """The Edits of a model.

    Args:
      make: (skip) -> the sampler without that many levels, see `levels.make`.
      whole: see `levels.skipped_levels`.
      controls: the images that ControlNets read; where 'mask' is one of them, no hole is filled.

    Raises:
      UserError: a strength that leaves no noise level, a model whose condition the image is, a mask of two meanings.
    """
    if options.weighted_prompts and not any(c.kind == 'text' for c in conditioning):
        raise UserError('config.model.editing.weighted_prompts is of text encoders, and this model has none')
    if options.prompt_chunks > 1 and not any(c.divisible for c in conditioning):
        raise UserError(
            'config.model.editing.prompt_chunks is of networks that read the sequences of a CLIP; this one has none'
        )
    sampler, changes = make(0), options.strength < 1
    holes = MASK not in controls
    if not holes and any(c.kind == 'inpainting' for c in conditioning):
        raise UserError(
            "a condition of kind 'inpainting' and a ControlNet both read 'mask', the one as a hole: take one of them"
        )
    takes = len(context.image) == 3 and not ({c.name for c in conditioning} | (controls - {MASK})) & set(TAKEN)
    if changes and not takes:
        raise UserError('config.model.editing.strength is of images, and an image is a condition of this model itself')
    if changes:
        n = len(sampler.schedule.t)
        skip = levels.skipped_levels(n, options.strength, whole)
        if skip >= n:
            raise UserError(f'config.model.editing.strength = {options.strength} leaves none of {n} noise levels')
        sampler = make(skip)
    keeps = not any(c.kind == 'inpainting' for c in conditioning)
    return Edits(options, sampler, inputs_of(context.image, changes, holes) if takes else (), keeps, holes)


def inputs_of(shape: tuple[int, ...], changes: bool, holes: bool = True) -> tuple[Input, ...]:
    """The images that `sample` reads: an image and its mask.

    Args:
      shape: of an image.
      changes: whether an image alone is one that samples begin with.
      holes: whether there may be a mask.
    """
    height, width, channels = shape
    alone = Input(IMAGE, (height, width, channels))
    if changes:
        alone = alone._replace(required=True)
    elif not holes:
        return ()
    else:
        alone = alone._replace(beside=(MASK,), otherwise='or editing.strength below 1, to change all of it')
    return (alone, Input(MASK, (height, width, 1), beside=(IMAGE,))) if holes else (alone,)


def reads(edits: Edits, batch: dict[str, Array]) -> bool:
    """Whether sampling reads the image of a batch."""
    needed = {IMAGE} if edits.options.strength < 1 else {IMAGE, MASK}
    return bool(edits.inputs) and needed <= set(batch)


def start(settings: dict[str, Any], eps: Array, x_0: Array | None, changes: bool) -> Array:
    """The x that sampling begins with.

    Args:
      settings: 'start', the standard deviation of its noise, and 'kept', what x_0 is multiplied with.
      eps: noise.
      x_0: the image, in the model's space.
      changes: whether strength is below 1.

    Raises:
      UserError: no image to begin with.
    """
    x = settings['start'] * eps
    if not changes:
        return x
    if x_0 is None:
        raise UserError('editing.strength below 1 begins with an image: set the condition image')
    return settings['kept'] * x_0 + x


def settings_of(edits: Edits) -> dict[str, float]:
    """The numbers that `start` reads."""
    schedule = edits.sampler.schedule
    if edits.options.strength == 1:
        return {'start': edits.sampler.start}
    return {'start': float(schedule.sigma[-1]), 'kept': float(schedule.alpha[-1])}


def fills(edits: Edits, batch: dict[str, Array]) -> bool:
    """Whether sampling fills the hole of an image of a batch."""
    return edits.holes and MASK in batch and reads(edits, batch)


def missing(mask: Array) -> Array:
    """Masks of a batch, in [-1, 1], as bool: True where something is missing."""
    return mask > 0


def at_size(mask: Array, shape: tuple[int, ...]) -> Array:
    """Masks [n, H, W, 1] at the height and width of `shape`, by the first value of each block (torch's 'nearest')."""
    for axis, size in ((1, shape[0]), (2, shape[1])):
        mask = jnp.take(mask, jnp.arange(size) * mask.shape[axis] // size, axis)
    return mask


def with_space(conditioning: Conditioning, space: Space) -> Conditioning:
    """The conditions, of which those of kind 'inpainting' are in this space."""
    compute = functools.partial(known_planes, space)
    return tuple(c._replace(compute=compute) if c.kind == 'inpainting' else c for c in conditioning)


def known_planes(space: Space, frozen: Any, batch: dict[str, Array], train: bool) -> Array:
    """[n, h, w, 1 + C], the masks of a batch and x_0 of its images with 0, grey, in their holes; all is missing where
    there is no mask."""
    n = len(next(iter(batch.values())))
    if MASK in batch and IMAGE in batch:
        hole, image = missing(batch[MASK]), batch[IMAGE]
    else:
        hole, image = jnp.ones((n, *space.image[:2], 1), bool), jnp.zeros((n, *space.image))
    known = space.encode(frozen, {IMAGE: jnp.where(hole, 0, image)}, jax.random.key(0))
    return jnp.concatenate([at_size(hole, space.shape).astype(known.dtype), known], -1)


def keeping(process: Process, x_0: Array, eps: Array, hole: Array) -> Callable:
    """What `samplers.run` does to x after a step: (x, level, last) -> x with what is known in its place.

    Args:
      x_0, eps: [n, ...], the image and its noise.
      hole: bool [n, ..., 1], where x stays.
    """

    def keep(x: Array, level: Any, last: Array) -> Array:
        alpha, sigma = coefficients(process, level, x)
        return jnp.where(hole, x, jnp.where(last, x_0, alpha * x_0 + sigma * eps))

    return keep


def pasted(images: Array, batch: dict[str, Array]) -> Array:
    """Images [n, H, W, C] with the batch's own where nothing is missing."""
    return jnp.where(missing(batch[MASK]), images, batch[IMAGE])
