"""ArrayRecord files of a person's own: arrayrecord:PATTERN, patterns as in tars.py.

A record is the file of an image, or a tf.train.Example with the file of an image in a field of bytes, and, in fields of
numbers and texts, its class and caption. Fields of usual names are found; ?image=photo&label=kind names others. What
TFDS has prepared is read by its name and config.data.dir instead. Other forms (pickles, msgpack) are refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from jaxgen import files
from jaxgen.addresses import Address
from jaxgen.data import folder, guard, tars, texts, transforms
from jaxgen.data.records import UNREAD_TEXT, Contents, Feature, Split, classes_of, open_file, root, text_digest
from jaxgen.errors import UserError

# Fields of an Example that are taken for these features, in the order of preference.
FIELDS = {
    'image': ('image', 'image/encoded', 'image_raw', 'image_bytes', 'encoded', 'jpg', 'png', 'jpeg', 'webp', 'data'),
    'label': ('label', 'image/class/label', 'class', 'cls', 'target', 'labels'),
    'caption': ('caption', 'text', 'txt', 'image/caption', 'caption/text'),
}
VERSION = 2  # of kept labels


def read(address: Address, data) -> Contents:
    """What the records hold, by the first of them."""
    where, directory = address.path, root(data)
    paths = tars.shards(where, '*array*record*')
    check_unprepared(paths[0])
    for path in paths:
        open_file(path).close()  # a pipe or device is refused
    try:
        stored = ArrayRecordDataSource([os.fspath(path) for path in paths])
        first = stored[0] if len(stored) else b''
    except Exception as e:
        why = ' '.join(str(e).split())[:200] or 'it is damaged'
        raise UserError(f'{where} cannot be read as ArrayRecord files: {why}') from e
    if not first:
        raise UserError(f'{where} has no records')
    fields = fields_of(first, address, where)
    most = folder.BYTES_PER_PIXEL * data['max_pixels'] + folder.OTHER_BYTES
    features = {'image': Feature(('image',), image=True)}
    labels: np.ndarray | None = None
    if 'label' in fields and {'label', 'domain'} & set(data['features']):
        raw = labels_of(stored, fields['label'], paths, directory, bool(data['dir']), where)
        labels, names, n = classes_of(raw, data['classes'], where)
        features['label'] = Feature(('label',), dtype=np.int32, classes=n, names=names)
    if 'caption' in fields:
        features['caption'] = Feature(('caption',), shape=(UNREAD_TEXT,), text=True)

    def opened(wanted: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
        def example(i: int) -> dict[str, Any]:
            if wanted == ('label',):
                return {'label': labels[i]}
            record = stored[i]
            parsed = parse(record) if fields['image'] else {}
            values = {'label': None if labels is None else labels[i]}
            if 'image' in wanted:
                values['image'] = only(parsed, fields['image']) if fields['image'] else record
                if len(values['image']) > most:
                    raise ValueError(f'it has {len(values["image"])} bytes, more than the {most} that are read')
            if 'caption' in wanted:
                values['caption'] = texts.encoded(every(parsed, fields['caption']))
            return {name: values[name] for name in wanted}

        return example

    # Without regard to classes: who is held out is the same with classes and without.
    return Contents(where, features, {'train': Split(len(stored), opened)}, tuple(paths), 'arrayrecord 1')


def check_unprepared(path: str) -> None:
    """Refuses the files of a set that TFDS has prepared."""
    directory = os.path.dirname(path)
    if os.path.isfile(os.path.join(directory, 'features.json')):
        parts = directory.split(os.sep)
        raise UserError(
            f'{directory} is a set that TFDS has prepared: name it by config.data.source={"/".join(parts[-2:-1])}, '
            f'config.data.dir={os.sep.join(parts[:-2])}'
        )


def parse(record: bytes) -> dict[str, Any]:
    """The fields of a tf.train.Example.

    Raises:
      ValueError: it is none.
    """
    try:
        return tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as e:
        raise ValueError('it is no tf.train.Example') from e


def only(fields: Any, name: str) -> Any:
    """The value of a field with one value.

    Raises:
      ValueError: there is no such field, or it has none or several.
    """
    kind = fields[name].WhichOneof('kind') if name in fields else None
    values = getattr(fields[name], kind).value if kind else ()
    if len(values) != 1:
        raise ValueError(f'its field {name!r} has {len(values)} values')
    return values[0]


def is_image(content: Any) -> bool:
    """Whether bytes begin as an image's file does."""
    try:
        with Image.open(io.BytesIO(content), formats=transforms.FORMATS):
            return True
    except Exception:
        return False


