"""NCSN's network against a plain torch version: sizes, outputs, the published loss and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled import labelled

from jaxgen.config import DEFAULTS
from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import diffusion
from jaxgen.networks import denoisers
from jaxgen.networks.refinenet import Norm, RefineNet, enlarge, mean_5x5
from jaxgen.optim import make_optim

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

SMALL = {'channels': 4, 'levels': 4, 'sigmas': (0.02, 2.0), 'classes': 3}
SIGMA = 0.02 * 100 ** (np.arange(4) / 3)  # over images in [-1, 1]

RNG = np.random.default_rng(1)
X = RNG.normal(size=(3, 8, 12, 3)).astype(np.float32)
EPS = RNG.normal(size=X.shape).astype(np.float32)
T = np.array([3, 0, 1])
LABEL = np.array([0, 2, 1])


def torch_network(channels, levels, colours, classes=0):
    """The network in torch, its parts named as ours. Images are in [0, 1], and its output is the score."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.level = nn.Embedding(levels, 3 * width)
            self.label = nn.Embedding(classes, 3 * width) if classes else None

        def forward(self, x, level, label):
            table = self.level(level) + (self.label(label) if classes else 0)
            gamma, alpha, beta = table[:, :, None, None].tensor_split(3, 1)
            means = x.mean((2, 3), keepdim=True)
            deviation = (means.var(1, keepdim=True) + 1e-5).sqrt()
            return gamma * (F.instance_norm(x) + alpha * (means - means.mean(1, keepdim=True)) / deviation) + beta

    def conv(old, new, dilation=1, bias=True):
        return nn.Conv2d(old, new, 3, padding=dilation, dilation=dilation, bias=bias)

    class Layer(nn.Module):
        def __init__(self, act, *sizes, **options):
            super().__init__()
            self.act, self.norm, self.conv = act, Norm(sizes[0]), conv(*sizes, **options)

        def forward(self, x, *condition):
            return self.conv(self.act(self.norm(x, *condition)))

    class Residual(nn.Module):
        def __init__(self, old, new, dilation, kind):
            super().__init__()
            self.layer1 = Layer(F.elu, old, old, dilation=dilation)
            self.layer2 = Layer(F.elu, old, new, dilation=dilation)
            self.halve = kind == 'halve'
            self.shortcut = {
                'plain': nn.Identity,
                'halve': lambda: nn.Conv2d(old, new, 1),
                'dilate': lambda: conv(old, new, dilation),
            }[kind]()

        def forward(self, x, *condition):
            x = self.shortcut(x) + self.layer2(self.layer1(x, *condition), *condition)
            return F.avg_pool2d(x, 2) if self.halve else x

    class Refine(nn.ModuleDict):
        def __init__(self, sizes, new, units=1):
            super().__init__()
            self.units = units
            widths = [(f'map{i}_', size, 2) for i, size in enumerate(sizes)] + [('out_', new, units)]
            for name, width, count in widths:
                for i in range(2 * count):
                    self[f'{name}{i // 2}{i % 2}'] = Layer(F.elu, width, width, bias=False)
            for i, size in enumerate(sizes if len(sizes) > 1 else ()):
                self[f'fuse{i}'] = Layer(lambda x: x, size, new)
            for i in range(2):
                self[f'pool{i}'] = Layer(lambda x: F.avg_pool2d(x, 5, 1, 2), new, new, bias=False)

        def add_units(self, name, x, count, *condition):
            for i in range(count):
                x = x + self[f'{name}_{i}1'](self[f'{name}_{i}0'](x, *condition), *condition)
            return x

        def forward(self, maps, *condition):
            size = maps[0].shape[2:]
            maps = [self.add_units(f'map{i}', x, 2, *condition) for i, x in enumerate(maps)]
            if len(maps) > 1:
                maps = [self[f'fuse{i}'](x, *condition) for i, x in enumerate(maps)]
                maps = [F.interpolate(x, size, mode='bilinear', align_corners=True) for x in maps]
            x = F.elu(sum(maps))
            once = self['pool0'](x, *condition)
            return self.add_units('out', x + once + self['pool1'](once, *condition), self.units, *condition)

    class Network(nn.ModuleDict):
        def __init__(self):
            c, d = channels, 2 * channels
            super().__init__({
                'first': conv(colours, c),
                'stage0_0': Residual(c, c, 1, 'plain'), 'stage0_1': Residual(c, c, 1, 'plain'),
                'stage1_0': Residual(c, d, 1, 'halve'), 'stage1_1': Residual(d, d, 1, 'plain'),
                'stage2_0': Residual(d, d, 2, 'dilate'), 'stage2_1': Residual(d, d, 2, 'plain'),
                'stage3_0': Residual(d, d, 4, 'dilate'), 'stage3_1': Residual(d, d, 4, 'plain'),
                'refine3': Refine([d], d), 'refine2': Refine([d, d], d),
                'refine1': Refine([d, d], c), 'refine0': Refine([c, c], c, units=3),
                'last': Layer(F.elu, c, colours),
            })  # fmt: skip

        def forward(self, x, *condition):
            h, stages = self['first'](2 * x - 1), []
            for i in range(4):
                h = self[f'stage{i}_1'](self[f'stage{i}_0'](h, *condition), *condition)
                stages.append(h)
            h = self['refine3']([h], *condition)
            for i in (2, 1, 0):
                h = self[f'refine{i}']([stages[i], h], *condition)
            return self['last'](h, *condition)

    torch.manual_seed(0)
    return Network()


