"""LPIPS against torch on the same weights, the files that its weights come from, and the distance by a classifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from support import fresh_stage, sgd

from jaxgen.contract import Context, Latents
from jaxgen.errors import UserError
from jaxgen.families import classifier
from jaxgen.losses import perceptual
from jaxgen.networks import vgg

NARROW = ((3, 4), (5, 6), (4, 4, 4), (6, 5, 6), (5, 5, 5))
BY_DEPTH = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]  # torchvision's numbers of the convolutions


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Files of a narrow VGG's weights and of the channels' weights, and both as one dict of torch's names."""
    rng = np.random.default_rng(0)
    network, channels, before = {}, {}, 3
    for numbers, widths in zip(BY_DEPTH, NARROW, strict=True):
        for number, width in zip(numbers, widths, strict=True):
            kernel = rng.normal(size=(width, before, 3, 3)) / np.sqrt(before * 4.5)
            network[f'features.{number}.weight'] = kernel.astype(np.float32)
            network[f'features.{number}.bias'] = rng.normal(size=width).astype(np.float32) / 4
            before = width
        channels[f'lin{len(channels)}.model.1.weight'] = rng.uniform(size=(1, before, 1, 1)).astype(np.float32)
    folder = tmp_path_factory.mktemp('weights')
    network['classifier.0.weight'] = np.zeros((2, 3), np.float32)  # which nothing needs
    paths = tuple(str(folder / f'{name}.safetensors') for name in ('vgg', 'lpips'))
    for path, tensors in zip(paths, (network, channels), strict=True):
        safetensors.numpy.save_file(tensors, path)
    return paths, network | channels


@pytest.fixture
def narrow(monkeypatch):
    for module in (vgg, perceptual):
        monkeypatch.setattr(module, 'CHANNELS', NARROW)
    monkeypatch.setattr(perceptual, 'VGG16', lambda: vgg.VGG16(NARROW))
    perceptual.entries.cache_clear()
    yield
    perceptual.entries.cache_clear()


def oracle(tensors: dict, x: np.ndarray, y: np.ndarray):
    """LPIPS and its gradient by y, in torch."""
    torch = pytest.importorskip('torch')
    F = torch.nn.functional
    w = {name: torch.from_numpy(a) for name, a in tensors.items()}
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def units(image):
        h, maps = (image - shift) / scale, []
        h = h.permute(0, 3, 1, 2)
        for depth, numbers in enumerate(BY_DEPTH):
            h = F.max_pool2d(h, 2) if depth else h
            for number in numbers:
                h = F.relu(F.conv2d(h, w[f'features.{number}.weight'], w[f'features.{number}.bias'], padding=1))
            maps.append(h / ((h**2).sum(1, keepdim=True) + 1e-20).sqrt())
        return maps

    y = torch.tensor(y, requires_grad=True)
    total = 0
    for i, (a, b) in enumerate(zip(units(torch.tensor(x)), units(y), strict=True)):
        total = total + F.conv2d((a - b) ** 2, w[f'lin{i}.model.1.weight']).mean((1, 2, 3))
    total.sum().backward()
    return total.detach().numpy(), y.grad.numpy()


def test_lpips_equals_torch(files, narrow, capfd):
    paths, tensors = files
    weights = perceptual.load(paths)
    assert 'not the published' in capfd.readouterr().err
    x, y = np.random.default_rng(1).uniform(-1, 1, size=(2, 3, 32, 16, 3)).astype(np.float32)
    value, slope = oracle(tensors, x, y)

    def total(y):
        each = perceptual.lpips(weights, x, y)
        return each.sum(), each

    its_slope, each = jax.jit(jax.grad(total, has_aux=True))(y)
    np.testing.assert_allclose(each, value, rtol=1e-4)
    np.testing.assert_allclose(its_slope, slope, atol=2e-4 * np.abs(slope).max())


def test_grey_is_repeated_as_colour(files, narrow):
    weights = perceptual.load(files[0])
    grey = np.random.default_rng(2).uniform(-1, 1, size=(1, 16, 16, 1)).astype(np.float32)
    f = jax.jit(lambda x, y: perceptual.lpips(weights, x, y))
    np.testing.assert_allclose(f(grey, -grey), f(grey.repeat(3, -1), -grey.repeat(3, -1)), rtol=1e-5)


