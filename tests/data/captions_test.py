"""Captions of a person's own images: beside them in files, in archives, in sets of TFDS; damaged files in one line."""

from __future__ import annotations

import collections
import json
import os
import random

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_sets import encoded, grey, make, refused, take, write_folder, write_tar, write_zip

from jaxgen import data
from jaxgen.data import captions, folder, metadata, transforms
from jaxgen.errors import RunError, UserError
from jaxgen.text.tokenizers import caption_text

N = 12
WORDS = {i: [f'the {i}th, "größe" 北京', f'number\n{i}', f'{i} ☕ ' + 'x' * 3000][: i % 4] for i in range(N)}


def files(form: str, below: str = '') -> dict[str, bytes]:
    """Grey images named by their values, and the captions `WORDS` in a form."""
    out = {f'{below}{i}.png': encoded(grey(i)) for i in range(N)}
    if form == 'jsonl':
        rows = [{'file_name': f'{i}.png', 'text': texts} for i, texts in WORDS.items()]
        out[f'{below}metadata.jsonl'] = '\n'.join(map(json.dumps, rows)).encode()
    elif form == 'csv':  # several rows of one image
        quoted = [f'{i}.png,"{text}"' for i, texts in WORDS.items() for text in (t.replace('"', '""') for t in texts)]
        out[f'{below}metadata.csv'] = '\r\n'.join(['file_name,text', *quoted]).encode('utf-8-sig')
    else:
        contents = {'txt': lambda texts: texts[0].encode(), 'json': lambda texts: json.dumps({'text': texts}).encode()}
        out |= {f'{below}{i}.{form}': contents[form](texts) for i, texts in WORDS.items() if texts}
    return out


def written(path, contents: dict[str, bytes]) -> str:
    for name, content in contents.items():
        os.makedirs(os.path.dirname(path / name), exist_ok=True)
        (path / name).write_bytes(content)
    return f'folder:{path}'


def captioned(where, source: str, **fields) -> dict:
    features = fields.pop('features', ('image', 'caption'))
    return make(where / 'sets', source=source, features=features, test_fraction=0.1, **fields)


def texts_of(config, splits=('train', 'test')) -> dict[int, str]:
    """{value of the image: its caption} of all examples."""
    examples = [example for split in splits for example in data.dataset(config, split)]
    return {int(one['image'][0, 0, 0]): caption_text(one['caption']) for one in examples}


@pytest.mark.parametrize('form', ['jsonl', 'csv', 'txt', 'json'])
def test_files_beside_images(tmp_path, form):
    """As a folder, a zip and a tar; without one the caption is empty, and the others are whole."""
    first = {i: texts[0].strip() if texts else '' for i, texts in WORDS.items()}
    contents = files(form, 'images/')
    for source in (written(tmp_path / 'x', contents), write_zip(tmp_path / 'x.zip', contents),
                   write_tar(tmp_path / 'x.tar', contents)):  # fmt: skip
        assert texts_of(captioned(tmp_path, source)) == first


def test_one_of_several_is_drawn_by_the_number_of_the_example(tmp_path):
    """By the stream of random numbers itself; the same whatever the number of processes and the first batch."""
    config = captioned(tmp_path, written(tmp_path / 'x', files('jsonl')), batch=4)
    assert data.spec(config).features['caption'].shape == (3000 + len('11 ☕ '.encode()),)
    batches = take(config, 30, seed=3)
    drawn = collections.defaultdict(set)
    for k, batch in enumerate(batches):
        for u, image, caption in zip(
            transforms.uniform(3, np.arange(4 * k, 4 * k + 4), transforms.CAPTION), batch['image'], batch['caption'],
            strict=True,
        ):  # fmt: skip
            texts = WORDS[int(image[0, 0, 0])]
            assert caption_text(caption) == (texts[int(u * len(texts))].strip() if texts else '')
            drawn[int(image[0, 0, 0])].add(caption_text(caption))
    assert max(map(len, drawn.values())) == 3
    (later,) = take(config, 1, seed=3, start=7)
    np.testing.assert_array_equal(later['caption'], batches[7]['caption'])
    halves = [take(config, 1, seed=3, process_index=i, process_count=2)[0]['caption'] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), batches[0]['caption'])


