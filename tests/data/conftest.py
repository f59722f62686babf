"""Data sets of several tests."""

from __future__ import annotations

import os

import numpy as np
import pytest
from data_sets import make
from PIL import Image


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """One directory of prepared sets for all tests that do not mind what is in it."""
    return str(tmp_path_factory.mktemp('prepared'))


@pytest.fixture
def five(tmp_path):
    """Five training images and a test image, 12 x 20 pixels, a ramp that identifies the image, and left and right."""
    for i in range(6):
        ramp = np.arange(20, dtype=np.uint8)[None].repeat(12, 0) + 20 * i
        os.makedirs(tmp_path / 'images', exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / 'images' / f'{i}.png')
    return make(tmp_path / 'sets', source=f'folder:{tmp_path / "images"}', size=12, test_fraction=0.01, batch=8)