def test_files_of_torch_and_other_names(files, narrow, tmp_path):
    torch = pytest.importorskip('torch')
    paths, tensors = files
    other = {k.replace('features.', 'net.slice1.').replace('lin', 'lins.'): torch.tensor(a) for k, a in tensors.items()}
    torch.save(other, tmp_path / 'all.pth')
    a, b = perceptual.load(paths), perceptual.load((str(tmp_path / 'all.pth'),))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_files_that_will_not_do(files, narrow, tmp_path):
    paths, tensors = files
    text = tmp_path / 'text.pth'
    text.write_text('no weights')
    swapped = {**tensors, 'features.5.weight': tensors['features.5.weight'].transpose(1, 0, 2, 3)}
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(a) for k, a in swapped.items()}, tmp_path / 'swapped.safetensors'
    )
    for given, message in [
        ((str(tmp_path / 'none.safetensors'),), 'no such file'),
        ((str(text),), 'cannot be read|needs torch'),
        (paths[:1], r'missing: lin0\.weight \[1, '),
        ((str(tmp_path / 'swapped.safetensors'),), 'features.5.weight is'),
    ]:
        with pytest.raises(UserError, match=message):
            perceptual.load(given)
    with pytest.raises(UserError, match='16 x 16'):
        perceptual.load(paths, (8, 8, 3))


def test_published_vgg():
    """The real widths: 14,714,688 weights, and torchvision's names of the first and the last convolution."""
    shapes = {name: list(entry.their_shape()) for entry in perceptual.entries() for name in entry.names}
    assert sum(np.prod(s) for name, s in shapes.items() if name.startswith('features')) == 14_714_688
    assert shapes['features.0.weight'] == [64, 3, 3, 3] and shapes['features.28.weight'] == [512, 512, 3, 3]
    assert [name for name in shapes if name.startswith('features') and name.endswith('weight')] == [
        f'features.{number}.weight' for numbers in BY_DEPTH for number in numbers
    ]
    assert [shapes[f'lin{i}.weight'][1] for i in range(5)] == [64, 128, 256, 512, 512]


def test_distance_by_hand():
    a = jnp.array([[[[3.0, 4.0], [0.0, 0.0]]], [[[1.0, 0.0], [1.0, 0.0]]]])  # [2, 1, 2, 2]
    b = jnp.array([[[[4.0, 3.0], [0.0, 2.0]]], [[[0.0, 9.0], [5.0, 0.0]]]])
    np.testing.assert_allclose(perceptual.distance([a], [b]), [(2 * 0.2**2 + 1) / 2, 1.0], rtol=1e-6)
    weighted = perceptual.distance([a, a], [b, b], [jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])])
    np.testing.assert_allclose(weighted, [0.04 / 2 + (0.08 + 2) / 2, 0.5 + 1.0], rtol=1e-6)
    vectors = perceptual.distance([jnp.array([[3.0, 4.0]])], [jnp.array([[4.0, 3.0]])])
    np.testing.assert_allclose(vectors, [0.08], rtol=1e-6)
    slope = jax.grad(lambda b: perceptual.distance([a], [b]).sum())(jnp.zeros_like(b))
    assert np.isfinite(slope).all(), 'where all channels are 0'


def test_classifier_has_maps_of_every_depth():
    stage, state, frozen = fresh_stage('runs/classifier_shapes', None)
    x = jax.random.uniform(jax.random.key(0), (3, 16, 24, 3), minval=-1, maxval=1)  # not the size it was trained at
    maps_of = jax.jit(lambda x: stage.encode(state, frozen, {'image': x, 'maps': True}, None))
    maps = maps_of(x)
    assert [m.shape for m in maps] == [(3, 16, 24, 8), (3, 8, 12, 16)]
    distance = jax.jit(perceptual.of_stage(stage))
    y = x.at[0, :8].set(0.0).at[2].set(-x[2])
    values = distance((state, frozen), x, y)
    np.testing.assert_allclose(values, perceptual.distance(maps, maps_of(y)), rtol=1e-5)
    assert 0 == values[1] < values[0] and values[2] > 0

    # A family without maps is compared by its features.
    plain = stage._replace(encode=lambda state, frozen, batch, rng: batch['image'].mean((1, 2)))
    np.testing.assert_allclose(
        perceptual.of_stage(plain)((state, frozen), x, y), perceptual.distance([x.mean((1, 2))], [y.mean((1, 2))])
    )
    for useless in (stage._replace(encode=None), stage._replace(latents=Latents(grids=((4, 4),)))):
        with pytest.raises(UserError, match='classifier'):
            perceptual.of_stage(useless)


def test_classifier_still_returns_its_features():
    f = classifier.build(Context((8, 8, 1), 3, sgd()), width=4, levels=1, features=5)
    batch = {'image': jnp.ones((2, 8, 8, 1)), 'label': jnp.array([0, 2])}
    state = jax.eval_shape(f.init, jax.random.key(0), batch, {})
    assert jax.eval_shape(f.encode, state, {}, {'image': batch['image']}, jax.random.key(0)).shape == (2, 5)