def fields_of(first: bytes, address: Address, where: str) -> dict[str, str]:
    """{feature: field of an Example}; 'image': '' where a record is the image's file itself.

    Raises:
      UserError: the first record has no image.
    """
    options = address.options
    if unknown := sorted(options.keys() - FIELDS.keys()):
        raise UserError(f'{where}: ?{unknown[0]}=: there are image, label and caption')
    if not options and is_image(first):
        return {'image': ''}
    try:
        fields = parse(first)
    except ValueError:
        fields = {}
    if not fields:
        raise UserError(f'{where}: its records are neither files of images nor tf.train.Example with one in a field')
    missing = [name for name in options.values() if name not in fields]
    if missing:
        raise UserError(f'{where}: its records have no field {missing[0]!r}, but {", ".join(sorted(fields)[:20])}')
    chosen = {what: next((name for name in names if name in fields), '') for what, names in FIELDS.items()}
    chosen = {what: name for what, name in (chosen | options).items() if name}
    if 'image' not in chosen or not is_image(safe_only(fields, chosen['image'])):
        others = [name for name in fields if is_image(safe_only(fields, name))]
        if 'image' in options or not others:
            raise UserError(
                f'{where}: which field holds the files of the images? Write ?image=NAME behind the name; there are '
                f'{", ".join(sorted(fields)[:20])}'
            )
        chosen['image'] = min(others)
    return chosen


def every(fields: Any, name: str) -> list[Any]:
    """The values of a field, none where there is no such field."""
    kind = fields[name].WhichOneof('kind') if name in fields else None
    return list(getattr(fields[name], kind).value) if kind else []


def safe_only(fields: Any, name: str) -> Any:
    with contextlib.suppress(ValueError):
        return only(fields, name)
    return b''


# --- labels


def labels_of(stored, field: str, paths: list[str], directory: str, confined: bool, where: str) -> np.ndarray:
    """The class of every record as it is stored, integers or texts [n]. Since all records have to be read for it, it is
    kept in `directory`.

    Raises:
      UserError: a record has none.
    """
    about = [(os.path.realpath(path), os.stat(path)) for path in paths]
    key = text_digest(field, *(f'{path} {files.version_of(one)}' for path, one in about))
    kept = os.path.join(directory, tars.INDICES, f'{key}.labels')
    if (known := load_labels(kept, len(stored))) is not None:
        return known
    values = []
    for i in tqdm(range(len(stored)), desc=f'reading the classes of {where}', disable=None, leave=False, delay=2):
        try:
            value = only(parse(stored[i]), field)
            values.append(value.decode() if isinstance(value, bytes) else value)
        except Exception as e:
            raise UserError(f'{where}: record {i} has no class: {" ".join(str(e).split())[:200]}') from e
    labels = np.array(values)
    texts = labels.dtype.kind == 'U'
    names, numbers = np.unique(labels, return_inverse=True) if texts else ((), labels)
    with contextlib.suppress(OSError, UserError):  # a directory that cannot be written to is no fault of the data
        if confined:
            guard.check_inside(directory, os.path.dirname(kept))
        kind = '<f8' if numbers.dtype.kind == 'f' else '<i8'
        head = {
            'version': VERSION,
            'n': len(labels),
            'kind': kind,
            'texts': [str(name) for name in names] if texts else None,
        }
        with files.replacing(kept) as new:
            new.write(json.dumps(head).encode() + b'\n' + np.asarray(numbers, kind).tobytes())
    return labels


def load_labels(path: str, n: int) -> np.ndarray | None:
    """The labels that `labels_of` has kept, None where there are none."""
    try:
        with open_file(path) as file:
            line = file.readline(2**26)
            head = json.loads(line)
            content = file.read(8 * n + 1)
        if head['version'] != VERSION or head['kind'] not in ('<f8', '<i8') or head['n'] != n or len(content) != 8 * n:
            return None
        numbers = np.frombuffer(content, head['kind'])
        if head['texts'] is None:
            return numbers
        return np.array(head['texts'], str)[numbers.astype(int)]
    except (UserError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
