"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): a new word of a model that stays as it is.

The word is learned rows of the tables by which the text encoders embed their tokens, [vectors, D] each. With
`config.stages.base` and an `adapter` of this name these are all that is trained, on captions that hold the word. In
sampling every stage that is such a run adds its word, so that one prompt may hold several.

The numbers of the new tokens come behind the vocabulary of each encoder (`contract.Captions.added`); the rows are put
into its state where it is applied (`contract.WORDS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.contract import WORDS, Context
from jaxgen.diffusion import adapters as adapting
from jaxgen.diffusion.adapters import BASE, OWN
from jaxgen.diffusion.conditioning import outputs_of
from jaxgen.errors import UserError

Array = jax.Array

INVERSION = adapting.INVERSION


class Word(NamedTuple):
    """A new word."""

    name: str  # OWN or the stage whose run learned it
    word: str
    vectors: int
    encoders: tuple[str, ...]  # stages of the text encoders that know it


class Words(NamedTuple):
    """The new words of a model, in the order of their tokens' numbers."""

    every: tuple[Word, ...]
    initial: dict[str, int]  # {encoder: the row that the run's own word begins as}

    @property
    def added(self) -> tuple[tuple[str, str, int], ...]:
        """As `contract.Captions.added`."""
        return tuple((encoder, one.word, one.vectors) for one in self.every for encoder in one.encoders)

    @property
    def learned(self) -> str:
        """The run's own word; '': it has none."""
        return next((one.word for one in self.every if one.name == OWN), '')

    def known(self, networks: Mapping[str, Any], frozen: Any) -> Any:
        """`frozen` with the rows of all words in the text encoders.

        Args:
          networks: params or averages of the run.
        """
        rows: dict[str, list[Array]] = {}
        for one in self.every:
            own = networks[INVERSION] if one.name == OWN else frozen[one.name][0].ema[INVERSION]
            for encoder in one.encoders:
                rows.setdefault(encoder, []).append(own[encoder].astype(jnp.float32))
        made = {}
        for encoder, arrays in rows.items():
            state, its_frozen = frozen[encoder]
            made[encoder] = state.replace(ema={**state.ema, WORDS: jnp.concatenate(arrays)}), its_frozen
        return {**frozen, **made}

    def init(self, frozen: Any) -> dict[str, Array]:
        """{encoder: rows [vectors, D]} before the first update: those of the initial word, or the mean of all."""
        (own,) = (one for one in self.every if one.name == OWN)
        made = {}
        for encoder in own.encoders:
            table = table_of(frozen[encoder][0]).astype(jnp.float32)
            row = table[self.initial[encoder]] if encoder in self.initial else table.mean(0)
            made[encoder] = jnp.tile(row, (own.vectors, 1))
        return made


def table_of(state: Any) -> Any:
    """The rows [vocabulary, D] by which a text encoder embeds its tokens."""
    return state.ema['text']['tokens']['embedding']


def encoders_of(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages that read texts, by the conditions of a complete config.model."""
    sections = [own for own in model['conditioning'].values() if own['kind'] == 'text']
    outputs = [text for own in sections for text in (*own['tokens'], *own['pooled'])]
    return tuple(sorted({stage for text in outputs for stage, _ in outputs_of(text)}))


def bind(context: Context, model: Mapping[str, Any], adapter: Mapping[str, Any]) -> Words:
    """The words of a model: its own first, then those of its stages.

    Args:
      model: complete config.model.
      adapter: its section of this name.

    Raises:
      UserError: a word that is none, that two runs have, or of a model that reads no captions.
    """
    words = []
    if adapter['name'] == INVERSION:
        words.append(word_of(OWN, adapter, model))
    for name, family in context.stages.items():
        theirs = adapting.adapter_of(family)
        if name != BASE and theirs.get('name') == INVERSION:
            adapting.check_same(model, family, name)
            words.append(word_of(name, theirs, model))
    for i, one in enumerate(words):
        if any(one.word.lower() == other.word.lower() for other in words[:i]):
            raise UserError(f'config.stages.{one.name}: the word {one.word!r} is that of another of these runs')
    return Words(tuple(words), initial_rows(context, words, adapter))


def word_of(name: str, adapter: Mapping[str, Any], model: Mapping[str, Any]) -> Word:
    """The word of a complete section `adapter`; arguments and errors as those of `bind`."""
    word, every = adapter['word'], encoders_of(model)
    where = 'config.model.adapter' if name == OWN else f'config.stages.{name}'
    if not every:
        raise UserError(f'{where}: a new word is of a model that reads captions by text encoders')
    if not word or word.split() != [word]:
        raise UserError(f"{where}.word must be one word without spaces, like '<zig>'; it is {word!r}")
    encoders = tuple(adapter['encoders']) or every
    if wrong := [encoder for encoder in encoders if encoder not in every]:
        raise UserError(f'{where}.encoders: {wrong[0]!r} is no text encoder of this model: {", ".join(every)}')
    return Word(name, word, adapter['vectors'], encoders)


def initial_rows(context: Context, words: list[Word], adapter: Mapping[str, Any]) -> dict[str, int]:
    """{encoder: number of the token of the initial word}; {} where there is none, or no tokenizer yet.

    Raises:
      UserError: it is several tokens.
    """
    rows = {}
    for encoder in (one for word in words if word.name == OWN for one in word.encoders if adapter['initial']):
        tokenizer = context.tokenizer(encoder) if context.tokenizer else None
        if tokenizer is None:
            continue
        numbers = tokenizer.pieces(adapter['initial'])
        if len(numbers) != 1:
            raise UserError(
                f'config.model.adapter.initial = {adapter["initial"]!r} is {len(numbers)} tokens of '
                f'config.stages.{encoder}: name a word that is one'
            )
        rows[encoder] = numbers[0]
    return rows


def inversion_of(sections: dict[str, Any], run: str) -> dict[str, Any]:
    """What a config of textual inversion has over that of its base: the recipe of diffusers' example (AdamW, the rate
    for batches of 4, 3,000 updates)."""
    return {
        'stages': {BASE: run},
        'model': {'adapter': {'name': INVERSION}},
        'data': adapting.of_few_images(sections),
        'optim': {'name': 'adamw', 'lr': 2e-3, 'weight_decay': 1e-2, 'clip': 1.0, 'ema': 0.0},
        'train': {'steps': 3000, 'save_every': 500, 'sample_every': 500, 'samples': 16},
    }
