"""Parquet files, as the Hugging Face hub's sets of images are downloaded: parquet:FILE or parquet:FOLDER of shards.

A column of images holds the bytes of their files, or structs {bytes, path}. Names of classes come from the ClassLabel
that the hub's files describe; other labels, integers or texts, are read first. parquet:PATH?image=img&label=fine_label
names columns. A shard's split is in its name or its folder's: train-00000-of-00002.parquet, default/test/0000.parquet.
An example is read with its whole row group. Of sets of more than 256 MB training mixes the examples of so many row
groups at a time, other ones in each epoch; these stay in memory.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxgen.addresses import Address
from jaxgen.data import arrays, texts
from jaxgen.data.records import UNREAD_TEXT, Contents, Feature, Split, classes_of, open_file
from jaxgen.errors import RunError, UserError

SPLIT = re.compile(r'(?:^|[^a-z])(train|test|validation|valid|val|dev)(?:[^a-z]|$)')
SPLITS = {**arrays.WORDS, 'dev': 'validation'}
CAPTIONS = (*arrays.ROLES['caption'], 'prompt')
ROWS = 32  # that are read at a time
PACKED = 100  # times the size of a file is what its values may have as a rule
WINDOW = 2**28  # bytes of the row groups whose examples training mixes; twice as many are in memory


class Shard(NamedTuple):
    path: str
    metadata: Any  # of pyarrow
    rows: int


def read(address: Address, data) -> Contents:
    """The columns of a file, or of a folder's files.

    Raises:
      UserError: pyarrow is not installed, or the files are none of Parquet, or have no images.
    """
    try:
        import pyarrow as pa
    except ImportError as e:
        raise UserError("config.data.source: parquet: is read by pyarrow: pip install 'jaxgen[parquet]'") from e
    path = address.path
    splits = {split: [shard(file) for file in paths] for split, paths in files_of(path).items()}
    first = next(iter(splits.values()))[0]
    schema = first.metadata.schema.to_arrow_schema()
    for one in (one for shards in splits.values() for one in shards):
        other = one.metadata.schema.to_arrow_schema()
        if not other.equals(schema):
            raise UserError(f'{one.path} has other columns than {first.path}: name one file, or one folder of one set')
    described = hub_features(schema)
    names = roles(path, address.options, schema, described, pa)
    columns = {
        split: Columns(split, shards, max(data['cache_mb'] * 2**20, 2 * WINDOW), names, described)
        for split, shards in splits.items()
    }
    notes = []
    for split in [split for split in columns if split != 'train' and 'label' in names and columns[split].unlabelled()]:
        notes.append(f'the split {split}, which has no labels')
        del columns[split]
    features, labels = features_of(path, columns, schema, names, described, data, pa)
    return Contents(
        path,
        features,
        {split: split_of(one, features, labels) for split, one in columns.items()},
        tuple(one.path for shards in splits.values() for one in shards),
        recipe=repr(sorted(names.items())),
        notes=tuple(notes),
    )


def files_of(path: str) -> dict[str, list[str]]:
    """{split: paths in order}; without words of splits in their names all are of 'train'."""
    if not os.path.isdir(path):
        return {'train': [path]}
    paths = []
    for top, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths += [os.path.join(top, name) for name in sorted(names) if name.endswith('.parquet') and name[0] != '.']
    if not paths:
        raise UserError(f'{path} holds no .parquet files')
    splits: dict[str, list[str]] = {}
    for one in paths:
        splits_named = SPLIT.findall(os.path.relpath(one, path).lower())
        splits.setdefault(SPLITS[splits_named[-1]] if splits_named else 'train', []).append(one)
    return splits


def shard(path: str) -> Shard:
    """A file by its footer.

    Raises:
      UserError: it is none of Parquet, or says what cannot be.
    """
    from pyarrow import parquet

    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            metadata = parquet.read_metadata(file)
            metadata.schema.to_arrow_schema()
        except Exception as e:
            raise UserError(f'{path} is no Parquet file, or damaged: {" ".join(str(e).split())[:200]}') from e
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    # Every image has bytes of its own.
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows or sum(rows) > size:
        raise UserError(f'{path} is damaged: by its footer it has {metadata.num_rows} rows in {size} bytes')
    return Shard(path, metadata, metadata.num_rows)


def read_groups(file, shard: Shard, groups: list[int], columns: list[str]):
    """Some row groups. They are read a few rows at a time: a value that is stored once may stand in any number of rows,
    each of which then has bytes of its own in memory.

    Raises:
      RunError: they have far more bytes than the file and its footer say.
    """
    import pyarrow as pa
    from pyarrow import parquet

    declared = sum(shard.metadata.row_group(i).total_byte_size for i in groups)
    most = 2 * max(WINDOW, min(declared, PACKED * os.fstat(file.fileno()).st_size))
    reader = parquet.ParquetFile(file, metadata=shard.metadata)
    parts, total = [], 0
    for part in reader.iter_batches(ROWS, row_groups=groups, columns=columns, use_threads=False):
        total += part.nbytes
        if total > most:
            raise RunError(f'{shard.path}: its rows have more than {most} bytes, many times those of the file')
        parts.append(part)
    return pa.Table.from_batches(parts) if parts else reader.schema_arrow.empty_table().select(columns)


def hub_features(schema) -> dict[str, Any]:
    """{column: what the hub's files say of it}, {'label': {'_type': 'ClassLabel', 'names': [...]}}."""
    try:
        features = json.loads(schema.metadata[b'huggingface'])['info']['features']
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def is_image(field, described: dict[str, Any], pa) -> bool:
    if pa.types.is_struct(field.type):
        return any(field.type.field(i).name == 'bytes' for i in range(field.type.num_fields))
    return pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)


