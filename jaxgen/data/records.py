"""Examples that are read by number straight from a person's files, without being copied into a prepared set first.

A reader of one kind of file is a function (address, data) -> Contents: what is there by the headers, no image read. All
else that such sources need is here: splits, held-out examples, identity, the text of an error. To add a kind, write
its reader, and name it in `addresses.READ` and `sources.READERS`.

    contents = idx.read(addresses.parse('idx:~/mnist'), data)
    records = open_split(contents, contents.features, data, 'train', directory)
    records[5]  # {'image': uint8 [28, 28], 'label': 3}
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from jaxgen import files
from jaxgen.addresses import Address
from jaxgen.data import folder, guard, transforms
from jaxgen.errors import RunError, UserError

DIGESTS = 'jaxgen_digests'  # in the directory of prepared sets: of files that take long to read
LONG = 2**24  # bytes of such a file
MOST_CLASSES = 2**20  # that integers as labels may number
MOST_TEXT = 2**15  # bytes of a text in a batch; what is longer is cut off
UNREAD_TEXT = 2**13  # the same where the longest one of a source is not known


class Feature(NamedTuple):
    """One feature: where an example keeps it and what it becomes in a batch."""

    path: tuple[str, ...]
    shape: tuple[int, ...] = ()
    dtype: Any = np.uint8
    classes: int = 0
    names: tuple[str, ...] = ()  # of the classes, where they have any
    image: bool = False
    channels: int = 0  # of an image; 0: config.data.channels
    palette: bool = False  # an image whose palette's indices are classes, not to be blended
    text: bool = False  # a record holds a tuple of UTF-8 bytes, see texts.py; `shape` is the most bytes of one
    side: int = 0  # the shorter one in pixels, of an image that is made smaller than the others; 0: as they are


def root(data) -> str:
    """Directory of the prepared sets."""
    return files.absolute(data['dir'] or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')


class Records(Protocol):
    """The examples of one split of a source, in an order that never changes.

    `records[i]` holds the chosen features: an image as the bytes of its file or as uint8 [H, W] or [H, W, C] with 1 to
    4 channels, a text as in texts.py, all else as a number or an array of the feature's shape. It may be called from
    several threads at once. What it raises is the fault of one example, which is counted and replaced (see
    loader.Examples), except RunError: that ends the run.
    """

    path: str  # for messages
    chosen: dict[str, Feature]

    @property
    def identity(self) -> str:
        """A text that is the same for the same examples, wherever they lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...


class Split(NamedTuple):
    """One of the splits that files have of themselves."""

    n: int  # examples
    # (names of features) -> the function from a number to the example, {name: value} of these. Other features are not
    # read. It is called from several threads at once.
    open: Callable[[tuple[str, ...]], Callable[[int], dict[str, Any]]]
    labels: Callable[[], np.ndarray] | None = None  # int [n]: so that of each class one is trained on
    names: Callable[[int], str] | None = None  # of an example, for messages: 'a/b.png'
    # float64 [n] in [0, 1), a function of each example alone: the least are held out for testing. None: of its number.
    ranks: Callable[[], np.ndarray] | None = None
    # Where examples are read in blocks, each of which takes long: (block of each, int [n], how many blocks fit into
    # memory). Training then mixes the examples of so many blocks at a time, other ones in each epoch. A function of
    # the files alone, since the order of the examples must be one.
    blocks: Callable[[], tuple[np.ndarray, int]] | None = None


class Contents(NamedTuple):
    """What a person's files hold, by their headers."""

    path: str  # absolute
    features: dict[str, Feature]  # by name, which is also their path; 'image' among them
    splits: dict[str, Split]  # 'train', 'test', 'validation', or 'train' alone, of which some are held out then
    files: tuple[str, ...]  # absolute paths of all that is read: their digests are the set's identity
    recipe: str = ''  # how the files are read, where that can be said: other examples have another recipe
    notes: tuple[str, ...] = ()  # what is left out, and why
    digest: Callable[[], str] | None = None  # of what the files hold, where there is a quicker one than all bytes
    # A text that changes when a file does, where `files` are not all that is read.
    stamp: Callable[[], str] | None = None


