"""Files below a folder or in an archive by their names alone: classes and splits, in little memory.

    listed = walk('/images', links=False, counts=Counter())
    tree = arranged(listed.names)
    tree.classes, tree.labels[7], len(tree.splits['train'])  # ('cat', 'dog'), 1, 800000

A million files take their names' bytes and some 60 bytes more each. The rules are those of scan and split:
what lies in an archive is divided as the folder that it was made of.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgen.errors import UserError

# Files with these endings are taken for images; PIL reads them without programs beside it.
ENDINGS = (
    *('.apng', '.avif', '.bmp', '.dds', '.dib', '.gif', '.icns', '.ico', '.j2c', '.j2k', '.jfif', '.jp2', '.jpe'),
    *('.jpeg', '.jpf', '.jpg', '.jpx', '.pbm', '.pcx', '.pgm', '.png', '.pnm', '.ppm', '.psd', '.qoi', '.ras', '.sgi'),
    *('.tga', '.tif', '.tiff', '.webp', '.xbm', '.xpm'),
)
# Sub-folders that are splits where all of them are, and one is the training split: in the order of preference.
TRAIN = ('train', 'training')
VALIDATION = ('val', 'valid', 'validation', 'dev', 'eval')
TEST = ('test', 'testing', *VALIDATION)  # one of the latter where there is none of the former, and beside it else
HELD_OUT = ('test', 'validation')  # splits of files that are not trained on
SUFFIXES = frozenset(ENDINGS)
IRREGULAR = 'that are no regular files (pipes, devices)'
RANKS = 16**13  # how many values a rank can have


class Names(Sequence):
    """Texts by number, all in one block of bytes. What is no Unicode comes back as it was."""

    def __init__(self, block: bytes, ends: np.ndarray):
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        block, ends = bytearray(), array('q')
        for name in names:
            block += name.encode('utf-8', 'surrogateescape')
            ends.append(len(block))
        return cls(bytes(block), np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def encoded(self, i: int) -> bytes:
        return self.block[self.ends[i - 1] if i else 0 : self.ends[i]]

    def __getitem__(self, i):
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        return self.encoded(i).decode('utf-8', 'surrogateescape')

    def __iter__(self):
        start = 0
        for end in self.ends.tolist():
            yield self.block[start:end].decode('utf-8', 'surrogateescape')
            start = end

    def take(self, numbers: Iterable[int]) -> Names:
        return Names.of(self[int(i)] for i in numbers)


class Listed(NamedTuple):
    """The images below a folder, in the order of the walk."""

    names: Names  # paths below the folder, parts separated by '/'
    sizes: np.ndarray  # int64, bytes; -1 where the file cannot be looked at
    times: np.ndarray  # int64, ns, of the last change
    directories: tuple[tuple[str, int], ...]  # path and time of the last change of every folder that was listed
    endings: tuple[tuple[str, int], ...] = ()  # of the files that are no images, and how many there are of each


class Tree(NamedTuple):
    """What names say."""

    # Numbers of the names, by rank: of 'train', and of 'validation' and 'test' where folders have such names.
    splits: dict[str, np.ndarray]
    labels: np.ndarray  # int32, by number of the name; -1: no class, or the name is in no split
    classes: tuple[str, ...]  # (): the names have none
    below: int  # folders around those of the classes: 1 where the first-level ones are splits
    ranks: np.ndarray  # float64 in [0, 1), by number of the name
    notes: tuple[str, ...]  # what is left out, and why


def walk(root: str, links: bool, counts: Counter) -> Listed:
    """The files below `root` with the ending of an image: of each folder in the order of their names, those in real
    folders before those behind links. A file with several paths is listed by the first, with `links` by all.

    Args:
      counts: of what is left out, by reason.

    Raises:
      UserError: a folder cannot be listed, or there are no images.
    """
    endings: Counter = Counter()
    block, ends, sizes, times, devices, inodes = bytearray(), array('q'), array('q'), array('q'), array('q'), array('Q')
    real, linked, visited, directories = [''], [], set(), []
    while real or linked:
        below = real.pop() if real else linked.pop(0)
        path = os.path.join(root, below)
        here = os.path.realpath(path)
        if here in visited:
            counts['folders linked twice'] += 1
            continue
        visited.add(here)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise UserError(f'config.data.source: cannot list {path}: {e.strerror}') from e
        try:
            inside, folders = [], []
            with os.scandir(handle) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == '.':
                        continue
                    if is_folder(entry):
                        if not name.startswith('__MACOSX'):
                            folders.append((name, entry.is_symlink()))
                    elif name[name.rfind('.') :].lower() in SUFFIXES:
                        inside.append(name)
                    else:
                        endings[os.path.splitext(name)[1].lower() or 'without one'] += 1
            about = os.fstat(handle)
            directories.append((path, about.st_mtime_ns))
            inside.sort()
            for name in inside:
                try:
                    about = os.stat(name, dir_fd=handle)
                except OSError:  # a broken link: listed, and found unreadable later
                    size, time, device, inode = -1, 0, -1, len(ends)
                else:
                    if not stat.S_ISREG(about.st_mode):
                        counts[IRREGULAR] += 1
                        continue
                    size, time, device, inode = about.st_size, about.st_mtime_ns, about.st_dev, about.st_ino
                block += (below + name).encode('utf-8', 'surrogateescape')
                ends.append(len(block))
                sizes.append(size), times.append(min(time, 2**63 - 1)), devices.append(device), inodes.append(inode)
        except OSError as e:
            raise UserError(f'config.data.source: cannot list {path}: {e.strerror}') from e
        finally:
            os.close(handle)
        folders.sort()
        real += [f'{below}{name}/' for name, link in reversed(folders) if not link]
        linked += [f'{below}{name}/' for name, link in folders if link]
    if not ends:
        others = endings.total() + counts.total()
        inside = f'{others} other files' if others else 'no files'
        raise UserError(f'the folder {root} holds no images (.png, .jpg, .webp, ...), but {inside}')
    if endings:
        counts[other_endings(endings)] = endings.total()
    names = Names(bytes(block), column(ends))
    listed = Listed(names, column(sizes), column(times), tuple(directories), tuple(endings.items()))
    if links:
        return listed
    first = first_of_each(column(devices), column(inodes, np.uint64))
    if len(first) == len(names):
        return listed
    counts['files linked twice'] += len(names) - len(first)
    return listed._replace(names=names.take(first), sizes=listed.sizes[first], times=listed.times[first])


def other_endings(endings: Counter) -> str:
    """'files with other endings (40 .heic, 3 .txt)'."""
    some = ', '.join(f'{n} {ascii(ending)[1:-1]}' for ending, n in endings.most_common(5))
    return f'files with other endings ({some}{", ..." if len(endings) > 5 else ""})'


def column(values: array, dtype=np.int64) -> np.ndarray:
    return np.frombuffer(values, dtype) if values else np.zeros(0, dtype)


def first_of_each(devices: np.ndarray, inodes: np.ndarray) -> np.ndarray:
    """Numbers of the first occurrence of each pair, in order."""
    order = np.lexsort((inodes, devices))  # stable: equal pairs stay in order
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(devices[order]) != 0) | (inodes[order][1:] != inodes[order][:-1])
    return np.sort(order[new])


UPWARD = re.compile(rb'(?:\.{0,2}/)+')


def inside(name: bytes) -> bytes:
    """A file's name in an archive without a beginning like '/', './' and '../', as unpacking drops it."""
    start = UPWARD.match(name)
    return name[start.end() :] if start else name


