"""Many image files together, whatever holds them: a large folder, a zip, the shards of a tar. Examples, classes,
captions and splits by the files' names.

    cat/1.png, dog/2.jpg                 classes are the first-level folders; train/ and test/ are splits
    dataset.json                         EDM's and StyleGAN's {"labels": [["00000/img0.png", 3], ...]}, or null
    0001.jpg, 0001.cls, 0001.txt         WebDataset's: files of one stem are one example: its class, its caption;
    0001.jpg, 0001.json                  or both in {"label": 3, "caption": "a cat"}
    metadata.jsonl, metadata.csv         the captions of the images below their folder, see metadata.py

A file's name is never a path here: nothing is unpacked, and files are read by number, some at once, into memory. A file
has at most the bytes of an image of data.max_pixels, whatever its header says.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxgen import files
from jaxgen.addresses import Address
from jaxgen.data import folder, metadata, texts, transforms, trees
from jaxgen.data.records import Contents, Feature, Split, classes_of, text_digest
from jaxgen.errors import UserError

MOST_JSON = 2**28  # bytes of a dataset.json; that of ImageNet has 2^26
MOST_LABEL = 2**15  # bytes of an image's name and label, a vector of a thousand numbers, in it
MOST_SMALL = 2**20  # bytes of a caption, a label, or both, in a file
LABELS = ('label', 'cls', 'class')  # fields of the .json beside an image, in the order of preference
CAPTIONS = ('caption', 'text', 'txt', 'captions', 'texts', 'prompt')
TEXTS = ('.txt', '.caption')
CAPTIONLESS = 'put a metadata.jsonl beside the images ({"file_name": "1.png", "text": "a cat"}), or 1.txt beside 1.png'
REPLACED = 'files of which the archive has a later one of the same name'
HIDDEN = re.compile(r'(?:^|/)\.(?!\.?(?:/|$))')  # '.a' and 'a/.b', but not '../a'


class Entries(NamedTuple):
    """Regular files that are read by number."""

    names: trees.Names
    sizes: np.ndarray  # int64, bytes, as declared
    # (number, most bytes) -> the file's bytes. ValueError: it is damaged, or has more. Called from several threads.
    read: Callable[[int, int], bytes]
    notes: tuple[str, ...] = ()  # what is left out, and why
    group: np.ndarray | None = None  # of each, by number: files of two groups are never one example


class Sidecars(NamedTuple):
    """Files beside the images that tell their classes and captions, -1 where there is none, by number of the image."""

    classes: np.ndarray
    captions: np.ndarray
    both: np.ndarray  # .json


def check_options(address: Address) -> None:
    """Raises UserError where an address has options: the files' names say what is what."""
    for name, value in address.options.items():
        raise UserError(f'config.data.source: {address.kind}: takes no options, and has ?{name}={value}')


def contents(
    where: str, entries: Entries, data, recipe: str, digest: Callable[[], str], paths: tuple[str, ...] = ()
) -> Contents:
    """What an archive holds.

    Args:
      where: the archive, in messages.
      recipe, digest, paths: see records.Contents.

    Raises:
      UserError: no images, or labels that do not fit them.
    """
    chosen, notes = image_numbers(entries, where)
    names = entries.names.take(chosen)
    about = dataset_json(entries, len(chosen), where)
    sidecars = beside(entries, chosen) if len(chosen) < len(entries.names) else None
    values, vectors = None, None
    if about is not None:
        values = labels_of_json(about[0], about[1], names, where)
        if values is not None and values.ndim == 2:
            values, vectors = from_vectors(values)
    elif sidecars is not None:
        values = labels_beside(entries, names, sidecars, where)
    tree = trees.arranged(trees.without_top(names), labelled=values is None and about is None)
    if values is not None:
        numbers, titles, n = classes_of(values, data['classes'], where)
        label = Feature(('label',), dtype=np.int32, classes=n, names=titles)
    else:
        numbers, label = tree.labels, label_of(tree, data, where)
    features = {'image': Feature(('image',), image=True)} | ({'label': label} if label else {})
    columns: dict[str, Callable[[int], Any]] = {
        'image': lambda i: entries.read(int(chosen[i]), most_bytes(data)),
        'label': lambda i: numbers[i],
    }
    if vectors is not None:
        features['vector'] = Feature(('vector',), shape=vectors.shape[1:], dtype=np.float32)
        columns['vector'] = lambda i: vectors[i]
    if 'caption' in data['features'] and (captions := captions_of(entries, chosen, sidecars, data['caption'], where)):
        features['caption'] = Feature(('caption',), shape=(captions.room,), text=True)
        columns['caption'] = captions
        notes += captions.notes
        recipe += f' caption={data["caption"]}' if data['caption'] else ''
    labels = numbers if label else None
    splits = {title: split(part, names, tree, columns, labels) for title, part in tree.splits.items()}

    def with_labels() -> str:
        stored = [hashlib.sha256(x.tobytes()).hexdigest() for x in (values, vectors) if x is not None]
        return text_digest(digest(), *stored)

    return Contents(where, features, splits, paths, recipe, (*entries.notes, *notes, *tree.notes), with_labels)


