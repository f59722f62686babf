"""Addresses of data: KIND:PATH or KIND:PATH?NAME=VALUE&NAME=VALUE, as config.data.source names a person's own files.

    parse('npz:~/cells.npz?image=x&range=0,1')  # Address('npz', '~/cells.npz', {'image': 'x', 'range': '0,1'})

Whatever has to know that a source names a path (that it is made absolute, that a stranger's run may not choose it, that
it may lie elsewhere) asks this module. It imports nothing, so that the config can.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Kinds of sources that name a path. Of those that are prepared, all behind the colon is the path.
PREPARED = ('folder', 'pairs')
READ = ('arrayrecord', 'cifar', 'idx', 'mat', 'npy', 'npz', 'parquet', 'tar', 'zip')
KINDS = (*PREPARED, *READ)
OPTIONS = re.compile(r'\?(\w+=[^?/&=]*(?:&\w+=[^?/&=]*)*)$')


class Address(NamedTuple):
    kind: str
    path: str
    options: dict[str, str] = {}

    def __str__(self) -> str:
        options = '&'.join(f'{name}={value}' for name, value in self.options.items())
        return f'{self.kind}:{self.path}' + (f'?{options}' if options else '')


def parse(source: str) -> Address | None:
    """The address that a source is, None where it is of a kind without a path: digits, shapes:outlined, a TFDS name."""
    kind, colon, path = source.partition(':')
    if not colon or kind not in KINDS:
        return None
    if kind in READ and (match := OPTIONS.search(path)):
        options: dict[str, str] = {}
        for part in match[1].split('&'):
            name, value = part.split('=')
            options[name] = f'{options[name]}&{name}={value}' if name in options else value
        return Address(kind, path[: match.start()], options)
    return Address(kind, path)
