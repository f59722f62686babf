"""Arrays of a file as examples: which of them are images, labels and captions, and how an image lies in its array.

The same options say it for every container of arrays (idx, npz, npy, mat), behind a ? in the address:

    npz:cells.npz?image=x&label=kind           names of arrays: of the images, the labels; any other feature likewise
    mat:chardata.mat?image=data&layout=(WH)N   its axes: N examples, H rows, W columns, C channels; those in brackets
                                               are one axis, the first of them the slowest
    mat:frey.mat?image=ff&layout=(HW)N&size=28x20   height x width, where one axis holds both and they are not square
    npz:dsprites.npz?image=imgs&range=0,1      the values that are black and white

Numbers beyond the range, and what is no number, make an example damaged. Other features are called as their arrays, and
take mask_layout and mask_range.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxgen import files
from jaxgen.addresses import Address
from jaxgen.data import guard, texts
from jaxgen.data.records import Contents, Feature, Split, classes_of, root, text_digest
from jaxgen.errors import RunError, UserError

# Names of arrays that are taken for these features where the address names none, in the order of preference.
ROLES = {
    'image': ('image', 'images', 'imgs', 'img', 'x', 'X', 'data', 'features', 'arr_0', 'samples'),
    'label': ('label', 'labels', 'y', 'Y', 'target', 'targets', 'fine_labels', 'class', 'classes'),
    'caption': ('caption', 'captions', 'text', 'texts'),
}
PLURALS = {'images': 'image', 'labels': 'label', 'captions': 'caption'}
SPLIT = re.compile('(?:(train|test|validation|valid|val)_?(.+)|(.+)_(train|test|validation|valid|val))')
WORDS = {'train': 'train', 'test': 'test', 'val': 'validation', 'valid': 'validation', 'validation': 'validation'}
INFLATION = 1032  # of deflate, at most: no compressed file holds more bytes than this times its own
SAMPLED = 32  # images that are looked at to see whether 0 and 1 are all their values
UNPACKED = 'jaxgen_unpacked'  # in the directory of prepared sets: compressed arrays too large for data.cache_mb
PART = 2**20  # bytes


class Stored(NamedTuple):
    """An array in a file, by its header."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]  # maps it into memory, or reads it


class Layout(NamedTuple):
    """How images lie in an array."""

    axes: tuple[str, ...]  # of the array: 'N' and the others, as in ('N', 'HW', 'C')
    sizes: dict[str, int]  # of 'N', 'H', 'W', 'C'; without 'C' images are [H, W]

    def image(self, x: np.ndarray, i: int) -> np.ndarray:
        """Image i as [H, W] or [H, W, C]."""
        one = x[(slice(None),) * self.axes.index('N') + (i,)]
        order = ''.join(axis for axis in self.axes if axis != 'N')
        one = np.reshape(one, [self.sizes[a] for a in order])
        return np.transpose(one, [order.index(a) for a in 'HWC' if a in order])


def by_split(names) -> dict[str, dict[str, str]]:
    """{split: {name without the split: name}} of arrays: x_train, testdata, val_labels; others are of 'train'."""
    out: dict[str, dict[str, str]] = {}
    for name in names:
        match = SPLIT.fullmatch(name)
        word, rest = ((match[1], match[2]) if match[1] else (match[4], match[3])) if match else ('train', name)
        if name in WORDS:
            word, rest = name, 'images'
        out.setdefault(WORDS[word], {})[rest] = name
    return out


def of_names(address: Address, data, stored: dict[str, Stored], paths: tuple[str, ...], **about) -> Contents:
    """`contents` of arrays whose names say their splits, {'x_train': array}. An array that the address names is one of
    the training split by its whole name."""
    splits = by_split(stored)
    train, options = splits.setdefault('train', {}), dict(address.options)
    for option, array in address.options.items():
        if array in train.values():  # the same name without 'train' is that of the test split, too
            options[option] = next(rest for rest, name in train.items() if name == array)
        elif array in stored:
            train[array] = array
    return contents(
        address._replace(options=options),
        data,
        {split: {rest: stored[name] for rest, name in names.items()} for split, names in splits.items()},
        paths,
        **about,
    )


