"""A person's own images as conditions: files, folders, arrays; what each family makes of them; what is refused."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import assemble, first_batch, tiny

from jaxgen import conditions, data, outputs, run, sample
from jaxgen import main as command
from jaxgen.config import DEFAULTS
from jaxgen.data.own_images import OwnImages, Reduced
from jaxgen.errors import RunError, UserError

SECTION = {**DEFAULTS['data'], 'source': 'digits', 'size': 8, 'channels': 1}
slow = pytest.mark.slow  # compiles networks


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, x: np.ndarray, **options) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(x.squeeze(-1) if x.shape[-1] == 1 else x).save(path, **options)
    return str(path)


def own(value, shape=(8, 8, 1), name: str = 'image', **section) -> np.ndarray:
    images = OwnImages(name, value, shape, {**SECTION, **section})
    return images.take(np.arange(len(images)))


# --- what is read


@pytest.mark.parametrize('channels', [1, 3])
def test_files_are_read_as_the_data_are(channels, tmp_path):
    """Every mode, size, transparency, EXIF rotation: the same pixels as of folder:PATH."""
    folder = tmp_path / 'images'
    turned = Image.Exif()
    turned[0x0112] = 6  # to be rotated by 90 degrees
    save(folder / 'a.png', noise(13, 9, 3))
    save(folder / 'b.png', noise(9, 13, 1), exif=turned)
    save(folder / 'c.png', noise(8, 8, 4))
    save(folder / 'd.jpg', noise(20, 31, 3), exif=turned)
    Image.fromarray(noise(16, 16, 3)).quantize(7).save(folder / 'e.gif')
    Image.fromarray(np.arange(0, 65536, 256, np.uint16).reshape(16, 16)).save(folder / 'f.png')
    Image.fromarray(noise(16, 16) > 100).save(folder / 'g.tiff')
    Image.fromarray(noise(12, 18, 3)).convert('CMYK').save(folder / 'h.jpg')
    section = {**SECTION, 'source': f'folder:{folder}', 'channels': channels, 'dir': str(tmp_path / 'prepared')}
    wanted = [x['image'].tobytes() for split in ('train', 'test') for x in data.dataset(section, split)]
    assert sorted(x.tobytes() for x in own(str(folder), (8, 8, channels))) == sorted(wanted)


def test_arrays_and_images_of_pil_are_as_files(tmp_path):
    x = noise(20, 14, 3)
    file = save(tmp_path / 'x.png', x)
    wanted = own(file)
    with open(file, 'rb') as encoded:
        content = encoded.read()
    for value in (x, x[None], [x], Image.fromarray(x), content, tmp_path / 'x.png', x.astype(np.float32) / 127.5 - 1):
        np.testing.assert_array_equal(own(value), wanted)
    with Image.open(file) as lazily:
        np.testing.assert_array_equal(own([lazily, x]), np.concatenate([wanted, wanted]))
    np.testing.assert_array_equal(own(jnp.asarray(x)), wanted)
    # What has the model's size is taken as it is, bit for bit.
    exact = noise(5, 8, 8, 1)
    np.testing.assert_array_equal(own(exact), exact)
    np.testing.assert_array_equal(own(exact[0, ..., 0]), exact[:1])
    np.testing.assert_array_equal(own((exact / 127.5 - 1).tolist()), exact)


def test_the_centre_of_an_image_is_taken():
    x = np.zeros((8, 20, 1), np.uint8)
    x[:, 6:14] = 200  # the central square
    assert (own(x) == 200).all() and (own(x.swapaxes(0, 1)) == 200).all()
    images = OwnImages('image', [x, x], (4, 4, 1), SECTION)
    assert images.note() == 'image: 2 images, 20 x 8, their central squares resized to 4 x 4'
    assert OwnImages('image', noise(16, 16), (4, 4, 1), SECTION).note() == 'image: 16 x 16, resized to 4 x 4'
    assert OwnImages('image', noise(4, 4), (4, 4, 1), SECTION).note() == ''


def test_masks_of_any_kind_are_black_and_white(tmp_path):
    hole = np.zeros((8, 8), bool)
    hole[2:5, 3:6] = True
    values = [hole, hole * np.uint8(255), hole * np.uint8(1), hole * 1.0, hole * 2.0 - 1, Image.fromarray(hole)]
    values.append(save(tmp_path / 'ones.png', (hole * np.uint8(1))[..., None]))
    values.append(save(tmp_path / 'colours.png', np.repeat(hole[..., None] * np.uint8(1), 3, -1)))
    for value in values:
        np.testing.assert_array_equal(own(value, name='mask')[0, ..., 0], hole * np.uint8(255))
    assert 'no pixel' in OwnImages('mask', np.zeros((8, 8), bool), (8, 8, 1), SECTION).doubts[0]
    # Of an image 1 is nearly black, and real numbers from 0 to 1 are read as they are, with a word about it.
    assert own(hole * np.uint8(1)).max() == 1
    assert 'give 2 x - 1' in OwnImages('image', hole * 1.0, (8, 8, 1), SECTION).doubts[0]


def test_many_files_are_read_again_instead_of_kept(tmp_path):
    for i in range(3):
        save(tmp_path / f'{i}.png', noise(8, 8, 1, seed=i))
    images = OwnImages('image', str(tmp_path), (8, 8, 1), {**SECTION, 'cache_mb': 0})
    assert images.kept is None
    np.testing.assert_array_equal(images.take(np.array([2, 0, 5])), [noise(8, 8, 1, seed=i) for i in (2, 0, 2)])
    save(tmp_path / '1.png', noise(8, 8, 1, seed=7))
    with pytest.raises(RunError, match='changed'):
        images.take(np.array([1]))


def test_bits_where_the_data_are_bits():
    """Of the image alone; a small copy is of its grey levels, as in the data."""
    x = noise(8, 8)
    np.testing.assert_array_equal(own(x, binarise='threshold')[0, ..., 0], np.where(x > 127, 255, 0))
    np.testing.assert_array_equal(own(x, name='edges', binarise='threshold')[0, ..., 0], x)
    small = Reduced(OwnImages('image', x, (8, 8, 1), {**SECTION, 'binarise': 'fixed'}), 4)
    np.testing.assert_allclose(small.take(np.arange(1)), means(x[None, ..., None], 4), atol=0.5)


def test_a_folder_with_files_that_are_no_images(tmp_path):
    save(tmp_path / 'good.png', noise(8, 8, 1))
    save(tmp_path / 'large.png', noise(40, 40, 1))
    (tmp_path / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    (tmp_path / 'notes.txt').write_text('')
    os.mkfifo(tmp_path / 'pipe.png')
    images = OwnImages('image', str(tmp_path), (8, 8, 1), {**SECTION, 'max_pixels': 1000})
    assert len(images) == 1 and 'left out 2 of 3' in images.left_out and 'bad.png' in images.left_out
    assert '1600' not in images.left_out and '40 x 40' in images.left_out
    # Where several belong together one by one, none may be left out.
    with pytest.raises(UserError, match='unclear'):
        save(tmp_path / 'more.png', noise(8, 8, 1))
        both = {'image': OwnImages('image', str(tmp_path), (8, 8, 1), SECTION),
                'mask': OwnImages('mask', noise(3, 8, 8, 1), (8, 8, 1), SECTION)}  # fmt: skip
        conditions.check_aligned(both)


MISTAKES = {
    'nowhere.png': 'no file nowhere.png',
    'https://example.com/a.png': 'address',
    '': 'name a file',
    b'no image': 'cannot be read as an image',
    b'': 'cannot be read as an image',
    '/dev/zero': 'no regular file',
}


@pytest.mark.parametrize('value, message', [
    *MISTAKES.items(), ([], 'empty'), (np.zeros((0, 8, 8, 1), np.uint8), 'empty'), (None, 'NoneType'),
    ({'a': 1}, 'dict'), (np.array(['a', None]), 'paths, arrays'), (object(), 'paths, arrays'),
    (noise(8, 8, 2), 'channels'), (noise(3, 8, 8), 'channels'), (noise(1, 8, 8, 5), 'channels'), (noise(8), 'channels'),
    (noise(0, 8, 1), 'channels'), (noise(2, 2, 8, 8, 1), 'channels'), (noise(8, 8).astype(np.int32), 'uint8'),
    (np.full((8, 8), 1.5), r'\[-1, 1\]'), (np.full((8, 8), np.nan), r'\[-1, 1\]'), (noise(8, 8) * 1.0, r'0..255'),
    ([noise(8, 8), 'nowhere.png'], 'no file'), ([[1, 2], [3]], 'no array'), (3, 'channels'),
])  # fmt: skip
def test_says_what_is_wrong_with_images(value, message):
    with pytest.raises(UserError, match=message) as error:
        own(value)
    assert '\n' not in str(error.value) and str(error.value).startswith('condition image')


def test_large_images_are_refused_before_decoding():
    file = io.BytesIO()
    Image.new('1', (3000, 3000)).save(file, 'PNG')
    with pytest.raises(UserError, match='max_pixels'):
        own(file.getvalue(), max_pixels=1_000_000)
    with pytest.raises(UserError, match='max_pixels'):
        own(Image.new('1', (3000, 3000)), max_pixels=1_000_000)


# --- how many there are, and what belongs together


@functools.cache
def assembled(name: str):
    config = tiny(name)
    return assemble(config), config


def read(name: str, condition, n=None):
    return conditions.read(*assembled(name), condition, n)


def test_one_value_or_one_for_each_sample():
    x = noise(3, 8, 8, 1)
    for condition, n, wanted in [
        ({'image': x[:1]}, None, 1), ({'image': x}, None, 3), ({'image': x}, 3, 3), ({'image': x[0]}, 5, 5),
        ({'label': 3}, None, 0), ({'label': [3]}, None, 1), ({'label': [3]}, 4, 4), ({'label': np.arange(3)}, None, 3),
        ({'label': (1, 2, 3), 'image': x[0]}, None, 3), ({'label': 2, 'image': x}, None, 3), ({}, None, 0), ({}, 7, 7),
    ]:  # fmt: skip
        assert read('stargan2_digits', condition, n).n == wanted, condition
    for condition, n in [
        ({'image': x}, 2), ({'image': x, 'label': [1, 2]}, None), ({'label': [1, 2]}, 3), ({'image': x}, 1),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=r'leave n out|one for each'):
            read('stargan2_digits', condition, n)
    provide = conditions.provider(*assembled('stargan2_digits'), {'label': [4, '2', np.int64(9)], 'image': x})
    batch = provide(np.array([2, 0]))
    assert batch['label'].tolist() == [9, 4] and set(batch) == {'index', 'label', 'image'}
    np.testing.assert_array_equal(batch['image'], x[[2, 0]])


@pytest.mark.parametrize('name, condition, message', [
    ('stargan2_digits', {'label': True}, 'NUMBER'), ('stargan2_digits', {'label': 1.5}, 'NUMBER'),
    ('stargan2_digits', {'label': [1, 'x']}, 'NUMBER'), ('stargan2_digits', {'label': []}, 'empty'),
    ('stargan2_digits', {'label': [1, 10]}, 'between 0 and 9'), ('stargan2_digits', {'domain': 3}, 'set label'),
    ('stargan2_digits', {'colour': 3}, 'label, image, reference'), ('stargan2_digits', 'label=3', 'must be a dict'),
    ('pix2pix_shapes', {'image': noise(8, 8, 3)}, 'made of sketch'),
    ('cyclegan_shapes', {'image': noise(8, 8), 'other': noise(8, 8)}, 'leave one out'),
    ('superresolving_digits', {'image': noise(8, 8), 'low_resolution': noise(4, 4)}, 'leave one out'),
    ('upsampler_shapes', {'image': noise(8, 8), 'low_resolution': noise(8, 8)}, 'leave one out'),
    ('inpainting_shapes', {'image': noise(9, 9), 'mask': noise(8, 8)}, 'one size'),
    ('completing_digits', {'image': noise(2, 8, 9, 1), 'mask': noise(9, 8)}, '9 x 8 pixels and mask 8 x 9'),
    ('vae_digits', {'label': 3}, 'conditions: image'), ('ddpm_digits', {'mask': noise(8, 8)}, 'read beside image'),
    ('vae_digits', {'image': noise(8, 8), 'label': 1}, 'no condition'),
    ('conditional_vae_digits', {'image': noise(8, 8)}, 'label'), ('dcgan_digits', {'image': noise(8, 8)}, 'has none'),
    ('classifier_digits', {'image': noise(8, 8)}, 'draws no images'),
])  # fmt: skip
def test_says_what_is_wrong_with_conditions(name, condition, message, no_compile):
    with pytest.raises(UserError, match=message) as error:
        read(name, condition)
    assert '\n' not in str(error.value)


def test_arrays_that_are_no_images(tmp_path):
    """Any feature of the data; from a file, which is not unpickled and may not claim more than it holds."""
    shape = jax.ShapeDtypeStruct((3,), np.float32)
    rows = np.arange(6.0).reshape(2, 3)
    for value, wanted in [(rows, rows), (rows[0], rows[:1]), ([1, 2, 3], [[1, 2, 3]]), (rows.tolist(), rows)]:
        np.testing.assert_array_equal(conditions.arrays('embedding', value, shape).array, wanted)
    path = str(tmp_path / 'x.npy')
    np.save(path, rows)
    np.testing.assert_array_equal(conditions.arrays('embedding', path, shape).array, rows)
    with open(path, 'r+b') as file:
        content = file.read().replace(b"'shape': (2, 3)", b"'shape': (9, 3)")
    for damaged in (content, content[:20], b''):
        (tmp_path / 'damaged.npy').write_bytes(damaged)
        with pytest.raises(UserError, match='cannot be read as an array'):
            conditions.arrays('embedding', str(tmp_path / 'damaged.npy'), shape)
    np.save(path, np.array([{}], object), allow_pickle=True)
    for value in (path, rows[:, :2], [[1, 2, 3], [4]], [np.nan, 1, 2], 'nowhere', np.zeros((0, 3)), ['a', 'b', 'c']):
        with pytest.raises(UserError, match='condition embedding'):
            conditions.arrays('embedding', value, shape)
    with pytest.raises(UserError, match='int32'):
        conditions.arrays('factors', [0.5, 1, 2], jax.ShapeDtypeStruct((3,), np.int32))


def test_pairs_are_in_the_order_of_their_names(tmp_path):
    for part, names in {'image': 'abc', 'mask': 'abc', 'others': 'xyz', 'shifted': 'bcd'}.items():
        for i, name in enumerate(names):
            save(tmp_path / part / f'{name}.png', noise(8, 8, 1, seed=i))
    image = str(tmp_path / 'image')
    for part in ('mask', 'others'):
        assert read('completing_digits', {'image': image, 'mask': str(tmp_path / part)}).n == 3
    with pytest.raises(UserError, match=r'a\.png and .*b\.png do not'):
        read('completing_digits', {'image': image, 'mask': str(tmp_path / 'shifted')})


def test_samples_are_named_after_their_files(tmp_path):
    files = [save(tmp_path / name, noise(8, 8, 1)) for name in ('a.png', 'a.jpg', 'A.bmp', 'a-2.png', 'sub/a.gif')]
    given = read('stargan2_digits', {'image': files})
    assert given.names(5) == ['a', 'a-3', 'A-4', 'a-2', 'a-5']
    assert given.sources(1) == {'image': files[1]}
    assert read('stargan2_digits', {'image': files[0]}).names(3) == ['a', 'a-2', 'a-3']
    assert read('stargan2_digits', {'image': files[3], 'reference': files[:2]}).names(2) == ['a-2_a', 'a-2_a-2']
    assert read('stargan2_digits', {'reference': files[0]}).names(1) == ['a']
    assert read('stargan2_digits', {'image': [noise(8, 8)] * 2}).names(2) == []
    assert [conditions.stem(path) for path in ('/x/..png', '.hidden.png', 'a\nb.png', 'ä/ö ü.x.png', 'x' * 300)] == [
        '_.png', '_hidden', 'a_b', 'ö ü.x', 'x' * 80
    ]  # fmt: skip
    assert conditions.stem('字' * 300) == '字' * 26 and conditions.stem(os.fsdecode(b'a\xff.png')) == 'a_'
    named = conditions.unique(['a', 'a', 'a-2', 'A', 'a'])
    assert len({name.casefold() for name in named}) == 5 and named[0] == 'a' and named[2] == 'a-2'


def test_other_files_have_another_text(tmp_path):
    one, two = (save(tmp_path / f'{i}' / 'x.png', noise(8, 8, 1, seed=i)) for i in range(2))
    texts = [read('stargan2_digits', {'image': path}).texts['image'] for path in (one, two, one)]
    assert texts[0] == texts[2] != texts[1]


# --- what is written


def listing(folder, images: dict[str, bytes]) -> None:
    os.makedirs(folder / 'images', exist_ok=True)
    about = {}
    for name, content in images.items():
        (folder / 'images' / name).write_bytes(content)
        about[name] = {'sha256': outputs.file_digest(str(folder / 'images' / name)), 'sources': {}}
    (folder / 'samples.npz').write_bytes(b'')
    (folder / 'sources.json').write_text(json.dumps(about))


def test_only_what_was_written_is_replaced(tmp_path):
    listing(tmp_path, {'photo.png': b'1', 'b.png': b'2'})
    assert sorted(outputs.written(str(tmp_path), 'samples.npz')) == [
        'images/b.png', 'images/photo.png', 'samples.npz', 'sources.json'
    ]  # fmt: skip
    with outputs.directory(str(tmp_path), 'samples.npz') as new:
        os.mkdir(os.path.join(new, 'images'))
        for name in ('samples.npz', 'images/00000.png'):
            with open(os.path.join(new, name), 'wb') as file:
                file.write(b'new')
    assert os.listdir(tmp_path / 'images') == ['00000.png'] and sorted(os.listdir(tmp_path)) == [
        'images',
        'samples.npz',
    ]


@pytest.mark.parametrize('what', ['changed', 'added', 'linked', 'unlisted', 'damaged', 'claimed'])
def test_a_persons_files_stay(what, tmp_path):
    listing(tmp_path, {'photo.png': b'1'})
    photo = tmp_path / 'images' / 'photo.png'
    if what == 'changed':
        photo.write_bytes(b'mine')
    elif what == 'added':
        (tmp_path / 'images' / 'mine.png').write_bytes(b'1')
    elif what == 'linked':
        photo.rename(tmp_path / 'elsewhere')
        photo.symlink_to(tmp_path / 'elsewhere')
    elif what == 'unlisted':
        (tmp_path / 'sources.json').unlink()
    elif what == 'damaged':
        (tmp_path / 'sources.json').write_text('[' * 100_000)
    else:
        (tmp_path / 'sources.json').write_text('{"photo.png": {"sha256": null}}')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with pytest.raises(UserError, match='was not written by jaxgen'), outputs.directory(str(tmp_path), 'samples.npz'):
        pass
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}


# --- what each family makes of them


@functools.cache
def fresh(name: str) -> run.Run:
    """A run of a tiny config, with the weights before the first update."""
    a, config = assembled(name)
    state = jax.jit(a.family.init)(jax.random.key(0), first_batch(config), a.frozen)
    return run.Run('nowhere', config, a, state, 'ema')


def means(x: np.ndarray, side: int) -> np.ndarray:
    """Means of squares of images [n, H, W, C]."""
    n, h, w, c = x.shape
    return x.reshape(n, side, h // side, side, w // side, c).mean((2, 4))


def shape_of(name: str) -> tuple[int, ...]:
    return assembled(name)[0].spec.features['image'].shape


def drawn(name: str, seed: int = 0, **condition) -> np.ndarray:
    return fresh(name).sample(seed=seed, condition=condition)


def test_a_hole_of_ones_own_is_completed():
    x, mask = noise(2, *shape_of('completing_digits')), noise(8, 8) > 128
    y = drawn('completing_digits', image=x, mask=mask)
    np.testing.assert_array_equal(y[:, ~mask], x[:, ~mask])
    assert (y[:, mask] != x[:, mask]).any()
    np.testing.assert_array_equal(y, drawn('completing_digits', seed=3, image=x, mask=mask))
    # The brighter half of a mask is the hole.
    grey = np.where(mask, 128, 127).astype(np.uint8)
    np.testing.assert_array_equal(y, drawn('completing_digits', image=x, mask=grey))


def test_an_image_is_made_larger(tmp_path):
    name = 'superresolving_digits'
    x = noise(2, *shape_of(name)) // 4 * 4 // 2 + 64
    small = means(np.repeat(np.repeat(x[:, ::2, ::2], 2, 1), 2, 2), 4).astype(np.uint8)
    files = [save(tmp_path / f'{i}.png', one) for i, one in enumerate(small)]
    y = drawn(name, low_resolution=files)
    wanted = drawn(name, image=np.repeat(np.repeat(small, 2, 1), 2, 2))
    np.testing.assert_allclose(y.astype(int), wanted.astype(int), atol=1)


@slow
def test_holes_are_inpainted():
    x, mask = noise(2, *shape_of('inpainting_shapes')), noise(*shape_of('inpainting_shapes')[:2]) > 128
    y = drawn('inpainting_shapes', image=x, mask=mask)
    np.testing.assert_array_equal(y[:, ~mask], x[:, ~mask])
    np.testing.assert_array_equal(y, drawn('inpainting_shapes', seed=3, image=x, mask=mask))
    film = fresh('inpainting_shapes').film(2, 4, condition={'image': x, 'mask': mask})
    np.testing.assert_array_equal(film[:, 0, 3], x)  # the last frame is the image itself


@slow
def test_an_upsampler_reads_the_means_of_an_image_or_a_small_one():
    name = 'upsampler_shapes'
    side = assembled(name)[0].spec.features['low_resolution'].shape[0]
    x = noise(2, *shape_of(name))
    small = np.rint(means(x, side)).astype(np.uint8)
    np.testing.assert_array_equal(drawn(name, image=x), drawn(name, low_resolution=small))
    assert (drawn(name, image=x) != drawn(name, image=x[::-1])).any()


@slow
def test_colours_keep_the_luma_of_a_grey_image():
    name = 'colourising_shapes'
    x = noise(1, *shape_of(name)[:2], 1) // 4 + 96
    y = drawn(name, image=x)
    assert y.shape == (1, *shape_of(name))
    inside = ((y > 0) & (y < 255)).all(-1)
    luma = (y * np.array([0.299, 0.587, 0.114])).sum(-1)
    np.testing.assert_allclose(luma[inside], x[..., 0][inside], atol=1.01)


@slow
@pytest.mark.parametrize('name', ['denoising_digits', 'recovery_shapes'])
def test_what_is_corrupted_already_gets_no_more_noise(name):
    x = noise(1, *shape_of(name))
    r = fresh(name)
    batch = {'index': jnp.arange(1), 'corrupted': data.to_float(x)}
    key = jax.random.key(5)
    if name == 'denoising_digits':
        z = r.assembled.family.encode(r.state, {}, {'image': batch['corrupted']}, key)
        wanted = data.to_uint8(r.assembled.family.decode(r.state, {}, {}, z, key))
        np.testing.assert_allclose(drawn(name, corrupted=x).astype(int), np.asarray(wanted, int), atol=1)
        np.testing.assert_array_equal(drawn(name, corrupted=x), drawn(name, seed=1, corrupted=x))
    assert (drawn(name, image=x) != drawn(name, corrupted=x)).any()
    first = r.film(1, 2, condition={'corrupted': x})[0, 0, 0]
    np.testing.assert_allclose(first.astype(int), x[0].astype(int), atol=1)


@slow
def test_inputs_of_any_name_are_translated(tmp_path):
    name = 'pix2pix_shapes'
    x = noise(2, *shape_of(name))
    for i, one in enumerate(x):
        save(tmp_path / f'{i}.png', one)
    y = drawn(name, sketch=x)
    np.testing.assert_array_equal(drawn(name, sketch=str(tmp_path)), y)
    assert (drawn(name, sketch=x[::-1]) != y).any()
    assert fresh(name).film(2, 3, condition={'sketch': x}).shape[2] == 2  # no truth to be displayed


@slow
def test_both_directions_are_translated():
    name = 'cyclegan_shapes'
    r, x = fresh(name), noise(2, *shape_of(name))
    cycles = r.assembled.family.trajectory(
        r.state, {}, {'image': data.to_float(x), 'other': data.to_float(x)}, jax.random.key(0)
    )
    for domain in ('image', 'other'):
        wanted = np.asarray(data.to_uint8(cycles[domain][1]), int)
        np.testing.assert_allclose(drawn(name, **{domain: x}).astype(int), wanted, atol=1)
        assert len(r.film(2, 3, condition={domain: x})[0]) == 1  # one row, of the direction that there is


@slow
def test_styles_are_those_of_references():
    name = 'stargan2_digits'
    x, references = noise(2, *shape_of(name)), noise(2, *shape_of(name), seed=1)
    y = drawn(name, image=x, reference=references, label=[3, 4])
    np.testing.assert_array_equal(y, drawn(name, seed=1, image=x, reference=references, label=[3, 4]))
    assert (y != drawn(name, image=x, reference=references[::-1], label=[3, 4])).any()
    assert (drawn(name, image=x) != drawn(name, seed=1, image=x)).any()
    film = fresh(name).film(2, 11, condition={'image': x})
    assert film.shape[1] == 1
    assert fresh(name).film(2, 11, condition={'image': x, 'domain': 3}).shape[1] == 3


@slow
@pytest.mark.parametrize(
    'name',
    ['autoencoder_digits', 'vae_digits', 'vqvae_digits', 'vqgan_digits', 'kl_shapes', 'real_nvp_digits', 'glow_digits',
     'infogan_digits', 'ddpm_digits', 'dit_digits', 'stylegan2_digits'],
)  # fmt: skip
def test_an_image_is_reconstructed(name):
    """As encode and decode say; by flows exactly."""
    r, x = fresh(name), noise(1, *shape_of(name))
    y = r.sample(2, condition={'image': x})
    assert y.shape == (2, *x.shape[1:]) and y.dtype == np.uint8
    if name in ('real_nvp_digits', 'glow_digits'):
        np.testing.assert_allclose(y[:1].astype(int), x.astype(int), atol=1)
    elif name in ('autoencoder_digits', 'vqvae_digits', 'vqgan_digits', 'kl_shapes'):
        f, key = r.assembled.family, jax.random.key(0)
        z = f.encode(r.state, r.assembled.frozen, sample.to_inside({'image': jnp.asarray(x)}), key)
        wanted = data.to_uint8(f.decode(r.state, r.assembled.frozen, {}, z, key))
        np.testing.assert_allclose(y[:1].astype(int), np.asarray(wanted, int), atol=1)


@slow
def test_the_command(tmp_path, capfd, monkeypatch):
    """A folder with a file that is no image: results beside their sources, named after them; again: replaced."""
    photos = tmp_path / 'photos'
    save(photos / 'one.png', noise(40, 30, 3))
    save(photos / 'sub' / 'one.jpg', noise(30, 40, 1))
    (photos / 'bad.png').write_bytes(b'none')
    monkeypatch.setattr(run.Run, 'changes', lambda self: {})
    r = dataclasses.replace(fresh('autoencoder_digits'), workdir=str(tmp_path))
    for _ in range(2):
        command.sample_mode(r, 0, 0, {'image': str(photos)}, '', 0)
        (folder,) = (tmp_path / 'samples').iterdir()
        assert sorted(os.listdir(folder / 'images')) == ['one-2.png', 'one.png']
    said = capfd.readouterr().err
    assert 'image: 2 images, 30 x 40 to 40 x 30, their central squares resized to 8 x 8' in said
    assert 'left out 1 of 3' in said and 'bad.png' in said
    about = json.loads((folder / 'sources.json').read_text())
    assert about['one.png']['sources'] == {'image': str(photos / 'one.png')}
    y = fresh('autoencoder_digits').sample(condition={'image': str(photos)})
    for i, name in enumerate(('one', 'one-2')):
        with Image.open(folder / 'images' / f'{name}.png') as written:
            np.testing.assert_array_equal(np.asarray(written), y[i, ..., 0])
    with Image.open(folder / 'grid.png') as grid:
        tile = np.asarray(grid)[6:54, 6:54][::6, ::6]  # 8 x 8 pixels, enlarged to 48 x 48
    assert (tile == OwnImages('image', str(photos), (8, 8, 1), SECTION).take(np.array([0]))[0, ..., 0]).mean() > 0.5
