"""A person's own images in a folder: classes, splits, unreadable files, identity."""

from __future__ import annotations

import io
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_sets import encoded, grey, make, random_image, refused, sixteen_bit, take, write_folder
from PIL import Image

from jaxgen import data
from jaxgen.data import folder, sources


def test_folder_classes_from_subfolders(tmp_path):
    source = write_folder(tmp_path / 'in', [], cat=[10, 20], dog=[30], **{'ant/deep/er': [40, 50]})
    config = make(tmp_path, source=source, features=('image', 'label'), test_fraction=0.3)
    assert data.spec(config).classes == 3
    labels = {}
    for split in ('train', 'test'):
        examples = data.dataset(config, split)
        labels.update({int(e['image'][0, 0, 0]): int(e['label']) for e in (examples[i] for i in range(len(examples)))})
    assert labels == {40: 0, 50: 0, 10: 1, 20: 1, 30: 2}
    assert data.spec({**config, 'classes': 5}).classes == 5
    with refused('has 3 sub-folders'):
        data.dataset({**config, 'classes': 2}, 'train')
    with refused("has no 'factors'"):
        data.spec({**config, 'features': ('image', 'factors')})


def test_folder_without_classes(tmp_path):
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [1], cat=[2, 3]), features=('image', 'label'))
    for call in (data.spec, lambda c: data.dataset({**c, 'classes': 4}, 'train')):
        with refused('put every image into a sub-folder'):
            call(config)
    assert data.spec({**config, 'features': ('image',)}).classes == 0
    # Described on a machine that lacks the folder.
    elsewhere = {**config, 'source': 'folder:/not/here'}
    assert data.spec({**elsewhere, 'features': ('image',)}).features['image'].shape == (8, 8, 1)
    with refused('/not/here does not exist'):
        data.spec(elsewhere)


def test_folder_of_all_kinds_of_files(tmp_path, capfd):
    path = tmp_path / 'in'
    os.makedirs(path / 'sub' / '.thumbnails')
    expected = {
        'grey.png': grey(1),
        'sub/bits.bmp': Image.fromarray(np.eye(9, dtype=bool)),
        'colour.JPG': random_image(),
        'sub/alpha.webp': random_image().convert('RGBA'),
        'palette.gif': random_image().convert('P'),
        'print.tif': random_image().convert('CMYK'),
        'deep.png': sixteen_bit([0, 65535], 'I;16'),
        'dot.ppm': Image.new('RGB', (1, 1), 'red'),
        'line.png': grey(3, 1, 500),
    }
    for name, image in expected.items():
        image.save(path / name)
    (path / 'readme.txt').write_text('no image')
    (path / '.DS_Store').write_bytes(b'\0')
    (path / '._grey.png').write_bytes(b'a resource fork')
    grey(5).save(path / 'sub' / '.thumbnails' / 'small.png')
    os.symlink(path, path / 'sub' / 'loop')
    strange = os.fsencode(path) + b'/caf\xe9 \xe2\x98\x83\n.png'
    with open(strange, 'wb') as f:
        f.write(encoded(grey(4)))
    config = make(tmp_path, source=f'folder:{path}', channels=3, size=6)
    train, test = (data.dataset(config, split) for split in ('train', 'test'))
    assert len(train) + len(test) == len(expected) + 1 and len(test) >= 1
    for examples in (train, test):
        for i in range(len(examples)):
            assert examples[i]['image'].shape == (6, 6, 3)
    out, message = capfd.readouterr()
    assert (
        not out and message == f'jaxgen: {path}: left out 1 folders linked twice, 1 files with other endings (1 .txt)\n'
    )