def contents(
    address: Address,
    data,
    splits: dict[str, dict[str, Stored]],
    paths: tuple[str, ...],
    last: bool = False,
    notes: tuple[str, ...] = (),
    class_names: dict[str, tuple[str, ...]] | None = None,
) -> Contents:
    """What a file holds whose arrays are `splits`, {'train': {'image': array}}.

    Args:
      last: examples are along the last axis where an array has three or four, as MATLAB has them.
      notes: what is left out, and why.
      class_names: of the numbers in an array of labels, by its name.

    Raises:
      UserError: it is not said which array is what, or they do not fit together.
    """
    options = {PLURALS.get(name, name): value for name, value in address.options.items()}
    where, train = address.path, splits.get('train', {})
    if not train:
        others = [split for split, arrays in splits.items() if arrays]
        left = f'; left out: {"; ".join(notes)}' if notes else ''
        raise UserError(f'{where} has no arrays to train on, only {", ".join(others) or "none of numbers"}{left}')
    names = roles(where, options, train)
    rules = {name: Rules(options, name) for name in names}
    layouts: dict[str, Layout] = {}
    sets: dict[str, dict[str, Stored]] = {}
    for split, arrays in splits.items():
        if names['image'] not in arrays:
            continue
        if split != 'train' and 0 in arrays[names['image']].shape:
            notes = (*notes, f'the split {split}, which is empty')
            continue
        stored = {name: arrays[array] for name, array in names.items() if array in arrays}
        layouts[split] = layout(where, stored, rules['image'], last)
        sets[split] = stored
    if len(sizes := {(x.sizes['H'], x.sizes['W'], x.sizes.get('C', 1)) for x in layouts.values()}) > 1:
        raise UserError(f'{where}: images of its splits differ in size: {sorted(sizes)}')
    columns = {split: Columns(where, sets[split], layouts[split], rules) for split in sets}
    own = (class_names or {}).get(names.get('label', ''), ())
    features, labels = features_of(where, columns, data['classes'] or len(own))
    if own and features['label'].classes == len(own) and not features['label'].names:
        features['label'] = features['label']._replace(names=own)
    return Contents(
        where,
        features,
        {split: split_of(columns[split], features, labels.get(split)) for split in sets},
        paths,
        notes=notes,
        recipe=repr(({n: names[n] for n in features}, layouts['train'].axes, sorted(options.items()), last)),
    )


class Rules:
    """The options of one feature: 'layout', 'size' and 'range', or '' where the address has none."""

    def __init__(self, options: dict[str, str], name: str):
        self.name = name
        self.layout, self.size, self.range = (
            options.get(f'{name}_{option}', options.get(option, '') if name == 'image' else '')
            for option in ('layout', 'size', 'range')
        )


def roles(where: str, options: dict[str, str], train: dict[str, Stored]) -> dict[str, str]:
    """{feature: array}: those that the address names, those that have usual names, and all others by their own."""
    settings = ('layout', 'size', 'range')
    named = {n: a for n, a in options.items() if n not in settings and not n.endswith(tuple(f'_{s}' for s in settings))}
    for name, array in named.items():
        if array not in train:
            raise UserError(f'{where}: ?{name}={array}: there is no such array; {listed(train, array)}')
    for name, usual in ROLES.items():
        if name not in named:
            candidates = [array for array in usual if array in train and array not in named.values()]
            named |= {name: candidates[0]} if candidates else {}
    if 'image' not in named:
        raise UserError(f'{where}: which array holds the images? Write ?image=NAME behind the file; {listed(train)}')
    rest = [array for array in train if array not in named.values() and array not in named]
    for option in options:
        feature = option.rpartition('_')[0]
        if option not in named and option not in settings and feature not in (*named, *rest):
            raise UserError(f'{where}: ?{option}={options[option]}: there is no feature {feature!r}; {listed(train)}')
    return {**named, **{array: array for array in rest}}


def listed(arrays: dict[str, Stored], near: str = '') -> str:
    close = difflib.get_close_matches(near, arrays, n=1, cutoff=0.6) if near else []
    some = ', '.join(f'{ascii(name[:60])[1:-1]} {x.dtype} {list(x.shape)}' for name, x in list(arrays.items())[:8])
    return f'did you mean {close[0]}?' if close else f'it has {some}{", ..." if len(arrays) > 8 else ""}'


# --- layout


