"""Checks of what a person configured, before anything is compiled: each raises UserError with what to change."""

from __future__ import annotations

import jax

from jaxgen.contract import Context, State
from jaxgen.errors import UserError


def check_labels(context: Context, conditional: bool) -> None:
    """Raises UserError where a model is to be conditioned on the class and the data have no labels."""
    if conditional and not context.classes:
        raise UserError(
            "config.model.conditional needs labels: take a data set with classes, with 'label' in config.data.features"
        )


def check_stage_image(context: Context, name: str) -> None:
    """Raises UserError where a stage was trained on images of another size than the data's."""
    image = context.stages[name].image
    if image not in ((), context.image):  # () before `assembly.assemble`
        raise UserError(
            f'config.stages.{name} was trained on other images: they are {image} (height, width, channels), and those '
            f'of config.data {context.image}'
        )


def check_same_weights(kept: State, made: State, field: str, trained: tuple[int, ...]) -> None:
    """Raises UserError where a family has other weights for images of another size: layers that read whole images,
    positions that are learned, a level more.

    Args:
      kept: the weights that there are, of images of the size `trained`.
      made: those of the other size, as shapes.
      field: that says the other size.
    """
    here, there = (
        {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path((s.ema, s.extra))}
        for s in (kept, made)
    )
    if here != there:
        raise UserError(f'{field}: the weights are of images of {size_text(trained)} pixels and fit no other size')


def check_discriminator(params: dict) -> None:
    """Raises UserError where a run has no discriminator, since the file that it was imported from had none."""
    if 'discriminator' not in (params or {}):
        raise UserError(
            'this needs the discriminator, and the published file that was imported had none: import it with '
            '--discriminator=FILE, or train on'
        )


def size_text(image: tuple[int, ...]) -> str:
    """Height and width of an image as config.data.size has them: '28', or '(28, 20)'."""
    height, width = image[:2]
    return str(height) if height == width else f'({height}, {width})'


def check_size(image: tuple[int, int, int], divisor: int, reason: str) -> None:
    """Raises UserError where an image's height or width is not a multiple of `divisor`.

    Args:
      reason: the fields that make it so, like 'config.model.levels = 3'.
    """
    height, width, _ = image
    if height % divisor or width % divisor:
        raise UserError(f'config.data.size = {size_text(image)} must be a multiple of {divisor} for {reason}')


def check_parts(n: int, parts: int, field: str) -> None:
    """Raises UserError where a batch of n examples cannot be cut into so many equal parts, and each of these into equal
    parts for the devices: of others XLA may compute something else.

    Args:
      field: of the config, which says how many parts there are.
    """
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    if n % (parts * devices):
        each = f', each for {devices} devices' if devices > 1 else ''
        raise UserError(
            f'config.data.batch = {n} must be a multiple of {parts * devices}: {field} makes {parts} parts{each}'
        )
