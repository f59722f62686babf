"""The Inception network of FID against torch-fidelity's, and what load makes of people's files.

All weights are random, drawn so that activations keep their scale.
"""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import os
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy
from support import assert_same, torch_fidelity

from jaxgen.errors import UserError
from jaxgen.metrics import inception
from jaxgen.networks.inception import Inception, resize_tf1
from jaxgen.weights import mapping
from jaxgen.weights.features import INCEPTION

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """Random weights with torch's names and layout."""
    rng = np.random.default_rng(0)
    tensors = {}
    for entry in mapping.entries(INCEPTION, inception.shapes()):
        leaf, fan_in, shape = entry.path.split('/')[-1], np.prod(entry.shape[:-1]), entry.their_shape()
        if leaf in ('kernel', 'fc.kernel'):
            value = rng.normal(scale=(2 / fan_in) ** 0.5, size=shape)
        elif leaf in ('scale', 'var'):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(scale=0.2, size=shape)
        tensors[entry.names[0]] = value.astype(np.float32)
    return tensors


@pytest.fixture(scope='module')
def file(tmp_path_factory) -> str:
    """The weights as a person's .safetensors."""
    path = str(tmp_path_factory.mktemp('weights') / 'random.safetensors')
    safetensors.numpy.save_file(weights(), path)
    return path


@pytest.fixture(scope='module')
def pth(tmp_path_factory) -> str:
    """The weights as a person's .pth, with the counts that torch keeps."""
    torch = pytest.importorskip('torch')
    path = str(tmp_path_factory.mktemp('weights') / 'random.pth')
    state = {name: torch.from_numpy(a) for name, a in weights().items()}
    counts = {n.replace('running_mean', 'num_batches_tracked'): torch.tensor(7) for n in state if 'running_mean' in n}
    torch.save({**state, **counts}, path)
    return path


def message(path, cache='never') -> str:
    with pytest.raises(UserError) as caught:
        inception.load(str(path), str(cache))
    assert '\n' not in str(caught.value)
    assert not os.path.exists('never')
    return str(caught.value)


def test_parameters():
    sizes = {path: np.prod(shape) for path, shape in inception.shapes().items() if path.startswith('params/')}
    assert sum(sizes.values()) == 23_850_960


def test_equals_torch_fidelity(pth, tmp_path, capsys):
    fidelity = torch_fidelity()
    import torch

    network = fidelity.FeatureExtractorInceptionV3('test', ['2048', 'logits_unbiased'], pth)
    hooked = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: hooked.update(spatial=args[-1]))
    images = np.random.default_rng(1).integers(0, 256, (2, 320, 37, 3)).astype(np.uint8)  # one side shrinks, one grows
    images[1] = 255 - images[1] // 8
    features, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = {'features': features, 'logits': logits, 'spatial': hooked['spatial'][:, :7].permute(0, 2, 3, 1)}

    _, variables = inception.load(pth, str(tmp_path))
    got = jax.jit(Inception().apply)(variables, images)
    assert {k: (v.shape, str(v.dtype)) for k, v in got.items()} == {
        'features': ((2, 2048), 'float32'),
        'logits': ((2, 1008), 'float32'),
        'spatial': ((2, 2023), 'float32'),
    }
    for name, reference in expected.items():
        reference = reference.reshape(2, -1).numpy()
        assert 0.01 < np.abs(reference).max() < 1000  # else the comparison says little
        assert np.abs(reference[0] - reference[1]).max() > 0.01 * np.abs(reference).max()
        assert np.abs(got[name] - reference).max() <= 1e-4 * np.abs(reference).max(), name


@pytest.mark.parametrize('old, new', [((1, 1), (5, 3)), ((6, 9), (6, 9)), ((2, 45), (299, 7)), ((320, 31), (299, 299))])
def test_resize(old, new):
    images = np.random.default_rng(2).uniform(0, 255, (2, *old, 3)).astype(np.float32)
    got = np.asarray(jax.jit(resize_tf1, static_argnums=(1, 2))(images, *new))
    assert got.shape == (2, *new, 3) and got.dtype == np.float32
    if old == new:
        np.testing.assert_array_equal(got, images)
    torch_fidelity()
    import torch
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    expected = resize(torch.from_numpy(images).permute(0, 3, 1, 2), new, align_corners=False)
    np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)


def test_resize_reads_at_the_corner():
    """Pixel i of four reads at i / 2: no half-pixel centres, the last one held."""
    got = resize_tf1(np.float32([[0, 10]]).reshape(1, 1, 2, 1), 1, 4)
    np.testing.assert_array_equal(np.asarray(got).ravel(), [0, 5, 10, 10])


def test_conversion_is_kept_and_needs_no_torch(pth, file, tmp_path, monkeypatch, capsys):
    name, variables = inception.load(pth, str(tmp_path))
    (kept,) = tmp_path.iterdir()
    sha256 = kept.name.removeprefix('inception-').removesuffix('.safetensors')
    assert name == f'inception_{sha256[:8]}'
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'WARNING' in said and sha256 in said
    monkeypatch.setitem(sys.modules, 'torch', None)
    again = inception.load(pth, str(tmp_path))
    assert again[0] == name
    assert_same(again[1], variables)
    assert_same(inception.load(file, str(tmp_path / 'other'))[1], variables)  # the same weights, another file
    moved = inception.load(str(kept.rename(tmp_path / 'mine.safetensors')), 'never')
    assert moved[0] == name and not os.path.exists('never')
    assert_same(moved[1], variables)
    assert 'pip install torch' in message(pth, tmp_path)