def layout(where: str, stored: dict[str, Stored], rules: Rules, last: bool) -> Layout:
    """The layout of the images of a split: that which the address names, or one that their shape leaves no doubt of."""
    x, label = stored['image'], stored.get('label')
    if rules.layout:
        return parse_layout(where, x, rules)
    if rules.size:
        raise UserError(f'{where}: ?size={rules.size} says how height and width share an axis: add layout=N(HW), say')
    n = max(label.shape, default=0) if label else 0
    fitting = []
    for axes in ('HWN', 'HWCN', 'NHW', 'NHWC', 'NCHW') if last else ('NHW', 'NHWC', 'NCHW', 'HWN', 'HWCN'):
        sizes = dict(zip(axes, x.shape, strict=False))
        if len(axes) == len(x.shape) and 1 <= sizes.get('C', 1) <= 4 and (not n or sizes['N'] == n):
            fitting.append(Layout(tuple(axes), sizes))
    # Without labels the axis of the examples is where it is usual; of channels there may be two that could be it.
    likely = [one for one in fitting if n or one.axes.index('N') == (len(x.shape) - 1 if last else 0)]
    if len(likely) > 1 and n:
        usual = [one for one in likely if one.axes.index('N') == (len(x.shape) - 1 if last else 0)]
        likely = usual or likely
    if len(likely) != 1:
        several = ' or '.join(''.join(one.axes) for one in likely)
        counts = f' and {n} labels' if n else ''
        raise UserError(
            f'{where}: the images {x.name} are {x.dtype} {list(x.shape)}{counts}: say how they lie by '
            f'?layout={several or "NHWC, HWN, N(HW) or (WH)N"} (N examples, H rows, W columns, C channels)'
        )
    return likely[0]


def parse_layout(where: str, x: Stored, rules: Rules) -> Layout:
    """The layout that a text like N(HW)C says of an array.

    Raises:
      UserError: it is no layout, or not one of this array.
    """
    text = rules.layout

    def wrong(why: str) -> UserError:
        return UserError(f'{where}: ?layout={text} of {x.name} {list(x.shape)}: {why}')

    groups = [match[0].strip('()') for match in re.finditer(r'\([NHWC]+\)|[NHWC]', text)]
    letters = ''.join(groups)
    if re.sub(r'\([NHWC]+\)|[NHWC]', '', text) or sorted(letters) not in (sorted('NHW'), sorted('NHWC')):
        raise wrong('write N, H, W and C once each, C if there is one, in brackets what is one axis: N(HW)')
    if 'N' not in groups:
        raise wrong('the examples have an axis of their own')
    if len(groups) != len(x.shape):
        raise wrong(f'it has {len(groups)} axes, the array {len(x.shape)}')
    sizes: dict[str, int] = {}
    if rules.size:
        if not (match := re.fullmatch('([1-9][0-9]{0,5})x([1-9][0-9]{0,5})', rules.size)):
            raise wrong(f'size={rules.size} must be HEIGHTxWIDTH, 28x20')
        sizes |= {'H': int(match[1]), 'W': int(match[2])}
    sizes |= {group: length for group, length in zip(groups, x.shape, strict=True) if len(group) == 1}
    for group, length in zip(groups, x.shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes]
        rest = length // math.prod(sizes[axis] for axis in group if axis in sizes)
        if len(unknown) == 1:
            sizes[unknown[0]] = rest
        elif sorted(unknown) == ['H', 'W'] and math.isqrt(rest) ** 2 == rest:
            sizes |= dict.fromkeys('HW', math.isqrt(rest))
        elif unknown:
            raise wrong('add size=HEIGHTxWIDTH, size=28x20')
        if math.prod(sizes[axis] for axis in group) != length:
            raise wrong(f'an axis of {length} is not {" x ".join(f"{a} {sizes[a]}" for a in group)}')
    if any(sizes[group] != length for group, length in zip(groups, x.shape, strict=True) if len(group) == 1):
        raise wrong(f'size={rules.size} is not that of the array')
    if not 1 <= sizes.get('C', 1) <= 4:
        raise wrong(f'images have 1 to 4 channels, not {sizes["C"]}')
    return Layout(tuple(groups), sizes)


# --- values