Reader = Callable[[Address, dict], Contents]


class ReadRecords:
    """Records of one split of what a reader has read."""

    def __init__(self, contents: Contents, title: str, chosen: dict[str, Feature], numbers, identity: Callable):
        split = contents.splits[title]
        self.path, self.chosen, self.split, self.numbers = contents.path, chosen, split, numbers
        self.contents, self.title = contents, title
        self.make_identity = identity
        self.read_chosen()
        self.shuffled = split.ranks is not None  # see sources.PreparedRecords; what has ranks is in their order

    def read_chosen(self) -> None:
        """Opens the features in `chosen`."""
        self.example = self.split.open(tuple({f.path[0] for f in self.chosen.values()}))

    @functools.cached_property
    def identity(self) -> str:
        return self.make_identity()

    def stamp(self) -> str:
        """See `stamp`."""
        contents, numbers = self.contents, b'' if self.numbers is None else np.asarray(self.numbers, np.int64).tobytes()
        whole = contents.stamp() if contents.stamp else stamp_of_files(contents.files)
        return text_digest(contents.path, contents.recipe, self.title, hashlib.sha256(numbers).hexdigest(), whole)

    def __len__(self) -> int:
        return self.split.n if self.numbers is None else len(self.numbers)

    def number(self, i: int) -> int:
        """The number that example i has in the files."""
        return int(i if self.numbers is None else self.numbers[i])

    def name(self, i: int) -> str:
        number = self.number(i)
        return f'example {number}' if self.split.names is None else self.split.names(number)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            example = self.example(self.number(i))
        except OSError as e:  # a file that is gone
            why = ' '.join(str(e.strerror or e).split())
            raise RunError(f'{self.path}: cannot read {self.name(i)} ({why})') from e
        return {name: example[f.path[0]] for name, f in self.chosen.items()}


def name_of(records: Records, i: int) -> str:
    """What an example is called in messages."""
    while not isinstance(records, ReadRecords) and hasattr(records, 'records'):  # a part of others, see splits.py
        i, records = int(getattr(records, 'numbers', range(i + 1))[i]), records.records
    return records.name(i) if isinstance(records, ReadRecords) else f'example {i}'


def with_features(records: Records, names: tuple[str, ...]) -> Records:
    """The same records, of which no other features are read."""
    other = copy.copy(records)
    other.chosen = {name: records.chosen[name] for name in names}
    if hasattr(records, 'records'):  # a part of others, see splits.py
        other.records = with_features(records.records, names)
    else:
        other.read_chosen()
    return other


def stamp(records: Records) -> str:
    """A text that is another one as soon as a file changes that these examples are read from, or which of them they
    are: by the paths, sizes and times of the files, which are not read. '' where that cannot be said."""
    rows = []
    while hasattr(records, 'records'):  # a part of others, see splits.py
        for name in ('numbers', 'classes'):
            x = np.asarray(getattr(records, name, ()), np.int64)
            rows.append(hashlib.sha256(x.tobytes()).hexdigest())
        records = records.records
    own = getattr(records, 'stamp', None)
    return text_digest(*rows, own()) if own else ''


def stamp_beyond_identity(records: Records) -> str:
    """`stamp` where the identity of the examples is of their files' names and sizes, as of a large folder: others may
    have the same one. '' where it is of what the files hold."""
    inner = records
    while not isinstance(inner, ReadRecords) and hasattr(inner, 'records'):
        inner = inner.records
    return stamp(records) if isinstance(inner, ReadRecords) and inner.contents.stamp else ''


def stamp_of_files(paths: tuple[str, ...]) -> str:
    """A text that changes when one of these files does."""
    about = ((os.path.realpath(path), os.stat(path)) for path in paths)
    return repr([(path, *files.version_of(one)) for path, one in about])


