"""Helpers of the tests of data: sections of a config, images, folders of them, a set of TFDS."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from support import ROOT

from jaxgen import data
from jaxgen.config import DEFAULTS
from jaxgen.errors import UserError


def make(where, **fields) -> dict:
    """A section `data` of a config."""
    assert not set(fields) - set(DEFAULTS['data'])
    return {**DEFAULTS['data'], 'dir': str(where), 'batch': 8, **fields}


def take(config: dict, n: int, **kwargs) -> list[dict]:
    """The first n batches."""
    with contextlib.closing(data.batches(config, **{'seed': 0, **kwargs})) as batches:
        return list(itertools.islice(batches, n))


def refused(match: str):
    """The block raises a UserError of one line."""

    @contextlib.contextmanager
    def context():
        with pytest.raises(UserError, match=match) as caught:
            yield
        assert '\n' not in str(caught.value)

    return context()


def encoded(image: Image.Image, form: str = 'PNG', **options) -> bytes:
    """The bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(value: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.full((height, width), value, np.uint8))


def random_image(seed: int = 0, height: int = 12, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write_folder(path, values, **subfolders) -> str:
    """Grey images named by their values; the source's name."""
    for where, inside in {'': values, **subfolders}.items():
        os.makedirs(os.path.join(path, where), exist_ok=True)
        for value in inside:
            grey(value).save(os.path.join(path, where, f'{value}.png'))
    return f'folder:{path}'


def write_zip(path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f'zip:{path}'


def write_tar(path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mode: str = 'w') -> str:
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return f'tar:{path}'


def write_pairs(path, image, **others) -> str:
    """Ramps by number: as they are in image/, darker by the feature's number in the others; the source's name."""
    for k, (part, numbers) in enumerate({'image': image, **others}.items()):
        os.makedirs(path / part, exist_ok=True)
        for i in numbers:
            ramp = np.arange(20, dtype=np.uint8)[None].repeat(12, 0) + 20 * i + 100 * k
            Image.fromarray(ramp).save(path / part / f'{i}.{"png" if k else "bmp"}')
    return f'pairs:{path}'


def sixteen_bit(values, mode: str) -> Image.Image:
    """An image of one row with these values, mode 'I;16', 'I' or 'F'."""
    return Image.fromarray(np.array([values], np.uint16 if mode == 'I;16' else np.int32 if mode == 'I' else np.float32))


class ToyFaces(tfds.core.GeneratorBasedBuilder):
    """As CelebA is: encoded images, attributes in a dict; only a train split."""

    VERSION = tfds.core.Version('1.0.0')
    splits = {'train': 10}
    generated = 0

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    'photo': tfds.features.Image(shape=(None, None, 3)),
                    'name': tfds.features.Text(),
                    'kind': tfds.features.ClassLabel(names=['a', 'b', 'c']),
                    'attributes': {'Smiling': np.bool_, 'Age': np.int64},
                    'landmarks': tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
                    'words': tfds.features.Sequence(np.int64),
                }
            )
        )

    def dataset_info_from_configs(self, **kwargs):
        return tfds.core.DatasetInfo(builder=self, **kwargs)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(n) for name, n in self.splits.items()}

    def image(self, i):
        return encoded(grey(i, 14, 10))

    def _generate_examples(self, n):
        for i in range(n):
            type(self).generated += 1
            yield (
                i,
                {
                    'photo': self.image(i),
                    'name': f'face {i}',
                    'kind': i % 3,
                    'attributes': {'Smiling': i % 2 == 1, 'Age': i + 20},
                    'landmarks': np.full((2, 2), i / 2, np.float32),
                    'words': list(range(i)),
                },
            )


def run_code(code: str, *args: str, first: str = '') -> subprocess.Popen:
    """A process that runs this Python, with the packages in the directory `first` before all others."""
    paths = os.pathsep.join([*filter(None, [first]), ROOT, os.path.join(ROOT, 'tests')])
    return subprocess.Popen(
        [sys.executable, '-W', 'error', '-c', code, *args],
        env={**os.environ, 'PYTHONPATH': paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