def damage(path) -> None:
    """Four files that claim to be images."""
    whole = encoded(random_image(height=60, width=60), 'JPEG')
    (path / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (path / 'empty.png').write_bytes(b'')
    (path / 'text.gif').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    os.symlink(path / 'nowhere', path / 'link.png')


def test_folder_with_unreadable_files(tmp_path, capfd):
    source = write_folder(tmp_path / 'in', range(36))
    damage(tmp_path / 'in')
    config = make(tmp_path / 'sets', source=source)
    with refused(r'4 of 40 files, which cannot be read.*\.\.\.\), are more than config.data.max_corrupt = 0.01') as _:
        data.dataset(config, 'train')
    assert not capfd.readouterr().err
    examples = data.dataset({**config, 'max_corrupt': 0.1}, 'train')
    assert len(examples) + len(data.dataset({**config, 'max_corrupt': 0.1}, 'test')) == 36
    message = capfd.readouterr().err
    assert message.count('\n') == 1 and '4 of 40' in message and 'cut.jpg' in message
    report = message.rpartition('why: ')[2].strip()
    with open(report) as f:
        lines = f.read().splitlines()
    assert len(lines) == 4 and all('\t' in line for line in lines) and str(tmp_path / 'sets') in report
    with refused('4 of 40'):  # prepared by now, and still refused to one who does not want it
        data.dataset(config, 'train')


def test_folder_of_which_nothing_can_be_read(tmp_path):
    os.makedirs(tmp_path / 'in')
    damage(tmp_path / 'in')
    with refused('4 of 4 files.*that is all of them'):
        data.dataset(make(tmp_path, source=f'folder:{tmp_path / "in"}', max_corrupt=1.0), 'train')


def test_image_that_is_too_large_is_unreadable(tmp_path, capfd):
    source = write_folder(tmp_path / 'in', range(5))
    grey(0, 100, 100).save(tmp_path / 'in' / 'bomb.png')
    examples = data.dataset(make(tmp_path, source=source, max_corrupt=0.5, max_pixels=1000), 'train')
    assert len(examples) <= 4
    assert 'bomb.png' in capfd.readouterr().err


@pytest.mark.parametrize(
    ('names', 'match'),
    [
        ([], 'holds no images .*, but no files'),
        (['a.txt', 'b/c.csv', '.hidden.png'], 'holds no images .*, but 2 other files'),
    ],
)
def test_folder_without_images(tmp_path, names, match):
    path = tmp_path / 'in'
    os.makedirs(path / 'b')
    for name in names:
        (path / name).write_text('x')
    with refused(match):
        data.dataset(make(tmp_path, source=f'folder:{path}'), 'train')


def test_no_folder(tmp_path):
    (tmp_path / 'file').write_text('x')
    for source, match in {
        f'folder:{tmp_path}/nowhere': 'does not exist',
        f'folder:{tmp_path}/file': 'is a file',
        'folder:': 'name the folder',
        str(tmp_path): f'write folder:{tmp_path}',
    }.items():
        with refused(match):
            data.dataset(make(tmp_path, source=source), 'train')


def test_folder_of_one_image(tmp_path):
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [9]))
    assert len(data.dataset(config, 'train')) == 1
    assert take(config, 3)[2]['image'].shape == (8, 8, 8, 1)
    with refused('too few images'):
        data.dataset(config, 'test')


def test_changed_folder_is_prepared_anew(tmp_path):
    source = write_folder(tmp_path / 'in', range(10))
    config = make(tmp_path, source=source)
    before = len(data.dataset(config, 'train')), len(data.dataset(config, 'test'))
    grey(200).save(tmp_path / 'in' / 'new.png')
    assert len(data.dataset(config, 'train')) + len(data.dataset(config, 'test')) == 11
    os.remove(tmp_path / 'in' / 'new.png')
    assert (len(data.dataset(config, 'train')), len(data.dataset(config, 'test'))) == before
    grey(255).save(tmp_path / 'in' / '0.png')  # other pixels, same name
    os.utime(tmp_path / 'in' / '0.png', (1, 1))
    pixels = {
        int(examples[i]['image'][0, 0, 0])
        for examples in (data.dataset(config, split) for split in ('train', 'test'))
        for i in range(len(examples))
    }
    assert pixels == {*range(1, 10), 255}


def test_held_out_images_stay_held_out():
    files = [folder.File(f'a/{i}.png', 1, 1) for i in range(3000)]
    train, test = folder.split(files, 0.2)
    assert sorted(train + test) == sorted(files) and 540 < len(test) < 660
    fewer = folder.split(files[:1000], 0.2)[1]
    assert set(fewer) == set(test) & set(files[:1000])
    assert set(test) < set(folder.split(files, 0.4)[1])
    changed = [f._replace(size=9, time=9) for f in files]
    assert {f.path for f in folder.split(changed, 0.2)[1]} == {f.path for f in test}
    for n in (2, 3, 4):
        assert all(
            folder.split(files[i : i + n], fraction)[k] for i in range(20) for fraction in (0.01, 0.99) for k in (0, 1)
        )


