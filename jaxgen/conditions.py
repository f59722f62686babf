"""The conditions that samples get: what a person sets, and the data's own for the rest.

    given = conditions.read(assembled, config, {'image': 'photos', 'label': [3, 4]})
    given.n, given.lines()  # samples, and what a person should know about them
    provide = conditions.provider(assembled, config, given)
    provide(np.arange(4))  # {'index': [4], 'image': [4, H, W, C], 'label': [4]}

A condition is a label, a caption (a text of any words where text encoders read it), or an array; an image may be a
person's own file, folder or array of any size (see data/own_images.py). Of each condition there is one value for all
samples, or one for each of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxgen import config as configs
from jaxgen import origin
from jaxgen.data import captions, folder, numpy_files, splits
from jaxgen.data.loader import OTHER
from jaxgen.data.own_images import OwnImages, Reduced, reason
from jaxgen.errors import UserError
from jaxgen.options import shown
from jaxgen.text import emphasis, tokenizers

LOW_RESOLUTION = 'low_resolution'
OUTPAINT = 'outpaint'  # pixels that are to be drawn around an image
APART = (OTHER, 'reference', LOW_RESOLUTION)  # images that need not lie over the others, pixel by pixel
MOST_BYTES = 80  # of a file's name that are part of another's; file systems take 255
PROMPTS = ('caption', 'negative_caption')  # texts of any words, where text encoders read them
MOST_TEXT = 2**20  # characters
SECOND = ('mask', 'reference')  # images after which a sample is named only where there is no other


@dataclasses.dataclass(frozen=True)
class Values:
    """Values [m, ...] of a condition that is no image, m = 1 or one for each sample."""

    array: np.ndarray
    listed: bool = False  # one for each sample, also if there is but one

    def __len__(self) -> int:
        return len(self.array)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        return self.array[numbers % len(self.array)]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a person sets for samples, checked.

    Attributes:
      values: {name: Values, OwnImages or Reduced}, arrays of the batch.
      images: {name: OwnImages}, as the person named them.
      n: how many samples there are of them; 0: any number.
      reconstructs: 'image' is to be encoded and decoded, where the family has no such condition.
      replaced: conditions that the batch need not hold.
      texts: {name: a short text of it}, in which others differ.
      notes: lines about what is not set.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: dict[str, OwnImages] = dataclasses.field(default_factory=dict)
    n: int = 0
    reconstructs: bool = False
    replaced: tuple[str, ...] = ()
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def doubts(self) -> list[str]:
        """Lines about what may not be what the person means."""
        return [line for images in self.images.values() for line in images.doubts]

    def lines(self) -> list[str]:
        """Lines about sizes, what was left out, and conditions that are not set."""
        each = [line for images in self.images.values() for line in (images.note(), images.left_out) if line]
        return [*each, *self.notes]

    def names(self, n: int) -> list[str]:
        """Names of n samples by the files that they are made of, no two alike; [] where there are none."""
        files = {name: images for name, images in self.images.items() if all(images.paths)}
        if not files:
            return []
        first = next((name for name in files if name not in SECOND), next(iter(files)))
        several = [name for name in files if name == first or len(files[name]) > 1]
        named = []
        for i in range(n):
            stems = dict.fromkeys(stem(files[name].paths[i % len(files[name])]) for name in several)
            named.append(shortened('_'.join(stems), 2 * MOST_BYTES))
        return unique(named)

    def sources(self, i: int) -> dict[str, str]:
        """{condition: absolute path of its file} of sample i."""
        paths = {name: images.paths[i % len(images)] for name, images in self.images.items()}
        return {name: os.path.abspath(path) for name, path in paths.items() if path}


def stem(path: str) -> str:
    """A file's name without its ending, as part of the name of another one."""
    name = os.path.splitext(os.path.basename(path))[0]
    return shortened(re.sub(r'[^\w.()+ -]|^\.', '_', name), MOST_BYTES) or '_'


def shortened(name: str, most: int) -> str:
    """As much of a name as fits into `most` bytes."""
    return name.encode()[:most].decode(errors='ignore')


def unique(names: Sequence[str]) -> list[str]:
    """The names, of which those that an earlier one equals, also but for case, end in -2, -3, ..."""
    taken = set(map(str.casefold, names))
    seen: set[str] = set()
    counts: dict[str, int] = {}
    out = []
    for name in names:
        new, key = name, name.casefold()
        if key in seen:
            count = counts.get(key, 1)
            while new.casefold() in taken:
                count += 1
                new = f'{name}-{count}'
            counts[key] = count
        taken.add(new.casefold())
        seen.add(new.casefold())
        out.append(new)
    return out