def ours_of(named):
    """Arrays by the names of torch's parameters as a tree of ours."""
    tree: dict = {}
    for name, value in named.items():
        *path, kind = name.split('.')
        if kind == 'weight':
            kind = path.pop() if path[-1] in ('level', 'label') else 'kernel'
        value = value.detach().numpy()
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
            value = value[0, 0] if value.shape[:2] == (1, 1) else value
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[kind] = value.astype(np.float32)
    return tree


def shapes(network, x=X):
    """Of its parameters."""
    return jax.eval_shape(lambda: network.init(jax.random.key(0), x, np.zeros(len(x)), LABEL))['params']


@pytest.fixture(scope='module')
def theirs():
    torch = pytest.importorskip('torch')
    return torch_network(4, 4, 3, classes=3).to(torch.float64)


@pytest.fixture(scope='module')
def params(theirs):
    return ours_of(dict(theirs.named_parameters()))


@jax.jit
def compiled(params, t, label):
    return labelled(RefineNet, **SMALL).apply({'params': params}, X, t, label, train=False)


def apply(params, t=T, label=LABEL):
    return np.asarray(compiled(params, np.asarray(t, np.float32), label))


@pytest.mark.parametrize(('channels', 'size', 'colours', 'count'), [(128, 32, 3, 30_117_635), (64, 28, 1, 7_638_657)])
def test_published_sizes(channels, size, colours, count):
    torch = pytest.importorskip('torch')
    ours = shapes(labelled(RefineNet, channels=channels), np.zeros((1, size, size, colours), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == count
    with torch.device('meta'):
        theirs = torch_network(channels, 10, colours)
    assert sum(leaf.numel() for leaf in theirs.parameters()) == count


def test_equals_torch(theirs, params):
    import torch

    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(labelled(RefineNet, **SMALL)))
    with torch.no_grad():
        score = theirs(torch.from_numpy((X + 1) / 2.0).double().permute(0, 3, 1, 2), *map(torch.from_numpy, (T, LABEL)))
    reference = SIGMA[T][:, None, None, None] / 2 * score.numpy().transpose(0, 2, 3, 1)
    ours = apply(params)
    assert ours.dtype == np.float32
    for one, other in zip(ours, reference, strict=True):  # an example for itself: sigma makes them of different sizes
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_loss_and_gradients_are_the_published_ones(theirs, params):
    """Eq. 5 and 6 of the paper, for noise that is added to images in [0, 1]."""
    import torch

    sigma = torch.from_numpy(SIGMA[T])[:, None, None, None] / 2
    eps = torch.from_numpy(EPS).double().permute(0, 3, 1, 2)
    x = torch.from_numpy((X + 1) / 2.0).double().permute(0, 3, 1, 2)  # the noisy image
    score = theirs(x, torch.from_numpy(T), torch.from_numpy(LABEL))
    loss = (sigma**2 * (score + eps / sigma) ** 2).sum((1, 2, 3)).mean() / 2
    names = dict(theirs.named_parameters())
    gradients = ours_of(dict(zip(names, torch.autograd.grad(loss, names.values()), strict=True)))

    def mean_square(params, remat=False):
        output = labelled(RefineNet, **SMALL, remat=remat).apply({'params': params}, X, T, LABEL, train=True)
        return X[0].size / 2 * jnp.square(output + EPS).mean()

    value, ours = jax.jit(jax.value_and_grad(mean_square))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(gradients), strict=True
    ):  # fmt: skip
        assert np.abs(other).max() > 0, path
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max(), err_msg=jax.tree_util.keystr(path))
    assert 'remat' in str(jax.make_jaxpr(lambda params: mean_square(params, remat=True))(params))