def test_every_class_of_two_images_is_trained_on():
    files = [folder.File(f'{c}/{i}.png', 1, 1) for c in range(300) for i in range(2)]
    alone = [folder.File(f'alone{c}/0.png', 1, 1) for c in range(40)]
    for fraction in (0.2, 0.8):
        train, test = folder.split([*files, *alone], fraction, classes=True)
        assert sorted(train + test) == sorted([*files, *alone])
        assert {f.path.split('/')[0] for f in train} == {f.path.split('/')[0] for f in [*files, *alone]}
        assert len(test) > 50 and not set(test) & set(alone)
        # Others stay where they would be: the rarest alone are moved.
        assert set(test) <= set(folder.split([*files, *alone], fraction)[1])
    for n in range(2, 6):  # each side has one in any case
        for group in (alone[:n], files[:n]):
            assert all(folder.split(group, fraction, classes=True)[k] for fraction in (0.01, 0.99) for k in (0, 1))


def labels_by_value(config: dict, split: str = 'train') -> dict[int, int]:
    """{grey value: label} of a split of `write_folder`'s images."""
    examples = data.dataset({**config, 'features': ('image', 'label')}, split)
    return {int(e['image'][0, 0, 0]): int(e['label']) for e in (examples[i] for i in range(len(examples)))}


def test_folders_named_by_numbers_are_in_their_order(tmp_path):
    inside = {str(c): range(20 * c, 20 * c + 6) for c in range(11)}
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [], **inside), features=('image', 'label'))
    assert data.spec(config).names == tuple(map(str, range(11)))
    labels = labels_by_value(config) | labels_by_value(config, 'test')
    assert labels == {20 * c + i: c for c in range(11) for i in range(6)}
    assert folder.ordered({'1', '10', '9', 'a'}) == ('1', '10', '9', 'a')
    assert folder.ordered({'-1', '10', '9'}) == ('-1', '10', '9')
    assert folder.ordered({'007', '10', '9', '7'}) == ('007', '7', '9', '10')


