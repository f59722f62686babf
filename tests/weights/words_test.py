"""Files of textual inversion: what each kind holds, and what is none."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from jaxgen.errors import UserError
from jaxgen.weights import words
from jaxgen.weights.files import open_weights

RNG = np.random.default_rng(0)
NAMES = {'text': 'clip_l', 'text_2': 'clip_g', 'text_3': 't5xxl'}
WIDTHS = {'text': 4, 'text_2': 6, 'text_3': 4}


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def opened(folder, tensors, name: str = 'thing.safetensors'):
    safetensors.numpy.save_file(tensors, folder / name)
    return open_weights(str(folder / name))


@pytest.mark.parametrize(
    ('tensors', 'word', 'places'),
    [
        ({'<zig>': drawn(3, 4)}, '<zig>', {'text': '<zig>'}),
        ({'<zig>': drawn(6)}, '<zig>', {'text_2': '<zig>'}),
        ({'emb_params': drawn(1, 4)}, 'thing', {'text': 'emb_params'}),
        ({'clip_g': drawn(2, 6), 'clip_l': drawn(2, 4)}, 'thing', {'text': 'clip_l', 'text_2': 'clip_g'}),
        ({'clip_l': drawn(2, 4), 't5xxl': drawn(2, 4)}, 'thing', {'text': 'clip_l', 'text_3': 't5xxl'}),
    ],
)
def test_words_and_rows_of_files(tensors, word, places, tmp_path):
    found, rows = words.word_and_rows(opened(tmp_path, tensors))
    made = words.placed('x', rows, NAMES, WIDTHS)
    assert found == word and made.keys() == places.keys()
    for encoder, name in places.items():
        np.testing.assert_array_equal(made[encoder].read(), tensors[name])


@pytest.mark.slow
def test_a_file_of_the_web_ui(tmp_path):
    torch = pytest.importorskip('torch')
    rows = drawn(2, 4)
    said = {'string_to_token': {'*': 265}, 'name': 'other', 'step': 9, 'sd_checkpoint': None}
    torch.save({**said, 'string_to_param': {'*': torch.nn.Parameter(torch.from_numpy(rows))}}, tmp_path / 'mine.pt')
    word, found = words.word_and_rows(open_weights(str(tmp_path / 'mine.pt')))
    assert word == 'mine'
    np.testing.assert_array_equal(found[''].read(), rows)


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        ({'a.weight': drawn(2, 4), 'b.weight': drawn(2, 4)}, 'is no file of textual inversion: it has 2 tensors'),
        ({'x': drawn(2, 4, 3)}, r'x is float32 of \[2, 4, 3\], and should be'),
        ({'x': np.zeros((2, 4), np.int32)}, 'x is int32'),
        ({'clip_l': drawn(2, 4), 'clip_g': drawn(1, 6)}, 'the word is 1 and 2 tokens'),
        ({'x': drawn(2, 5)}, 'is a word of another text encoder: it is 5 wide, and config.stages has text 4, text_2 6'),
        ({'clip_g': drawn(2, 4)}, 'clip_g is 4 wide, and config.stages has text_2 6'),
    ],
)
def test_files_of_something_else(tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        words.placed('x', words.word_and_rows(opened(tmp_path, tensors))[1], NAMES, WIDTHS)
