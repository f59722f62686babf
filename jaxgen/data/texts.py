"""Texts of examples: in any script, of any length, one or several an example.

A record holds a feature that is a text as a tuple of UTF-8 bytes, () where the example has none. A batch holds one of
them, uint8 [n, room] with zeros behind it: the first, or, of a training example, one that is drawn by the example's
number in the endless order. `room` is the longest that a source has, as far as that is known without reading all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgen.data import folder
from jaxgen.data.records import MOST_TEXT, Records, with_features


def encoded(value: Any) -> tuple[bytes, ...]:
    """The texts that are stored as `value`: a text, UTF-8 bytes, a list or array of these, or None.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(value, str | bytes | None):
        values = [] if value is None else [value]
    elif isinstance(value, list | tuple | np.ndarray):
        values = list(value)
    else:
        raise ValueError(f'a text, or a list of texts, and no {type(value).__name__}')
    out = []
    for one in values:
        if one is None:
            continue
        if not isinstance(one, str | bytes):
            raise ValueError(f'a text, or a list of texts, and no {type(one).__name__} in a list')
        text = one.decode('utf-8', 'replace') if isinstance(one, bytes) else one
        if text := text.strip():
            out.append(text.encode('utf-8', 'replace'))
    return tuple(out)


def cut(text: bytes, room: int) -> bytes:
    """The text's first bytes, cut off between two characters."""
    return text if len(text) <= room else text[:room].decode('utf-8', 'ignore').encode()


def padded(text: bytes, room: int) -> np.ndarray:
    """A text as uint8 [room], zeros behind it."""
    return np.frombuffer(cut(text, room).ljust(room, b'\0'), np.uint8)


def room_for(longest: int) -> int:
    """Bytes of a feature's texts, of which the longest has so many."""
    return max(1, min(longest, MOST_TEXT))


class Texts:
    """The texts of a split's records.

    Args:
      rooms: {feature: bytes of a text in a batch}.
      keep: whether what has been read stays in memory.
      failed: called with an example's number and the reason where its texts cannot be read; it has none then.
    """

    def __init__(self, records: Records, rooms: dict[str, int], keep: bool, failed: Callable[[int, Exception], None]):
        self.rooms, self.failed = rooms, failed
        self.records = with_features(records, tuple(rooms))
        self.kept: dict[int, dict[str, tuple[bytes, ...]]] | None = {} if keep else None

    def one(self, i: int) -> dict[str, tuple[bytes, ...]]:
        """All texts of example i."""
        kept = self.kept
        if kept is not None and i in kept:
            return kept[i]
        try:
            captions = self.records[i]
        except ValueError as e:
            self.failed(i, e)
            captions = dict.fromkeys(self.rooms, ())
        if kept is not None:
            kept[i] = captions
        return captions

    def take(self, indices: np.ndarray, drawn: np.ndarray | None) -> dict[str, np.ndarray]:
        """A text of each of the examples [n], uint8 [n, room] by feature.

        Args:
          drawn: float64 [n] in [0, 1), which of an example's texts it is; None: the first.
        """
        every = [self.one(i) for i in indices.tolist()]
        return {name: self.batch(name, [one[name] for one in every], drawn) for name in self.rooms}

    def batch(self, name: str, every: list[tuple[bytes, ...]], drawn: np.ndarray | None) -> np.ndarray:
        room, out = self.rooms[name], np.zeros((len(every), self.rooms[name]), np.uint8)
        for row, texts in enumerate(every):
            if not texts:
                continue
            text = texts[0 if drawn is None else int(drawn[row] * len(texts))]
            if len(text) > room:
                folder.say(f'{self.records.path}: texts ({name}) of more than {room:,} bytes are cut off there')
                text = cut(text, room)
            out[row, : len(text)] = np.frombuffer(text, np.uint8)
        return out