def test_published_name(file, tmp_path, monkeypatch, capsys):
    name, _ = inception.load(file, str(tmp_path))
    (kept,) = tmp_path.iterdir()
    sha256 = kept.name.removeprefix('inception-').removesuffix('.safetensors')
    capsys.readouterr()
    monkeypatch.setitem(inception.PUBLISHED, 'sha256', sha256)
    for path in (file, str(kept)):
        name, _ = inception.load(path, str(tmp_path))
        assert name == 'inception'
    assert not capsys.readouterr().err


def test_damaged_conversion_is_made_again(file, tmp_path, capsys):
    _, variables = inception.load(file, str(tmp_path))
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    foreign = safetensors.numpy.save({'params/fc.bias': np.zeros(7)}, {'source': '0' * 64})
    for damaged in (whole[: len(whole) // 2], b'', foreign):
        kept.write_bytes(damaged)
        capsys.readouterr()
        assert_same(inception.load(file, str(tmp_path))[1], variables)
        assert f'{kept} is damaged' in capsys.readouterr().err
        assert kept.read_bytes() == whole


def test_two_convert_at_once(file, tmp_path, capsys):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: inception.load(file, str(tmp_path)), range(2))
    assert_same(one[1], other[1])
    assert one[0] == other[0] and len(list(tmp_path.iterdir())) == 1
    assert 'damaged' not in capsys.readouterr().err


def test_full_disk(file, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'replace', full)
    name, _ = inception.load(file, str(tmp_path))
    assert name.startswith('inception_')
    assert 'could not be kept' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_file(tmp_path):
    for path in ('', tmp_path / 'none.pth', tmp_path):
        said = message(path)
        assert '--inception=PATH' in said and 'https://' in said and inception.PUBLISHED['sha256'] in said


class Hostile(NamedTuple):
    """Makes a folder where it is unpickled."""

    folder: pathlib.Path

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_not_weights(tmp_path):
    bad = tmp_path / 'bad.safetensors'
    bad.write_bytes(b'nothing')
    assert 'no safetensors file' in message(bad)
    torch = pytest.importorskip('torch')
    bad = tmp_path / 'bad.pth'
    for content in (b'', b'nothing'):
        bad.write_bytes(content)
        assert 'cannot be read' in message(bad)
    for content, line in (
        ([1, 2], 'holds no tensors'),
        ({'a': 'text'}, 'holds no tensors'),
        ({'a': Hostile(tmp_path / 'harm')}, 'is not read'),
    ):
        torch.save(content, bad)
        assert line in message(bad)
    assert not (tmp_path / 'harm').exists()


def test_other_weights(tmp_path):
    path = tmp_path / 'other.safetensors'
    small = {name: a for name, a in weights().items() if name.startswith('Conv2d_1a')}
    safetensors.numpy.save_file(small, path)
    assert 'does not fit the Inception network of FID' in message(path) and 'missing: ' in message(path)
    safetensors.numpy.save_file({**small, 'Conv2d_1a_3x3.conv.weight': np.zeros((32, 1, 3, 3), np.float32)}, path)
    assert 'Conv2d_1a_3x3.conv.weight is [32, 1, 3, 3] and [32, 3, 3, 3] by the Inception network' in message(path)
    torchvision = {'AuxLogits.fc.bias': np.zeros(1000), 'fc.weight': np.zeros((1000, 2048))}
    safetensors.numpy.save_file(torchvision, path)
    assert 'left over: AuxLogits.fc.bias [1000]' in message(path)
    assert "torchvision's network, another one" in message(path)


def test_forged_weights_are_not_the_published_ones(file, tmp_path, monkeypatch, capsys):
    """Whatever a file says of its origin, the name is by what it holds."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in inception.shapes().items()}
    forged, cache = tmp_path / 'forged.safetensors', tmp_path / 'cache'
    published = inception.PUBLISHED['sha256']
    for mark in ('', ':', ':' + '0' * 64, ':' + inception.seal(b'', published, inception.arrays_digest(zeros))):
        forged.write_bytes(safetensors.numpy.save(zeros, {'source': published + mark}))
        assert inception.load(str(forged), 'never')[0] == f'inception_{inception.arrays_digest(zeros)[:8]}'
        assert 'is not the published weights' in capsys.readouterr().err
    # Planted in the cache they are not taken for what the person's file holds.
    name, variables = inception.load(file, str(cache))
    (kept,) = cache.iterdir()
    kept.write_bytes(safetensors.numpy.save(zeros, {'source': kept.name[10:74]}))
    again = inception.load(file, str(cache))
    assert again[0] == name
    assert_same(again[1], variables)
    # A seal is of these arrays, and of one person.
    with safetensors.safe_open(kept, 'numpy') as opened:
        about = opened.metadata()
    forged.write_bytes(safetensors.numpy.save(zeros, about))
    assert inception.load(str(forged), 'never')[0] == f'inception_{inception.arrays_digest(zeros)[:8]}'
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'another'))
    assert inception.load(str(kept), 'never')[0] != name


def test_torch_that_can_be_made_to_run_code(pth, tmp_path, monkeypatch):
    torch = pytest.importorskip('torch')
    monkeypatch.setattr(torch, '__version__', '2.5.1+cpu')
    assert 'needs torch 2.6 or newer' in message(pth, tmp_path)
    monkeypatch.setattr(torch, '__version__', '2.10.0')
    inception.load(pth, str(tmp_path))