def classes(spec, config) -> np.ndarray:
    """The classes of the training data."""
    return np.unique(np.array(config.data.keep_classes or range(spec.classes), np.int32))


def read(assembled, config, condition: dict[str, Any] | Given, n: int | None = None) -> Given:
    """The conditions that a person sets, read and checked.

    Args:
      condition: {name: value, or a list of one for each sample}; see `numbers` and data/own_images.py.
      n: samples wanted; None: as many as there are values.

    Raises:
      UserError: the family draws nothing, has no such condition, a value is none for it, or their numbers differ.
    """
    if isinstance(condition, Given):
        given = condition
    else:
        if not isinstance(condition, dict):
            raise UserError(f"condition must be a dict, like {{'label': 3}}; it is {condition!r}")
        given = made(assembled, config, condition)
    return dataclasses.replace(given, n=number_of_samples(given, n))


def made(assembled, config, condition: dict[str, Any]) -> Given:
    family = assembled.family
    border = border_of(condition[OUTPAINT]) if OUTPAINT in condition and fills_holes(family) else None
    set_names = {*condition, *(('mask',) if border else ())}
    reconstructs = 'image' in condition and is_reconstructed(family, set_names)
    if family.sample is None and not reconstructs:
        raise UserError(f'a run of {config.family} draws no images: there is nothing to sample')
    for name in condition:
        if name not in allowed(family):
            refuse(family, name)
        if reconstructs and name != 'image':
            raise UserError(f'condition {name!r}: this run reconstructs the image, and reads nothing beside it')
    values: dict[str, Any] = {}
    images: dict[str, OwnImages] = {}
    if border and ('mask' in condition or 'image' not in condition):
        raise UserError(f'condition {OUTPAINT} is of an image, and makes its mask: set image, and no mask')
    for name, value in condition.items():
        if name == OUTPAINT:
            continue
        if shape := image_shape(assembled, name):
            binary = name == 'mask' and fills_holes(family)
            around = border if border and name == 'image' else (0, 0, 0, 0)
            images[name] = values[name] = OwnImages(name, value, shape, config.data, binary, around)
        else:
            values[name] = numbers(assembled, config, name, value)
    if border:
        shape = inputs(family)['mask']
        holes = [outside(size, border) for size in images['image'].sizes]
        images['mask'] = values['mask'] = OwnImages('mask', holes, shape, config.data, True)
    if 'domain' in values and 'image' not in images:
        raise UserError("condition 'domain' is that of the input image, as the data say: set label, the target domain")
    if is_derived(family) and 'image' in images:
        if LOW_RESOLUTION in images:
            raise UserError('conditions image and low_resolution: the latter is made of the former; leave one out')
        del values['image']
        values[LOW_RESOLUTION] = Reduced(images['image'], assembled.spec.features[LOW_RESOLUTION].shape[0])
    replaced = {one.instead_of: one.name for one in family.inputs if one.name in values}
    for name in values:
        if name in replaced:
            raise UserError(f'conditions {replaced[name]} and {name}: one is in place of the other; leave one out')
    read_by_sample = {*family.conditions, *inputs(family), *(PROMPTS if family.captions.encoded else ())}
    if values and not reconstructs and not read_by_sample & set(values):
        wanted = ', '.join(family.conditions)
        raise UserError(f'condition {next(iter(values))!r} is displayed by --film alone: samples are made of {wanted}')
    for one in family.inputs:
        if one.name in values and not reconstructs and not set(one.beside) <= set(values):
            more = f', {one.otherwise}' if one.otherwise else ''
            raise UserError(f'condition {one.name} is read beside {" and ".join(one.beside)}: set that too{more}')
    check_aligned(images)
    texts = {name: text_of(images.get(name), value) for name, value in condition.items()}
    notes = [] if reconstructs or not images else unset(assembled, {*values, *replaced})
    notes += cut_off(assembled, values)
    if 'negative_caption' in values and not family.captions.negative:
        notes.append('negative_caption changes nothing: samples are not guided, see --config.model.guidance.scale')
    return Given(values, images, 0, reconstructs, tuple(replaced), texts, tuple(notes))


def fills_holes(family) -> bool:
    """Whether a mask says what is missing of an image, which the family completes: images may be drawn on beyond their
    edges too. That of a ControlNet does not."""
    return any(one.name == 'mask' and ('image' in one.beside or 'image' in family.conditions) for one in family.inputs)


