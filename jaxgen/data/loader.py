"""Batches and examples for main, train and evaluate.

The training data are one endless sequence: which example has a number in it is a pure function of
(seed, number), and so is its random augmentation. So resuming seeks to a number, and the number of
processes that divide the work changes nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from jaxgen.data import decoding, folder, kept, sources, splits, texts, transforms, views, workers
from jaxgen.data.decoding import Crops
from jaxgen.data.prepared import PreparedSet
from jaxgen.data.records import Feature, Records, blocks_of, name_of, with_features
from jaxgen.data.records import stamp as stamp_of
from jaxgen.data.section import completes
from jaxgen.errors import RunError, UserError
from jaxgen.sections import sides

MOST_LINES = 5  # about damaged examples
KEPT_TEXTS = 2**18  # examples of a set whose texts stay in memory
FEW = 2048  # examples that are decoded sooner than processes are started
MOST_PROCESSES = 32  # that are started where no number is set
LEAST_AT_ONCE, MOST_AT_ONCE = 8, 32  # images that a process is given at a time,
MOST_BYTES = 2**25  # and bytes of them
OTHER = 'other'  # the feature that comes from config.data.other, unpaired
OTHER_CAPTION = 'other_caption'  # and their captions: those of that source, or config.data.other_prompt
OF_OTHERS = {'image': OTHER, 'caption': OTHER_CAPTION}  # by their names in that source


class Spec(NamedTuple):
    """What one example holds."""

    features: dict[str, jax.ShapeDtypeStruct]  # by name: image uint8 [height, width, channels], label int32 [], ...
    classes: int  # of 'label'; 0: the batch has no labels
    names: tuple[str, ...] = ()  # of the classes, by number; (): they have none
    captioned: tuple[int, ...] = ()  # entries of 'factors' whose values 'caption' states

    def class_number(self, value: int | str) -> int:
        """The number of a class by its name or number. A text that is a class's name means that class, also where the
        names are numbers, as of folders 1, 2 and 3; an integer is always the number, from 0.

        Raises:
          UserError: a text that is neither. Whether the number is in range is left to the caller.
          ValueError: the same where the classes have no names.
        """
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        if not self.names or isinstance(value, int) or value.removeprefix('-').isdecimal():
            return int(value)
        close = difflib.get_close_matches(value, self.names, n=3, cutoff=0.5)
        some = ', '.join(self.names[:10]) + (', ...' if len(self.names) > 10 else '')
        raise UserError(
            f'no class {value!r}; ' + (f'did you mean {" or ".join(close)}?' if close else f'they are {some}')
        )


def spec_to_json(spec: Spec) -> dict[str, Any]:
    """A JSON object that `spec_from_json` makes this Spec of again: a run that keeps it is sampled without its data."""
    features = {name: {'shape': list(f.shape), 'dtype': np.dtype(f.dtype).name} for name, f in spec.features.items()}
    about = {'features': features, 'classes': spec.classes, 'names': list(spec.names)}
    return about | ({'captioned': list(spec.captioned)} if spec.captioned else {})


def spec_from_json(stored: Any) -> Spec:
    """The Spec that `spec_to_json` has described.

    Raises:
      ValueError: it is something else. The object may come from a stranger.
    """
    try:
        names, captioned, classes = stored.get('names', []), stored.get('captioned', []), stored['classes']
        features = {}
        for name, f in stored['features'].items():
            if not all(type(n) is int and 0 <= n < 2**31 for n in f['shape']):
                raise ValueError(f'shape {f["shape"]!r}')
            if f['dtype'] not in ('uint8', 'int32', 'float32'):
                raise ValueError(f'dtype {f["dtype"]!r}')
            features[name] = jax.ShapeDtypeStruct(tuple(f['shape']), np.dtype(f['dtype']))
        if len(features['image'].shape) != 3:
            raise ValueError('an image has height, width and channels')
        if type(classes) is not int or classes < 0 or not all(isinstance(name, str) for name in names):
            raise ValueError('classes')
        if not all(type(i) is int and 0 <= i < math.prod(features['factors'].shape) for i in captioned):
            raise ValueError(f'captioned factors {captioned!r}')
        if names and len(names) != classes:
            raise ValueError(f'{len(names)} names of {classes} classes')
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f'{type(e).__name__}: {e}') from e
    return Spec(features, classes, tuple(names), tuple(captioned))


@completes
def spec(data) -> Spec:
    """Shapes and types of one example. Prepares nothing and needs no network.

    Args:
      data: the section `data` of a config, or some of its fields.

    Raises:
      UserError: an unknown source, a feature that it lacks, or a class.
    """
    if prompts := fixed_captions(data):
        about = spec(without_captions(data))
        texts = {name: jax.ShapeDtypeStruct(text.shape, text.dtype) for name, text in prompts.items()}
        return about._replace(features={**about.features, **texts})
    if OTHER in data['features']:
        own, other = sections(data)
        with of_other():
            others = spec(other).features
        about = spec(own)
        return about._replace(features={**about.features, **of_others(others)})
    source = sources.resolve(data)
    chosen = sources.choose(source, data)
    if data['keep_classes']:
        classes = sources.choose(source, {**data, 'features': ('label',)})['label'].classes
        if not all(type(c) is int and 0 <= c < classes for c in data['keep_classes']):
            raise UserError(
                f'config.data.keep_classes must be classes, 0 to {classes - 1}; they are {tuple(data["keep_classes"])}'
            )
    features = {name: jax.ShapeDtypeStruct(shape(f, data), f.dtype) for name, f in chosen.items()}
    label = chosen.get('label', Feature(()))
    # Fewer names than classes: config.data.classes is more than this source has.
    names = label.names + tuple(map(str, range(len(label.names), label.classes))) if label.names else ()
    return Spec(features, label.classes, names, source.captioned if 'factors' in chosen else ())


def shape(feature: Feature, data) -> tuple[int, ...]:
    """Shape of one example's feature in a batch."""
    height, width = sides(data['size'])
    factor = min(height, width) // feature.side if feature.side else 1
    channels = feature.channels or data['channels']
    return (height // factor, width // factor, channels) if feature.image else feature.shape


def resized(spec: Spec, size: int | tuple[int, ...]) -> Spec:
    """The Spec with images of another `data.size`, and all that lie over them."""
    height, width, _ = spec.features['image'].shape

    def one(feature: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if len(feature.shape) != 3:
            return feature
        # As in `shape`: a reduced image has as many pixels on its shorter side as before.
        side = min(feature.shape[:2])
        factor = 1 if side == min(height, width) else max(min(sides(size)) // side, 1)
        return jax.ShapeDtypeStruct((*(n // factor for n in sides(size)), feature.shape[2]), feature.dtype)

    return spec._replace(features={name: one(feature) for name, feature in spec.features.items()})


def sections(data) -> tuple[dict, dict]:
    """The section `data` of a config whose features hold OTHER as two: of its own images, and of the others.

    Raises:
      UserError: no second source is named.
    """
    if not data['other']:
        raise UserError(
            f'config.data.features: {OTHER!r} are the images of a second source: set config.data.other, to '
            'shapes:outlined or folder:PATH, for example'
        )
    own = {**data, 'features': tuple(name for name in data['features'] if name not in OF_OTHERS.values())}
    read = tuple(name for name, there in OF_OTHERS.items() if there in data['features'])
    others = {'source': data['other'], 'features': read, 'keep_classes': ()}
    return own, {**data, **others, 'test_source': '', 'validation_source': ''}


def of_others(example: dict[str, Any]) -> dict[str, Any]:
    """What the second source gives, under the names that it has in a batch."""
    return {there: example[name] for name, there in OF_OTHERS.items() if name in example}


@contextlib.contextmanager
def of_other() -> Iterator[None]:
    """A mistake in the source is named as one in config.data.other."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace('config.data.source', 'config.data.other')) from e


class Examples:
    """One split, decoded and resized.

    `len(examples)`; `examples[i]` is {name: array} of example i, always the same; `take` makes batches. A split that is
    small when decoded stays in memory, each example from its first use; what was decoded is kept on disk, too, for the
    next process (kept.py). Many images at once are decoded by other processes (workers.py): `close` ends these.
    """

    def __init__(self, records: Records, data):
        self.records, self.data = records, data
        rooms = {name: f.shape[0] for name, f in records.chosen.items() if f.text}
        # All else, of which an example is an array of one shape.
        others = tuple(name for name in records.chosen if name not in rooms)
        self.stored = with_features(records, others) if rooms else records
        self.shapes = {name: shape(f, data) for name, f in self.stored.chosen.items()}
        self.targets = tuple(
            decoding.Target(name, self.shapes[name], f.palette) for name, f in self.stored.chosen.items() if f.image
        )
        pixels = sum(math.prod(target.shape) for target in self.targets)
        self.fits = len(records) * pixels <= data['cache_mb'] * 2**20
        self.cache = self.empty(len(records)) if self.fits else {}
        self.known = np.zeros(len(records), bool)  # which of them the cache holds
        self.corrupt: dict[int, str] = {}  # examples that could not be decoded, and why
        self.textless: dict[int, str] = {}  # examples whose texts cannot be read, and why
        self.texts = (
            texts.Texts(records, rooms, self.fits and len(records) <= KEPT_TEXTS, self.count_textless)
            if rooms
            else None
        )
        processes = number_of_processes(data['processes'], len(records))
        self.workers = workers.Lease(processes) if processes and self.targets else None

    def close(self) -> None:
        """Ends the use of other processes, which end with the last that use them. Images are decoded here from then
        on."""
        lease, self.workers = self.workers, None
        if lease:
            lease.close()

    @property
    def identity(self) -> str:
        """A text that is the same for the same images: set, split, and their preprocessing."""
        d = self.data
        rest = '' if d['binarise'] == 'none' else f' binarise={d["binarise"]}'
        rest += f' draft={d["draft"]}' if d['draft'] else ''
        rest += f' white={d["white"]}' if d['white'] < 255 else ''
        return f'{self.records.identity} box={tuple(d["box"])} size={d["size"]} channels={d["channels"]}{rest}'

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not -len(self) <= i < len(self):
            raise IndexError(f'example {i} of {len(self)}')
        return {name: np.asarray(x[0]) for name, x in self.take(np.array([i % len(self)])).items()}

    def take(
        self,
        indices: np.ndarray,
        crops: Crops | None = None,
        words: np.ndarray | None = None,
        drawn: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The examples [n] as one batch, fresh arrays [n, ...].

        Args:
          crops: of each one's images; None: their central parts, as for evaluation.
          words: of the bits that are drawn for grey levels; None: those of the image itself. See transforms.binarised.
          drawn: which of an example's texts it has, see texts.py; None: the first.
        """
        out = self.arrays(indices, crops, words) if self.shapes else {}
        if self.texts:
            out |= self.texts.take(np.array([self.substitute(i) for i in indices.tolist()]), drawn)
        return {name: out[name] for name in self.records.chosen}

    def arrays(self, indices: np.ndarray, crops: Crops | None, words: np.ndarray | None) -> dict[str, np.ndarray]:
        """As `take`, without texts."""
        how, crops = self.data['binarise'] if 'image' in self.shapes else 'none', crops or Crops()
        if how == 'none':
            return self.grey(indices, crops)
        out = self.grey(indices, crops._replace(mirrored=None))
        out['image'] = transforms.binarised(out['image'], how, words)  # of the image as it is stored
        return self.mirrored(out, crops.mirrored)

    def grey(self, indices: np.ndarray, crops: Crops) -> dict[str, np.ndarray]:
        """As `take`, before pixels become bits."""
        if any(x is not None for x in crops._replace(mirrored=None)) or not (self.fits or self.store):
            return self.decoded(indices, crops)
        return self.mirrored(self.central(indices), crops.mirrored)

    def mirrored(self, out: dict[str, np.ndarray], which: np.ndarray | None) -> dict[str, np.ndarray]:
        """A batch whose images `which` [n] have been mirrored in place."""
        for target in self.targets if which is not None else ():
            out[target.name][which] = transforms.mirrored(out[target.name][which])
        return out

    def central(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `take`, without anything at random."""
        if not self.fits:
            return self.from_disk(indices)
        new = np.unique(indices[~self.known[indices]])
        if len(new):
            # Two threads may write the same values at once; an example is known after it is written.
            for name, x in self.from_disk(new).items():
                self.cache[name][new] = x
            self.known[new] = True
        return {name: x[indices] for name, x in self.cache.items()}

    def take_cyclic(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """As `take`, of any numbers from 0: after the last example comes the first."""
        return self.take(numbers % len(self))

    # --- on disk

    @functools.cached_property
    def store(self) -> kept.Store | None:
        """Where decoded examples are kept on disk; None where they are not: few are decoded soon, arrays need no
        decoding."""
        if not self.data['disk_mb'] or len(self) < FEW or not self.encoded:
            return None
        size = sum(x.nbytes for x in self.empty(1).values())
        if kept.length(len(self), size) > self.data['disk_mb'] * 2**20:
            return None
        stamp = stamp_of(self.records)
        fields = [(name, self.data[name]) for name in decoding.FIELDS]
        layout = [(name, self.shapes[name], np.dtype(f.dtype).str, f.path) for name, f in self.stored.chosen.items()]
        what = repr((decoding.version(), stamp, fields, layout, self.targets))
        return kept.open_store(what, len(self), size, self.data['disk_mb']) if stamp else None

    @functools.cached_property
    def encoded(self) -> bool:
        """Whether there are images, stored as files' bytes."""
        if not self.targets:
            return False
        try:
            return isinstance(self.stored[0][self.targets[0].name], bytes)
        except (RunError, UserError):
            raise
        except Exception:  # the first one is damaged
            return True

    def from_disk(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `decoded`, from the disk where they are kept there."""
        store = self.store
        if store is None:
            return self.decoded(indices, Crops())
        out, rows = self.empty(len(indices)), np.empty((len(indices), store.size + kept.DIGEST), np.uint8)
        new = ~store.read(indices, rows)
        if new.any():
            missing, at = np.unique(indices[new], return_inverse=True)
            fresh = self.decoded(missing, Crops())
            parts = [x.reshape(len(missing), -1).view(np.uint8) for x in fresh.values()]
            made = np.concatenate([*parts, np.zeros((len(missing), kept.DIGEST), np.uint8)], axis=1)
            sound = np.array([i not in self.corrupt for i in missing.tolist()], bool)  # others are met again
            store.write(missing[sound], made[sound])
            rows[new] = made[at]
        start = 0
        for name, x in out.items():
            end = start + x[:1].nbytes
            out[name] = np.ascontiguousarray(rows[:, start:end]).view(x.dtype).reshape(x.shape)
            start = end
        return out

    # --- from what is stored

    def decoded(self, indices: np.ndarray, crops: Crops) -> dict[str, np.ndarray]:
        """As `take`, from the stored records."""
        out = self.empty(len(indices))
        for n in self.by_workers(out, indices, crops):
            for name, value in self.sound(int(indices[n]), crops.one(n)).items():
                out[name][n] = value
        return out

    def by_workers(self, out: dict[str, np.ndarray], indices: np.ndarray, crops: Crops) -> Sequence[int]:
        """Decodes into `out` what other processes can; the numbers of the examples that are left to this one: damaged
        ones, or all where there are few, no other processes or nothing to decode."""
        everything, lease = range(len(indices)), self.workers
        if lease is None or len(indices) < LEAST_AT_ONCE:
            return everything
        if not self.encoded:
            self.close()
            return everything
        left: list[int] = []
        try:
            for task, images, damaged in lease.decoded(self.tasks(out, indices, crops, lease.pool.n)):
                for target, x in zip(task.targets, images, strict=True):
                    out[target.name][task.start : task.start + len(task)] = x
                left += (task.start + np.flatnonzero(damaged)).tolist()
        except workers.Unavailable as e:
            if self.workers is lease:  # not closed, by this thread or another
                self.close()
                folder.say(f'no processes that decode images can be started ({e}): threads of this one do it')
            return everything
        return left

    def tasks(self, out: dict[str, np.ndarray], indices: np.ndarray, crops: Crops, n: int) -> Iterator[workers.Task]:
        """The images of a batch in parts for `n` processes. All else of the examples goes into `out`."""
        room = max(1, MOST_BYTES // sum(math.prod(target.shape) for target in self.targets))
        size = min(max(LEAST_AT_ONCE, -(-len(indices) // (workers.LINES * n))), MOST_AT_ONCE, room)
        others = [name for name, f in self.stored.chosen.items() if not f.image]
        stored: list[bytes] = []
        start = length = 0
        for k, i in enumerate(map(int, indices)):
            try:
                example = self.stored[i]
            except (RunError, UserError):
                raise
            except Exception:  # damaged: no image is in these bytes either
                example = {}
            for name in others if example else ():
                out[name][k] = example[name]
            images = [example.get(target.name) for target in self.targets]
            stored += [x if isinstance(x, bytes) else b'' for x in images]
            length += sum(map(len, stored[-len(images) :]))
            if k + 1 - start == size or length >= MOST_BYTES or k + 1 == len(indices):
                part = Crops(*(None if x is None else x[start : k + 1] for x in crops))
                yield workers.Task(start, stored, self.targets, self.data, part)
                stored, start, length = [], k + 1, 0

    def sound(self, i: int, crop: Crops) -> dict[str, Any]:
        """Example i, or, where it cannot be decoded, the first that can of those that `uniform` names for i.

        Raises:
          RunError: more than data.max_corrupt of the examples have been damaged so far.
        """
        one = i
        for k in itertools.count():
            try:
                return self.example(one, crop)
            except (RunError, UserError):
                raise
            except Exception as e:
                self.count_corrupt(one, sources.reason(e))
            one = int(transforms.uniform(i, k, transforms.REPLACED) * len(self))

    def substitute(self, i: int) -> int:
        """The example that stands in the place of example i, see `sound`: i itself, where it is not damaged."""
        one = i
        for k in itertools.count():
            if one not in self.corrupt:
                return one
            one = int(transforms.uniform(i, k, transforms.REPLACED) * len(self))
        raise AssertionError

    def count_textless(self, i: int, e: Exception) -> None:
        """Counts an example whose texts cannot be read, and says so.

        Raises:
          RunError: they are more than data.max_corrupt of the examples.
        """
        new, why, most = i not in self.textless, sources.reason(e), self.data['max_corrupt']
        self.textless[i] = why
        said = f'{self.records.path}: the texts of {name_of(self.records, i)} cannot be read ({why})'
        if len(self.textless) > min(most * len(self), len(self) - 1):
            raise RunError(
                f'{said}: {len(self.textless)} of {len(self)} examples, more than config.data.max_corrupt = {most:g}; '
                'repair or remove them, or raise it'
            )
        if new and len(self.textless) <= MOST_LINES:
            more = '; others will not be named' if len(self.textless) == MOST_LINES else ''
            folder.say(f'{said}, it has none{more}')

    def count_corrupt(self, i: int, why: str) -> None:
        """Counts an example that cannot be decoded, and says so once."""
        new = i not in self.corrupt
        self.corrupt[i] = why
        name, most = name_of(self.records, i), self.data['max_corrupt']
        if len(self.corrupt) > min(most * len(self), len(self) - 1):
            first = min(dict(self.corrupt))
            raise RunError(
                f'{self.records.path}: {name_of(self.records, first)} cannot be decoded ({self.corrupt[first]}): '
                f'{len(self.corrupt)} of {len(self)} examples, more than config.data.max_corrupt = {most:g}; repair or '
                'remove them, or raise it'
            )
        if new and len(self.corrupt) <= MOST_LINES:
            more = '; others will not be named' if len(self.corrupt) == MOST_LINES else ''
            folder.say(f'{self.records.path}: {name} cannot be decoded ({why}), another one takes its place{more}')

    def example(self, i: int, crop: Crops) -> dict[str, Any]:
        """One example, decoded."""
        out = self.stored[i]
        return out | {t.name: decoding.prepared(out[t.name], t, self.data, crop) for t in self.targets}

    def empty(self, n: int) -> dict[str, np.ndarray]:
        return {name: np.empty((n, *self.shapes[name]), f.dtype) for name, f in self.stored.chosen.items()}


class UnpairedExamples:
    """Examples and, as OTHER, the images of a second source: here in stored order, and as many as there are examples,
    cyclically where the second source has fewer. In training each has an order of its own."""

    def __init__(self, examples: Examples, others: Examples):
        self.examples, self.others = examples, others

    @property
    def identity(self) -> str:
        return f'{self.examples.identity} {OTHER}: {self.others.identity}'

    def close(self) -> None:
        """As of `Examples`."""
        self.examples.close()
        self.others.close()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {**self.examples[i], **of_others(self.others[i % len(self) % len(self.others)])}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {**self.examples.take(indices), **of_others(self.others.take_cyclic(indices))}

    def take_cyclic(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """As `take`, of any numbers from 0: after the last of either source comes its first."""
        return {**self.examples.take_cyclic(numbers), **of_others(self.others.take_cyclic(numbers))}


def fixed_captions(data) -> dict[str, np.ndarray]:
    """{'caption' and 'other_caption': its bytes in UTF-8} of the captions that all examples have alike."""
    texts = {'caption': data['prompt'] if 'caption' in data['features'] else ''}
    texts[OTHER_CAPTION] = data['other_prompt'] if OTHER in data['features'] else ''
    return {name: np.frombuffer(text.encode(errors='replace'), np.uint8) for name, text in texts.items() if text}


def without_captions(data) -> dict:
    """The section `data` for the source's own features."""
    fixed = {'caption': data['prompt'], OTHER_CAPTION: data['other_prompt']}
    own = tuple(name for name in data['features'] if not fixed.get(name))
    return {**data, 'features': own, 'prompt': '', 'other_prompt': ''}


def captioned(batch: dict[str, np.ndarray], prompts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch with the captions that all examples have alike."""
    n = len(next(iter(batch.values())))
    return batch | {name: np.broadcast_to(text, (n, *text.shape)).copy() for name, text in prompts.items()}


class Captioned:
    """Examples with captions that all of them have alike; all else as theirs."""

    def __init__(self, examples: Examples | UnpairedExamples, prompts: dict[str, np.ndarray]):
        self.examples, self.prompts = examples, prompts

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str):
        return getattr(self.examples, name)

    @property
    def identity(self) -> str:
        texts = (f'{name} {bytes(text).decode()!r}' for name, text in self.prompts.items())
        return ' '.join([self.examples.identity, *texts])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {**self.examples[i], **self.prompts}

    def take(self, *arguments, **named) -> dict[str, np.ndarray]:
        return captioned(self.examples.take(*arguments, **named), self.prompts)

    def take_cyclic(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return captioned(self.examples.take_cyclic(numbers), self.prompts)


@completes
def dataset(data, split: str) -> Examples | UnpairedExamples | Captioned:
    """The examples of split 'train', 'validation' or 'test' in stored order, cut and resized as for evaluation.

    The set is prepared first if it is not there yet. What is in each split: splits.open_split.

    Raises:
      UserError: it cannot be prepared, has no such split, or data.box does not fit its images.
    """
    if prompts := fixed_captions(data):
        return Captioned(dataset(without_captions(data), split), prompts)
    if OTHER in data['features']:
        own, other = sections(data)
        with of_other():
            others = dataset(other, split)
        return UnpairedExamples(dataset(own, split), others)
    examples = Examples(*splits.open_split(data, split))
    examples[0]  # so that what does not fit is an error now, and not in a thread
    return examples


def order(seed: int, n: int, stream: int = transforms.ORDER) -> Callable[[np.ndarray], np.ndarray]:
    """The function from numbers (int [b], any) to examples (int [b], 0 to n - 1).

    Every epoch, numbers e * n to (e + 1) * n - 1, is a random order of all examples: their order
    by random keys. Keeps 8 bytes per example for each of the last four epochs. (Grain's `shuffle`
    keeps nothing, but makes about 2^16 / n tries per example: 20 ms each where n = 1, 20 us for the
    digits.)
    """
    epochs = max(1, 4096 // n)  # sorted together

    @functools.lru_cache(maxsize=4)
    def part(i: int) -> np.ndarray:
        numbers = i * epochs * n + np.arange(epochs * n)
        keys = transforms.uniform(seed, numbers, stream)
        return np.argsort(keys.reshape(epochs, n), axis=1, kind='stable').reshape(-1)

    def examples(numbers: np.ndarray) -> np.ndarray:
        parts, positions = np.divmod(numbers, epochs * n)
        out = np.empty_like(numbers)
        for i in np.unique(parts):
            out[parts == i] = part(int(i))[positions[parts == i]]
        return out

    return examples


def order_in_blocks(seed: int, blocks: np.ndarray, together: int, apart: int) -> Callable[[np.ndarray], np.ndarray]:
    """As `order`, of examples that are read in blocks: every epoch takes the blocks in a random order, and the examples
    of `together` blocks at a time in a random order.

    Args:
      blocks: of each example, int [n].
      apart: added to the streams of randomness.
    """
    n, count = len(blocks), int(blocks.max()) + 1

    @functools.lru_cache(maxsize=4)
    def epoch(e: int) -> np.ndarray:
        keys = transforms.uniform(seed, e * count + np.arange(count), transforms.BLOCKS + apart)
        rank = np.empty(count, int)
        rank[np.argsort(keys, kind='stable')] = np.arange(count)
        keys = transforms.uniform(seed, e * n + np.arange(n), transforms.ORDER + apart)
        return np.lexsort((keys, rank[blocks] // together))

    def examples(numbers: np.ndarray) -> np.ndarray:
        epochs, positions = np.divmod(numbers, n)
        out = np.empty_like(numbers)
        for e in np.unique(epochs):
            out[epochs == e] = epoch(int(e))[positions[epochs == e]]
        return out

    return examples


def rectangles(uniform: Callable) -> np.ndarray:
    """Numbers of transforms.rectangle, [n, tries, 4]."""
    return np.stack([np.stack([uniform(t + k) for k in range(4)], -1) for t in transforms.TRIES], 1)


def moves(data, uniform: Callable) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Pixels by which training images move down and right, int [n] each; None without data.pad and data.shift.

    Padded by p and cut out anywhere, an image moves by -p to p, all equally likely. A shift is uniform in real numbers
    up to a fraction of the side, and then rounded.
    """
    pad, shift = data['pad'], data['shift']
    if not pad and not shift:
        return None, None
    return tuple(
        np.floor(uniform(p) * (2 * pad + 1)).astype(int)
        - pad
        + np.rint((2 * uniform(s) - 1) * (shift * side)).astype(int)
        for p, s, side in zip(transforms.PAD, transforms.SHIFT, sides(data['size']), strict=True)
    )


def without_image(examples: Examples, split: str) -> Examples | None:
    """The same examples of a split without 'image', which is not read then; None: nothing is left of them."""
    names = tuple(name for name in examples.records.chosen if name != 'image')
    return Examples(*splits.open_split({**examples.data, 'features': names}, split)) if names else None


def augmented(
    examples: Examples,
    data,
    seed: int,
    apart: int = 0,
    read: Examples | None = None,
    prepared: PreparedSet | None = None,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The function from numbers [n] to the training examples with these numbers, augmented.

    All images of one example are cropped and mirrored alike.

    Args:
      apart: added to the streams of randomness: another order and another augmentation.
      read: those that are read, where 'image' is not; see `without_image`.
      prepared: what 'image' is replaced by, in the view that the augmentation makes.
    """
    blocks = blocks_of(examples.records)
    if blocks is None:
        which = order(seed, len(examples), transforms.ORDER + apart)
    else:
        which = order_in_blocks(seed, *blocks, apart)
    read = read if prepared else examples

    def take(numbers: np.ndarray) -> dict[str, np.ndarray]:
        def uniform(stream: int, used: bool = True) -> np.ndarray | None:
            return transforms.uniform(seed, numbers, stream + apart) if used else None

        down, right = moves(data, uniform)
        crops = Crops(
            uniform(transforms.CROPPED) < data['crop_rate'] if data['crop_rate'] < 1 else None,
            uniform(transforms.CROP, data['crop'] == 'random'),
            rectangles(uniform) if data['crop'] == 'resized' else None,
            uniform(transforms.ROW, data['jitter'] > 0),
            uniform(transforms.COLUMN, data['jitter'] > 0),
            down,
            right,
            uniform(transforms.FLIP) < 0.5 if data['flip'] else None,
        )
        anew = transforms.words(seed, numbers, transforms.BITS + apart) if data['binarise'] == 'dynamic' else None
        indices = which(numbers)
        out = {} if read is None else read.take(indices, crops, anew, uniform(transforms.CAPTION, bool(read.texts)))
        return out | prepared.take(indices, views.numbers(data, len(numbers), crops)) if prepared else out

    return take


def number_of_threads(threads: int) -> int:
    """`data.threads`, or, where that is 0, as many as there are cores."""
    return threads or workers.cores()


def number_of_processes(processes: int | None, examples: int) -> int:
    """`data.processes`, or, where that is None, as many as there are cores; none on one core, or for few examples."""
    if processes is not None:
        return processes
    cores = workers.cores()
    return 0 if cores < 2 or examples < FEW else min(cores, MOST_PROCESSES)


class Batches:
    """What `batches` returns: an iterator that is closed."""

    def __init__(self, iterator: grain.DatasetIterator, examples: Examples | UnpairedExamples):
        self.iterator, self.examples = iterator, examples

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self.iterator)

    def close(self) -> None:
        """Ends the threads, and the processes that decode."""
        self.iterator.close()
        self.examples.close()


@completes
def batches(
    data,
    split: str = 'train',
    *,
    seed: int,
    start: int = 0,
    batch: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prepared: PreparedSet | None = None,
    finish: Callable[[dict], dict] | None = None,
) -> Batches:
    """Endless batches {name: [batch / process_count, ...]}, shuffled anew in every epoch, augmented.

    Batch number b holds the examples number b * batch to (b + 1) * batch - 1 of the endless order,
    across the ends of epochs; each process has its own block of every batch, in order, so that all
    blocks together are the batch of one process.

    Args:
      data: the section `data` of a config, or some of its fields.
      seed: of order and augmentation, 0 to 2^64 - 1.
      start: number of the first batch; it is gone to at once.
      batch: examples of one batch over all processes; data.batch by default.
      prepared: what batches of the training split have in place of 'image', see prepared.py.
      finish: what each batch goes through in the end, in the loader's threads: captions become tokens.

    Returns:
      An iterator; `close()` ends its threads and processes.
    """
    batch = data['batch'] if batch is None else batch
    if prompts := fixed_captions(data):
        data, last = without_captions(data), finish

        def finish(out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            out = captioned(out, prompts)
            return last(out) if last else out

    if not 0 <= seed < 2**64:
        raise UserError(f'config.seed = {seed} must be from 0 to {2**64 - 1}')
    if batch < 1 or batch % process_count:
        raise UserError(f'config.data.batch = {batch} must be a multiple of the {process_count} processes')
    examples = dataset(data, split)
    if isinstance(examples, UnpairedExamples):
        take = augmented(examples.examples, data, seed)
        others = augmented(examples.others, data, seed, transforms.OTHER)
    else:
        read = without_image(examples, split) if prepared else None
        take, others = augmented(examples, data, seed, read=read, prepared=prepared), None
        if prepared:
            examples.close()
            examples = read or examples
    own = np.arange(batch).reshape(process_count, -1)[process_index]  # this process's part of a batch

    def make(step: int) -> dict[str, np.ndarray]:
        numbers = step * batch + own
        out = take(numbers) | (of_others(others(numbers)) if others else {})
        return finish(out) if finish else out

    steps = grain.MapDataset.range(start, 2**62 // batch).map(make)
    # An element is a whole batch, so few of them are kept ready: with processes, two parts for each of these.
    threads = number_of_threads(data['threads'])
    if processes := number_of_processes(data['processes'], len(examples)):
        threads = max(threads, 1 + -(-workers.LINES * processes * LEAST_AT_ONCE // len(own)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    return Batches(iter(steps.to_iter_dataset(options)), examples)