def own_splits(names) -> dict[str, str]:
    """{split: name} of the splits that a set with these has beside 'train', '' where it has none, as in
    `sources.own_splits`."""
    test = next((name for name in ('test', 'validation') if name in names), '')
    validation = 'validation' if 'validation' in names else ''
    return {'own_test': test, 'validation': validation if test != validation else '', 'rest': validation}


def blocks_of(records: Records) -> tuple[np.ndarray, int] | None:
    """`Split.blocks` of the examples of these records; None where any order of reading is as quick."""
    if isinstance(records, ReadRecords):
        blocks = records.split.blocks() if records.split.blocks else None
    else:  # a part of others, see splits.py
        blocks = blocks_of(records.records) if hasattr(records, 'records') else None
    numbers = getattr(records, 'numbers', None)
    return blocks if blocks is None or numbers is None else (blocks[0][numbers], blocks[1])


def open_split(contents: Contents, chosen: dict[str, Feature], data, split: str, directory: str) -> ReadRecords:
    """The records of a split, by the names of `sources.open_records`: of the files' own, or, where they have no other
    than 'train', a part of this one.

    Args:
      chosen: the features that an example is to hold.
      directory: of prepared sets, where digests of large files are kept.

    Raises:
      UserError: there is no such split.
    """
    splits = {name: part for name, part in contents.splits.items() if part.n}
    own = own_splits(splits)
    title = split.removeprefix('split:')
    if title != split:
        if title not in splits or title == 'train':
            others = ', '.join(name for name in splits if name != 'train') or 'none beside its training data'
            raise UserError(f'{split}: {contents.path} has no such split to hold out; it has {others}')
    elif split in ('validation', 'rest', 'none'):
        if not (title := own.get(split, '')):
            raise UserError(
                f'{contents.path} has no validation split: set config.data.validation_fraction, to 0.1, say, or '
                'config.data.validation_source'
            )
    elif split in ('test', 'own_test') and own['own_test']:
        title = own['own_test']
    elif 'train' not in splits:
        raise UserError(f'{contents.path} has no examples to train on, only {", ".join(splits) or "empty splits"}')
    else:
        title = 'train'
    numbers, which = None, title
    if split in ('train', 'test', 'own_test') and not own['own_test']:
        fraction = data['test_fraction']
        numbers = held_out(splits[title], fraction, contents.path)[split != 'train']
        if splits[title].blocks:  # in the order of the files, which is quick
            numbers = np.sort(numbers)
        which = f'train without {fraction}' if split == 'train' else f'{fraction} of train'

    def identity() -> str:
        return f'{which} {contents_digest(contents, directory, bool(data["dir"]))}'

    return ReadRecords(contents, title, chosen, numbers, identity)


