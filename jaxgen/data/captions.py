"""Captions as conditions on the command line: their words, and checks of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxgen.data import sources
from jaxgen.errors import UserError


def words(text: bytes) -> list[bytes]:
    """The words of a caption in UTF-8, as jaxgen/networks/text.py reads them."""
    return re.findall(rb'[a-z0-9_\x80-\xff]+', text.lower())


def encoded(texts: Sequence[str]) -> np.ndarray:
    """Texts as data sets hold captions, uint8 [n, bytes of the longest]: UTF-8, zeros behind each."""
    rows = [text.encode(errors='replace') for text in texts]
    room = max(1, *map(len, rows))
    return np.stack([np.frombuffer(row.ljust(room, b'\0'), np.uint8) for row in rows])


def known(data) -> set[bytes]:
    """All words of the training captions."""
    section = {**data, 'features': ('caption',)}
    records = sources.open_records(sources.resolve(section), section, 'train')
    vocabulary: set[bytes] = set()
    for i in range(len(records)):
        stored = records[i]['caption']  # one as an array, or all as in texts.py
        for text in stored if isinstance(stored, tuple) else [bytes(stored)]:
            vocabulary.update(words(text))
    return vocabulary


def check(text: str, room: int, most: int, known: Callable[[], set[bytes]]) -> np.ndarray:
    """A caption as data sets hold it, uint8 [room]: UTF-8, zeros behind the text.

    Args:
      most: words that the model reads; 0: any number.
      known: gives all words of the training captions.

    Raises:
      UserError: it is empty, too long, or has a word that no training caption has.
    """
    encoded = text.encode(errors='replace')  # bytes of the command line that are no UTF-8
    read = words(encoded)
    if not read:
        raise UserError("write --condition=caption='some words'; it has none")
    if len(encoded) > room:
        raise UserError(f'condition caption: {len(encoded)} bytes are more than the {room} that captions have here')
    if most and len(read) > most:
        raise UserError(f'condition caption: {len(read)} words are more than the {most} that this model reads')
    vocabulary = {word.decode() for word in known()}
    for word in (w.decode() for w in read):
        if word not in vocabulary:
            close = difflib.get_close_matches(word, vocabulary, n=3, cutoff=0.6)
            some = ', '.join(sorted(vocabulary)[:20]) + (', ...' if len(vocabulary) > 20 else '')
            hint = f'did you mean {" or ".join(close)}?' if close else f'they have {some}'
            raise UserError(f'condition caption: no training caption has the word {word!r}; {hint}')
    return np.frombuffer(encoded.ljust(room, b'\0'), np.uint8)