def test_metadata_of_nested_folders_and_splits(tmp_path):
    """The nearest file says it, the others what that one leaves out; names are relative to the file's folder."""
    write_folder(tmp_path / 'x', [], **{'train/a': range(6), 'train/b': range(6, 9), 'test/a': [9], 'test/b': [10]})
    row = lambda name, text: json.dumps({'file_name': name, 'prompt': text}) + '\n'  # noqa: E731
    top = [row(f'./train\\a\\{i}.png', f'top {i}') for i in range(6)] + [row('test/b/10.png', 'top 10')]
    written(tmp_path / 'x', {
        'metadata.jsonl': ''.join(top).encode(),
        'train/a/metadata.jsonl': ''.join(row(f'{i}.png', f'near {i}') for i in range(3)).encode(),
        'train/metadata.csv': b'file_name,prompt\n' + b''.join(b'b/%d.png,mid %d\n' % (i, i) for i in range(6, 9)),
        'test/captions.jsonl': row('a/9.png', 'test 9').encode(),
    })  # fmt: skip
    config = captioned(tmp_path, f'folder:{tmp_path}/x', features=('image', 'label', 'caption'))
    near, top, mid = ({i: f'{name} {i}' for i in some} for name, some in
                      (('near', range(3)), ('top', range(3, 6)), ('mid', range(6, 9))))  # fmt: skip
    assert texts_of(config, ['train']) == near | top | mid
    assert texts_of(config, ['test']) == {9: 'test 9', 10: 'top 10'} and data.spec(config).names == ('a', 'b')


def test_the_column_is_an_option(tmp_path):
    rows = [{'file_name': f'{i}.png', 'text': f'short {i}', 'long one': f'long {i}', 'n': 3} for i in range(N)]
    source = write_folder(tmp_path / 'x', range(N))
    (tmp_path / 'x' / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert texts_of(captioned(tmp_path, source))[5] == 'short 5'
    assert texts_of(captioned(tmp_path, source, caption='long one'))[5] == 'long 5'
    with refused("has no column 'other' with captions: name it by config.data.caption; it has 'file_name', 'text'"):
        data.spec(captioned(tmp_path, source, caption='other'))
    with refused("line 1: 'n' must be a text, or a list of texts, and no int"):
        data.spec(captioned(tmp_path, source, caption='n'))


def test_words_of_a_vocabulary_are_those_of_all_captions(tmp_path):
    config = captioned(tmp_path, written(tmp_path / 'x', files('jsonl')))
    trained = {int(one['image'][0, 0, 0]) for one in data.dataset(config, 'train')}
    expected = {word for i in trained for text in WORDS[i] for word in captions.words(text.encode())}
    assert captions.known(config) == expected and {b'number', 'größe'.encode()} <= expected


def test_identity_is_of_images_and_captions(tmp_path):
    """Wherever it lies; another one as soon as a caption changes, of the same length too."""
    for form in ('jsonl', 'txt'):
        identities = []
        for where in ('one', 'two'):
            source = written(tmp_path / form / where, files(form))
            identities.append(data.dataset(captioned(tmp_path, source), 'train').identity)
        assert identities[0] == identities[1]
        changed = tmp_path / form / 'two' / ('metadata.jsonl' if form == 'jsonl' else '1.txt')
        changed.write_bytes(changed.read_bytes().replace(b'the 1th', b'the 2th'))
        assert data.dataset(captioned(tmp_path, source), 'train').identity != identities[0]


def test_what_is_left_out_is_said(tmp_path, capfd):
    source = write_folder(tmp_path / 'x', range(N))
    rows = [{'file_name': f'{i}.png', 'text': 'y' * (40_000 if i == 3 else i)} for i in range(1, N)]
    rows += [{'file_name': name, 'text': 'z'} for name in ('../outside.png', '/etc/passwd', 'gone.png')]
    (tmp_path / 'x' / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path / 'x' / 'captions.csv').write_text('file_name,text')
    (tmp_path / 'x' / 'notes.md').write_text('')
    folder.announced.clear()
    found = texts_of(captioned(tmp_path, source))
    assert len(found[3]) == 2**15 and found[0] == ''
    (line,) = capfd.readouterr().err.splitlines()
    for part in ("3 rows of 'metadata.jsonl' for images that are not there, like '../outside.png'", 'captions.csv',
                 'the end of 1 captions of more than 32,768 bytes', 'the captions of 1 images', '1 .md'):  # fmt: skip
        assert part in line
    assert '.jsonl)' not in line


@pytest.mark.parametrize(('name', 'content', 'match'), [
    ('metadata.jsonl', b'{"file_name": "1.png", "text": "a"}\n{"file_name": "2.png"', "line 2 is no JSON"),
    ('metadata.jsonl', b'["1.png", "a"]', 'line 1 must be a JSON object'),
    ('metadata.jsonl', b'[' * 100_000, 'line 1 is no JSON'),
    ('metadata.jsonl', b'{"text": "a"}', "line 1 has no column 'file_name'"),
    ('metadata.jsonl', b'{"file_name": "1.png"}', "has no column 'text' or 'caption'"),
    ('metadata.jsonl', b'{"file_name": "1.png", "text": {"en": "a"}}', "'text' must be a text"),
    ('metadata.jsonl', b'\n{"file_name": "1.png", "text": "caf\xe9"}', 'line 2 is no UTF-8'),
    ('metadata.jsonl', b'{"file_name": "x.png", "text": "a"}', "names no image that is there, but 'x.png'"),
    ('metadata.csv', b'file_name,text\n1.png,a, b\n', 'line 2 has 3 values and the first one 2'),
    ('metadata.csv', b'file_name,text\n1.png,' + b'x' * 200_000, 'field larger than field limit'),
    ('metadata.csv', 'file_name,text\n1.png,a\n'.encode('utf-16'), 'is no UTF-8'),
    ('metadata.jsonl', b'', "has no 'caption'; put a"), ('none.txt', b'a', "has no 'caption'; put a metadata.jsonl"),
])  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, name, content, match):
    source = write_folder(tmp_path / 'x', range(N))
    (tmp_path / 'x' / name).write_bytes(content)
    with refused(match):
        data.dataset(captioned(tmp_path, source), 'train')


