"""Decoding, cropping, resizing and randomness by number, against slow oracles and exact values."""

from __future__ import annotations

import itertools
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_sets import encoded, grey, make, refused, sixteen_bit, write_folder
from PIL import Image, ImageFile, PngImagePlugin

from jaxgen import data
from jaxgen.data import transforms
from jaxgen.errors import RunError


def test_uniform_against_integers_of_python():
    word = (1 << 64) - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    for seed, number, stream in [(0, 0, 1), (0, 1, 1), (2**31, 5, 2), (2**32 - 1, 2**62, 7)]:
        expected = (mix(mix(number ^ mix(seed)) ^ mix(stream)) >> 11) / 2**53
        assert transforms.uniform(seed, number, stream) == expected


def test_uniform_is_uniform_and_its_streams_are_independent():
    n = np.arange(100_000)
    streams = np.stack([transforms.uniform(seed, n, stream) for seed, stream in [(0, 1), (0, 2), (1, 1), (2, 1)]])
    assert (streams >= 0).all() and (streams < 1).all()
    np.testing.assert_allclose(streams.mean(1), 1 / 2, atol=0.005)
    np.testing.assert_allclose(streams.var(1), 1 / 12, atol=0.002)
    np.testing.assert_allclose(np.corrcoef(streams), np.eye(4), atol=0.015)
    assert abs(np.corrcoef(streams[0, 1:], streams[0, :-1])[0, 1]) < 0.015


def test_float_and_back_is_exact():
    x = jnp.arange(256, dtype=jnp.uint8)
    inside = jax.jit(data.to_float)(x)
    assert inside.dtype == jnp.float32 and inside.min() == -1 and inside.max() == 1
    np.testing.assert_array_equal(jax.jit(data.to_uint8)(inside), x)
    np.testing.assert_array_equal(data.to_uint8(jnp.array([-7.0, 7.0, 0.0])), [0, 255, 128])
    assert data.to_uint8(inside.astype(jnp.bfloat16)).dtype == jnp.uint8


