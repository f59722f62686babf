"""The splits of a data set, as its source has them, or as the config makes them: train, validation, test.

records, section = open_split(config.data, 'validation')
len(records), records[5]  # 144, {'image': a PNG file's bytes, 'label': 3}

A test or validation source of its own leaves all of `data.source` to training; a fraction for validation is taken from
the training examples by their numbers and classes alone, so it is the same at every start and on every host.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from jaxgen.data import sources, transforms
from jaxgen.data.records import Feature, Records
from jaxgen.data.section import completes
from jaxgen.errors import UserError

SPLITS = ('train', 'validation', 'test')
OWN = 'split:'  # before the name of a split of data.source itself, in data.test_source and data.validation_source
MOST_STRATIFIED = 100_000  # examples whose labels are read; in larger sets a random fraction of a class hardly varies
KEPT_LABELS = 8  # splits whose labels stay in memory

_labels: dict[str, np.ndarray] = {}  # by the identity of the records that they were read from


class Selected:
    """Some of a split's records, and all else as theirs."""

    def __init__(self, records: Records, numbers: np.ndarray, which: str):
        self.records, self.numbers, self.which = records, numbers, which
        self.path, self.chosen = records.path, records.chosen

    @property
    def identity(self) -> str:
        return f'{self.records.identity} {self.which}'

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.records[int(self.numbers[i])]


class Relabelled:
    """A split's records with other numbers for its classes: entry c of `classes` stands for class c."""

    def __init__(self, records: Records, classes: np.ndarray):
        self.records, self.classes = records, classes
        self.path, self.chosen = records.path, records.chosen

    @property
    def identity(self) -> str:
        return f'{self.records.identity} classes numbered {tuple(self.classes.tolist())}'

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {k: self.classes[v] if k in ('label', 'domain') else v for k, v in self.records[i].items()}


def open_split(data, split: str) -> tuple[Records | Selected | Relabelled, dict]:
    """(records, section): the stored examples of a split, and the section `data` of the source that they come from.

    train: of `data.source` the training split, or all of it where it has no test split of its own and
      `data.test_source` names one; without what `data.validation_fraction` holds out, and of `data.keep_classes` alone.
    validation: `data.validation_source`, or that fraction, or the source's own split of this name beside a test split.
    test: `data.test_source`, or the source's own, or `data.test_fraction` of it.

    Raises:
      UserError: there is no such split, or nothing is left in it.
    """
    if split not in SPLITS:
        raise UserError(f'a split is one of {", ".join(SPLITS)}, not {split!r}')
    section = {**data}
    field = f'{split}_source'
    if split != 'train' and section[field]:
        return open_named(section, field)
    if split == 'test' and not section['test_fraction'] and not sources.has_split(sources.resolve(section), 'own_test'):
        raise UserError('there are no test examples: config.data.test_fraction is 0')
    if split == 'test' or (split == 'validation' and not section['validation_fraction']):
        return sources.open_records(sources.resolve(section), section, part(section, split)), section
    return select_training(section, split), section


def part(data, split: str) -> str:
    """The name of a split of `data.source` for `sources.open_records`."""
    if not data['test_source'] and (data['test_fraction'] or split != 'train'):
        return split
    rest = 'none' if data['test_source'] == f'{OWN}validation' else 'rest'
    return {'train': 'whole', 'validation': rest}.get(split, split)


def for_conditions(data) -> str:
    """The split whose conditions samples have: 'test', or 'train' where nothing is held out."""
    section = {**data}
    if section['test_fraction'] or section['test_source'] or sources.has_split(sources.resolve(section), 'own_test'):
        return 'test'
    return 'train'


def has_validation(data) -> bool:
    """Whether there is a validation split."""
    if data['validation_source'] or data['validation_fraction']:
        return True
    return sources.has_split(sources.resolve(data), part(data, 'validation'))


def held_out(data) -> str:
    """The split that training is watched on: 'validation' where there is one, else 'test'."""
    return 'validation' if has_validation(data) else 'test'


# --- a source of its own


def open_named(data: dict, field: str) -> tuple[Records | Relabelled, dict]:
    """(records, section) of the split that `data.test_source` or `data.validation_source` names: the test split of that
    source, or all of it where it has none of its own. Its classes are numbered as those of `data.source`.

    Raises:
      UserError: as `open_split`; the field is named in place of data.source.
    """
    name = data[field]
    if name.startswith(OWN):
        return sources.open_records(sources.resolve(data), data, name), data
    if sources.canonical(name) == sources.canonical(data['source']):
        raise UserError(f'config.data.{field} = {name} is config.data.source: name another source, or {OWN}NAME of it')
    section = {**data, 'source': name, 'test_source': '', 'validation_source': '', 'validation_fraction': 0.0}
    try:
        source = sources.resolve(section)
        with contextlib.suppress(KeyError):
            if source.features()['label'].classes:  # they are compared below, by their names
                section['classes'] = 0
        own_test = sources.has_split(source, 'own_test')
        records = sources.open_records(source, section, 'test' if own_test else 'whole')
    except UserError as e:
        raise UserError(str(e).replace('config.data.source', f'config.data.{field}')) from e
    if 'label' not in records.chosen and 'domain' not in records.chosen:
        return records, section
    label = ('label',)
    trained = sources.choose(sources.resolve({**data, 'features': label}), {**data, 'features': label})['label']
    here = sources.choose(sources.resolve({**section, 'features': label}), {**section, 'features': label})['label']
    numbers = class_numbers(trained, here, f'config.data.{field} = {name}')
    return (records if numbers is None else Relabelled(records, numbers)), section