class Columns:
    """The arrays of one split by feature, loaded when they are first used."""

    def __init__(self, where: str, stored: dict[str, Stored], layout: Layout, rules: dict[str, Rules]):
        self.where, self.layout, self.rules, self.n = where, layout, rules, layout.sizes['N']
        if not self.n or not all(layout.sizes.values()):
            raise UserError(f'{where}: the images {stored["image"].name} {list(stored["image"].shape)} are empty')
        self.stored = {name: x for name, x in stored.items() if name == 'image' or self.fits(name, x)}
        self.loaded: dict[str, np.ndarray] = {}
        self.lock = threading.Lock()

    def fits(self, name: str, x: Stored) -> bool:
        """Whether an array has a value for each example.

        Raises:
          UserError: it has not, and it is the labels or captions.
        """
        # MATLAB's vectors are [1, n] or [n, 1].
        n = max(x.shape, default=0) if len(x.shape) == 2 and 1 in x.shape else x.shape[0] if x.shape else 0
        if n == self.n or self.is_image(name, x) or (name == 'label' and len(x.shape) == 2 and self.n in x.shape):
            return True
        if name in ('label', 'caption') or self.rules[name].layout:
            raise UserError(f'{self.where}: {self.n} images, but {x.name} is {x.dtype} {list(x.shape)}')
        return False

    def is_image(self, name: str, x: Stored) -> bool:
        """Whether an array holds an image of each example beside the first: a mask, say."""
        if self.rules[name].layout:
            return parse_layout(self.where, x, self.rules[name]).sizes['N'] == self.n
        axes, sizes = ''.join(self.layout.axes), self.layout.sizes
        bare = axes.replace('C', '')
        usual = next((a for a in (axes, bare) if len(a) == len(x.shape) and len(self.layout.axes) == len(axes)), '')
        return (
            bool(usual)
            and x.dtype.kind in 'buif'
            and all(length == sizes[a] for a, length in zip(usual, x.shape, strict=True) if a != 'C')
        )

    def layout_of(self, name: str) -> Layout:
        if name == 'image':
            return self.layout
        x = self.stored[name]
        if self.rules[name].layout:
            return parse_layout(self.where, x, self.rules[name])
        axes = tuple(a for a in self.layout.axes if a != 'C' or len(x.shape) == len(self.layout.axes))
        return Layout(axes, dict(zip(axes, x.shape, strict=True)))

    def array(self, name: str) -> np.ndarray:
        with self.lock:
            if name not in self.loaded:
                try:
                    self.loaded[name] = self.stored[name].load()
                except ValueError as e:  # the file is shorter than it was a moment ago
                    raise UserError(f'{self.where} has changed while it is read: {e}') from e
            return self.loaded[name]

    def vector(self, name: str) -> np.ndarray:
        """An array with the examples along its first axis; labels as one number each."""
        x = self.array(name)
        if x.ndim == 2 and 1 in x.shape and x.size == self.n:
            return x.reshape(-1)
        if name == 'label' and x.ndim == 2:
            x = np.asarray(x if len(x) == self.n else x.T)
            if not ((x == 0) | (x == 1)).all() or not (x.sum(1) == 1).all():
                raise UserError(f'{self.where}: labels {self.stored[name].name} {list(x.shape)} are neither numbers '
                                'nor one-hot: name others by ?label=NAME')  # fmt: skip
            return x.argmax(1)
        return x


def features_of(
    where: str, columns: dict[str, Columns], classes: int
) -> tuple[dict[str, Feature], dict[str, np.ndarray]]:
    """(the features that all splits have, the class of each example by split)."""
    features = {'image': Feature(('image',), image=True)}
    labels: dict[str, np.ndarray] = {}
    for name in columns['train'].stored:
        if name == 'image' or any(name not in one.stored for one in columns.values()):
            continue
        x = columns['train'].stored[name]
        if name == 'label':
            parts = [np.asarray(one.vector(name)) for one in columns.values()]
            numbers, class_names, n = classes_of(np.concatenate(parts), classes, where)
            ends = np.cumsum([len(part) for part in parts])[:-1]
            labels = dict(zip(columns, np.split(numbers, ends), strict=True))
            features[name] = Feature((name,), dtype=np.int32, classes=n, names=class_names)
        elif columns['train'].is_image(name, x):
            features[name] = Feature((name,), image=True)
        elif x.dtype.kind in 'US':
            if len(x.shape) == 1:
                stored = (text for one in columns.values() for text in one.vector(name).tolist())
                longest = max((len(text) for one in stored for text in texts.encoded(one)), default=0)
                features[name] = Feature((name,), shape=(texts.room_for(longest),), text=True)
        elif x.dtype.kind in 'biuf':
            shape = x.shape[1:] if math.prod(x.shape) != columns['train'].n else ()
            kind = np.float32 if x.dtype.kind == 'f' else np.uint8 if x.dtype == np.uint8 else np.int32
            features[name] = Feature((name,), shape=shape, dtype=kind)
    return features, labels


