"""Captions in a file beside the images, as the hub's ImageFolder has them: metadata.jsonl or metadata.csv.

    {"file_name": "0001.png", "text": "a red heart"}                       metadata.jsonl, captions.jsonl: a row a line
    {"file_name": "cats/2.jpg", "text": ["a cat", "ein Kater"]}            several captions of one image
    file_name,text                                                         metadata.csv, .tsv: the columns' names first
    0001.png,"a red heart, small"

Names are relative to the folder of the file, and are looked up among the images that are there: they open nothing. An
image takes the row of the nearest file above it. Several rows of one image are several captions.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxgen.data import texts, trees
from jaxgen.data.records import MOST_TEXT
from jaxgen.errors import UserError

# Files with captions: the first of these in a folder is read.
NAMES = ('metadata.jsonl', 'captions.jsonl', 'metadata.csv', 'captions.csv', 'metadata.tsv', 'captions.tsv')
FILES = ('file_name', 'filename', 'file', 'image', 'path')  # columns with an image's name, in the order of preference
COLUMNS = ('text', 'caption', 'captions', 'texts', 'prompt', 'txt')  # columns with captions
MOST_FILE = 2**30  # bytes of such a file
MOST_ROW = 2**15  # bytes of it for each image, beside
OTHER = 2**24


class Captions(NamedTuple):
    """Captions by number of the image."""

    texts: dict[int, tuple[bytes, ...]]  # of those that have any
    longest: int  # bytes of one
    notes: tuple[str, ...]  # what is left out, and why
    files: tuple[str, ...]  # that were read

    def digest(self, names: trees.Names) -> str:
        """64 hexadecimal digits, the same for the same captions of images with the same names."""
        digest = hashlib.sha256()
        for name, i in sorted((names.encoded(i), i) for i in self.texts):
            digest.update(b'\0'.join([name, *self.texts[i], b'']) + b'\0')
        return digest.hexdigest()


def is_metadata(name: str) -> bool:
    return posixpath.basename(name).lower() in NAMES


def read(
    images: trees.Names, files: list[tuple[str, int]], content: Callable[[int, int], bytes], column: str, where: str
) -> Captions | None:
    """The captions in files beside images; None where there is no such file.

    Args:
      images: their names, parts separated by '/'.
      files: (name, number) of other files.
      content: (number, most bytes) -> what is in it. ValueError: it cannot be read, or has more.
      column: that captions are in; '': one of COLUMNS.
      where: the folder or archive, in messages.

    Raises:
      UserError: a file is damaged, has no such column, or none of its rows is of an image.
    """
    chosen, notes = nearest(files)
    if not chosen:
        return None
    numbers = {name: i for i, name in enumerate(images)}
    most = min(MOST_FILE, OTHER + len(images) * MOST_ROW)
    by_number: dict[int, tuple[bytes, ...]] = {}
    for name, number in chosen:
        try:
            text = content(number, most).decode('utf-8-sig')
        except UnicodeDecodeError as e:
            line = e.object.count(b'\n', 0, e.start) + 1
            raise UserError(f'{where}: {name!a}: line {line} is no UTF-8: save the file as UTF-8') from e
        except (OSError, ValueError) as e:
            raise UserError(f'{where}: {name!a} cannot be read: {" ".join(str(e).split())[:200]}') from e
        own: dict[int, list[bytes]] = {}
        above, lost, first = posixpath.dirname(name), 0, ''
        captioned, without = False, ''
        for line, row in rows(text, name, where):
            file, captions = of_row(row, column, f'{where}: {name!a}: line {line}')
            if captions is None:
                without = without or ', '.join(map(ascii, list(row)[:10]))
            captioned = captioned or captions is not None
            i = numbers.get(posixpath.normpath(posixpath.join(above, file.replace('\\', '/'))))
            if i is None:
                lost, first = lost + 1, first or file
            else:
                own.setdefault(i, []).extend(captions or ())
        if without and not captioned:
            what = repr(column) if column else f'{COLUMNS[0]!r} or {COLUMNS[1]!r}'
            raise UserError(
                f'{where}: {name!a} has no column {what} with captions: name it by config.data.caption; '
                f'it has {without[:300]}'
            )
        if lost and not own:
            raise UserError(
                f'{where}: {name!a} names no image that is there, but {ascii(first)[:100]}: names must be relative to '
                'its folder'
            )
        if lost:
            notes.append(f'{lost} rows of {name!a} for images that are not there, like {ascii(first)[:100]}')
        by_number |= {i: tuple(captions) for i, captions in own.items() if captions}
    lengths = np.array([len(text) for captions in by_number.values() for text in captions], np.int64)
    if n := int((lengths > MOST_TEXT).sum()):
        notes.append(f'the end of {n} captions of more than {MOST_TEXT:,} bytes')
        by_number = {i: tuple(texts.cut(text, MOST_TEXT) for text in captions) for i, captions in by_number.items()}
    return Captions(by_number, int(lengths.max(initial=0)), tuple(notes), tuple(name for name, _ in chosen))


def nearest(files: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    """(one file of captions for each folder, the deepest last, what is left out)."""
    rank = {name: i for i, name in enumerate(NAMES)}
    chosen: dict[str, tuple[str, int]] = {}
    notes = []
    listed = [(name, number) for name, number in files if is_metadata(name)]
    for name, number in sorted(listed, key=lambda one: (rank[posixpath.basename(one[0]).lower()], one)):
        above = posixpath.dirname(name)
        if above in chosen:
            notes.append(f'{name!a} beside {posixpath.basename(chosen[above][0])}')
        else:
            chosen[above] = name, number
    return sorted(chosen.values(), key=lambda one: (one[0].count('/'), one)), notes


def rows(text: str, name: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, the row) of a file.

    Raises:
      UserError: it is damaged.
    """
    if name.lower().endswith('.jsonl'):
        for k, line in enumerate(text.split('\n'), 1):
            if line.strip():
                yield k, json_row(line, f'{where}: {name!a}: line {k}')
        return
    table = csv.reader(io.StringIO(text, newline=''), delimiter='\t' if name.lower().endswith('.tsv') else ',')
    header: list[str] = []
    try:
        for row in table:
            if not any(row):
                continue
            if not header:
                header = [title.strip() for title in row]
                continue
            if len(row) != len(header):
                raise UserError(
                    f'{where}: {name!a}: line {table.line_num} has {len(row)} values and the first one {len(header)}: '
                    'put a text with commas, quotes or ends of lines into "quotes", and double those within it'
                )
            yield table.line_num, dict(zip(header, row, strict=True))
    except csv.Error as e:
        raise UserError(f'{where}: {name!a}: line {table.line_num} cannot be read: {e}') from e


def json_row(line: str, where: str) -> dict[str, Any]:
    """A line of a .jsonl file.

    Raises:
      UserError: it is no JSON object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f'{where} is no JSON ({" ".join(str(e).split())[:100]}): repair or remove it') from e
    if not isinstance(row, dict):
        raise UserError(f'{where} must be a JSON object, {{"file_name": "1.png", "text": "a cat"}}')
    return row


def of_row(row: dict[str, Any], column: str, where: str) -> tuple[str, tuple[bytes, ...] | None]:
    """(the image's name, its captions) in a row; None where it has no column for these.

    Raises:
      UserError: it names no image, or its captions are no texts.
    """
    file = next((row[key] for key in FILES if isinstance(row.get(key), str)), '')
    if not file:
        has = ', '.join(map(ascii, list(row)[:10]))[:300] or 'nothing'
        raise UserError(f"{where} has no column 'file_name' with an image's name, but {has}")
    key = column or next((key for key in COLUMNS if key in row), '')
    if key not in row:
        return file, None
    try:
        return file, texts.encoded(row[key])
    except ValueError as e:
        raise UserError(f'{where}: {ascii(key)[:100]} must be {e}') from e