def border_of(value) -> tuple[int, int, int, int]:
    """The pixels left, top, right and bottom of an image, of numbers or of a text '0,80,0,80'.

    Raises:
      UserError: they are none.
    """
    parts = value.split(',') if isinstance(value, str) else value
    try:
        left, top, right, bottom = (int(part) if isinstance(part, str) else operator.index(part) for part in parts)
    except (TypeError, ValueError) as e:
        raise UserError(
            f'condition {OUTPAINT}: four numbers of pixels, left, top, right, bottom, like 0,80,0,80; it is '
            f'{shown(value)}'
        ) from e
    if min(left, top, right, bottom) < 0 or not any((left, top, right, bottom)):
        raise UserError(f'condition {OUTPAINT}: numbers from 0, not all of them 0; they are {left, top, right, bottom}')
    return left, top, right, bottom


def outside(size: tuple[int, int], border: tuple[int, int, int, int]) -> np.ndarray:
    """bool [height, width] of a canvas of size (width, height), True in its border."""
    (width, height), (left, top, right, bottom) = size, border
    hole = np.ones((height, width), bool)
    hole[top : height - bottom, left : width - right] = False
    return hole


def inputs(family) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the family's further images."""
    return {one.name: one.shape for one in family.inputs}


def is_reconstructed(family, names: Iterable[str] = ()) -> bool:
    """Whether an image is reconstructed, since no condition is one and the family encodes and decodes.

    Args:
      names: of what is set: an input is none where one that it is read beside is not among them.
    """
    named = {*family.conditions, *(one.name for one in family.inputs if set(one.beside) <= set(names))}
    return not {'image', LOW_RESOLUTION} & named and family.encode is not None and family.decode is not None


def is_derived(family) -> bool:
    """Whether the condition 'low_resolution' is made of an image."""
    return LOW_RESOLUTION in family.conditions and 'image' not in family.conditions


def allowed(family) -> tuple[str, ...]:
    """The names that a person may set."""
    more: tuple[str, ...] = ('image',) if is_reconstructed(family) or is_derived(family) else ()
    more += PROMPTS if family.captions.encoded else ()
    more += (OUTPAINT,) if fills_holes(family) else ()
    return tuple(dict.fromkeys((*family.conditions, *inputs(family), *more, *family.displayed)))


def refuse(family, name: str) -> None:
    """Raises UserError for a condition that there is not."""
    named = [one for one in allowed(family) if one not in family.displayed or one in inputs(family)]
    has = f'its conditions: {", ".join(named)}' if named else 'it has none'
    raise UserError(f'this run takes no condition {name!r}; {has}')


def image_shape(assembled, name: str) -> tuple[int, ...]:
    """(H, W, C) of a feature that is an image; (): it is none."""
    family, features = assembled.family, assembled.spec.features
    if name in inputs(family):
        return inputs(family)[name]
    shape = features[name].shape if name in features else ()
    return shape if len(shape) == 3 and features[name].dtype == np.uint8 else ()


def is_list(value) -> bool:
    """Whether these are values of several samples, and not one for all."""
    return isinstance(value, list | tuple | range) or (isinstance(value, np.ndarray) and value.ndim > 0)


def as_list(value) -> list:
    """The values of samples, or the one for all."""
    return list(value) if is_list(value) else [value]


def numbers(assembled, config, name: str, value) -> Values:
    """Values of a condition that is no image.

    Args:
      value: a class by number or name, a caption, a number, or a list of these; of arrays one, or one for each sample,
        also the path of a file .npy.

    Raises:
      UserError: the value is none for this condition.
    """
    if hasattr(value, '__array__') and not isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value)
    values = as_list(value)
    listed = is_list(value)
    if not values:
        raise UserError(f'condition {name}: an empty list; name one value at least')
    if name in PROMPTS and assembled.texts:
        return Values(captions.encoded([prompt(name, one) for one in values]), listed)
    feature, spec = assembled.spec.features[name], assembled.spec
    if name == 'caption':
        origin.check_named(assembled.unnamed, *configs.DATA_PATHS)  # whose words are read
        known = functools.cache(lambda: captions.known(config.data))
        words = assembled.family.captions.words
        return Values(np.stack([captions.check(str(one), feature.shape[0], words, known) for one in values]), listed)
    if feature.shape:
        return arrays(name, value, feature)
    return Values(np.array([one_number(spec, config, name, one) for one in values], feature.dtype), listed)


def prompt(name: str, value) -> str:
    """A text for tokenizers: any words, any length, none at all.

    Raises:
      UserError: it is no text.
    """
    if not isinstance(value, str):
        raise UserError(f'condition {name} must be a text, or a list of one for each sample; it is {shown(value)}')
    if len(value) > MOST_TEXT:
        raise UserError(f'condition {name}: a text of {len(value):,} characters; {MOST_TEXT:,} are read at most')
    return value


