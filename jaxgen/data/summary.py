"""What a config's data look like before anything is trained: counts, sizes, classes, what is left out, an image grid.

    about, grid = summarise(config.data, seed=config.seed)
    print('\n'.join(text(about)))

Nothing is compiled. A set of TFDS that is not there yet is prepared.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from jaxgen import addresses, files
from jaxgen.data import folder, loader, splits, transforms
from jaxgen.errors import UserError
from jaxgen.sections import Data, sides

SAMPLED = 256  # examples that are decoded, to know their sizes and whether they can be
COUNTED = 100_000  # labels of a split that are counted; of more, as many at random
COLUMNS, ROWS = 8, 4  # of the grid, for each split
BATCH = 32  # training examples that are shown, and of which ranges are given
AUGMENTATION = ('crop', 'crop_rate', 'jitter', 'pad', 'shift', 'flip', 'box', 'binarise')


def summarise(data, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """(JSON object, image grid uint8 [H, W, C]) of the data of a config.

    The grid's first rows are the first training examples as the loader gives them, augmented; then come examples of the
    test split. Of several features of images each has a row.

    Raises:
      UserError: as `loader.spec` and `loader.dataset`.
    """
    spec = loader.spec(data)
    names = [name for name in splits.SPLITS if name != 'validation' or has_validation(data)]
    sets = {name: loader.dataset(data, name) for name in names}
    with contextlib.closing(loader.batches(data, seed=seed, batch=BATCH)) as batches:
        batch = next(batches)
    own, _ = loader.sections(data) if loader.OTHER in data['features'] else (data, None)
    examples = getattr(sets['train'], 'examples', sets['train'])
    sizes = sizes_of(examples)
    about = {
        'source': data['source'],
        **{name: data[name] for name in ('other', 'test_source', 'validation_source') if data[name]},
        'splits': {name: len(one) for name, one in sets.items()},
        'batches_per_epoch': round(len(sets['train']) / data['batch'], 2),
        **sizes,
        'features': {name: feature_of(x) for name, x in batch.items()},
        'classes': classes_of(own, names),
        'captions': captions_of(batch),
        'left_out': lines_of(data, examples),
        'damaged': {'decoded': sizes['sampled'], 'of_these': len(examples.corrupt)},
        'augmentation': augmentation_of(data),
        'notes': notes_of(data, sizes),
    }
    shown = [('train', batch)]
    test = sets['test']
    some = [test[i] for i in spread(len(test), COLUMNS * ROWS)]
    shown.append(('test', {name: np.stack([one[name] for one in some]) for name in batch}))
    images = [name for name, feature in spec.features.items() if len(feature.shape) == 3]
    titles, grid = grid_of(shown, images)
    return about | {'grid': titles}, grid


def has_validation(data) -> bool:
    own, _ = loader.sections(data) if loader.OTHER in data['features'] else (data, None)
    return splits.has_validation(own) and loader.OTHER not in data['features']


def spread(n: int, most: int) -> list[int]:
    """Numbers from 0 to n - 1, `most` at most, at equal distances."""
    return [i * n // min(n, most) for i in range(min(n, most))]


def sizes_of(examples: loader.Examples) -> dict[str, Any]:
    """Heights and widths of stored images, before they are cut and resized, and their modes, by some of them."""
    heights, widths, modes = [], [], {}
    numbers = spread(len(examples), SAMPLED)
    for i in numbers:
        examples[i]  # damaged ones are counted
        with contextlib.suppress(Exception):
            stored = examples.records[i]['image']
            if isinstance(stored, np.ndarray):
                (height, width), mode = stored.shape[:2], {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}[(*stored.shape, 1)[2]]
            else:
                image = transforms.opened(stored, examples.data['max_pixels'])
                (width, height), mode = image.size, image.mode
            heights.append(height)
            widths.append(width)
            modes[mode] = modes.get(mode, 0) + 1

    def limits(values: list[int]) -> dict[str, int]:
        return {'least': min(values), 'median': int(np.median(values)), 'most': max(values)} if values else {}

    return {'sampled': len(numbers), 'height': limits(heights), 'width': limits(widths), 'modes': modes}


def feature_of(x: np.ndarray) -> dict[str, Any]:
    """Shape, type and range of a feature, by a batch."""
    return {'shape': list(x.shape[1:]), 'dtype': x.dtype.name, 'least': x.min().item(), 'most': x.max().item()}


def classes_of(data, names: list[str]) -> dict[str, Any]:
    """{split: {class: examples}} where the source has labels, else {}."""
    section = {**data, 'features': ('image', 'label')}
    try:
        spec = loader.spec(section)
    except UserError:  # it has none, or data.classes is not set
        return {}
    titles = spec.names or tuple(map(str, range(spec.classes)))
    counts = {}
    for name in names:
        records, _ = splits.open_split({**section, 'features': ('label',)}, name)
        n = len(records)
        numbers = range(n)
        if n > COUNTED:
            numbers = np.unique((transforms.uniform(0, np.arange(COUNTED), transforms.ORDER) * n).astype(int)).tolist()
        labels = np.array([int(records[i]['label']) for i in numbers], int)
        counted = np.bincount(labels, minlength=len(titles))
        counts[name] = {title: int(k) for title, k in zip(titles, counted, strict=True)}
        if n > COUNTED:
            counts[name]['(of these)'] = len(labels)
    return counts


def captions_of(batch: dict[str, np.ndarray]) -> list[str]:
    if 'caption' not in batch:
        return []
    texts = (bytes(x).rstrip(b'\0').decode('utf-8', 'replace') for x in batch['caption'][:4])
    return [' '.join(text.split()) for text in texts]


def lines_of(data, examples: loader.Examples) -> list[str]:
    """What this process has written to stderr of this source: files and examples that are left out, and why."""
    address = addresses.parse(data['source'])
    tops = [examples.records.path] + ([os.path.realpath(os.path.expanduser(address.path))] if address else [])
    return sorted(line for line in folder.announced if line.startswith(tuple(tops)))


def augmentation_of(data) -> dict[str, Any]:
    """The fields of augmentation that are not at their defaults."""
    usual = {name: getattr(Data, name, None) for name in AUGMENTATION}
    return {name: data[name] for name in AUGMENTATION if data[name] != usual[name]}


def notes_of(data, sizes: dict[str, Any]) -> list[str]:
    """What the config makes of these images that a person may not expect."""
    notes, (height, width) = [], sides(data['size'])
    colour = sum(n for mode, n in sizes['modes'].items() if mode not in ('1', 'L', 'LA', 'I;16', 'I', 'F'))
    if data['channels'] == 1 and colour:
        notes.append('images with colours become grey: config.data.channels = 3 keeps them')
    if data['channels'] == 3 and not colour:
        notes.append('all images are grey: config.data.channels = 1 is a third of the pixels')
    if sizes['height'] and (height > sizes['height']['median'] or width > sizes['width']['median']):
        notes.append(f'images are enlarged to config.data.size = {height} x {width}')
    h, w = sizes['height'].get('median', height), sizes['width'].get('median', width)
    if abs(h * width - w * height) > 0.1 * max(h * width, w * height):
        notes.append(f'images of {h} x {w} are cut to the aspect ratio of {height} x {width}')
    return notes


def grid_of(shown: list[tuple[str, dict[str, np.ndarray]]], images: list[str]) -> tuple[list[str], np.ndarray]:
    """(what each row shows, the grid) of batches; all images as large as the largest."""
    height, width, channels = (max(batch[name].shape[k] for _, batch in shown for name in images) for k in (1, 2, 3))
    titles, rows = [], []
    for split, batch in shown:
        n = len(batch[images[0]])
        for first in range(0, min(n, COLUMNS * max(1, ROWS // len(images))), COLUMNS):
            for name in images:
                x = batch[name][first : first + COLUMNS]
                x = x.repeat(height // x.shape[1], 1).repeat(width // x.shape[2], 2)
                x = np.broadcast_to(x, (*x.shape[:3], channels))
                rows.append(np.pad(x, ((0, COLUMNS - len(x)), (0, 0), (0, 0), (0, 0)), constant_values=96))
                titles.append(f'{split} {name}')
    return titles, files.grid(np.concatenate(rows), COLUMNS)


def text(about: dict[str, Any]) -> list[str]:
    """The object of `summarise` as lines."""

    def limits(values: dict[str, int]) -> str:
        same = values and values['least'] == values['most']
        return str(values['least']) if same else '-'.join(str(values[k]) for k in ('least', 'most')) if values else '?'

    lines = [about['source']]
    for name in ('other', 'test_source', 'validation_source'):
        lines += [f'{name:<14}{about[name]}'] if name in about else []
    lines.append('examples      ' + ', '.join(f'{n} {name}' for name, n in about['splits'].items()))
    lines.append(f'an epoch      {about["batches_per_epoch"]:g} batches')
    median = f'{about["height"].get("median", "?")} x {about["width"].get("median", "?")}'
    modes = ', '.join(f'{n} {mode}' for mode, n in about['modes'].items())
    lines.append(
        f'stored images {limits(about["height"])} x {limits(about["width"])} pixels, median {median} '
        f'(of {about["sampled"]}: {modes})'
    )
    for name, one in about['features'].items():
        shape = ' x '.join(map(str, one['shape'])) or 'one number'
        lines.append(f'  {name:<12}{shape}, {one["dtype"]}, {one["least"]:.6g} to {one["most"]:.6g}')
    for split, counts in about['classes'].items():
        some = ', '.join(f'{title} {n}' for title, n in list(counts.items())[:20])
        lines.append(f'classes       {split}: {some}{", ..." if len(counts) > 20 else ""} ({len(counts)} classes)')
    shown = (text if text.isprintable() else ascii(text)[1:-1] for text in about['captions'])
    lines += [f'caption       {text if len(text) <= 200 else text[:200] + "..."}' for text in shown]
    lines += [f'left out      {line}' for line in about['left_out']]
    augmentation = ', '.join(f'{name} = {value}' for name, value in about['augmentation'].items())
    lines.append(f'augmentation  {augmentation or "none"}')
    lines += [f'note          {note}' for note in about['notes']]
    return lines