def held_out(split: Split, fraction: float, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples (to train on, held out), both by rank: classes that are stored one after another mix.

    Whether an example is held out depends on its own rank and the fraction alone, so it stays where it is when others
    are added; but of each class one is trained on (unless all classes have only one), and at least one is held out.

    Raises:
      UserError: there is one example.
    """
    if split.n < 2:
        raise UserError(f'{path} has one image: that is too few to hold some out for testing')
    ranks = split.ranks() if split.ranks else transforms.uniform(0, np.arange(split.n), transforms.HELD_OUT)
    order = np.argsort(ranks, kind='stable')
    out = ranks < fraction
    out[order[0]], out[order[-1]] = True, False
    by_rank = out.copy()
    if split.labels and len(labels := split.labels()):
        keep = order[::-1][np.unique(labels[order[::-1]], return_index=True)[1]]  # of each the one of the highest rank
        out[keep] = False
        if not out.any():
            rest = np.setdiff1d(order, keep, assume_unique=True)
            out = by_rank if not len(rest) else np.isin(np.arange(split.n), rest[:1])
    return order[~out[order]], order[out[order]]


# --- identity


def contents_digest(contents: Contents, directory: str, confined: bool) -> str:
    """64 hexadecimal digits, the same for the same examples wherever their files lie. The name of a single file is no
    part of them."""
    if contents.digest:
        return text_digest(contents.recipe, contents.digest())
    top = os.path.dirname(contents.path) if len(contents.files) == 1 else contents.path
    rows = [contents.recipe]
    paths = sorted(contents.files)
    for path in tqdm(paths, desc=f'reading {contents.path}', disable=None, leave=False, delay=2):
        rows += ['' if len(paths) == 1 else os.path.relpath(path, top), file_digest(path, directory, confined)]
    return text_digest(*rows)


def text_digest(*parts: str) -> str:
    return hashlib.sha256('\0'.join(parts).encode('utf-8', 'surrogateescape')).hexdigest()


def file_digest(path: str, directory: str, confined: bool) -> str:
    """SHA-256 of a file. That of a large one is kept in `directory` by path, size and times of its last change."""
    try:
        with open_file(path) as file:
            about = os.fstat(file.fileno())
            if about.st_size < LONG:
                return hashlib.file_digest(file, 'sha256').hexdigest()
            key = text_digest(os.path.realpath(path), *map(str, files.version_of(about)))
            kept = os.path.join(directory, DIGESTS, key)
            with contextlib.suppress(OSError), open(kept, encoding='ascii', errors='replace') as known:
                if re.fullmatch('[0-9a-f]{64}', text := known.read(65)):
                    return text
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as e:
        raise RunError(f'cannot read {path}: {e.strerror}') from e
    with contextlib.suppress(OSError, UserError):  # a directory that cannot be written to is none of its business
        if confined:
            guard.check_inside(directory, os.path.dirname(kept))
        with files.replacing(kept) as new:
            new.write(digest.encode())
    return digest


def open_file(path: str):
    """A regular file, open for reading.

    Raises:
      UserError: there is none. A pipe or a device is refused at once.
    """
    try:
        return folder.open_regular(path)
    except ValueError as e:
        raise UserError(f'config.data.source: {path} cannot be read: {e}') from e
    except OSError as e:
        raise UserError(f'config.data.source: {path}: {e.strerror}') from e


# --- labels and captions


def classes_of(labels: np.ndarray, classes: int, path: str) -> tuple[np.ndarray, tuple[str, ...], int]:
    """(label of each example as int32 [n], names of the classes, how many there are) of labels as they are stored.

    Integers from 0 to K - 1, all of which occur, are the classes' numbers. Others are numbered in their order, and
    named by what they were: 1 to 10, texts, 3 and 7. With config.data.classes = `classes` integers below it stay.

    Raises:
      UserError: they are no integers or texts, one for each example.
    """
    if labels.ndim == 2 and 1 in labels.shape:
        labels = labels.reshape(-1)
    if labels.dtype.kind == 'f' and (np.abs(labels) < 2**53).all() and (labels == np.rint(labels)).all():
        labels = labels.astype(np.int64)  # MATLAB's numbers
    if labels.ndim != 1 or labels.dtype.kind not in 'biuUS':
        raise UserError(
            f'{path}: labels must be one integer or text for each example; they are {labels.dtype} {labels.shape}'
        )
    if labels.dtype.kind == 'b':
        labels = labels.astype(np.int64)
    whole = labels.dtype.kind in 'iu'
    if classes and whole and (not len(labels) or (labels.min() >= 0 and labels.max() < classes)):
        return labels.astype(np.int32), (), classes
    distinct, numbers = np.unique(labels, return_inverse=True)
    if len(distinct) > MOST_CLASSES:
        raise UserError(f'{path}: labels have {len(distinct)} values, which are no classes')
    names = tuple(x.decode('utf-8', 'replace') if isinstance(x, bytes) else str(x) for x in distinct.tolist())
    if whole and names == tuple(map(str, range(len(names)))):
        names = ()
    return numbers.reshape(-1).astype(np.int32), names, len(distinct)