def is_text(kind, pa) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_texts(kind, pa) -> bool:
    """Whether values are texts or lists of texts."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_text(kind.value_type if lists else kind, pa)


def roles(path: str, options: dict[str, str], schema, described: dict[str, Any], pa) -> dict[str, str]:
    """{feature: column}: those that the address names, those with usual names or types, all others by their own."""
    listed = ', '.join(f'{field.name} {str(field.type)[:40]}' for field in list(schema)[:10])
    if twice := [name for name, n in collections.Counter(schema.names).items() if n > 1]:
        raise UserError(f'{path} has several columns {twice[0]!a}: give each a name of its own')
    named = {arrays.PLURALS.get(name, name): column for name, column in options.items()}
    for name, column in named.items():
        if column not in schema.names:
            raise UserError(f'{path}: ?{name}={column}: there is no such column; it has {listed}')
    images = [field.name for field in schema if is_image(field, described, pa)]
    classes = [name for name, about in described.items() if about.get('_type') == 'ClassLabel' and name in schema.names]
    usual = {
        'image': [*(n for n in arrays.ROLES['image'] if n in images), *images],
        'label': [*(n for n in arrays.ROLES['label'] if n in schema.names), *classes],
        'caption': [n for n in CAPTIONS if n in schema.names and is_texts(schema.field(n).type, pa)],
    }
    for name, columns in usual.items():
        if name not in named and (columns := [column for column in columns if column not in named.values()]):
            named[name] = columns[0]
    if 'image' not in named or named['image'] not in images:
        raise UserError(f'{path} has no column with the bytes of images; it has {listed}')
    if 'label' in named and not (is_text(kind := schema.field(named['label']).type, pa) or pa.types.is_integer(kind)
                                 or pa.types.is_boolean(kind)):  # fmt: skip
        if 'label' in options or 'labels' in options:
            raise UserError(f'{path}: ?label={named["label"]} is {kind}: labels are integers or texts')
        del named['label']
    return {**named, **{n: n for n in schema.names if n not in named.values() and n not in named}}


class Columns:
    """The columns of one split, by row."""

    def __init__(self, split: str, shards: list[Shard], room: int, names: dict[str, str], described: dict[str, Any]):
        self.split, self.shards, self.room, self.names = split, shards, room, names
        self.described = described.get(names.get('label', ''), {})
        groups = [
            (k, i, shard.metadata.row_group(i).num_rows)
            for k, shard in enumerate(shards) for i in range(shard.metadata.num_row_groups)
        ]  # fmt: skip
        self.groups = [(k, i) for k, i, _ in groups]
        self.ends = np.cumsum([n for _, _, n in groups], dtype=np.int64)
        self.n = int(self.ends[-1]) if groups else 0
        size = sum(s.metadata.row_group(i).total_byte_size for s in shards for i in range(s.metadata.num_row_groups))
        # Row groups that are mixed; 0: all of them fit into memory.
        self.together = max(2, WINDOW * len(groups) // size) if size > WINDOW else 0
        self.kept: collections.OrderedDict = collections.OrderedDict()
        self.lock, self.reading = threading.Lock(), collections.defaultdict(threading.Lock)

    def blocks(self) -> tuple[np.ndarray, int]:
        """The row group of each row, and how many of them are mixed."""
        return np.searchsorted(self.ends, np.arange(self.n), side='right'), self.together

    def column(self, name: str) -> list:
        """All values of a column."""
        values: list = []
        for one in self.shards:
            with open_file(one.path) as file:
                try:
                    table = read_groups(file, one, list(range(one.metadata.num_row_groups)), [self.names[name]])
                except Exception as e:
                    raise UserError(f'{one.path} is damaged: {" ".join(str(e).split())[:200]}') from e
            values += table.column(0).to_pylist()
        return values

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """As they are stored: integers or texts."""
        values = self.column('label')
        if None in values:
            raise UserError(f'{self.shards[0].path}: {values.count(None)} labels of {self.split} are null')
        try:
            return np.asarray(values)
        except ValueError as e:
            raise UserError(f'{self.shards[0].path}: labels must be integers or texts, not lists') from e

    def unlabelled(self) -> bool:
        """Whether it is a test split whose labels the hub keeps back."""
        return self.described.get('_type') == 'ClassLabel' and bool(self.n) and bool((self.labels == -1).all())

    def group(self, number: int, columns: tuple[str, ...]):
        """A row group; one that was read lately is in memory."""
        key = number, columns
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
            reading = self.reading[key]
        with reading:
            with self.lock:
                if key in self.kept:
                    return self.kept[key]
            shard, i = self.groups[number]
            with open(self.shards[shard].path, 'rb') as file:
                table = read_groups(file, self.shards[shard], [i], list(columns))
            with self.lock:
                self.kept[key] = table
                while len(self.kept) > 1 and sum(one.nbytes for one in self.kept.values()) > self.room:
                    self.kept.popitem(last=False)
                self.reading.pop(key, None)
        return table

    def row(self, i: int, names: tuple[str, ...]) -> dict[str, Any]:
        number = int(np.searchsorted(self.ends, i, side='right'))
        first = int(self.ends[number - 1]) if number else 0
        table = self.group(number, tuple(sorted({self.names[name] for name in names})))
        return {name: table.column(self.names[name])[i - first].as_py() for name in names}

    def name(self, i: int) -> str:
        number = int(np.searchsorted(self.ends, i, side='right'))
        shard = self.groups[number][0]
        before = [k for k, (other, _) in enumerate(self.groups) if other < shard]
        first = int(self.ends[before[-1]]) if before else 0
        return f'row {i - first} of {os.path.basename(self.shards[shard].path)}'


def features_of(
    path: str, columns: dict[str, Columns], schema, names: dict[str, str], described: dict[str, Any], data, pa
) -> tuple[dict[str, Feature], Callable[[str], np.ndarray] | None]:
    """(the features, the function from a split to the class of each of its examples)."""
    features = {'image': Feature(('image',), image=True)}
    numbers: Callable[[str], np.ndarray] | None = None
    for name, column in names.items():
        kind, about = schema.field(column).type, described.get(column, {})
        if name == 'label':
            features[name], numbers = label_feature(path, columns, about, data)
        elif name != 'image' and is_image(schema.field(column), described, pa):
            features[name] = Feature((name,), image=True)
        elif is_texts(kind, pa):
            if name in data['features']:
                stored = (value for one in columns.values() for value in one.column(name))
                longest = max((len(text) for value in stored for text in texts.encoded(value)), default=0)
                features[name] = Feature((name,), shape=(texts.room_for(longest),), text=True)
            else:
                features[name] = Feature((name,), shape=(UNREAD_TEXT,), text=True)
        elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            features[name] = Feature((name,), dtype=np.int32)
        elif pa.types.is_floating(kind):
            features[name] = Feature((name,), dtype=np.float32)
    return features, numbers


def label_feature(path: str, columns: dict[str, Columns], about: dict[str, Any], data):
    """(the feature, the function from a split to the class of each of its examples)."""
    described = about.get('names') if about.get('_type') == 'ClassLabel' else None
    if isinstance(described, list) and described and all(isinstance(name, str) for name in described):
        names = tuple(described)

        @functools.cache
        def numbers(split: str) -> np.ndarray:
            values = columns[split].labels
            if values.ndim != 1 or values.dtype.kind not in 'biu':
                raise UserError(f'{path}: labels of {split} are {values.dtype}, not the numbers of the {len(names)} '
                                'classes that it describes')  # fmt: skip
            if len(values) and not (values.min() >= 0 and values.max() < len(names)):
                raise UserError(
                    f'{path}: labels of {split} are {values.min()} to {values.max()}, of {len(names)} classes'
                )
            return values.astype(np.int32)

        shown = () if names == tuple(map(str, range(len(names)))) else names
        return Feature(('label',), dtype=np.int32, classes=len(names), names=shown), numbers

    @functools.cache
    def all_labels() -> tuple[dict[str, np.ndarray], tuple[str, ...], int]:
        parts = [one.labels for one in columns.values()]
        values, names, n = classes_of(np.concatenate(parts), data['classes'], path)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return dict(zip(columns, np.split(values, ends), strict=True)), names, n

    wanted = {'label', 'domain'} & set(data['features']) or data['keep_classes']
    _, names, n = all_labels() if wanted else ({}, (), 0)
    return Feature(('label',), dtype=np.int32, classes=n, names=names), lambda split: all_labels()[0][split]


def split_of(columns: Columns, features: dict[str, Feature], labels: Callable[[str], np.ndarray] | None) -> Split:
    def open_examples(names: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
        read = tuple(name for name in names if name != 'label')
        numbers = labels(columns.split) if labels and 'label' in names else np.zeros(0)

        def example(i: int) -> dict[str, Any]:
            row = columns.row(i, read) if read else {}
            out = {name: value_of(row[name], features[name]) for name in read}
            return out | ({'label': numbers[i]} if 'label' in names else {})

        return example

    own = None if labels is None else functools.partial(labels, columns.split)
    return Split(columns.n, open_examples, own, columns.name, blocks=columns.blocks if columns.together else None)


def value_of(value, feature: Feature):
    """A stored value as a record has it.

    Raises:
      ValueError: there is none.
    """
    if feature.image:
        content = value.get('bytes') if isinstance(value, dict) else value
        if not content:
            # A path leads out of the set: it is not followed.
            raise ValueError('it has a path and no bytes' if isinstance(value, dict) and value.get('path') else 'empty')
        return content
    if feature.text:
        return texts.encoded(value)
    if value is None:
        raise ValueError('a value is null')
    return arrays.converted(np.asarray(value), feature.dtype)[()]
