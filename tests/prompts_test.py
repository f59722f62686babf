"""Texts as conditions of models that read tokens: any words, from the command line and from files."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxgen import assembly, conditions, main
from jaxgen.contract import Captions
from jaxgen.errors import UserError
from jaxgen.text import tokenizers

TEXTS = [
    'A llama, in a top hat!',
    '',
    '北京の写真 ☕',
    'word ' * 500,
    "it's <|endoftext|> here",
    'two\nlines\x00inside',
]


@pytest.fixture(scope='module')
def assembled():
    tokenizer = tokenizers.train([f'a {colour} circle' for colour in ('red', 'green')], 530, 12)
    family = SimpleNamespace(captions=Captions(encoded=True))
    return SimpleNamespace(texts={'tokens': None}, tokenizers={'text/tokens': tokenizer}, spec=None, family=family)


def test_any_words_of_any_length_in_any_script(assembled):
    given = conditions.numbers(assembled, None, 'caption', TEXTS)
    assert [tokenizers.caption_text(row) for row in given.array] == TEXTS and given.listed
    assert given.array.dtype == np.uint8 and given.array.shape == (6, 2500)
    one = conditions.numbers(assembled, None, 'negative_caption', 'blurry')
    assert len(one) == 1 and not one.listed
    broken = conditions.numbers(assembled, None, 'caption', 'a \udcff byte')  # of a command line that is no UTF-8
    assert tokenizers.caption_text(broken.array[0]) == 'a ? byte'
    for value in (3, [None], b'bytes', [['nested']], {'a': 1}, [], 'x' * (2**20 + 1)):
        with pytest.raises(UserError, match='condition caption'):
            conditions.numbers(assembled, None, 'caption', value)


def test_what_no_tokens_are_left_for_is_said(assembled):
    tokenizer = assembled.tokenizers['text/tokens']
    words = 'a red circle beside a green circle'
    values = {'caption': conditions.numbers(assembled, None, 'caption', [words, 'a red circle'])}
    (line,) = conditions.cut_off(assembled, values)
    rest = tokenizer.rest(words)
    assert repr(rest) in line and '12 tokens' in line and '1 of 2' in line and words.endswith(rest)
    # What is left in is the same tokens as of the whole text, and with one word more there would be another one.
    whole, short = tokenizer([words, words.removesuffix(rest)]).ids
    np.testing.assert_array_equal(whole, short)
    assert tokenizer.rest('a red circle') == '' and not tokenizer.rest(words.removesuffix(rest))
    assert not conditions.cut_off(assembled, {'caption': conditions.numbers(assembled, None, 'caption', 'a circle')})


@pytest.mark.parametrize('guided', [True, False])
def test_a_negative_prompt_alone_and_without_guidance(assembled, guided):
    captions = Captions(encoded=True, negative=guided)
    family = SimpleNamespace(
        captions=captions, sample=len, encode=None, decode=None, conditions=('caption',), inputs=(), displayed=()
    )
    spec = SimpleNamespace(features={})
    run = SimpleNamespace(**{**vars(assembled), 'family': family, 'spec': spec})
    given = conditions.read(run, None, {'negative_caption': ['a red circle', 'green']})
    assert given.n == 2
    assert given.lines() == ([] if guided else [line for line in given.notes if 'negative_caption changes' in line])
    assert bool(given.lines()) == (not guided)


def test_another_tokenizer_than_in_training_is_refused(assembled, tmp_path):
    folder = str(tmp_path / 'run' / 'tokenizer')
    assembled.tokenizers['text/tokens'].save(folder)
    saved = {'tokenizers': {'text/tokens': tokenizers.from_folder(folder, 12).digest()}}

    def run_of(tokenizer):
        digests = {'text/tokens': tokenizer.digest()}
        config = SimpleNamespace(stages={'text': 'clip'})
        return SimpleNamespace(stage_digests={}, tokenizer_digests=digests, config=config)

    other = tokenizers.train(['a blue square'], 530, 12)
    assembly.check_stages(saved, run_of(assembled.tokenizers['text/tokens']), 'runs/x')
    assembly.check_stages({}, run_of(other), 'runs/x')  # of a run that began before these were kept
    with pytest.raises(UserError, match='clip/tokenizer is not the tokenizer that runs/x was trained with'):
        assembly.check_stages(saved, run_of(other), 'runs/x')


def test_texts_of_a_file(tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_bytes('\ufeffa cat\r\n\r\n  ein Käfer = 3 \n'.encode())
    texts = ['a cat', 'ein Käfer = 3']
    assert main.parse_conditions([f'caption=@{path}', 'label=3']) == {'caption': texts, 'label': '3'}
    assert main.parse_conditions([f'caption=@{path}', 'caption=last']) == {'caption': [*texts, 'last']}
    path.write_text('one')
    assert main.parse_conditions([f'negative_caption=@{path}']) == {'negative_caption': ['one']}
    assert main.parse_conditions(['image=@photo.png']) == {'image': '@photo.png'}
    (tmp_path / 'empty').write_text(' \n')
    (tmp_path / 'latin').write_bytes(b'caf\xe9')
    for name in ('empty', 'latin', 'gone', '.'):
        with pytest.raises(UserError, match='--condition=caption=@') as e:
            main.parse_conditions([f'caption=@{tmp_path / name}'])
        assert '\n' not in str(e.value)