def test_what_is_no_file_or_too_large(tmp_path, monkeypatch):
    source = write_folder(tmp_path / 'x', range(N))
    os.mkfifo(tmp_path / 'x' / 'metadata.csv')
    with refused('cannot be read: it is no regular file'):
        data.spec(captioned(tmp_path, source))
    os.remove(tmp_path / 'x' / 'metadata.csv')
    monkeypatch.setattr(metadata, 'OTHER', 0)
    monkeypatch.setattr(metadata, 'MOST_ROW', 10)
    (tmp_path / 'x' / 'metadata.csv').write_text('file_name,text\n' + '1.png,a\n' * 20)
    with refused('it has more than the 120 bytes that are read'):
        data.spec(captioned(tmp_path, source))


def test_a_damaged_file_beside_an_image_is_counted(tmp_path, capfd):
    source = written(tmp_path / 'x', files('json'))
    (tmp_path / 'x' / '1.json').write_bytes(b'{"text"')
    folder.announced.clear()
    with pytest.raises(RunError, match=r"the texts of '1.png' cannot be read .* more than config.data.max_corrupt"):
        texts_of(captioned(tmp_path, source))
    assert texts_of(captioned(tmp_path, source, max_corrupt=0.2))[1] == ''
    assert "the texts of '1.png' cannot be read (ValueError: '1.json'" in capfd.readouterr().err


@pytest.mark.parametrize('cache_mb', [0, 512])
def test_an_example_in_the_place_of_a_damaged_one_has_its_own_caption(tmp_path, cache_mb):
    """...and not that of the one that it stands in for."""
    contents = {f'{i}.png': encoded(grey(i)) for i in range(40)}
    rows = [json.dumps({'file_name': f'{i}.png', 'text': f'image {i}'}) for i in range(40)]
    damaged = {f'{i}.png': b'no image' for i in range(0, 40, 8)}
    source = written(tmp_path / 'x', contents | damaged | {'metadata.jsonl': '\n'.join(rows).encode()})
    config = captioned(tmp_path, source, max_corrupt=0.5, cache_mb=cache_mb, disk_mb=0)
    for batch in take(config, 12):
        for image, caption in zip(batch['image'], batch['caption'], strict=True):
            assert caption_text(caption) == f'image {image[0, 0, 0]}'


def test_pairs_have_the_captions_of_their_image(tmp_path):
    write_folder(tmp_path / 'x', [], image=range(N), edges=range(N))
    rows = [json.dumps({'file_name': f'image/{i}.png', 'text': f'image {i}'}) for i in range(N)]
    (tmp_path / 'x' / 'metadata.jsonl').write_text('\n'.join(rows))
    config = captioned(tmp_path, f'pairs:{tmp_path}/x', features=('image', 'edges', 'caption'))
    assert texts_of(config) == {i: f'image {i}' for i in range(N)}
    (tmp_path / 'x' / 'metadata.jsonl').unlink()
    with refused('has no captions: put a metadata.jsonl'):
        data.spec(config)