def cut_off(assembled, values: dict[str, Any]) -> list[str]:
    """Lines about texts with more tokens than a text encoder reads."""
    lines = []
    for name in (name for name in PROMPTS if name in values and assembled.texts):
        texts = tokenizers.caption_texts(values[name].array)
        if assembled.family.captions.weighted:
            texts = [emphasis.parsed(text)[0] for text in texts]
        for length, tokenizer in {one.length: one for one in assembled.tokenizers.values()}.items():
            chunks = assembled.family.captions.chunks
            rests = [(text, rest) for text in texts if (rest := tokenizer.rest(text, chunks))]
            if rests:
                many = f', and so on of {len(rests)} of {len(texts)} texts' if len(texts) > 1 else ''
                text, rest = (shown(words) for words in rests[0])
                parts = f'{chunks} times ' if chunks > 1 and tokenizer.divisible else ''
                lines.append(f'{name} {text}: {parts}{length} tokens are read, and not its end {rest}{many}')
    return lines


def one_number(spec, config, name: str, value) -> int | float:
    """A class, or another number."""
    is_class = name in ('label', 'domain')
    try:
        if isinstance(value, bool | np.bool_):
            raise ValueError
        if spec.features[name].dtype.kind == 'f':
            return finite(float(value))
        if not isinstance(value, str):
            value = operator.index(value)
        number = spec.class_number(value) if is_class else int(value)
    except (TypeError, ValueError) as e:
        raise UserError(f'write --condition={name}=NUMBER; it is {value!r}') from e
    kept = classes(spec, config) if name == 'label' else np.arange(spec.classes)
    if is_class and number not in kept:
        all_of = f'between 0 and {spec.classes - 1}'
        which = f'one of the training classes, {kept.tolist()}' if len(kept) < spec.classes else all_of
        raise UserError(f'condition {name}={number} must be {which}')
    return number


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError
    return value


def arrays(name: str, value, feature) -> Values:
    """Arrays [m, *shape] of a feature, from one of them, several, or a file .npy."""
    if isinstance(value, str | os.PathLike):
        path = os.path.expanduser(os.fsdecode(value))
        try:
            with folder.open_regular(path) as file:
                shape, _, dtype, start = numpy_files.header(path, file)
                if start + math.prod(shape) * dtype.itemsize > os.fstat(file.fileno()).st_size:
                    raise ValueError('its header says more than it holds')
                file.seek(0)
                value = np.lib.format.read_array(file, allow_pickle=False)
        except MemoryError:
            raise
        except Exception as e:  # of a damaged header nearly any
            raise UserError(f'condition {name}: {path} cannot be read as an array, a file .npy ({reason(e)})') from e
    try:
        x = np.asarray(value)
        ordered = x if x.ndim > len(feature.shape) else x[None]
        fits = ordered.shape[1:] == feature.shape and len(ordered) and x.dtype.kind in 'buif'
        converted = ordered.astype(feature.dtype) if fits else x
        fits = fits and np.isfinite(ordered).all() and (feature.dtype.kind == 'f' or (converted == ordered).all())
    except (TypeError, ValueError) as e:
        raise UserError(f'condition {name}: no array can be made of it ({reason(e)})') from e
    if not fits:
        raise UserError(
            f'condition {name} must be an array of {np.dtype(feature.dtype)} of shape {feature.shape}, or one such for '
            f'each sample, [n, ...]; it is {x.dtype} of shape {x.shape}'
        )
    return Values(converted, x.ndim > len(feature.shape))


def check_aligned(images: dict[str, OwnImages]) -> None:
    """Raises UserError where images that lie over each other differ in size or names, or it is unclear which of them
    belong together."""
    longer = [name for name, one in images.items() if len(one) > 1]
    for name, one in images.items():
        if one.left_out and [other for other in longer if other != name]:
            raise UserError(
                f'condition {one.left_out}: which of the others belong to which is unclear then; repair or remove them'
            )
    together = [one for name, one in images.items() if name not in APART]
    for one in together[1:]:
        first = together[0]
        n = max(len(first), len(one))
        if len({len(first), len(one), 1}) > 2:
            continue  # number_of_samples refuses it
        for i in range(n):
            a, b = i % len(first), i % len(one)
            if first.sizes[a] != one.sizes[b]:
                (w, h), (v, g) = first.sizes[a], one.sizes[b]
                raise UserError(
                    f'conditions {first.feature} and {one.feature}: {first.paths[a] or first.feature} is {w} x {h} '
                    f'pixels and {one.paths[b] or one.feature} {v} x {g}: they must have one size'
                )
        if len(first) == len(one) > 1 and all((*first.paths, *one.paths)):
            left, right = ([stem(path) for path in images.paths] for images in (first, one))
            if left != right and set(left) & set(right):
                i = next(i for i in range(n) if left[i] != right[i])
                raise UserError(
                    f'conditions {first.feature} and {one.feature} belong together in order: {first.paths[i]} and '
                    f'{one.paths[i]} do not, by their names'
                )