def test_the_nearest_level_is_looked_up_and_the_label_matters(params):
    plain = apply(params)
    between = apply(params, t=[2.6, -0.4, 1.4])
    ratio = 100 ** ((np.array([2.6, -0.4, 1.4]) - T) / 3)  # of sigma
    np.testing.assert_allclose(between, plain * ratio[:, None, None, None], rtol=1e-4, atol=1e-6)
    other_level, other_label = apply(params, t=[3, 1, 1]), apply(params, label=np.array([0, 1, 1]))
    for changed in (other_level / SIGMA[1] * SIGMA[0], other_label):
        assert np.abs(changed - plain)[1].max() > 0.1 * np.abs(plain[1]).max()
    for changed in (other_level, other_label):
        np.testing.assert_array_equal(changed[::2], plain[::2])


def test_pooling_and_enlarging_equal_torch():
    torch = pytest.importorskip('torch')
    x = torch.from_numpy(X).double().permute(0, 3, 1, 2)
    pooled = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    larger = torch.nn.functional.interpolate(x, (16, 25), mode='bilinear', align_corners=True)
    ours = jax.jit(lambda x: (mean_5x5(x), enlarge(x, 16, 25)))(X)
    for one, other in zip(ours, (pooled, larger), strict=True):
        np.testing.assert_allclose(one, other.permute(0, 2, 3, 1), atol=1e-6)


def test_how_the_norms_start():
    """Factors near 1, shifts at 0, and nothing from the class."""
    tables = jax.jit(
        lambda: Norm(10).init(jax.random.key(0), np.zeros((1, 2, 2, 500)), (T[:1], np.eye(3)[LABEL[:1]]))
    )()['params']
    factors, shifts = np.split(tables['level'], [1000], -1)
    assert factors.shape == (10, 1000) and abs(factors.mean() - 1) < 0.001 and abs(factors.std() - 0.02) < 0.001
    assert shifts.shape == (10, 500) and not shifts.any()
    assert tables['label'].shape == (3, 1500) and not tables['label'].any()


NCSN = {
    'network': {'name': 'refinenet', 'channels': 8}, 'process': {'name': 'geometric', 'timesteps': 5},
    'training': {'prediction': 'score'}, 'sampler': 'annealed_langevin',
}  # fmt: skip


def build(image=(8, 8, 1), **sections):
    return diffusion.build(Context(image, 0, make_optim(10, **DEFAULTS['optim'])), **{**NCSN, **sections})


def test_the_family_gives_the_process_to_the_network(monkeypatch):
    made = []
    monkeypatch.setattr(denoisers, 'bind', lambda module, conditioning: made.append(module))
    process = {'name': 'geometric', 'timesteps': 5, 'sigma_min': 0.1, 'sigma_max': 3.0}
    assert build(process=process).divisor == 2
    assert made == [RefineNet(channels=8, levels=5, sigmas=(0.1, 3.0), out_channels=1)]


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        ({'process': 'linear'}, ['geometric', 'linear']),
        ({'training': {'prediction': 'eps'}}, ['score', 'eps']),
        ({'image': (7, 7, 1)}, ['7', 'multiple of 2']),
        ({'network': {'name': 'refinenet', 'channels': 7}}, ['channels', '7']),
        ({'network': {'name': 'refinenet', 'stages': 5}}, ['stages', '5']),
        ({'network': {'name': 'refinenet', 'levels': 5}}, ['levels', 'no such field']),
    ],
)
def test_refuses_in_one_line(sections, message):
    with pytest.raises(UserError) as error:
        build(**sections)
    assert '\n' not in str(error.value)
    for part in message:
        assert part in str(error.value)
