"""A run's functions on arrays: encode, decode, classify, denoise, interpolate, save, and what they refuse."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from support import assemble, first_batch, tiny

from jaxgen import config as configs
from jaxgen import data, functions, randomness
from jaxgen.errors import UserError
from jaxgen.run import Run

BATCH = 4  # of sampling, in which the functions work too


@functools.cache
def run(name: str) -> Run:
    """A run of a tiny config, with the weights before the first update."""
    config = tiny(name)
    a = assemble(config)
    state = jax.jit(a.family.init)(jax.random.key(0), first_batch(config), a.frozen)
    return Run('runs/nowhere', a.config, a, state.replace(params=None, opt=None), 'ema')


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), np.uint8)


def direct(r: Run, name: str, batch: dict, *more):
    """A function of the family on the whole batch at once."""
    key = randomness.stream(jax.random.key(0), name)
    function = getattr(r.assembled.family, name)
    return function(r.state, r.assembled.frozen, batch, *more, *(() if name == 'denoise' else (key,)))


@pytest.mark.parametrize('n', [0, 1, 9])
def test_any_number_is_as_one_batch(n):
    r, x = run('vae_digits'), images(n)
    z = r.encode(x)
    assert z.dtype == np.float32 and z.shape[0] == n
    if not n:
        assert z.shape == (0, *r.assembled.family.latents.shape) and r.decode(z).shape == (0, 8, 8, 1)
        return
    np.testing.assert_allclose(z, direct(r, 'encode', {'image': data.to_float(x)}), atol=1e-5)
    decoded = direct(r, 'decode', {}, z)
    np.testing.assert_allclose(r.decode(z, dtype=np.float32), decoded, atol=1e-5)
    assert np.abs(r.decode(z).astype(int) - np.asarray(data.to_uint8(decoded)).astype(int)).max() <= 1
    np.testing.assert_array_equal(r.sample(latents=z), r.decode(z))
    with pytest.raises(UserError, match='leave n out'):
        r.sample(n + 1, latents=z)


def test_other_numbers_compile_nothing():
    r, compiled = run('autoencoder_digits'), []
    r.encode(images(3))

    def listen(event: str, duration: float, **_):
        compiled.append(event) if 'backend_compile' in event else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for n in (4, 5, 1, 11):
            assert len(r.encode(images(n))) == n
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    sizes = functions.program(r.assembled.family, 'encode').sizes
    assert [size for _, size in sizes] == [3]


@pytest.mark.slow
def test_options_of_sampling_have_a_program_each():
    r = run('ddpm_digits').with_sampling(sampler={'name': 'ddim', 'steps': 3})
    programs = [
        functions.program(r.with_sampling(**{'sampler.steps': k}).assembled.family, 'decode') for k in (3, 4, 3)
    ]
    assert programs[0] is programs[2] is not programs[1]


def test_floats_are_from_minus_one_to_one_and_come_back():
    r, x = run('vae_digits'), images(3)
    floats = np.asarray(data.to_float(x))
    for given in (floats, floats.astype(np.float64), jnp.asarray(floats), floats.tolist()):
        np.testing.assert_allclose(r.encode(np.asarray(given)), r.encode(x), atol=1e-5)
    assert r.reconstruct(x).dtype == np.uint8
    back = r.reconstruct(floats)
    assert back.dtype == np.float32 and np.abs(back).max() <= 1
    np.testing.assert_array_equal(data.to_uint8(jnp.asarray(back)), r.reconstruct(x))


@pytest.mark.slow
def test_codes():
    r, x = run('vqvae_digits'), images(5)
    (codes,) = r.encode(x)
    assert codes.dtype == np.int32 and codes.shape[1:] == r.assembled.family.latents.grids[0]
    np.testing.assert_array_equal(r.reconstruct(x), r.decode((codes.astype(np.int64),)))
    vocabulary = r.assembled.family.latents.vocabulary
    for wrong, message in [
        (codes, 'must be a tuple'),
        ((codes, codes), 'must be a tuple'),
        ((codes + vocabulary,), f'integers from 0 to {vocabulary - 1}'),
        ((codes.astype(float),), 'integers from 0'),
        ((codes[:, :1],), r'must be \[n'),
    ]:
        with pytest.raises(UserError, match=message):
            r.decode(wrong)
    with pytest.raises(UserError, match='nothing lies between them'):
        r.interpolate(x, x)


def test_latents_under_conditions():
    r = run('conditional_gan_digits')
    z = np.random.default_rng(0).normal(size=(3, *r.assembled.family.latents.shape))
    drawn = r.sample(latents=z, condition={'label': 7})
    expected = direct(r, 'decode', {'label': jnp.full(3, 7), 'index': jnp.arange(3)}, jnp.asarray(z, jnp.float32))
    assert np.abs(drawn.astype(int) - np.asarray(data.to_uint8(expected)).astype(int)).max() <= 1
    np.testing.assert_array_equal(r.sample(latents=z, seed=[0, 4], condition={'label': 7})[3:], drawn)
    for wrong, message in ({'dtype': 'pixels'}, 'dtype must be'), ({'latents': z * 1j}, 'must be real numbers'):
        with pytest.raises(UserError, match=message):
            r.decode(**{'latents': z, 'condition': {'label': 7}, **wrong})
    with pytest.raises(UserError, match='condition label=11'):
        r.decode(z, {'label': 11})
    rows = r.interpolate(z[:2], z[1:], 4)
    assert rows.shape == (2, 4, 8, 8, 1) and rows.dtype == np.uint8
    np.testing.assert_array_equal(rows[:, 0], r.decode(z[:2]))  # labels count up, as in sampling
    np.testing.assert_array_equal(rows[:, -1], r.decode(z[1:]))


def test_interpolation_between_images():
    r, a, b = run('vae_digits'), images(2), images(2, seed=1)
    rows = r.interpolate(a, b, 3, path='linear')
    np.testing.assert_array_equal(rows[:, 0], r.reconstruct(a))
    np.testing.assert_array_equal(rows[:, 1], r.decode((r.encode(a) + r.encode(b)) / 2))
    for wrong, message in [({'n': 1}, 'n must be from 2'), ({'path': ['linear']}, 'linear or spherical')]:
        with pytest.raises(UserError, match=message):
            r.interpolate(a, b, **wrong)
    with pytest.raises(UserError, match='as many'):
        r.interpolate(a, b[:1])


@pytest.mark.slow
def test_classes_of_noisy_images():
    r, x = run('noisy_classifier_digits'), images(5)
    np.testing.assert_allclose(r.classify(x), direct(r, 'classify', {'image': data.to_float(x)}), atol=1e-5)
    noisy, sigma = 3 * np.random.default_rng(0).normal(size=(5, 8, 8, 1)), np.linspace(0.5, 3, 5)
    batch = {'image': jnp.asarray(noisy, jnp.float32), 'sigma': jnp.asarray(sigma, jnp.float32)}
    np.testing.assert_allclose(r.classify(noisy, sigma), direct(r, 'classify', batch), atol=1e-5)
    with pytest.raises(UserError, match='not trained on noise'):
        run('classifier_digits').classify(x, sigma=1.0)


@pytest.mark.slow
def test_denoise():
    r, x = run('ddpm_digits'), np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    batch = {'index': jnp.arange(5)}
    expected = direct(r, 'denoise', batch, jnp.asarray(x), jnp.full(5, 0.7))
    np.testing.assert_allclose(r.denoise(x, 0.7), expected, atol=1e-4)
    clean = r.denoise(images(2), [0.1, 0.2])
    assert clean.dtype == np.uint8 and clean.shape == (2, 8, 8, 1)
    for wrong in (0, -1.0, [1, 2, 3], np.nan, 'much', 1e39, 1j):
        with pytest.raises(UserError, match='sigma must be'):
            r.denoise(images(2), wrong)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (images(2)[0], r'must be \[n, 8, 8, 1\]; they are \[8, 8, 1\]: for one of them, images\[None\]'),
        (images(2)[..., 0], r'they are \[2, 8, 8\]'),
        (np.zeros((2, 9, 8, 1), np.uint8), r'they are \[2, 9, 8, 1\]'),
        (images(2).astype(np.int64), 'they are int64'),
        (images(2) > 9, 'they are bool'),
        (images(2).astype(np.float32), r'floats must lie in \[-1, 1\]; they are from'),
        (np.full((1, 8, 8, 1), np.nan, np.float32), 'must be finite'),
        ('photo.png', 'must be uint8'),
        ([[1], [1, 2]], 'must be an array'),
        (np.uint8(3), r'they are \[\]'),
    ],
)
def test_images_that_are_none(wrong, message, no_compile):
    with pytest.raises(UserError, match=message) as e:
        functions.as_images('images', wrong, (8, 8, 1))
    assert '\n' not in str(e.value)


def test_floats_from_zero_to_one_are_announced(capfd):
    functions.as_images('images', images(2) / 255, (8, 8, 1))
    assert 'floats mean [-1, 1]' in capfd.readouterr().err
    functions.as_images('images', images(2) / 127.5 - 1, (8, 8, 1))
    assert not capfd.readouterr().err


def test_a_function_that_the_family_lacks():
    for name, call, message in [
        (
            'classifier_digits',
            lambda r: r.decode(np.zeros((1, 4))),
            'a classifier has no decode: it has encode, classify',
        ),
        ('vae_digits', lambda r: r.classify(images(1)), 'a vae has no classify: it has sample, encode, decode'),
        ('pixelcnn_digits', lambda r: r.sample(latents=np.zeros((1, 4))), 'a pixelcnn has no decode: it has sample'),
        ('classifier_digits', lambda r: r.reconstruct(images(1)), 'no decode'),
        ('conditional_gan_digits', lambda r: r.encode(images(1)), 'a gan has no encode'),
    ]:
        with pytest.raises(UserError, match=message):
            call(run(name))
    with pytest.raises(UserError, match='leave condition out'):
        r = run('vae_digits')
        r.decode(r.encode(images(1)), {'label': 3})


def test_saved_weights_are_read_by_others(tmp_path):
    r = run('conditional_gan_digits')
    r.save(tmp_path / 'gan.safetensors')
    with safetensors.safe_open(tmp_path / 'gan.safetensors', 'numpy') as file:
        about, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert configs.complete(json.loads(about.pop('config'))) == r.config
    assert about == {'jaxgen': '0.2.0', 'family': 'gan', 'step': '0', 'weights': 'ema'}
    state = {'ema': r.state.ema, 'extra': r.state.extra}
    read = jax.tree.map_with_path(lambda keys, _: arrays[jax.tree_util.keystr(keys, simple=True, separator='/')], state)
    jax.tree.map(np.testing.assert_array_equal, read, state)
    assert len(arrays) == len(jax.tree.leaves(state))
    for wrong, message in [('weights.bin', 'must end in .safetensors'), ('gs://x/y.safetensors', 'is an address')]:
        with pytest.raises(UserError, match=message):
            r.save(wrong)
    (tmp_path / 'folder.safetensors').mkdir()
    with pytest.raises(UserError, match='is a folder'):
        r.save(tmp_path / 'folder.safetensors')
    with pytest.raises(UserError, match='path must be a path; it is None'):
        r.save(None)
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written to'):
        r.save(tmp_path / 'file' / 'x.safetensors')


def test_repr_is_a_few_lines():
    text = repr(run('conditional_gan_digits'))
    generator = sum(x.size for x in jax.tree.leaves(run('conditional_gan_digits').state.ema['generator']))
    assert len(text.splitlines()) == 5 and max(map(len, text.splitlines())) < 120
    for part in ('gan in runs/nowhere', 'digits, 8 x 8 x 1, under label', 'ema of step 0', f'generator {generator:,}'):
        assert part in text
    assert 'sample, decode, interpolate, evaluate, save' in text