def palette_with_transparency() -> Image.Image:
    image = Image.new('P', (1, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


ENCODED = {
    'L': (encoded(grey(7, 1, 1)), [[[7, 7, 7]]]),
    '1': (encoded(Image.fromarray(np.array([[0, 1]], bool))), [[[0, 0, 0], [255, 255, 255]]]),
    'LA': (encoded(Image.merge('LA', [grey(0, 1, 1), grey(51, 1, 1)])), [[[204, 204, 204]]]),
    'RGB': (encoded(Image.new('RGB', (1, 1), (1, 2, 3))), [[[1, 2, 3]]]),
    'RGBA': (encoded(Image.new('RGBA', (1, 1), (255, 0, 0, 0))), [[[255, 255, 255]]]),
    'RGBA half': (encoded(Image.new('RGBA', (1, 1), (255, 0, 0, 51))), [[[255, 204, 204]]]),
    'RGB with one transparent colour': (
        encoded(Image.new('RGB', (1, 1), (9, 8, 7)), transparency=(9, 8, 7)),
        [[[255, 255, 255]]],
    ),
    'P': (encoded(palette_with_transparency()), [[[255, 0, 0]]]),
    'P transparent': (encoded(palette_with_transparency(), transparency=b'\0\xff'), [[[255, 255, 255]]]),
    'I;16': (encoded(sixteen_bit([0, 257 * 100, 65535], 'I;16')), [[[0] * 3, [100] * 3, [255] * 3]]),
    'I': (encoded(sixteen_bit([0, 257 * 100, 65535], 'I'), 'TIFF'), [[[0] * 3, [100] * 3, [255] * 3]]),
    'F to 1': (encoded(sixteen_bit([0, 0.2, 1], 'F'), 'TIFF'), [[[0] * 3, [51] * 3, [255] * 3]]),
    'F to 255': (encoded(sixteen_bit([0, 20, 255], 'F'), 'TIFF'), [[[0] * 3, [20] * 3, [255] * 3]]),
    'CMYK': (encoded(Image.new('CMYK', (1, 1), (0, 255, 255, 0)), 'TIFF'), [[[255, 0, 0]]]),
    'first frame': (
        encoded(
            Image.new('RGB', (1, 1), 'red'),
            'GIF',
            save_all=True,
            append_images=[Image.new('RGB', (1, 1), 'blue')],
        ),
        [[[255, 0, 0]]],
    ),
}


@pytest.mark.parametrize('kind', ENCODED)
def test_load_of_every_mode(kind):
    bytes_, expected = ENCODED[kind]
    assert transforms.to_array(transforms.load(bytes_, 3)).tolist() == expected
    one = transforms.to_array(transforms.load(bytes_, 1))
    luma = np.array(expected) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(one[..., 0], luma, atol=0.51)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('by', ['exif', 'xmp'])
def test_load_rotates_by_exif(form, by):
    image = Image.fromarray(np.array([[0, 0, 255]], np.uint8).repeat(8, 0).repeat(8, 1))
    options = {'quality': 95} if form in ('JPEG', 'WEBP') else {}
    if by == 'exif':
        options['exif'] = exif = Image.Exif()
        exif[0x0112] = 6  # shot with the camera rotated: display it rotated clockwise
    elif form == 'PNG':
        options['pnginfo'] = PngImagePlugin.PngInfo()
        options['pnginfo'].add_itxt('XML:com.adobe.xmp', '<x tiff:Orientation="6"/>')
    elif form == 'TIFF':
        pytest.skip('its own tag says it')
    else:
        options['xmp'] = b'<x tiff:Orientation="6"/>'
    x = transforms.to_array(transforms.load(encoded(image, form, **options), 1))
    assert x.shape == (24, 8, 1) and x[2].mean() < 10 and x[-2].mean() > 245


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_load_despite_damaged_exif():
    good = encoded(grey(50), 'JPEG', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff\xff\xff')
    assert transforms.load(good, 1).size == (8, 8)


def png_of(depth: int, kind: int, rows: list[bytes], key: bytes) -> bytes:
    """A PNG one pixel high for each row of packed pixels, with a transparent value."""
    width = {(0, 1): 8, (0, 2): 4, (0, 4): 2, (0, 8): 1, (0, 16): 1, (2, 8): 1, (2, 16): 1}[kind, depth]
    chunks = [b'IHDR' + struct.pack('>IIBBBBB', width, len(rows), depth, kind, 0, 0, 0), b'tRNS' + key]
    chunks += [b'IDAT' + zlib.compress(b''.join(b'\0' + row for row in rows)), b'IEND']
    packed = (struct.pack('>I', len(c) - 4) + c + struct.pack('>I', zlib.crc32(c)) for c in chunks)
    return b'\x89PNG\r\n\x1a\n' + b''.join(packed)


@pytest.mark.parametrize(
    ('content', 'expected'),
    {
        '1 bit': (png_of(1, 0, [b'\x80'], b'\0\0'), [255] * 8),
        '2 bits': (png_of(2, 0, [b'\x1b'], b'\0\1'), [0, 255, 170, 255]),
        '4 bits': (png_of(4, 0, [b'\x23'], b'\0\2'), [255, 51]),
        '8 bits': (png_of(8, 0, [b'\7', b'\5'], b'\0\7'), [255, 5]),
        '16 bits': (png_of(16, 0, [b'\0\0', b'\1\1', b'\1\0'], b'\0\0'), [255, 1, 1]),
        '16 bits, another': (png_of(16, 0, [b'\0\0', b'\x75\x30', b'\x75\x31'], b'\x75\x30'), [0, 255, 117]),
        '24 bits': (png_of(8, 2, [b'\7\7\7', b'\5\5\5'], b'\0\7\0\7\0\7'), [255, 5]),
        '48 bits': (png_of(16, 2, [b'\7\0' * 3, b'\5\0' * 3], b'\7\0' * 3), [255, 5]),
    }.values(),
)
def test_a_transparent_value_is_white(content, expected):
    """The PNG specification scales a value of b bits by 255 / (2^b - 1); the transparent one is in b bits."""
    assert np.asarray(transforms.load(content, 1)).reshape(-1).tolist() == expected


def bomb(side: int) -> bytes:
    """A PNG with side x side pixels in its header, and none in its data."""
    chunk = b'IHDR' + struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    end = b'IDAT' + zlib.compress(b'')
    chunks = b''.join(struct.pack('>I', len(c) - 4) + c + struct.pack('>I', zlib.crc32(c)) for c in (chunk, end))
    return b'\x89PNG\r\n\x1a\n' + chunks


def test_images_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch, capfd):
    icon = struct.pack('<HHHBBBBHHII', 0, 1, 1, 16, 16, 0, 0, 1, 32, len(bomb(9000)), 22) + bomb(9000)
    loads, contents = [], (bomb(9000), icon, encoded(grey(0, 1, 90)), encoded(grey(0, 90, 1), 'BMP'))
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda self: loads.append(self.size))
    for content in contents:
        with pytest.raises(ValueError, match=r'pixels are more than config.data.max_pixels = 80$'):
            transforms.load(content, 3, 80)
    with pytest.raises(ValueError, match='9000 x 9000 pixels are more than'):
        transforms.load(bomb(9000), 3)
    assert not loads
    monkeypatch.undo()
    source = write_folder(tmp_path / 'in', range(8))
    grey(1, 100, 100).save(tmp_path / 'in' / 'large.png')
    config = make(tmp_path, source=source, max_corrupt=0.2)
    few = data.dataset({**config, 'max_pixels': 9999}, 'train')
    assert 'large.png' in capfd.readouterr().err
    more = data.dataset({**config, 'max_pixels': 10_000}, 'train')
    assert len(more) + len(data.dataset(config, 'test')) == 9 > len(few)
    with pytest.raises(RunError, match=r'more than config.data.max_pixels = 60\)'):  # of TFDS and of our own sets, too
        data.dataset(make(tmp_path, max_pixels=60), 'train')


def test_limit_of_pixels_is_that_of_the_config(monkeypatch):
    """PIL has one of its own, whatever the config allows."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
    assert transforms.load(encoded(grey(0, 20, 20)), 1, 400).size == (20, 20)


def test_cut_takes_rows_and_columns():
    x = np.arange(30, dtype=np.uint8).reshape(5, 6)
    np.testing.assert_array_equal(np.asarray(transforms.cut(Image.fromarray(x), (1, 2, 3, 4))), x[1:4, 2:6])
    for box in [(0, 0, 6, 6), (0, 1, 5, 6), (-1, 0, 2, 2), (0, 0, 0, 3)]:
        with refused(r'config.data.box = .* height 5 and width 6'):
            transforms.cut(Image.fromarray(x), box)


def test_square_is_the_largest_one():
    wide = Image.fromarray(np.arange(20, dtype=np.uint8)[None].repeat(4, 0))
    for image, axis in ((wide, 1), (wide.transpose(Image.Transpose.TRANSPOSE), 0)):

        def columns(position, image=image, axis=axis):
            return np.asarray(transforms.fit(image, (4, 4), position)).take(0, 1 - axis).tolist()

        assert columns(None) == [8, 9, 10, 11]
        assert columns(0.0) == [0, 1, 2, 3]
        assert columns(0.999) == [16, 17, 18, 19]
        assert {columns(p)[0] for p in np.linspace(0, 0.999, 200)} == set(range(17))


def test_parts_of_other_aspects_are_the_largest_ones():
    for height, width, size in (
        (12, 20, (28, 20)),
        (20, 12, (28, 20)),
        (7, 40, (2, 3)),
        (40, 7, (1, 9)),
        (5, 5, (3, 4)),
    ):
        values = np.arange(height * width).reshape(height, width).astype(np.int32)
        image = Image.fromarray(values)
        whole = size[0] * width == size[1] * height
        # The part in the image's own pixels: what `fit` resizes, where it is asked for the size that it has already.
        rows, columns = (height, round(height * size[1] / size[0])) if width * size[0] > height * size[1] else (
            round(width * size[0] / size[1]), width
        )  # fmt: skip
        assert whole or (rows == height) != (columns == width)
        for position in (None, 0.0, 0.6, 0.999):
            part = np.asarray(transforms.fit(image, (rows, columns), position))
            top, left = np.unravel_index(part[0, 0], values.shape)
            np.testing.assert_array_equal(part, values[top : top + rows, left : left + columns])
            spare = (height - rows) + (width - columns)
            assert top + left == (spare // 2 if position is None else int(position * (spare + 1)))
        assert transforms.fit(image.convert('L'), size).size == size[::-1]


def test_a_covering_image_is_no_smaller_and_no_larger_than_it_must_be():
    image = Image.fromarray(np.zeros((12, 20), np.uint8))
    assert transforms.cover(image, (6, 6)).size == (10, 6)
    assert transforms.cover(image, (9, 4)).size == (15, 9)
    assert transforms.cover(image, (4, 30)).size == (30, 18)
    assert transforms.cover(image.transpose(Image.Transpose.TRANSPOSE), (30, 4)).size == (18, 30)


def test_bits_of_grey_levels():
    levels = np.array([0, 1, 51, 128, 254, 255], np.uint8)
    images = np.broadcast_to(levels[:, None, None], (3000, 6, 4, 3))
    words = transforms.words(3, np.arange(3000), transforms.BITS)
    x = transforms.binarised(images, 'dynamic', words)
    assert x.dtype == np.uint8 and set(x.ravel()) == {0, 255}
    np.testing.assert_array_equal(x, x[..., :1].repeat(3, -1), 'grey stays grey')
    bits = x[..., 0] / 255
    p = levels / 255
    # 12,000 bits of each level: within 4 standard errors, and 0 and 255 exactly.
    np.testing.assert_allclose(bits.mean((0, 2)), p, atol=4 * np.sqrt(0.25 / 12_000))
    assert (x[:, 0] == 0).all() and (x[:, 5] == 255).all()
    # Pixels are drawn apart: beside each other, and in one place in another image.
    middle = bits[:, 3] - 128 / 255
    assert abs((middle[:, :-1] * middle[:, 1:]).mean()) < 4 * 0.25 / np.sqrt(9000)
    assert abs((middle[:-1] * middle[1:]).mean()) < 4 * 0.25 / np.sqrt(12_000)
    np.testing.assert_array_equal(x[7:9], transforms.binarised(images[7:9], 'dynamic', words[7:9]))
    assert (transforms.binarised(images, 'threshold') == np.where(levels > 127, 255, 0)[:, None, None]).all()


def test_fixed_bits_are_of_the_image_alone():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 6, 1), np.uint8)
    bits = transforms.binarised(images, 'fixed')
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(transforms.binarised(images[order], 'fixed'), bits[order])
    assert abs((bits / 255).mean() - (images / 255).mean()) < 4 * 0.5 / np.sqrt(bits.size)
    np.testing.assert_array_equal(transforms.binarised(bits, 'fixed'), bits, 'black and white stays')
    # Images that differ in one pixel are drawn apart.
    one = images[:1].copy()
    one[0, 0, 0] ^= 1
    assert (transforms.binarised(one, 'fixed') != bits[:1]).mean() > 0.1


def test_resizing_does_not_alias():
    """Fine stripes become their mean; PIL without its growing support would pick black or white."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = np.asarray(transforms.fit(stripes, (8, 8)))
    assert np.abs(small.astype(int) - 127).max() <= 6
    assert np.asarray(transforms.fit(grey(9, 1, 1), (32, 32))).tolist() == np.full((32, 32), 9).tolist()


def test_rows_and_columns_of_a_window():
    square = Image.fromarray(np.arange(25, dtype=np.uint8).reshape(5, 5))
    for row, column in itertools.product((0, 1, 2), (0, 1, 2)):
        x = np.asarray(transforms.window(square, (3, 3), (row + 0.5) / 3, (column + 0.5) / 3))
        np.testing.assert_array_equal(x, np.asarray(square)[row : row + 3, column : column + 3])


@pytest.mark.parametrize('fill', ['reflect', 'edge'])
def test_moved_images_are_those_of_padding_and_cutting(fill):
    """A slow loop over pixels, and numpy's own padding."""
    x = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    padded = np.pad(x, ((4, 4), (4, 4), (0, 0)), fill)
    for down, right in itertools.product(range(-4, 5), repeat=2):
        y = transforms.moved(x, down, right, fill)
        np.testing.assert_array_equal(y, padded[4 - down : 9 - down, 4 - right : 10 - right])
        for i, j in itertools.product(range(5), range(6)):
            if 0 <= i - down < 5 and 0 <= j - right < 6:
                assert (y[i, j] == x[i - down, j - right]).all()
    assert transforms.moved(x[:1, :1], 3, -2, fill).shape == (1, 1, 3)


def test_rectangles_have_the_given_areas_and_aspects():
    u = np.random.default_rng(0).random((4000, 10, 4))
    area, aspect = (0.2, 0.8), (0.5, 2.0)
    boxes = np.array([transforms.rectangle(300, 300, area, aspect, one) for one in u])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 300).all() and (left + w <= 300).all()
    fraction, ratio = h * w / 90_000, w / h
    assert fraction.min() > 0.19 and fraction.max() < 0.81 and ratio.min() > 0.49 and ratio.max() < 2.03
    # The first try is uniform in area and in the logarithm of the aspect; where it fits it is taken.
    fits = np.array([rectangle_fits(one[0], area, aspect) for one in u])
    np.testing.assert_allclose(fraction[fits], 0.2 + 0.6 * u[fits, 0, 0], atol=0.01)
    np.testing.assert_allclose(np.log(ratio[fits]), np.log(0.5) + u[fits, 0, 1] * np.log(4), atol=0.02)
    np.testing.assert_array_equal(top[fits], np.floor(u[fits, 0, 2] * (301 - h[fits])))
    assert 0.5 < fits.mean() < 1 and abs(np.log(ratio).mean()) < 0.05
    # None fits: the largest central one. A strip of 10 x 100 and aspects from 3/4 to 4/3.
    assert transforms.rectangle(10, 100, (0.9, 1.0), (0.75, 4 / 3), u[0]) == (0, 43, 10, 13)
    assert transforms.rectangle(100, 10, (0.9, 1.0), (0.75, 4 / 3), u[0]) == (43, 0, 13, 10)
    assert transforms.rectangle(64, 64, (1.0, 1.0), (1.0, 1.0), u[0]) == (0, 0, 64, 64)


def rectangle_fits(u, area, aspect) -> bool:
    size = (area[0] + u[0] * (area[1] - area[0])) * 90_000
    ratio = np.exp(np.log(aspect[0]) + u[1] * np.log(aspect[1] / aspect[0]))
    return max(np.sqrt(size * ratio), np.sqrt(size / ratio)) <= 300