def without_top(names: Names) -> Names:
    """The names below the folders that all of them lie in: 'data/cat/1.png' and 'data/dog/1.png' without 'data/'."""
    common = names[0].rpartition('/')[0] if len(names) else ''
    for name in names:
        while common and not name.startswith(common + '/'):
            common = common.rpartition('/')[0]
        if not common:
            return names
    return Names.of(name[len(common) + 1 :] for name in names)


def arranged(names: Names, labelled: bool = True) -> Tree:
    """Classes, splits and ranks of names, as scan and split have them.

    Where all first-level folders have names of splits, they are: the classes are the folders in the training split.

    Args:
      labelled: folders are classes; else they are none, and no file is left out for want of one.
    """
    first, second, depths, tops, inner, ranks = by_folder(names)
    notes: Counter = Counter()
    splits = splits_of(first, depths, tops, notes)
    if splits:
        top, classed = second, depths > 1
        split = np.full(len(names), '', 'U10')
        for number, title in splits.items():
            split[first == number] = title
        classes_of = inner
    else:
        top, classed, classes_of = first, depths > 0, tops
        split = np.full(len(names), 'train', 'U10')
    own = split == 'train'
    kept = split != ''
    labels = np.full(len(names), -1, np.int32)
    classes: tuple[str, ...] = ()
    if labelled and own.any() and classed[own].all():
        classes = ordered({classes_of[i] for i in np.unique(top[own])})
        table = np.full(len(classes_of) + 1, -1, np.int32)
        position = {name: i for i, name in enumerate(classes)}
        for number, name in enumerate(classes_of):
            table[number] = position.get(name, -1)
        labels = np.where(kept & classed, table[top], -1).astype(np.int32)
        others = kept & (labels < 0)
        for title in HELD_OUT:
            notes[f'{title} images of no class that training has'] = int((others & (split == title)).sum())
        kept &= ~others
        once = int((np.bincount(labels[own], minlength=len(classes)) == 1).sum())
        if kept.sum() == own.sum():
            notes['classes of one image, too rare to be in the test split'] = once if once < own.sum() else 0
    order = np.argsort(ranks, kind='stable')
    divided = {title: order[(kept & (split == title))[order]] for title in ('train', 'validation', 'test')}
    return Tree(
        {title: numbers for title, numbers in divided.items() if len(numbers)},
        labels,
        classes,
        1 if splits else 0,
        ranks,
        tuple(f'{n} {what}' for what, n in notes.items() if n),
    )