@pytest.mark.parametrize(
    ('train', 'test', 'unused'),
    [('train', 'test', ''), ('Train', 'val', ''), ('training', 'Validation', ''), ('train', 'val', 'dev')],
)
def test_folders_of_splits(tmp_path, capfd, train, test, unused):
    inside = {f'{train}/cat': range(10), f'{train}/dog': range(10, 20), f'{test}/dog': [200, 201], f'{test}/emu': [250]}
    inside |= {f'{unused}/cat': [99]} if unused else {}
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [], **inside), features=('image', 'label'))
    assert data.spec(config).names == ('cat', 'dog')
    assert labels_by_value(config) == {i: i // 10 for i in range(20)}
    assert labels_by_value(config, 'test') == {200: 1, 201: 1}
    message = capfd.readouterr().err
    assert message.count('\n') == 1 and '1 test images of no class that training has' in message
    assert not unused or f'1 files in {unused}/, which is not used beside {test}/' in message


def test_folders_that_are_classes_after_all(tmp_path):
    """A train is also a vehicle; a training split alone is split by us; a test split may have no labels."""
    config = make(tmp_path, source=write_folder(tmp_path / 'a', [], train=range(5), bus=range(9, 14)))
    assert data.spec({**config, 'features': ('image', 'label')}).names == ('bus', 'train')
    config = make(tmp_path, source=write_folder(tmp_path / 'b', [], val=range(5), test=range(9, 14)))
    assert data.spec({**config, 'features': ('image', 'label')}).names == ('test', 'val')
    inside = {'train/cat': range(8), 'train/dog': range(8, 16), 'test': [99]}
    config = make(tmp_path, source=write_folder(tmp_path / 'c', [], **inside))
    train, test = labels_by_value(config), labels_by_value(config, 'test')
    assert test and train | test == {i: i // 8 for i in range(16)}
    flat = make(tmp_path, source=write_folder(tmp_path / 'd', [], train=range(8), test=[98, 99]))
    assert [len(data.dataset(flat, split)) for split in ('train', 'test')] == [8, 2]


def test_what_a_folder_leaves_out_is_counted(tmp_path, capfd):
    path = tmp_path / 'in'
    source = write_folder(path, [], cat=range(10), dog=range(10, 20), emu=[30])
    for i in range(40):
        (path / 'cat' / f'IMG_{i}.HEIC').write_bytes(b'x')
    (path / 'notes').write_text('x')
    os.symlink(path / 'cat' / '1.png', path / 'dog' / '1.png')  # the first link, but no real file
    os.link(path / 'dog' / '11.png', path / 'emu' / 'hard.png')
    os.symlink(path / 'dog', path / 'a dog')
    os.mkfifo(path / 'cat' / 'x.png')
    os.symlink('/dev/zero', path / 'dog' / 'zero.PNG')
    (path / 'cat' / 'bad.JPEG').write_bytes(b'x')
    os.makedirs(path / 'fox' / '.hidden')
    config = make(tmp_path / 'sets', source=source, max_corrupt=0.1)
    labels = labels_by_value(config) | labels_by_value(config, 'test')
    # Of the two names of one file the first in order is taken, dog/1.png being a link to a later one's equal.
    assert labels == {**dict.fromkeys(range(10), 0), **dict.fromkeys(range(10, 20), 1), 30: 2}
    message = capfd.readouterr().err
    assert message.count('\n') == 1
    for part in (
        '41 files with other endings (40 .heic, 1 without one)',
        '2 files linked twice',
        '1 folders linked twice',
        '2 that are no regular files',
        '1 classes of one image',
        "1 folders without images ('fox')",
        "1 of 22 files, which cannot be read as images ('cat/bad.JPEG')",
    ):
        assert part in message, (part, message)


def test_endless_files_are_no_images(tmp_path):
    """Nothing waits and nothing is read without an end, wherever images are read."""
    path = tmp_path / 'in'
    write_folder(path, range(4))
    os.mkfifo(path / 'x.png')
    os.symlink('/dev/zero', path / 'y.png')
    with refused('holds 2 that are no regular files'):
        data.FolderImages(str(path), (8, 8, 1))
    for name in ('x.png', 'y.png'):
        with pytest.raises(ValueError, match='no regular file'):
            folder.read_file(str(path / name))
    with open(path / 'z.png', 'wb') as file:
        file.truncate(2**40)  # a file with a hole, which reading would fill
    with pytest.raises(ValueError, match=r'it has more than the .* bytes'):
        folder.read_file(str(path / 'z.png'))
    os.remove(path / 'x.png'), os.remove(path / 'y.png'), os.remove(path / 'z.png')
    os.symlink(path, path / 'loop')
    os.symlink('self', path / 'self')
    assert len(data.FolderImages(str(path), (8, 8, 1))) == 4


def test_identity_of_a_folder_is_its_contents(tmp_path):
    source = write_folder(tmp_path / 'in', [], cat=range(6), dog=range(6, 12))
    config = make(tmp_path / 'sets', source=source, features=('image', 'label'))
    identity = data.dataset(config, 'train').identity
    shutil.copytree(tmp_path / 'in', tmp_path / 'elsewhere' / 'out')
    for file in (tmp_path / 'elsewhere' / 'out').glob('*/*'):
        os.utime(file, (5, 5))
    for spelled in (f'{source}/', f'folder:{tmp_path / "elsewhere" / "out"}'):
        moved = data.dataset({**config, 'source': spelled}, 'train')
        assert moved.identity == identity
        np.testing.assert_array_equal(moved[3]['image'], data.dataset(config, 'train')[3]['image'])
    assert len(os.listdir(tmp_path / 'sets' / 'jaxgen_folder')) == 2, 'one folder under two names is prepared once'
    assert data.dataset(config, 'test').identity != identity
    grey(77).save(tmp_path / 'elsewhere' / 'out' / 'cat' / '3.png')
    assert data.dataset({**config, 'source': f'folder:{tmp_path / "elsewhere" / "out"}'}, 'train').identity != identity
    os.rename(tmp_path / 'in' / 'cat' / '3.png', tmp_path / 'in' / 'cat' / '33.png')
    assert data.dataset(config, 'train').identity != identity


def test_reports_are_not_written_through_links(tmp_path):
    source = write_folder(tmp_path / 'in', range(9))
    (tmp_path / 'in' / 'bad.png').write_bytes(b'x')
    config = make(tmp_path / 'sets', source=source, max_corrupt=0.2)
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    path = os.path.dirname(sources.resolve(config).builder().data_dir)
    os.makedirs(path)
    os.symlink(victim, os.path.join(path, 'unreadable.txt'))
    data.dataset(config, 'train')
    assert victim.read_text() == 'mine' and not os.path.islink(os.path.join(path, 'unreadable.txt'))


def test_lines_of_several_threads_are_whole(monkeypatch):
    class Slow(io.StringIO):
        def write(self, text):
            time.sleep(0.0005)  # another thread's turn
            return super().write(text)

    monkeypatch.setattr('sys.stderr', stream := Slow())
    lines = [f'whole lines of threads, {i}' for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(folder.say, lines))
    assert sorted(stream.getvalue().splitlines()) == sorted(f'jaxgen: {line}' for line in lines)
