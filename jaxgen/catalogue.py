"""The configs that come with jaxgen, a line for each: --mode=list."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxgen import config, configs
from jaxgen.sections import sides


class Entry(NamedTuple):
    """A config: its name, variants but `tiny`, family, data set, images' size, time as its docstring has it, title."""

    name: str
    family: str
    data: str
    size: str
    time: str
    variants: str
    title: str


def entry(name: str) -> Entry:
    """The line of the config of a name."""
    with open(configs.file(name), encoding='utf-8') as source:
        doc = ast.get_docstring(ast.parse(source.read())) or ''
    measured = re.search(r'^Time: (\d.*?)(?=[,;(]|\.\s| with (?:much )?other|$)', doc, re.M)
    loaded = config.load(configs.file(name))
    size = 'x'.join(map(str, (*sides(loaded.data.size), loaded.data.channels)))
    others = ' '.join(v for v in variants(name) if v != 'tiny')
    time = measured[1].strip() if measured else '-'
    data = loaded.data.source.replace(os.getcwd() + os.sep, '')  # paths are as the config has them
    return Entry(name, loaded.family, data, size, time, others, doc.partition('\n')[0])


def variants(name: str) -> list[str]:
    """Names of a config's variants, which it says in the error of one that it does not have."""
    try:
        config.load(f'{configs.file(name)}:?')
    except config.UnknownVariant as e:
        return e.known
    return []


def entries(words: Sequence[str] = ()) -> list[Entry]:
    """The configs whose line or title has all the words."""
    every = [entry(name) for name in configs.names()]
    return [e for e in every if all(word.lower() in ' '.join(e).lower() for word in words)]


def text(words: Sequence[str]) -> str:
    """The configs whose line or title has all the words, in columns; '' if there is none."""
    matching = entries(words)
    rows = [('config', 'family', 'data', 'size', 'time', 'variants'), *(e[:-1] for e in matching)] if matching else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(f'{c:<{w}}' for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