def by_folder(names: Names) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], list[str], np.ndarray]:
    """Of each name: the number of its first-level and of its second-level folder, how many folders it lies in, and its
    rank; and the names of these folders by number, where -1, the last, is none."""
    first, second, depths, ranks = array('i'), array('i'), array('i'), array('d')
    tops: dict[str, int] = {}
    inner: dict[str, int] = {}
    for i, name in enumerate(names):
        parts = name.split('/', 2)
        first.append(tops.setdefault(parts[0], len(tops)) if len(parts) > 1 else -1)
        second.append(inner.setdefault(parts[1], len(inner)) if len(parts) > 2 else -1)
        depths.append(name.count('/'))
        ranks.append((int.from_bytes(hashlib.sha256(names.encoded(i)).digest()[:7], 'big') >> 4) / RANKS)
    columns = (column(x, np.int32) for x in (first, second, depths))
    return *columns, list(tops), list(inner), column(ranks, np.float64)


def splits_of(first: np.ndarray, depths: np.ndarray, tops: list[str], notes: Counter) -> dict[int, str]:
    """{number of a first-level folder: its split} where all of these folders are splits, else {}."""
    by_name = {name.lower(): i for i, name in enumerate(tops)}
    train = next((by_name[name] for name in TRAIN if name in by_name), None)
    if train is None or (first < 0).any() or not by_name.keys() <= {*TRAIN, *TEST}:
        return {}
    labelled = bool((depths[first == train] > 1).all())

    def first_of(words: tuple[str, ...]) -> str:
        """The first of these that is a folder, and holds classes if the training split does; '' if none is."""
        usable = (name for name in words if name in by_name)
        return next((name for name in usable if not labelled or (depths[first == by_name[name]] > 1).any()), '')

    test = first_of(TEST)
    validation = first_of(VALIDATION) if test and test not in VALIDATION else ''
    splits = {train: 'train', by_name.get(validation): 'validation', by_name.get(test): 'test'}
    for i in sorted({*range(len(tops))} - splits.keys(), key=tops.__getitem__):
        beside = f' beside {tops[by_name[test]]}/' if test else ''
        notes[f'files in {tops[i]}/, which is not used{beside}'] = int((first == i).sum())
    return {number: title for number, title in splits.items() if number is not None}


def ordered(names: set[str]) -> tuple[str, ...]:
    """Names in order; by their numbers where all of them are integers."""
    if all(re.fullmatch('[0-9]+', name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def is_folder(entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