def class_numbers(trained: Feature, here: Feature, where: str) -> np.ndarray | None:
    """The training numbers of the classes of another source, int32 [classes]; None: they are the same.

    Classes are the same by their names, where both sources name them (a class without one has its number as its name),
    else by their numbers.

    Raises:
      UserError: a class that training does not have.
    """
    names = [f.names or tuple(map(str, range(f.classes))) for f in (trained, here)]
    named = all(f.names for f in (trained, here)) or all(name.isdecimal() for name in names[0] + names[1])
    if not named:
        names = [tuple(map(str, range(f.classes))) for f in (trained, here)]
    other = [name for name in names[1] if name not in names[0]]
    if other:
        raise UserError(
            f'{where}: its class {other[0]!r} is none of the training classes ({", ".join(names[0][:10])}'
            f'{", ..." if len(names[0]) > 10 else ""}): leave its images out'
        )
    numbers = np.array([names[0].index(name) for name in names[1]], np.int32)
    return None if np.array_equal(numbers, np.arange(len(numbers))) else numbers


# --- a part of the training examples


def select_training(data: dict, split: str) -> Records | Selected:
    """The records of 'train' or of the 'validation' that is a fraction of the training examples.

    Raises:
      UserError: nothing is left.
    """
    records = sources.open_records(sources.resolve(data), data, part(data, 'train'))
    kept, fraction = tuple(data['keep_classes']), data['validation_fraction']
    if not kept and not fraction:
        return records
    numbers, which = np.arange(len(records)), []
    if kept:
        numbers = np.flatnonzero(np.isin(stored_labels(data), kept))
        if not len(numbers):
            raise UserError(f'config.data.keep_classes = {kept}: the training split has no example of them')
        which.append(f'classes={kept}')
    if fraction:
        classes = stored_labels(data)[numbers] if is_stratified(data, len(records)) else np.zeros(len(numbers), int)
        # The images of a folder are stored in a random order of their names, in which they stay when others come.
        keys = numbers if records.shuffled else transforms.uniform(0, numbers, transforms.VALIDATION)
        out = fraction_of(keys, classes, fraction)
        if not out.any():
            raise UserError(
                f'config.data.validation_fraction = {fraction}: none of the {len(numbers)} training examples can be '
                'held out, since every class would lose its only one: add examples, or set it to 0'
            )
        numbers = numbers[out if split == 'validation' else ~out]
        which.append(f'{"without " if split == "train" else ""}validation_fraction={fraction}')
    return Selected(records, numbers, ' '.join(which))


def fraction_of(keys: np.ndarray, classes: np.ndarray, fraction: float) -> np.ndarray:
    """Which examples are held out, bool [n]: round(fraction * n) of them and at least one, of every class the same
    fraction to the next whole number, by the largest remainders, and never the last one of a class.

    Args:
      keys: [n], those with the smallest of each class are held out.
      classes: [n].
    """
    n = len(keys)
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    exact = counts * (max(round(fraction * n), 1) / n)
    quota = np.minimum(np.floor(exact).astype(int), counts - 1)
    missing = max(round(fraction * n), 1) - quota.sum()
    room = np.argsort(quota - exact, kind='stable')
    room = room[(quota < counts - 1)[room]]
    quota[room[:missing]] += 1
    order = np.lexsort((keys, inverse))  # class by class, each by its keys
    position = np.empty(n, int)
    position[order] = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    return position < quota[inverse]


def is_stratified(data: dict, n: int) -> bool:
    """Whether each class is held out by the same fraction: the source has labels, and few enough to be read."""
    section = {**data, 'features': ('label',)}
    try:
        label = sources.resolve(section).features().get('label')
    except UserError:  # pairs have no labels
        return False
    return n <= MOST_STRATIFIED and label is not None and bool(label.classes or data['classes'])


def stored_labels(data: dict) -> np.ndarray:
    """The class of every example of the training split as it is stored, int32 [n]."""
    section = {**data, 'features': ('label',)}
    return read_labels(sources.open_records(sources.resolve(section), section, part(data, 'train')))


@completes
def labels(data, split: str) -> np.ndarray:
    """The class of every example of a split, int32 [n], whatever data.features are.

    Raises:
      UserError: the source has no labels.
    """
    return read_labels(open_split({**data, 'features': ('label',)}, split)[0])


def read_labels(records) -> np.ndarray:
    """The class of every record, int32 [n]; those of a few splits are kept in memory."""
    if records.identity not in _labels:
        read = np.array([records[i]['label'] for i in range(len(records))], np.int32)
        while len(_labels) >= KEPT_LABELS:
            _labels.pop(next(iter(_labels)), None)
        _labels[records.identity] = read
    return _labels[records.identity]
