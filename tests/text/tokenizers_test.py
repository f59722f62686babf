"""Tokenizers: against transformers' own on vocabularies made here, and on files that are none."""

import json
import os

import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.text import tokenizers

TEXTS = [
    'a red circle on a blue background',
    "  It's   THE\tbiggest\nsquare I've seen, isn't it?! 12 345 ",
    'naïve café ☕ — 北京の写真 ünïcödé ﬁ',
    '',
    '<|endoftext|> within a text <|startoftext|>',
    'x' * 300,
    'word ' * 200,
]
CAPTIONS = [
    f'a {size} {colour} {shape}'
    for size in ('small', 'large')
    for colour in ('red', 'green', 'blue')
    for shape in ('circle', 'square', 'triangle')
]


@pytest.fixture(scope='module')
def trained():
    return tokenizers.train(CAPTIONS, 560, 16)


def test_equals_clip_s_of_transformers(trained, tmp_path):
    transformers = pytest.importorskip('transformers')
    trained.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = theirs(TEXTS, padding='max_length', max_length=16, truncation=True, return_tensors='np')
    ids, lengths, cut = trained(TEXTS)
    np.testing.assert_array_equal(ids, expected['input_ids'])
    np.testing.assert_array_equal(lengths, expected['attention_mask'].sum(1))
    assert cut == sum(len(theirs(text)['input_ids']) > 16 for text in TEXTS) > 1


def test_reads_what_clip_s_of_transformers_saves(trained, tmp_path):
    """tokenizer.json alone, as newer folders have it, and a pad that is no end (OpenCLIP's)."""
    transformers = pytest.importorskip('transformers')
    trained.save(tmp_path / 'one')
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / 'one', pad_token='!')
    theirs.save_pretrained(tmp_path / 'two')
    ours = tokenizers.from_folder(str(tmp_path / 'two'))
    expected = theirs(TEXTS, padding='max_length', max_length=16, truncation=True, return_tensors='np')['input_ids']
    np.testing.assert_array_equal(ours(TEXTS).ids, expected)
    assert ours.pad != ours.end and ours.length == 16


def test_a_vocabulary_is_trained_by_frequency(trained):
    """'a' ends 18 captions' first words: one token each; words of all captions are whole."""
    ids, lengths, _ = trained(['a red circle', 'zebra'])
    assert lengths[0] == 5 and lengths[1] > 3  # start, three words, end
    again = tokenizers.train(CAPTIONS, 560, 16)
    assert again.files == trained.files and 514 < again.vocabulary <= 560
    assert ids[0, 0] == again.backend.token_to_id(tokenizers.START) and ids[0, 4] == ids[0, 5] == again.end


def test_any_text_is_read(trained):
    ids = trained([chr(i) for i in range(32, 0x2FFF, 7)]).ids
    unknown = trained.backend.token_to_id(tokenizers.END)
    assert all((row[1 : list(row).index(unknown, 1)] < unknown).all() for row in ids)
    assert len({tuple(row) for row in ids}) > 1000  # not all the same unknown token


@pytest.fixture(scope='module')
def unigrams(tmp_path_factory):
    """A SentencePiece model trained on captions, in a folder as T5's."""
    sentencepiece = pytest.importorskip('sentencepiece')
    folder = tmp_path_factory.mktemp('t5')
    options = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=80, hard_vocab_limit=False, minloglevel=2)
    texts = iter([*CAPTIONS * 20, *TEXTS[1:3] * 20])
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=texts, model_prefix=str(folder / 'spiece'), **options)
    return folder


def test_equals_sentencepiece(unigrams):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(unigrams / 'spiece.model'))
    ours = tokenizers.from_folder(str(unigrams), 4000)
    texts = [t for t in TEXTS if '<|' not in t]
    for text, ids, n in zip(texts, *ours(texts)[:2], strict=True):
        assert list(ids[: n - 1]) == theirs.encode(text) and ids[n - 1] == 1 and not ids[n:].any()
    assert ours.vocabulary == theirs.get_piece_size() + 100  # with the sentinels


def test_equals_t5_s_of_transformers(unigrams):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.T5Tokenizer.from_pretrained(unigrams)
    expected = theirs(TEXTS, padding='max_length', max_length=24, truncation=True, return_tensors='np')['input_ids']
    np.testing.assert_array_equal(tokenizers.from_folder(str(unigrams), 24)(TEXTS).ids, expected)
    theirs.save_pretrained(unigrams / 'fast')  # a tokenizer.json
    np.testing.assert_array_equal(tokenizers.from_folder(str(unigrams / 'fast'), 24)(TEXTS).ids, expected)


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({}, 'has no vocab.json with merges.txt, tokenizer.json or spiece.model'),
        ({'vocab.json': '{}'}, 'has no merges.txt beside its vocab.json'),
        ({'vocab.json': '{"a": 0, "b": 7}', 'merges.txt': ''}, 'number its tokens from 0'),
        ({'vocab.json': '[1, 2', 'merges.txt': ''}, 'vocab.json: no tokenizer'),
        ({'vocab.json': '{"a": "b"}', 'merges.txt': ''}, 'number its tokens from 0'),
        ({'vocab.json': '{"a": 0}', 'merges.txt': 'x y\n'}, 'vocab.json: no tokenizer'),
        ({'tokenizer.json': '{"model": {}}'}, 'tokenizer.json: no tokenizer'),
        ({'tokenizer.json': '{"version'}, 'tokenizer.json: no tokenizer'),
        ({'spiece.model': 'nothing of the kind'}, 'spiece.model: no tokenizer'),
        ({'spiece.model': ''}, 'holds no unigrams'),
    ],
)
def test_what_is_no_tokenizer_gets_a_line(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as e:
        tokenizers.from_folder(str(tmp_path), 8)
    assert '\n' not in str(e.value)


def test_the_length_has_to_be_known(trained, tmp_path):
    trained.save(tmp_path)
    os.remove(tmp_path / 'tokenizer_config.json')
    with pytest.raises(UserError, match='model_max_length'):
        tokenizers.from_folder(str(tmp_path))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'model_max_length': 10**30}))
    with pytest.raises(UserError, match='model_max_length'):
        tokenizers.from_folder(str(tmp_path))
    ours = tokenizers.from_folder(str(tmp_path), 5)
    assert ours(['a red circle', 'a small red circle']).cut == 1 and ours.length == 5
    assert (ours(['a small red circle']).ids[0, -1]) == ours.end


def test_damaged_files_end_in_one_line(unigrams, trained, tmp_path):
    trained.save(tmp_path)
    rng = np.random.default_rng(0)
    sources = {'spiece.model': (unigrams / 'spiece.model').read_bytes(), 'vocab.json': trained.files['vocab.json']}
    for name, whole in sources.items():
        for _ in range(60):
            broken = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.5 else whole)
            broken[rng.integers(len(broken))] = rng.integers(256)
            folder = tmp_path / name.replace('.', '_')
            folder.mkdir(exist_ok=True)
            trained.save(folder) if name == 'vocab.json' else None
            (folder / name).write_bytes(broken)
            try:
                tokenizers.from_folder(str(folder), 8)(TEXTS)
            except UserError as e:
                assert '\n' not in str(e)