def label_of(tree: trees.Tree, data, where: str) -> Feature | None:
    """The class by the first-level folder; None where these are none.

    Raises:
      UserError: data.classes is fewer than there are.
    """
    if not tree.classes:
        return None
    if 0 < data['classes'] < len(tree.classes):
        raise UserError(f'config.data.classes = {data["classes"]}, but {where} has {len(tree.classes)} sub-folders')
    n = max(data['classes'], len(tree.classes))
    return Feature(('label',), dtype=np.int32, classes=n, names=tree.classes)


def most_bytes(data) -> int:
    """That an image's file may have."""
    return folder.BYTES_PER_PIXEL * data['max_pixels'] + folder.OTHER_BYTES


def split(
    part: np.ndarray,
    names: trees.Names,
    tree: trees.Tree,
    columns: dict[str, Callable[[int], Any]],
    labels: np.ndarray | None,
) -> Split:
    """A split of these images, numbers of the names in order of their ranks.

    Args:
      columns: of each feature the function from the number of an image to its value.
      labels: int32, by number of the image.
    """

    def opened(wanted: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
        readers = [(name, columns[name]) for name in wanted]
        return lambda i: {name: value(part[i]) for name, value in readers}

    def label() -> np.ndarray:
        assert labels is not None
        return labels[part]

    return Split(
        len(part),
        opened,
        None if labels is None else label,
        lambda i: ascii(names[int(part[i])]),
        lambda: tree.ranks[part],
    )


def image_numbers(entries: Entries, where: str) -> tuple[np.ndarray, list[str]]:
    """(numbers of the files that are images by their names, what else there is).

    Raises:
      UserError: there are none.
    """
    chosen, others = [], Counter()
    for i, name in enumerate(entries.names):
        base = name.rpartition('/')[2]
        suffix = base[base.rfind('.') :].lower() if '.' in base else ''
        if '__MACOSX' in name or HIDDEN.search(name):
            continue
        if suffix in trees.SUFFIXES:
            chosen.append(i)
        elif suffix not in ('.json', '.cls', *TEXTS) and not metadata.is_metadata(base):
            others[suffix or 'without one'] += 1
    if not chosen:
        raise UserError(f'{where} holds no images (.png, .jpg, .webp, ...), but {len(entries.names)} other files')
    notes = []
    notes += [f'{others.total()} {trees.other_endings(others)}'] if others else []
    return np.array(chosen, np.int64), notes


# --- classes


def dataset_json(entries: Entries, n: int, where: str) -> tuple[Any, str] | None:
    """(the parsed dataset.json, the folder that it lies in, with a slash) of an archive that has one, at the top or in
    a folder that is.

    Args:
      n: images, which bound its size.

    Raises:
      UserError: it is no JSON.
    """
    for i, name in enumerate(entries.names):
        if name.endswith('dataset.json') and name.rpartition('/')[2] == 'dataset.json' and name.count('/') <= 1:
            try:
                return json.loads(entries.read(i, min(MOST_JSON, MOST_SMALL + n * MOST_LABEL))), name.removesuffix(
                    'dataset.json'
                )
            except (ValueError, RecursionError) as e:
                raise UserError(f'{where}: its dataset.json cannot be read: {" ".join(str(e).split())[:200]}') from e
    return None


def labels_of_json(about: Any, below: str, names: trees.Names, where: str) -> np.ndarray | None:
    """The labels in a dataset.json by number of the image, integers [n] or vectors [n, k]; None where it has none.

    Raises:
      UserError: they are of another form, or an image has none.
    """
    labels = about.get('labels') if isinstance(about, dict) else None
    if labels is None and isinstance(about, dict):
        return None
    form = f'{where}: the labels of its dataset.json must be a list of [name, class or vector]'
    if not isinstance(labels, list) or not all(
        isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in labels
    ):
        raise UserError(form)
    by_name = {below + name.replace('\\', '/').removeprefix('./'): value for name, value in labels}
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise UserError(f'{where}: its dataset.json has no label for {missing!a}')
    values = [by_name[name] for name in names]
    if all(type(value) is int for value in values):
        try:
            return np.array(values, np.int64)
        except OverflowError as e:
            raise UserError(form) from e
    lengths = {len(value) if isinstance(value, list) else -1 for value in values}
    if len(lengths) != 1 or min(lengths) < 1 or not all(type(x) in (int, float) for v in values for x in v):
        raise UserError(f'{form}, all of one length')
    try:
        vectors = np.array(values, np.float64)
    except OverflowError as e:
        raise UserError(form) from e
    if not (np.abs(vectors) <= np.finfo(np.float32).max).all():
        raise UserError(f'{form}, of finite numbers')
    return vectors


def from_vectors(vectors: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(classes, None) of vectors that are 1 at one place and 0 elsewhere, else (None, the vectors in float32)."""
    one = ((vectors == 0) | (vectors == 1)).all() and (vectors.sum(1) == 1).all()
    return (vectors.argmax(1), None) if one and vectors.shape[1] > 1 else (None, vectors.astype(np.float32))


def beside(entries: Entries, chosen: np.ndarray) -> Sidecars | None:
    """The files of labels and captions that have the stem of an image; None where there are none."""
    kinds = {'.cls': 0, **dict.fromkeys(TEXTS, 1), '.json': 2}
    files: dict[tuple[int, str] | str, list[int]] = {}

    def stem(i: int, name: str):
        text = name[: name.rfind('.')]
        return text if entries.group is None else (int(entries.group[i]), text)

    for i, name in enumerate(entries.names):
        kind = kinds.get(name[name.rfind('.') :].lower())
        if kind is not None:
            files.setdefault(stem(i, name), [-1, -1, -1])[kind] = i
    if not files:
        return None
    none = [-1, -1, -1]
    table = np.array([files.get(stem(i, entries.names[i]), none) for i in chosen.tolist()], np.int64)
    return Sidecars(*table.T) if (table >= 0).any() else None


def labels_beside(entries: Entries, names: trees.Names, sidecars: Sidecars, where: str) -> np.ndarray | None:
    """The classes in the files beside the images, integers or texts [n]; None where these hold none.

    Raises:
      UserError: an image has none where others have, or one cannot be read.
    """
    files = sidecars.classes
    key = ''
    if not (files >= 0).any():
        files = sidecars.both
        if not (files >= 0).any():
            return None
        first = small_json(entries, int(files[files >= 0][0]), where)
        key = next((key for key in LABELS if type(first.get(key)) in (int, str)), '')
        if not key:
            return None
    if (files < 0).any():
        n, name = int((files < 0).sum()), names[int(np.argmin(files))]
        raise UserError(f'{where}: {n} of {len(names)} images have no class beside them, like {name!a}')
    values = []
    for i in files.tolist():
        value = small_json(entries, i, where).get(key) if key else small(entries, i, where).strip()
        if type(value) not in (int, str) or value == '':
            raise UserError(f'{where}: {entries.names[i]!a} holds no class')
        values.append(value)
    texts = [str(value) for value in values]
    if all(len(text) < 10 and text.isascii() and text.removeprefix('-').isdecimal() for text in texts):
        return np.array([int(text) for text in texts])
    return np.array(texts)


def small(entries: Entries, i: int, where: str) -> str:
    """A short text.

    Raises:
      UserError: it is none.
    """
    try:
        return entries.read(i, MOST_SMALL).decode()
    except ValueError as e:
        raise UserError(f'{where}: {entries.names[i]!a} cannot be read: {e}') from e


def small_json(entries: Entries, i: int, where: str) -> dict:
    """A JSON object.

    Raises:
      UserError: it is none.
    """
    try:
        value = json.loads(small(entries, i, where))
    except (ValueError, RecursionError) as e:
        raise UserError(f'{where}: {entries.names[i]!a} is no JSON: {e}') from e
    if not isinstance(value, dict):
        raise UserError(f'{where}: {entries.names[i]!a} must hold a JSON object')
    return value


# --- captions


class CaptionsOf:
    """The function from the number of an image to its captions, as texts.py has them.

    Attributes:
      listed: captions in files for many images, see metadata.py.
      files: of each image the file beside it with its captions, -1 where there is none.
    """

    def __init__(self, entries: Entries, listed: metadata.Captions | None, files: np.ndarray, column: str):
        self.entries, self.files, self.column = entries, files, column
        self.metadata, self.listed = listed, listed.texts if listed else {}
        sizes = entries.sizes[files[files >= 0]]
        self.room = texts.room_for(max(listed.longest if listed else 0, int(sizes.max(initial=0))))
        self.notes = list(listed.notes) if listed else []
        if n := len(files) - int(((files >= 0) | np.isin(np.arange(len(files)), list(self.listed))).sum()):
            self.notes.append(f'the captions of {n} images that have none')

    def __call__(self, i: int) -> tuple[bytes, ...]:
        """Raises ValueError where the file beside an image cannot be read."""
        if (captions := self.listed.get(int(i))) is not None:
            return captions
        file = int(self.files[i])
        if file < 0:
            return ()
        name = self.entries.names[file]
        try:
            content = self.entries.read(file, MOST_SMALL)
            if not name.lower().endswith('.json'):
                return texts.encoded(content.decode('utf-8-sig'))
            fields = json.loads(content)
        except UnicodeDecodeError as e:
            raise ValueError(f'{name!a} is no UTF-8') from e
        except (ValueError, RecursionError) as e:
            raise ValueError(f'{name!a}: {e}') from e
        if not isinstance(fields, dict):
            raise ValueError(f'{name!a} holds no JSON object')
        keys = (self.column,) if self.column else CAPTIONS
        return texts.encoded(next((fields[key] for key in keys if isinstance(fields.get(key), str | list)), None))

    def read_files(self) -> list[str]:
        """Names of the files that captions are read from."""
        beside = [self.entries.names[int(i)] for i in np.unique(self.files[self.files >= 0])]
        return [*beside, *(self.metadata.files if self.metadata else ())]

    def digest(self, names: trees.Names, whole: bool) -> str:
        """64 hexadecimal digits, the same for the same captions of images with these names.

        Args:
          whole: by what is in the files beside the images, not by their sizes alone.
        """
        digest = hashlib.sha256((self.metadata.digest(names) if self.metadata else '').encode())
        for name, file in sorted((names.encoded(i), int(k)) for i, k in enumerate(self.files) if k >= 0):
            content = b'%d' % self.entries.sizes[file]
            if whole:
                with contextlib.suppress(ValueError):  # it has no captions then
                    content = hashlib.sha256(self.entries.read(file, MOST_SMALL)).digest()
            digest.update(name + b'\0' + content + b'\0')
        return digest.hexdigest()


def captions_of(
    entries: Entries, chosen: np.ndarray, sidecars: Sidecars | None, column: str, where: str
) -> CaptionsOf | None:
    """The captions of images; None where no file holds any.

    Args:
      chosen: numbers of the images.
      column: see config.data.caption.

    Raises:
      UserError: a file with the captions of many is damaged.
    """
    images = set(chosen.tolist())
    others = [(name, i) for i, name in enumerate(entries.names) if i not in images and metadata.is_metadata(name)]
    listed = metadata.read(entries.names.take(chosen), others, entries.read, column, where)
    files = np.full(len(chosen), -1, np.int64)
    if sidecars is not None:
        plain = sidecars.captions if column in ('', *CAPTIONS) else files
        files = np.where(plain >= 0, plain, sidecars.both)
    captioned = (files >= 0).any() or (listed is not None and listed.texts)
    return CaptionsOf(entries, listed, files, column) if captioned else None


# --- a large folder


class Folder:
    """A folder's images, listed and not read."""

    def __init__(self, root: str, listed: trees.Listed, counts: Counter):
        self.root, self.listed, self.counts = root, listed, counts  # of what is left out, by reason

    @functools.cached_property
    def tree(self) -> trees.Tree:
        return trees.arranged(self.listed.names)

    @functools.cached_property
    def digest(self) -> str:
        """Of the names and sizes, not of what is in the files: that would take reading all of them."""
        return sizes_digest(self.listed.names, self.listed.sizes)

    @property
    def stamp(self) -> str:
        """Of the names, sizes and times of all files as they are now, which may be later than they were listed."""
        names = self.listed.names
        digest = hashlib.sha256(self.root.encode('utf-8', 'surrogateescape') + b'\0')
        digest.update(names.block + names.ends.tobytes())
        for name in names:
            version = -1, 0, 0
            with contextlib.suppress(OSError):
                version = files.version_of(os.stat(os.path.join(self.root, name)))
            digest.update(b'%d %d %d\0' % version)
        return digest.hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f'{n} {what}' for what, n in self.counts.items() if n)

    def read(self, i: int, max_pixels: int) -> bytes:
        """The bytes of image i.

        Raises:
          ValueError: it cannot be read, or has more pixels.
        """
        try:
            return folder.read_file(os.path.join(self.root, self.listed.names[i]), max_pixels)
        except (FileNotFoundError, PermissionError, NotADirectoryError) as e:  # of this file, not of the disk
            raise ValueError(f'it cannot be opened: {e.strerror}') from e

    def is_current(self) -> bool:
        """Whether no file has come, gone or been renamed."""
        return all(modified(path) == time for path, time in self.listed.directories)


def modified(path: str) -> int:
    """The time at which an entry of a folder was changed, in ns; 0 where it cannot be looked at."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime_ns
    return 0


MOST_KEPT = 4
captioned: dict[str, CaptionsOf | None] = {}  # by what they are read from
folders: dict[tuple[str, bool], Folder] = {}  # by path and whether links are followed; listed by this process
lock = threading.Lock()


def listed(path: str, most: int, links: bool = False) -> Folder:
    """A folder by its path. One of more images than `most` is listed once, as long as no file comes or goes.

    Args:
      links: take a file as often as there are links to it.

    Raises:
      UserError: no such folder, or no image in it.
    """
    root = folder.root_of(path)
    with lock:
        known = folders.get((root, links))
        if known and len(known.listed.names) > most and known.is_current():
            return known
        counts: Counter = Counter()
        new = Folder(root, trees.walk(root, links, counts), counts)
        folders.pop((root, links), None)
        if len(new.listed.names) > most:
            folders[root, links] = new
            while len(folders) > MOST_KEPT:
                folders.pop(next(iter(folders)))
        return new


def of_folder(source: Folder, data) -> Contents:
    """What a folder holds whose files are read as they are."""
    tree, label = source.tree, label_of(source.tree, data, source.root)
    features = {'image': Feature(('image',), image=True)} | ({'label': label} if label else {})
    columns: dict[str, Callable[[int], Any]] = {
        'image': lambda i: source.read(i, data['max_pixels']),
        'label': lambda i: tree.labels[i],
    }
    captions = captions_beside(source, data)
    if captions:
        features['caption'] = Feature(('caption',), shape=(captions.room,), text=True)
        columns['caption'] = captions
    labels = tree.labels if label else None
    splits = {title: split(part, source.listed.names, tree, columns, labels) for title, part in tree.splits.items()}
    return Contents(
        *(source.root, features, splits, (), 'folder 1'),
        (*notes_beside(source, captions), *tree.notes),
        **digests(source, captions, data['direct']),
    )


def captions_beside(source: Folder, data) -> CaptionsOf | None:
    """The captions of a folder's images; None where they are not wanted, or there are none. Those of a few folders are
    kept while their files stay as they are.

    Raises:
      UserError: a file with captions is damaged.
    """
    if 'caption' not in data['features']:
        return None
    entries, stamp = with_others(source)
    key = text_digest(source.root, data['caption'], source.digest, stamp)
    with lock:
        if key not in captioned:
            chosen = np.arange(len(source.listed.names))
            made = captions_of(entries, chosen, beside(entries, chosen), data['caption'], source.root)
            while len(captioned) >= MOST_KEPT:
                captioned.pop(next(iter(captioned)))
            captioned[key] = made
        return captioned[key]


def notes_beside(source: Folder, captions: CaptionsOf | None) -> tuple[str, ...]:
    """The folder's notes, without files that are read for captions, and those of the captions."""
    if captions is None:
        return source.notes
    endings = Counter(dict(source.listed.endings))
    every = f'{endings.total()} {trees.other_endings(endings)}' if endings else ''
    endings -= Counter(os.path.splitext(name)[1].lower() for name in captions.read_files())
    rest = (f'{endings.total()} {trees.other_endings(endings)}',) if endings else ()
    return (*(note for note in source.notes if note != every), *rest, *captions.notes)


def with_others(source: Folder) -> tuple[Entries, str]:
    """(the images of a folder and, behind them, the files that may hold their captions; a text that changes when one of
    these does)."""
    names, sizes, rows = [*source.listed.names], [*source.listed.sizes.tolist()], []
    for path, _ in source.listed.directories:
        below = path[len(source.root) :].lstrip('/')
        with contextlib.suppress(OSError), os.scandir(path) as listed:
            for entry in sorted(listed, key=lambda entry: entry.name):
                ending = os.path.splitext(entry.name)[1].lower()
                if entry.name[0] == '.' or not (ending in (*TEXTS, '.json') or metadata.is_metadata(entry.name)):
                    continue
                with contextlib.suppress(OSError):
                    about = entry.stat()
                    names.append(below + entry.name)
                    sizes.append(about.st_size)
                    rows.append(f'{names[-1]} {files.version_of(about)}')

    def content(i: int, most: int) -> bytes:
        try:
            with folder.open_regular(os.path.join(source.root, names[i])) as file:
                read = file.read(most + 1)
        except OSError as e:
            raise ValueError(e.strerror or str(e)) from e
        if len(read) > most:
            raise ValueError(f'it has more than the {most} bytes that are read')
        return read

    return Entries(trees.Names.of(names), np.array(sizes, np.int64), content), text_digest(*rows)


def digests(source: Folder, captions: CaptionsOf | None = None, most: int = 0) -> dict[str, Callable[[], str]]:
    """`digest` and `stamp` of Contents.

    Args:
      most: images of a folder whose files of captions are read for the digest; of more it has their sizes.
    """
    if captions is None:
        return {'digest': lambda: source.digest, 'stamp': lambda: source.stamp}
    whole = len(source.listed.names) <= most
    return {
        'digest': lambda: text_digest(source.digest, captions.digest(source.listed.names, whole)),
        'stamp': lambda: text_digest(source.stamp, with_others(source)[1]),
    }


# --- a large folder of pairs


def of_pairs(source: Folder, features: dict[str, Feature], data) -> Contents:
    """What a folder holds whose sub-folders hold an image of every example, as folder.paired has it. Whether partners
    are of one aspect ratio is seen when they are read: those that are not are damaged.

    Raises:
      UserError: a feature has no sub-folder, or an image no partner.
    """
    names, tree = source.listed.names, source.tree
    required = tuple(features)
    missing = next((part for part in required if part not in tree.classes), None)
    if missing is not None:
        outside = next((name for name in names if name.count('/') <= tree.below), None)
        what = f'{outside!r} lies outside of all sub-folders' if outside is not None else f'{missing} is not there'
        raise UserError(f'the folder {source.root} must hold its images in {", ".join(required)}: {what}')
    tables = {title: partners(source, numbers) for title, numbers in tree.splits.items()}
    parts = {name: tree.classes.index(name) for name in required}
    captions = captions_beside(source, data)
    if 'caption' in data['features']:
        if captions is None:
            raise UserError(f'{source.root} has no captions: {CAPTIONLESS}')
        features = {**features, 'caption': Feature(('caption',), shape=(captions.room,), text=True)}

    def split_of(table: np.ndarray) -> Split:
        def opened(wanted: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
            def example(i: int) -> dict[str, Any]:
                names = (name for name in required if name in wanted)
                out = {name: source.read(int(table[i, parts[name]]), data['max_pixels']) for name in names}
                check_aspects(out, data['max_pixels'])
                if captions and 'caption' in wanted:
                    out['caption'] = captions(int(image[i]))
                return out

            return example

        image = table[:, parts['image']]
        return Split(len(table), opened, None, lambda i: ascii(names[int(image[i])]), lambda: tree.ranks[image])

    splits = {title: split_of(table) for title, table in tables.items()}
    return Contents(
        *(source.root, features, splits, (), 'pairs 1'),
        (*notes_beside(source, captions), *tree.notes),
        **digests(source, captions, data['direct']),
    )


def partners(source: Folder, numbers: np.ndarray) -> np.ndarray:
    """The files of a split as [examples, sub-folders], in the order of the ranks of those in image/.

    Raises:
      UserError: a file has no partner, or two have one name.
    """
    names, tree = source.listed.names, source.tree
    rows: dict[str, list[int]] = {}
    for i in numbers.tolist():
        row = rows.setdefault(os.path.splitext(names[i].split('/', tree.below + 1)[-1])[0], [-1] * len(tree.classes))
        if row[tree.labels[i]] >= 0:
            one, other = sorted((names[row[tree.labels[i]]], names[i]))
            raise UserError(f'{source.root}: {one} and {other} have one name')
        row[tree.labels[i]] = i
    table = np.array(list(rows.values()), np.int64)
    for one, part in enumerate(tree.classes):
        for other, beside in enumerate(tree.classes):
            alone = table[(table[:, one] >= 0) & (table[:, other] < 0), one]
            if len(alone):
                raise UserError(
                    f'{source.root}: {len(alone)} of the images in {part}/ have no partner in {beside}/, like '
                    f'{min(names[int(i)] for i in alone)!r}'
                )
    return table[np.argsort(tree.ranks[table[:, tree.classes.index('image')]], kind='stable')]


def check_aspects(images: dict[str, bytes], max_pixels: int) -> None:
    """Raises ValueError where crops of partners would not correspond, see folder.check_aspects."""
    try:
        sizes = (
            [transforms.displayed_size(content, max_pixels) for content in images.values()] if len(images) > 1 else []
        )
    except Exception as e:  # some are OSErrors, as those of the disk are
        raise ValueError(str(e)) from e
    for name, size in zip(images, sizes, strict=False):
        (w, h), (v, g) = max(sizes[0], size), min(sizes[0], size)
        if abs(w * g - v * h) >= max(w, h):
            (w, h), (v, g) = sizes[0], size
            raise ValueError(f'it has {w} x {h} pixels and its partner in {name}/ {v} x {g}')


def sizes_digest(names: trees.Names, *columns: np.ndarray) -> str:
    """64 hexadecimal digits that are the same for the same names and columns (sizes, checksums), in any order."""
    digest = hashlib.sha256()
    for i in sorted(range(len(names)), key=names.encoded):
        digest.update(names.encoded(i) + b'\0' + b' '.join(b'%d' % int(column[i]) for column in columns) + b'\0')
    return digest.hexdigest()