def split_of(columns: Columns, features: dict[str, Feature], labels: np.ndarray | None) -> Split:
    def open_examples(names: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
        values = {name: value_of(columns, name, features[name], labels) for name in names}
        return lambda i: {name: value(i) for name, value in values.items()}

    return Split(columns.n, open_examples, None if labels is None else lambda: labels)


def value_of(columns: Columns, name: str, feature: Feature, labels: np.ndarray | None) -> Callable[[int], Any]:
    """The function from an example's number to its value of one feature."""
    if name == 'label':
        return lambda i: labels[i]
    check = unchanged(columns.array(name))
    if feature.image:
        x, how, scale = columns.array(name), columns.layout_of(name), scaling(columns, name)
        return checked(check, lambda i: scale(how.image(x, i)))
    x = columns.vector(name)
    if x.dtype.kind in 'US':
        return checked(check, lambda i: texts.encoded(x[i]))
    return checked(check, lambda i: converted(np.asarray(x[i]), feature.dtype))


def checked(check: Callable[[], None] | None, value: Callable[[int], Any]) -> Callable[[int], Any]:
    """The function `value`, with a check before and after each example."""
    if check is None:
        return value

    def example(i: int) -> Any:
        check()
        out = value(i)
        check()
        return out

    return example


def unchanged(x: np.ndarray) -> Callable[[], None] | None:
    """The function that raises RunError once the file that an array is mapped from has been written to; None: it is in
    memory. Reading what a shorter file no longer has would end the process. A file that another one has replaced is
    still the one that is mapped."""
    if not isinstance(x, np.memmap):
        return None
    path = os.fspath(x.filename)

    def stamp() -> tuple[int, ...] | None:
        try:
            about = os.stat(path)
        except OSError:
            return None
        return about.st_ino, about.st_dev, about.st_size, int(about.st_mtime)

    first = stamp()

    def check() -> None:
        now = stamp()
        if now != first and now is not None and first is not None and now[:2] == first[:2]:
            raise RunError(f'{path} has been written to while it is read: leave it as it is, or replace it by another')

    return check


def converted(x: np.ndarray, dtype) -> np.ndarray:
    """Numbers of another type.

    Raises:
      ValueError: it has no such numbers.
    """
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
    finite = x[np.isfinite(x)]
    if finite.size and not (limits.min <= finite.min() and finite.max() <= limits.max):
        raise ValueError(f'it has {finite.min():g} to {finite.max():g}, which do not fit into {np.dtype(dtype).name}')
    return x.astype(dtype)


def scaling(columns: Columns, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function from stored values to uint8.

    Raises:
      UserError: which values are black and white cannot be known.
    """
    rules, x = columns.rules[name], columns.array(name)
    if x.dtype.kind not in 'buif':
        raise UserError(
            f'{columns.where}: the images {columns.stored[name].name} are {str(x.dtype)[:40]}, no real numbers: name '
            'another array by ?image=NAME'
        )
    text, title = rules.range, 'range' if name == 'image' else f'{name}_range'
    if text:
        try:
            low, high = map(float, text.split(','))
            valid = math.isfinite(low) and math.isfinite(high) and low != high
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f'{columns.where}: ?{title}={text} must be BLACK,WHITE: 0,1 or -1,1 or 0,255')
        limits = [(one.min(), one.max()) for one in sample(columns, name)]
        outside = [one for one in limits if not is_inside(*one, low, high)]
        if len(outside) > len(limits) / 2:  # fewer may be damaged
            raise UserError(
                f'{columns.where}: ?{title}={text}: the images {columns.stored[name].name} have values from '
                f'{min(one[0] for one in limits):g} to {max(one[1] for one in limits):g} (of {len(limits)} of them)'
            )
    elif x.dtype.kind == 'b':
        low, high = 0.0, 1.0
    else:
        some = sample(columns, name)
        least, most = min(one.min() for one in some), max(one.max() for one in some)
        if x.dtype != np.uint8 or most <= 1:
            raise UserError(
                f'{columns.where}: the images {columns.stored[name].name} are {x.dtype} from {least:g} to {most:g} (of '
                f'{len(some)} of them): say which values are black and white by ?{title}=0,1 or -1,1 or 0,255'
            )
        low, high = 0.0, 255.0
    if x.dtype == np.uint8 and (low, high) == (0, 255):
        return lambda one: np.asarray(one)
    return functools.partial(to_uint8, low=low, high=high)


def sample(columns: Columns, name: str) -> list[np.ndarray]:
    """Some of the images, as they are stored."""
    x, how = columns.array(name), columns.layout_of(name)
    return [how.image(x, i) for i in range(0, columns.n, max(1, columns.n // SAMPLED))]


def is_inside(least: float, most: float, low: float, high: float) -> bool:
    """Whether values are from black to white, but for rounding."""
    room = abs(high - low) / 510
    return bool(min(low, high) - room <= least and most <= max(low, high) + room)


def to_uint8(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low`, black, to `high`, white, as 0 to 255.

    Raises:
      ValueError: some are further outside than rounding brings them.
    """
    y = (np.asarray(x, np.float64) - low) * (255 / (high - low))
    if not np.isfinite(x).all():
        raise ValueError('it has values that are no finite numbers')
    if not is_inside(np.min(x), np.max(x), low, high):
        raise ValueError(f'it has values from {np.min(x):g} to {np.max(x):g}, outside of range={low:g},{high:g}')
    return np.clip(np.rint(y), 0, 255).astype(np.uint8)


# --- compressed arrays


unpacked: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # arrays in memory, while somebody uses them


def unpack(what: str, path: str, part: str, n_bytes: int, data, open_stream: Callable[[], Any]) -> np.ndarray:
    """The n_bytes that a compressed file holds, uint8, in memory where data.cache_mb has room for them, or else in a
    file that is written once, beside the prepared sets.

    Args:
      what: of messages.
      path, part: the file, and what of it.

    Raises:
      UserError: there are fewer, more, or it is damaged.
    """
    if n_bytes > INFLATION * os.path.getsize(path):
        raise UserError(f'{what} is damaged: by its header it has {n_bytes} bytes, more than the file can hold')
    about, directory = os.stat(path), os.path.join(root(data), UNPACKED)
    key = text_digest(os.path.realpath(path), part, *map(str, files.version_of(about)))
    if n_bytes <= data['cache_mb'] * 2**20:
        if (known := unpacked.get(key)) is not None:
            return known
        content = bytearray()
        for chunk in chunks(what, n_bytes, open_stream):
            content += chunk
        return unpacked.setdefault(key, np.frombuffer(content, np.uint8))
    kept = os.path.join(directory, key)
    if not os.path.isfile(kept) or os.path.islink(kept) or os.path.getsize(kept) != n_bytes:
        if data['dir']:
            guard.check_inside(root(data), directory)
        try:
            with files.replacing(kept) as new:
                for chunk in chunks(what, n_bytes, open_stream):
                    new.write(chunk)
        except OSError as e:
            raise UserError(f'cannot unpack {what} into {directory}: {e.strerror}; name another data.dir') from e
    return np.memmap(kept, np.uint8, 'r')


def chunks(what: str, n_bytes: int, open_stream: Callable[[], Any]):
    """The bytes of a stream, of which there must be n_bytes."""
    total = 0
    try:
        with open_stream() as stream:
            while chunk := stream.read(min(PART, n_bytes - total + 1)):
                total += len(chunk)
                if total > n_bytes:
                    break
                yield chunk
    except UserError:
        raise
    except Exception as e:  # what a damaged archive raises is of any kind
        raise UserError(f'{what} is damaged: {" ".join(str(e).split())[:200] or type(e).__name__}') from e
    if total != n_bytes:
        raise UserError(f'{what} is damaged: it has {"more" if total > n_bytes else total} bytes, not {n_bytes}')