def number_of_samples(given: Given, n: int | None) -> int:
    """How many samples there are; 0: any number.

    Raises:
      UserError: conditions have different numbers of values.
    """
    lengths = {name: len(value) for name, value in {**given.values, **given.images}.items()}
    several = {name: m for name, m in lengths.items() if m > 1}
    if len(set(several.values())) > 1:
        listed = ', '.join(f'{m} of {name}' for name, m in several.items())
        raise UserError(f'conditions must have one value, or one for each sample: there are {listed}')
    if n is not None and several and n != (m := next(iter(several.values()))):
        raise UserError(
            f'n = {n}, but there are {m} of condition {next(iter(several))}: leave n out, or name {n} of it'
        )
    if n is not None:
        return n
    several_or_one = bool(given.images) or any(
        isinstance(value, Values) and value.listed for value in given.values.values()
    )
    return max(several.values(), default=1 if several_or_one else 0)


def text_of(images: OwnImages | None, value) -> str:
    """A short text of a condition, another one for other values and files."""
    if images is None:
        return str(value) if isinstance(value, str | int) else ','.join(map(str, as_list(value)))
    first = stem(images.paths[0]) if images.paths[0] else ''
    return f'{first[:24]} {folder.digest(*images.paths, *images.digests)[:16]}'


def unset(assembled, there: set[str]) -> list[str]:
    """Lines about conditions that are not set, where others are."""
    lines = []
    for name in assembled.family.conditions:
        if name in there:
            continue
        if name == 'label':
            lines.append('label is not set: the samples go through the classes from the first one on')
        else:
            lines.append(f'{name} is not set: it is that of the examples of the test split, in order')
    return lines


def provider(
    assembled, config, condition: dict[str, Any] | Given, film: bool = False
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The function from samples' numbers [n] to 'index' [n] and the conditions that the family reads, [n, ...] each.

    Of a condition that is not set: labels count up through the training classes; anything else (a mask, a
    low-resolution image, a caption) comes from the test split, in order, cyclically. Examples are read when the
    function is called.

    Args:
      condition: {name: value} of those that a person sets, or these as `read` gives them.
      film: whether what trajectories display beside is in it too: of the test split, or of a person's own images.

    Raises:
      UserError: the family draws nothing, has no such condition, or a value is out of range.
    """
    family, spec = assembled.family, assembled.spec
    given = read(assembled, config, condition)
    if given.reconstructs:
        raise UserError('condition image: this run reconstructs it, which sampling alone does, and no film shows')
    for one in family.inputs:
        if one.required and one.name not in given.values:
            raise UserError(f'as this model is set, samples begin with an {one.name}: set the condition {one.name}')
    displayed = family.displayed if film else ()
    hidden = () if film else set(family.displayed) - set(inputs(family))
    own = {name: value for name, value in given.values.items() if name not in hidden}
    missing = (*family.conditions, *(() if given.images else displayed))
    rest = [name for name in dict.fromkeys(missing) if name != 'label' and name not in (*own, *given.replaced)]
    source = assembled.untokenised(splits.for_conditions(assembled.config.data)) if rest else None
    kept = classes(spec, config)

    def provide(numbers: np.ndarray) -> dict[str, np.ndarray]:
        out = {'index': numbers.astype(np.int32)}
        if 'label' in family.conditions:
            out['label'] = kept[numbers % len(kept)]
        out |= {name: value.take(numbers) for name, value in own.items()}
        examples = source.take_cyclic(numbers) if source is not None else {}
        return assembled.tokenised(out | {name: examples[name] for name in rest}, prompts=True)

    return provide


def first(assembled, config, n: int, condition: dict[str, Any] | Given, film: bool = False) -> dict[str, np.ndarray]:
    """The conditions of the first n samples; see `provider`."""
    given = condition if isinstance(condition, Given) else read(assembled, config, condition, n)
    return provider(assembled, config, given, film)(np.arange(n))
