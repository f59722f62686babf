"""The piece cache: what is kept is whole, of the same evaluation and made once."""

from __future__ import annotations

import contextlib
import os

import numpy as np

from jaxgen import files
from jaxgen.evaluation import cache
from jaxgen.metrics import statistics

PIECE = {'features': np.arange(6.0).reshape(2, 3), 'logits': np.ones((2, 1))}


def same(piece) -> bool:
    return piece.keys() == PIECE.keys() and all(np.array_equal(piece[name], x) for name, x in PIECE.items())


def test_a_piece_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        assert same(cache.piece(str(tmp_path), 4, 2, lambda: made.append(1) or PIECE))
    assert len(made) == 1 and os.listdir(tmp_path) == ['00000004.npz']
    cache.piece(str(tmp_path), 0, 2, lambda: made.append(1) or PIECE)
    cache.piece(str(tmp_path), 4, 3, lambda: made.append(1) or PIECE)  # of another number of samples
    assert len(made) == 3


def test_every_evaluation_has_a_folder_of_its_own_until_it_is_done(tmp_path):
    workdir = str(tmp_path)
    settings = [['vae', 0], ['vae', 1], ['gan', 0]]
    folders = {cache.path(workdir, decides) for decides in settings}
    assert len(folders) == 3 and cache.path(workdir, settings[0]) in folders
    for folder in folders:
        cache.piece(folder, 0, 2, lambda: PIECE)
    (tmp_path / 'evaluation.json').write_text('{}')
    cache.clear(workdir)
    assert os.listdir(tmp_path) == ['evaluation.json']
    cache.clear(workdir)  # there is nothing


def test_a_piece_with_any_byte_changed_is_whole_or_none(tmp_path):
    """A changed byte makes zipfile ask for a password, miss a method of compression, or lose an entry."""
    file = tmp_path / 'piece.npz'
    files.save_npz(str(file), {**PIECE, cache.NAMES: np.array(list(PIECE))})
    content, pieces = file.read_bytes(), []
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        pieces.append(cache.read(str(file), 2))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            statistics.read(str(file), 'another')
    assert all(map(same, filter(None, pieces)))
    assert pieces.count(None) > len(pieces) / 3
    file.write_bytes(content)
    assert same(cache.read(str(file), 2)) and cache.read(str(file), 3) is None
