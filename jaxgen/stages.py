"""What a family takes of an earlier stage in training: the latents or codes of a batch's images.

They are computed in the update, or, since they depend on the image and frozen weights alone, were before: then the
batch holds them under the names that `prepare` gives them (see prepare.py), and the update draws the same random
numbers.

    first = stages.encoder(context.stages['first'], 'first')

    def loss(params, state, frozen, batch, rng):
        codes = first.encode(frozen, batch, rng)

    Family(..., prepare=first.prepare)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxgen.contract import Array, Batch, Encode, Family, Frozen, Posterior, Prepare


class Encoder(NamedTuple):
    """The encoder of a stage."""

    prepare: Prepare
    encode: Callable[[Frozen, Batch, Array], Any]  # latents or codes of a batch, as `Family.encode` of the stage
    # gives them; where it has a posterior, drawn from it


def encoder(stage: Family, name: str) -> Encoder:
    """The encoder of config.stages.NAME.

    Raises:
      ValueError: the stage encodes nothing.
    """
    if stage.encode is None:
        raise ValueError(f'config.stages.{name} encodes nothing')
    if stage.latents.grids:
        return of_codes(stage.encode, name, len(stage.latents.grids), stage.latents.vocabulary)
    return of_latents(stage.posterior or of_mean(stage.encode), name)


def of_mean(encode: Encode) -> Posterior:
    """The distribution of latents that are given without one."""

    def moments(state, frozen, batch, rng):
        return {'mean': encode(state, frozen, batch, rng)}

    return Posterior(moments, lambda moments, rng: moments['mean'])


def of_latents(posterior: Posterior, name: str) -> Encoder:
    """The encoder of latents that are drawn from a posterior."""

    def prepare(frozen, batch, rng):
        state, its_frozen = frozen[name]
        return {f'{name}/{key}': x for key, x in posterior.moments(state, its_frozen, batch, rng).items()}

    def encode(frozen, batch, rng):
        state, its_frozen = frozen[name]
        prepared = {key.removeprefix(f'{name}/'): x for key, x in batch.items() if key.startswith(f'{name}/')}
        return posterior.draw(prepared or posterior.moments(state, its_frozen, batch, rng), rng)

    return Encoder(prepare, encode)


def of_codes(compute: Encode, name: str, grids: int, vocabulary: int) -> Encoder:
    """The encoder of grids of codes."""
    keys = [f'{name}/codes{k}' for k in range(grids)]
    stored = jnp.uint16 if vocabulary <= 2**16 else jnp.int32

    def prepare(frozen, batch, rng):
        state, its_frozen = frozen[name]
        codes = compute(state, its_frozen, batch, rng)
        return {key: grid.astype(stored) for key, grid in zip(keys, codes, strict=True)}

    def encode(frozen, batch, rng):
        if keys[0] in batch:
            return tuple(batch[key].astype(jnp.int32) for key in keys)
        state, its_frozen = frozen[name]
        return compute(state, its_frozen, batch, rng)

    return Encoder(prepare, encode)