def test_lists_of_texts_in_parquet(tmp_path):
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    columns = {
        'image': [encoded(grey(i)) for i in range(N)],
        'sentences': [texts if i % 2 else None for i, texts in WORDS.items()],
    }
    parquet.write_table(pa.table(columns), tmp_path / 'x.parquet')
    config = captioned(tmp_path, f'parquet:{tmp_path}/x.parquet', caption='sentences')
    assert texts_of(config) == {i: texts[0].strip() if i % 2 and texts else '' for i, texts in WORDS.items()}
    assert texts_of({**config, 'source': f'{config["source"]}?caption=sentences', 'caption': ''}) == texts_of(config)


class ToyCoco(tfds.core.GeneratorBasedBuilder):
    """As coco_captions is: captions in a sequence of dicts; a title beside."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        text = tfds.features.Text()
        features = {
            'image': tfds.features.Image(shape=(None, None, 3)),
            'title': text,
            'captions': tfds.features.Sequence({'id': np.int64, 'text': text}),
            'tags': tfds.features.Sequence(text),
            'numbers': tfds.features.Sequence(np.int64, length=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(N):
            captions = [{'id': k, 'text': text} for k, text in enumerate(WORDS[i])]
            yield i, {'image': encoded(grey(i)), 'title': f'title {i}', 'captions': captions, 'tags': [f'tag {i}', 'b'],
                      'numbers': [i, i]}  # fmt: skip


def test_texts_of_tfds(tmp_path):
    source = 'toy_coco'
    config = captioned(tmp_path, source, size=8)
    assert texts_of(config) == {i: texts[0].strip() if texts else '' for i, texts in WORDS.items()}
    for name, value in (('title', 'title 5'), ('tags', 'tag 5')):
        assert texts_of({**config, 'caption': name})[5] == value
    examples = data.dataset({**config, 'features': ('image', 'captions/text', 'numbers', 'title')}, 'train')
    one = examples[0]
    i = int(one['image'][0, 0, 0])
    assert one['numbers'].tolist() == [i, i] and caption_text(one['title']) == f'title {i}'
    with refused("config.data.caption: toy_coco has no 'words'; it has title, captions/text, tags"):
        data.spec({**config, 'caption': 'words'})
    drawn = {caption_text(c) for batch in take(config, 20) for c in batch['caption']}
    assert {text.strip() for texts in WORDS.values() for text in texts} - drawn <= {
        text.strip() for one in data.dataset(config, 'test') for text in WORDS[int(one['image'][0, 0, 0])]
    }


@pytest.mark.slow
def test_no_damaged_file_is_a_traceback(tmp_path):
    """Bytes of sound files changed, cut off, doubled and put in, at random."""
    rng = random.Random(0)
    sound = {form: files(form) for form in ('jsonl', 'csv')}
    kinds = collections.Counter()
    for k in range(400):
        form = ('jsonl', 'csv')[k % 2]
        name = f'metadata.{form}'
        content = bytearray(sound[form][name])
        for _ in range(rng.choice((1, 1, 3, 30))):
            at = rng.randrange(len(content))
            change = rng.randrange(5)
            if change == 0:
                content[at] = rng.randrange(256)
            elif change == 1:
                del content[at : at + rng.choice((1, 10, 1000))]
            elif change == 2:
                content[at:at] = rng.choice(
                    (b'\0', b'"', b'\n', b'\\', b'\xff', b'[', b'{', b',', b'1e999', b'NaN', b'\r')
                )
            elif change == 3:
                content[at:at] = content[at : at + 200]
            else:
                content[at:at] = rng.choice((b'"\\ud800"', b'9' * 5000, b'[' * 2000, b'null', b'\xef\xbb\xbf', b'../'))
            content = content or bytearray(b'x')
        source = written(
            tmp_path / f'{k}', {**{n: c for n, c in sound[form].items() if n != name}, name: bytes(content)}
        )
        try:
            texts_of(captioned(tmp_path, source))
            kinds['read'] += 1
        except UserError as e:
            assert '\n' not in str(e) and len(str(e)) < 1000 and str(e).isprintable()
            kinds['refused'] += 1
    assert min(kinds.values()) > 50 and len(kinds) == 2
