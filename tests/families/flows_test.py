"""Normalising flows: inverses, determinants against Jacobians, densities that integrate to 1, oracles in torch."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sgd

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import glow, real_nvp
from jaxgen.losses.likelihoods import sum_per_example
from jaxgen.networks import couplings
from jaxgen.networks import glow as glow_network
from jaxgen.networks import real_nvp as real_nvp_network
from jaxgen.optim import Optim

try:
    import torch
    import torch.nn.functional as F
except ImportError:  # it comes with [bench]
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason='without torch')

IMAGE = (4, 4, 1)


def optim(rate: float = 1e-2, accumulate: int = 1) -> Optim:
    return sgd(rate, accumulate, newest=0.5)


def compiled(f):
    """The family with its functions jitted: op by op they would take longer."""
    names = ('init', 'update', 'sample', 'evaluate', 'encode', 'decode', 'classify')
    return f._replace(**{name: jax.jit(getattr(f, name)) for name in names if getattr(f, name)})


def small_glow(image=IMAGE, classes: int = 0, optim=optim(), **model):
    return compiled(glow.build(Context(image, classes, optim), **{'width': 6, 'depth': 2, 'levels': 2, **model}))


def small_real_nvp(image=IMAGE, optim=optim(), **model):
    return compiled(real_nvp.build(Context(image, 0, optim), **{'width': 4, 'blocks': 1, 'scales': 2, **model}))


def images(n: int = 6, image=IMAGE, seed: int = 0) -> dict:
    levels = jax.random.randint(jax.random.key(seed), (n, *image), 0, 256)
    return {'image': levels / 127.5 - 1, 'label': jnp.arange(n) % 3, 'index': jnp.arange(n)}


def shaken(tree, seed: int = 1, by: float = 0.1):
    """The same weights with noise on them: layers that start at 0 do something too."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.float32(leaf + by * rng.normal(size=leaf.shape)) for leaf in leaves])


def glow_flow(image=IMAGE, width=6, depth=2, levels=2, coupling='affine', mixing='matrix', edge=True, classes=0):
    top = glow_network.Top(glow_network.latent_shapes(image, levels)[-1], classes, True, edge)
    return glow_network.Flow(image, width, depth, levels, coupling, mixing, edge, top, jnp.float32, False)


def real_nvp_flow(image=IMAGE, scales=2, width=4, blocks=1, norm=True):
    return real_nvp_network.Flow(image, scales, width, blocks, norm, jnp.float32, False)


def initial(net, x, label=None, by: float = 0.05) -> dict:
    """Weights set by the data of many images like x, and then shaken."""
    many = 0.3 * jax.random.normal(jax.random.key(8), (64, *x.shape[1:]))
    given = () if label is None else (jnp.arange(64) % 3,)
    variables = jax.jit(net.init)(jax.random.key(0), many, *given)
    out = {**variables, 'params': shaken(variables['params'], by=by)}
    if 'batch_stats' in out:  # variances stay positive
        out['batch_stats'] = jax.tree.map(jnp.abs, shaken(out['batch_stats'], seed=2))
    return out


def log_normal(z) -> np.ndarray:
    return -0.5 * (np.square(z) + math.log(2 * math.pi)).reshape(len(z), -1).sum(-1)


def jacobian_log_det(f, x) -> np.ndarray:
    """log |det df/dx| per example of f: [1, ...] -> [1, D] or the like, from the whole matrix."""

    def flat(v):
        return f(v.reshape(1, *x.shape[1:])).reshape(-1)

    matrices = jax.jit(jax.vmap(jax.jacrev(flat)))(x.reshape(len(x), -1))
    return np.linalg.slogdet(np.asarray(matrices, np.float64))[1]


# --- rearrangements ---------------------------------------------------------------------------------------------------


@needs_torch
def test_squeezes():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    oracle = F.pixel_unshuffle(torch.tensor(np.array(x)).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(couplings.squeeze(x), oracle)
    np.testing.assert_array_equal(couplings.unsqueeze(couplings.squeeze(x)), x)
    y = couplings.squeeze_diagonals(x)
    np.testing.assert_array_equal(couplings.unsqueeze_diagonals(y), x)
    for part, (row, column) in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        np.testing.assert_array_equal(y[..., 3 * part : 3 * part + 3], x[:, row::2, column::2])
    board = np.array(couplings.checkerboard(4, 6, 0))[0, :, :, 0]
    assert board[0, 0] == 0 and (board[1:] != board[:-1]).all() and (board[:, 1:] != board[:, :-1]).all()
    np.testing.assert_array_equal(couplings.checkerboard(4, 6, 1)[0, :, :, 0], 1 - board)
    colours = couplings.squeeze_diagonals(jnp.asarray(board)[None, :, :, None])
    assert (colours[..., :2] == 0).all() and (colours[..., 2:] == 1).all()


def test_pixels_and_bits():
    x = jnp.arange(256) / 127.5 - 1
    y = couplings.to_unit(x, 0.0)
    np.testing.assert_allclose(y * 256, np.arange(256), atol=1e-4)
    np.testing.assert_allclose(couplings.to_image(couplings.to_unit(x)), x, atol=1e-6)
    # An even density of y in [0, 1] is the code of 8 bits for each number.
    np.testing.assert_allclose(couplings.bits_per_dim(jnp.zeros(3), 48), 8, rtol=1e-6)
    logits, log_det = real_nvp.to_logit(y[:, None], 0.9)
    for constraint in (0.9, 1 - 1e-7, 1 - 1e-12):  # finite at both ends, and the same but for the sign
        ends, slopes = real_nvp.to_logit(jnp.array([[0.0], [1.0]]), constraint)
        least = (1 - constraint) / 2
        np.testing.assert_allclose(ends[:, 0], np.log(least / (1 - least)) * np.array([1, -1]), rtol=1e-5)
        np.testing.assert_allclose(slopes, np.log(constraint / (least * (1 - least))), rtol=1e-5)
    slope = np.vectorize(lambda v: 0.9 / ((0.05 + 0.9 * v) * (0.95 - 0.9 * v)))(np.asarray(y, np.float64))
    np.testing.assert_allclose(log_det, np.log(slope), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(real_nvp.from_logit(logits, 0.9)[:, 0], y, atol=1e-6)


@pytest.mark.parametrize('bits', [1, 5, 7])
def test_pixels_of_fewer_bits(bits):
    """The highest bits of the stored value; an even density is the code of so many bits."""
    levels, x = 2**bits, jnp.arange(256) / 127.5 - 1
    kept = np.arange(256) >> (8 - bits)
    np.testing.assert_allclose(couplings.to_unit(x, 0.25, levels) * levels, kept + 0.25, atol=1e-4)
    image = couplings.to_image(couplings.to_unit(x, np.float32(0.999), levels), levels)
    np.testing.assert_allclose(image, 2 * kept / (levels - 1) - 1, atol=1e-6)
    np.testing.assert_allclose(couplings.to_image(jnp.array([-3.0, 5.0]), levels), [-1, 1])
    np.testing.assert_allclose(couplings.bits_per_dim(jnp.zeros(3), 48, levels), bits, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('small', [small_glow, small_real_nvp])
def test_flows_of_five_bits(small):
    """Against the net itself, by hand; images that are made have 32 values, and latents keep the highest five bits."""
    batch, key, f = images(), jax.random.key(2), small(bits=5)
    state = f.init(jax.random.key(0), batch, {})
    kept = np.round((np.asarray(batch['image']) + 1) * 127.5) // 8
    noise = jnp.stack([
        jax.random.uniform(jax.random.split(jax.random.fold_in(key, i), 1)[0], IMAGE) for i in range(6)
    ])  # fmt: skip
    y = (kept + noise) / 32
    if small is small_glow:
        _, log_p = glow_flow().apply({'params': state.ema['flow']}, y - 0.5)
    else:
        p = 0.05 + 0.9 * y
        z, log_det = real_nvp_flow().apply({'params': state.ema['flow'], **state.extra}, jnp.log(p / (1 - p)))
        log_p = log_normal(z) + log_det + np.log(0.9 / (p * (1 - p))).reshape(6, -1).sum(-1)
    expected = -(log_p / 16 - math.log(32)) / math.log(2)
    np.testing.assert_allclose(f.evaluate(state, {}, batch, key)['bits_per_dim'], expected, rtol=1e-4)
    decoded = f.decode(state, {}, {}, f.encode(state, {}, batch, key), key)
    np.testing.assert_allclose(decoded, 2 * kept / 31 - 1, atol=1e-6)
    drawn = (np.asarray(f.sample(state, {}, {'index': jnp.arange(4)}, key)) + 1) * 15.5
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-4)


def test_scales_of_weight_normalisation():
    tree = {'conv1': {'scale': 1, 'bias': 2}, 'norm1': {'scale': 3}, 'blocks': {'skip': {'scale': 4}}}
    assert [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if real_nvp.is_scale(path)] == [4, 1]


# --- layers, one by one -----------------------------------------------------------------------------------------------


def step_apply(coupling, mixing, edge):
    modules = {inv: glow_network.Step(5, coupling, mixing, edge, inv, jnp.float32) for inv in (False, True)}

    def init(key, x):
        return modules[False].init(key, (x, jnp.zeros(len(x))), None)

    def apply(variables, x, inverse=False):
        (y, log_det), _ = modules[inverse].apply(variables, (x, jnp.zeros(len(x))), None)
        return y, log_det

    return init, apply


def module_apply(module, *between):
    def apply(variables, x, inverse=False):
        return module.apply(variables, x, *between, inverse=inverse)

    return module.init, apply


BOARD = couplings.checkerboard(2, 2, 1)


def coupling_apply(mask: str, first: int, norm: bool = True):
    def module(inverse):
        return real_nvp_network.Coupling(mask, 4, 1, norm, False, inverse, jnp.float32)

    def init(key, x):
        return module(False).init(key, (x, jnp.zeros(len(x))), first)

    def apply(variables, x, inverse=False):
        return module(inverse).apply(variables, (x, jnp.zeros(len(x))), first)[0]

    return init, apply


LAYERS = {
    'actnorm': module_apply(couplings.ActNorm()),
    'matrix': module_apply(couplings.InvertibleConv()),
    'lu': module_apply(couplings.InvertibleConv(lu=True)),
    'step_affine': step_apply('affine', 'matrix', True),
    'step_additive': step_apply('additive', 'lu', False),
    'batch_norm': module_apply(couplings.FlowBatchNorm()),
    'batch_norm_masked': module_apply(couplings.FlowBatchNorm(), BOARD),
    'board0': coupling_apply('checkerboard', 0),
    'channels1': coupling_apply('channels', 1),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', LAYERS)
def test_inverse_and_determinant_of_a_layer(name):
    init, apply = LAYERS[name]
    x = jax.random.normal(jax.random.key(3), (3, 2, 2, 4))
    variables = jax.jit(init)(jax.random.key(0), x)
    variables = {**variables, 'params': shaken(variables.get('params', {}))}
    if 'batch_stats' in variables:
        variables['batch_stats'] = jax.tree.map(jnp.abs, shaken(variables['batch_stats']))
    y, log_det = jax.jit(apply)(variables, x)
    assert y.shape == x.shape and log_det.shape == (3,) and np.abs(y - x).max() > 0.05
    again, back = jax.jit(lambda v, y: apply(v, y, inverse=True))(variables, y)
    np.testing.assert_allclose(again, x, atol=1e-5)
    np.testing.assert_allclose(back, -log_det, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_det, jacobian_log_det(lambda v: apply(variables, v)[0], x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_couplings_leave_their_part_alone():
    x = jax.random.normal(jax.random.key(3), (3, 2, 2, 4))
    for mask, first, kept in (
        ('checkerboard', 0, couplings.checkerboard(2, 2, 0) == 1),
        ('checkerboard', 1, couplings.checkerboard(2, 2, 1) == 1),
        ('channels', 0, np.arange(4) >= 2),
        ('channels', 1, np.arange(4) < 2),
    ):
        init, apply = coupling_apply(mask, first, norm=False)
        variables = jax.jit(init)(jax.random.key(0), x)
        y, _ = jax.jit(apply)({**variables, 'params': shaken(variables['params'])}, x)
        np.testing.assert_array_equal(np.asarray(y == x), np.broadcast_to(kept, x.shape))


@pytest.mark.slow
@pytest.mark.parametrize('lu', [False, True])
def test_mixing_starts_as_a_rotation(lu):
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 6))
    y, variables = jax.jit(couplings.InvertibleConv(lu).init_with_output)(jax.random.key(1), x)
    np.testing.assert_allclose(y[1], 0, atol=1e-4)
    np.testing.assert_allclose(jnp.square(y[0]).sum(-1), jnp.square(x).sum(-1), rtol=1e-4)
    if lu:
        p = np.asarray(variables['fixed']['permutation'])
        assert (p.sum(0) == 1).all() and (p.sum(1) == 1).all() and set(p.ravel()) == {0, 1}
        for name, outside in (('lower', np.triu), ('upper', np.tril)):
            np.testing.assert_array_equal(outside(variables['params'][name]), 0)


# --- whole flows ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('model', [
    dict(coupling='additive', mixing='lu', edge=False, image=(4, 8, 3)), dict(classes=3),
])  # fmt: skip
def test_glow_inverse_and_determinant(model):
    net, image = glow_flow(**model), model.get('image', IMAGE)
    label = jnp.array([0, 2]) if 'classes' in model else None
    x = 0.3 * jax.random.normal(jax.random.key(3), (2, *image))
    variables = initial(net, x, label)
    z, log_p = jax.jit(net.apply)(variables, x, label)
    assert z.shape == (2, math.prod(image))
    again, _ = jax.jit(lambda v, z: net.apply(v, z, label, inverse=True))(variables, z)
    np.testing.assert_allclose(again, x, atol=1e-5)
    if image == IMAGE:  # latents are standardised, so the whole map's determinant is all that log p adds to theirs
        for i in range(2):
            one = None if label is None else label[i : i + 1]
            log_det = jacobian_log_det(lambda v, one=one: net.apply(variables, v, one)[0], x[i : i + 1])
            np.testing.assert_allclose(log_p[i], (log_normal(z)[i] + log_det)[0], rtol=1e-4)


@pytest.mark.slow
def test_glow_inverse_is_exact_for_numbers_of_any_size():
    """Forwards nothing is clipped, so backwards nothing is."""
    steps = [glow_network.Step(4, 'additive', 'matrix', False, inverse, jnp.float32) for inverse in (False, True)]
    x = jax.random.normal(jax.random.key(3), (2, *IMAGE))
    x = jnp.concatenate([x, x[::-1]], -1)
    variables = steps[0].init(jax.random.key(0), (x, jnp.zeros(2)), None)
    (z, _), _ = steps[0].apply(variables, (1e8 * x, jnp.zeros(2)), None)
    (again, _), _ = steps[1].apply(variables, (z, jnp.zeros(2)), None)
    np.testing.assert_allclose(again / 1e8, x, atol=1e-4)


@pytest.mark.slow
def test_draws_that_overflow_float32_are_images():
    f = glow.build(Context((4, 4, 1), 0, optim()), width=4, depth=2, levels=2)
    batch = {'image': jnp.linspace(-1, 1, 64).reshape(4, 4, 4, 1)}
    state = f.init(jax.random.key(0), batch, {})
    narrow = jax.tree_util.tree_map_with_path(  # scales of e^-98
        lambda path, w: w - 100 if path[-2].key == 'out' and path[-1].key == 'bias' else w, state.ema
    )
    images = f.sample(state.replace(ema=narrow), {}, {'index': jnp.arange(3)}, jax.random.key(1))
    assert np.isfinite(images).all() and np.abs(images).max() <= 1


@pytest.mark.slow
def test_real_nvp_inverse_and_determinant():
    net, image = real_nvp_flow(blocks=1), IMAGE
    x = jax.random.normal(jax.random.key(3), (2, *image))
    variables = initial(net, x)
    z, log_det = jax.jit(net.apply)(variables, x)
    assert z.shape == (2, math.prod(image))
    again, back = jax.jit(lambda v, z: net.apply(v, z, inverse=True))(variables, z)
    np.testing.assert_allclose(again, x, atol=1e-5)
    np.testing.assert_allclose(back, -log_det, rtol=1e-4, atol=1e-4)
    whole = jacobian_log_det(lambda v: net.apply(variables, v)[0], x)
    np.testing.assert_allclose(log_det, whole, rtol=1e-4, atol=1e-4)


def grid(low: float, high: float, n: int) -> tuple[np.ndarray, float]:
    """Middles of n^2 squares, [n^2, 2], and the area of one."""
    line = low + (high - low) * (np.arange(n) + 0.5) / n
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2).astype(np.float32), ((high - low) / n) ** 2


@pytest.mark.slow
def test_density_integrates_to_one():
    net = real_nvp_flow((1, 2, 1), scales=1, blocks=1)
    variables = initial(net, jnp.zeros((1, 1, 2, 1)), by=0.3)

    @jax.jit
    def density(y):  # of pixels in (0, 1) and what the logit leaves outside
        x, slope = real_nvp.to_logit(y.reshape(-1, 1, 2, 1), 0.9)
        z, log_det = net.apply(variables, x)
        return jnp.exp(sum_per_example(-0.5 * z**2) - math.log(2 * math.pi) + log_det + slope)

    points, area = grid(-1 / 18, 19 / 18, 250)
    p = np.asarray(density(points))
    np.testing.assert_allclose(p.sum() * area, 1, atol=2e-3)
    assert p.std() > 0.3, 'not flat'
    inside = ((points > 0) & (points < 1)).all(-1)
    assert 0.5 < p[inside].sum() * area < 1

    init, apply = step_apply('affine', 'lu', False)
    x = jax.random.normal(jax.random.key(0), (64, 1, 1, 2)) * jnp.array([2.0, 0.5])
    steps = []
    for i in range(2):
        variables = jax.jit(init)(jax.random.key(i), x)
        steps.append({**variables, 'params': shaken(variables['params'], seed=i, by=0.05)})
        x = apply(steps[-1], x)[0]

    @jax.jit
    def of_steps(x):
        x, log_p = x.reshape(-1, 1, 1, 2), 0
        for step in steps:
            x, more = apply(step, x)
            log_p += more
        return jnp.exp(log_p + sum_per_example(-0.5 * x**2) - math.log(2 * math.pi))

    drawn = jax.random.normal(jax.random.key(1), (2000, 1, 1, 2))
    for step in reversed(steps):
        drawn = apply(step, drawn, inverse=True)[0]
    extent = float(np.abs(drawn).max()) * 1.3
    points, area = grid(-extent, extent, 400)
    np.testing.assert_allclose(np.asarray(of_steps(points)).sum() * area, 1, atol=2e-3)


# --- oracles in torch -------------------------------------------------------------------------------------------------


def torch_tree(tree):
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a), dtype=torch.float64), tree)


def image_conv(x, kernel, bias=None):
    """x [n, C, H, W], kernel [k, k, C, O] of ours."""
    return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=kernel.shape[0] // 2)


def column(v):
    return v[:, None, None]


class TorchGlow:
    """Glow with edges marked, NCHW, step after step, matrices by torch's own determinants."""

    def __init__(self, params, depth: int, levels: int):
        self.p, self.depth, self.levels = torch_tree(params), depth, levels

    def conv(self, x, kernel):
        if kernel.shape[0] == 1:
            return image_conv(x, kernel)
        inside = torch.ones_like(x[:, :1])
        r = kernel.shape[0] // 2
        x = torch.cat([F.pad(x, (r,) * 4), 1 - F.pad(inside, (r,) * 4)], 1)
        return F.conv2d(x, kernel.permute(3, 2, 0, 1))

    def zero_conv(self, p, x):
        return (self.conv(x, p['conv']['kernel']) + column(p['bias'])) * torch.exp(column(p['logs']) * 3)

    def step(self, p, x):
        area = x.shape[2] * x.shape[3]
        x = torch.exp(column(3 * p['actnorm']['logs'])) * (x + column(p['actnorm']['bias']))
        log_det = area * 3 * p['actnorm']['logs'].sum()
        w = p['mix']['kernel']
        x = torch.einsum('nchw,cd->ndhw', x, w)
        log_det = log_det + area * torch.log(torch.abs(torch.det(w)))
        a, b = x.chunk(2, 1)
        h = a
        for i in '12':
            norm = p[f'norm{i}']
            h = self.conv(h, p[f'conv{i}']['kernel'])
            h = torch.relu((h + column(norm['bias'])) * torch.exp(column(3 * norm['logs'])))
        h = self.zero_conv(p['out'], h)
        shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
        b = (b + shift) * scale
        return torch.cat([a, b], 1), log_det + torch.log(scale).sum((1, 2, 3))

    def __call__(self, x):
        log_p, zs = 0, []
        for i in range(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for k in range(self.depth):
                x, more = self.step(jax.tree.map(lambda a, k=k: a[k], self.p[f'steps{i}']), x)
                log_p = log_p + more
            if i < self.levels - 1:
                x, z = x.chunk(2, 1)
                h = self.zero_conv(self.p[f'prior{i}'], x)
                mean, logs = h[:, 0::2], h[:, 1::2]
            else:
                z = x
                h = self.zero_conv(self.p['top']['conv'], torch.cat([torch.zeros_like(x)] * 2, 1))
                mean, logs = h.chunk(2, 1)
            log_p = log_p + torch.distributions.Normal(mean, logs.exp()).log_prob(z).sum((1, 2, 3))
            zs.append(((z - mean) / logs.exp()).permute(0, 2, 3, 1).flatten(1))
        return torch.cat(zs, 1), log_p


@pytest.mark.slow
@needs_torch
def test_glow_is_that_of_torch():
    net, x = glow_flow((8, 4, 3), depth=3), 0.3 * jax.random.normal(jax.random.key(3), (3, 8, 4, 3))
    variables = initial(net, x)
    z, log_p = jax.jit(net.apply)(variables, x)
    oracle = TorchGlow(variables['params'], 3, 2)
    expected, expected_p = oracle(torch.tensor(np.asarray(x), dtype=torch.float64).permute(0, 3, 1, 2))
    np.testing.assert_allclose(z, expected, atol=1e-4)
    np.testing.assert_allclose(log_p, expected_p, rtol=1e-5)


class TorchRealNVP:
    """Real NVP, NCHW, in training or with given statistics."""

    def __init__(self, variables, scales: int, train: bool):
        tree = torch_tree({**variables})
        self.p, self.s, self.scales, self.train = tree['params'], tree['batch_stats'], scales, train

    def norm(self, p, s, x):
        return F.batch_norm(x, s['mean'].clone(), s['var'].clone(), p['scale'], p['bias'], self.train, eps=1e-5)

    def conv(self, p, x):
        v = p['conv']['kernel'].permute(3, 2, 0, 1)
        kernel = torch._weight_norm(v, p['scale'][:, None, None, None], 0)
        return F.conv2d(x, kernel, p.get('bias'), padding=v.shape[-1] // 2)

    def net(self, p, s, x, factor):
        x = factor * self.norm(p['norm_in'], s['norm_in'], x)
        x = self.conv(p['conv_in'], torch.cat([torch.relu(x), torch.relu(-x)], 1))
        out = self.conv(p['skip_in'], x)
        for k in range(len(p['blocks']['norm1']['scale'])):
            bp, bs = (jax.tree.map(lambda a, k=k: a[k], t['blocks']) for t in (p, s))
            h = self.conv(bp['conv1'], torch.relu(self.norm(bp['norm1'], bs['norm1'], x)))
            x = x + self.conv(bp['conv2'], torch.relu(self.norm(bp['norm2'], bs['norm2'], h)))
            out = out + self.conv(bp['skip'], x)
        return self.conv(p['conv_out'], torch.relu(self.norm(p['norm_out'], s['norm_out'], out))).chunk(2, 1)

    def coupling(self, name, j, x, kept, factor):
        """kept: bool like x. The network's input are the kept numbers: zeros elsewhere, or channels of their own."""
        p, s = (jax.tree.map(lambda a: a[j], t[name]) for t in (self.p, self.s))
        if factor == 2:
            condition, part = x * kept, x
        else:
            half = x.shape[1] // 2
            condition, part = (x[:, half:], x[:, :half]) if kept[0, -1, 0, 0] else (x[:, :half], x[:, half:])
        scale, shift = self.net(p['net'], s['net'], condition, factor)
        scale = torch.tanh(scale) * column(p['rescale'])
        new = (part + shift) * scale.exp()
        moved = (~kept).expand_as(x)[:, : part.shape[1]] if factor == 2 else torch.ones_like(part, dtype=torch.bool)
        mean, var = s['norm']['mean'], s['norm']['var']
        if self.train:
            values = [new[:, c][moved[:, c]] for c in range(part.shape[1])]
            mean, var = torch.stack([v.mean() for v in values]), torch.stack([v.var(unbiased=False) for v in values])
        new = (new - column(mean)) / torch.sqrt(column(var) + 1e-4)
        slope = scale - 0.5 * torch.log(column(var) + 1e-4)
        log_det = torch.where(moved, slope, 0).sum((1, 2, 3))
        part = torch.where(moved, new, part)
        if factor == 1:
            part = torch.cat([part, condition] if kept[0, -1, 0, 0] else [condition, part], 1)
        return part, log_det

    def __call__(self, x):
        log_det, zs = 0, []
        for i in range(self.scales):
            last = i == self.scales - 1
            h, w = x.shape[2:]
            odd = (torch.arange(h)[:, None] + torch.arange(w)) % 2 == 1
            for j in range(4 if last else 3):
                kept = (odd if j % 2 == 0 else ~odd)[None, None].expand(1, x.shape[1], h, w)
                x, more = self.coupling(f'checkerboard{i}', j, x, kept, 2)
                log_det = log_det + more
            if last:
                break
            x = F.pixel_unshuffle(x, 2)
            for j in range(3):
                second = (torch.arange(x.shape[1]) >= x.shape[1] // 2)[None, :, None, None]
                x, more = self.coupling(f'channels{i}', j, x, second if j % 2 == 0 else ~second, 1)
                log_det = log_det + more
            x = F.pixel_shuffle(x, 2)
            z = torch.cat([x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2]], 1)
            x = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 1::2]], 1)
            zs.append(z)
        return torch.cat([z.permute(0, 2, 3, 1).flatten(1) for z in (*zs, x)], 1), log_det


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize('train', [False, True])
def test_real_nvp_is_that_of_torch(train):
    net, x = real_nvp_flow((4, 8, 3), blocks=2), jax.random.normal(jax.random.key(3), (4, 4, 8, 3))
    variables = initial(net, x)
    apply = jax.jit(lambda v, x: net.apply(v, x, train, mutable=['batch_stats'])[0])
    z, log_det = apply(variables, x)
    oracle = TorchRealNVP(variables, 2, train)
    expected, expected_det = oracle(torch.tensor(np.asarray(x), dtype=torch.float64).permute(0, 3, 1, 2))
    np.testing.assert_allclose(z, expected, atol=2e-4)
    np.testing.assert_allclose(log_det, expected_det, rtol=1e-4, atol=1e-4)


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_actnorms_start_with_mean_zero_and_variance_one():
    batch, rng = images(64), jax.random.key(5)
    params = jax.jit(small_glow().init)(rng, batch, {}).params['flow']
    noise = jax.random.uniform(jax.random.split(rng)[1], batch['image'].shape)
    x = couplings.squeeze(couplings.to_unit(batch['image'], noise) - 0.5)
    step = glow_network.Step(6, 'affine', 'matrix', True, False, jnp.float32)
    for level in range(2):
        for k in range(2):
            weights = jax.tree.map(lambda a, k=k: a[k], params[f'steps{level}'])
            _, inside = step.apply(
                {'params': weights}, (x, jnp.zeros(len(x))), None, capture_intermediates=True
            )  # fmt: skip
            for name in ('actnorm', 'norm1', 'norm2'):
                ((y, _),) = inside['intermediates'][name]['__call__']
                np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
                np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
            ((x, _), _) = inside['intermediates']['__call__'][0]
        x = couplings.squeeze(jnp.split(x, 2, -1)[0]) if level == 0 else x


@pytest.mark.slow
@pytest.mark.parametrize('build, model', [
    (small_glow, dict()), (small_glow, dict(mixing='lu', classes=3, conditional=True)),
    (functools.partial(small_real_nvp, scales=1), dict()),
])  # fmt: skip
def test_fulfils_the_contract(build, model):
    f, batch = build(**model), images()
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    start, update = state, jax.jit(f.update)
    for i in range(2):
        state, logs = update(state, {}, batch, jax.random.key(i))
        assert all(np.isfinite(v) and v.shape == () for v in logs.values())
    if model:
        chex.assert_trees_all_equal(state.extra, start.extra)
        outside = np.triu(np.ones((4, 4)))[None]
        np.testing.assert_array_equal(state.params['flow']['steps0']['mix']['lower'] * outside, 0)
    z = f.encode(state, {}, batch, jax.random.key(3))
    assert z.shape == (6, *f.latents.shape)
    np.testing.assert_allclose(f.decode(state, {}, {}, z, jax.random.key(4)), batch['image'], atol=1e-4)
    hot = build(**model, temperature=0.5)
    drawn = hot.sample(state, {}, batch, jax.random.key(1))
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(1), i), f.latents.shape) for i in range(6)])
    assert drawn.shape == (6, *IMAGE) and np.abs(drawn).max() <= 1
    if not model:
        np.testing.assert_allclose(drawn, f.decode(state, {}, {}, 0.5 * noise, jax.random.key(9)), atol=1e-5)
    # Means of several draws have less variance, about the same value.
    bits = [build(**model, draws=k).evaluate(state, {}, batch, jax.random.key(2))['bits_per_dim'] for k in (1, 16)]
    assert bits[0].shape == (6,) and not np.array_equal(*bits)
    np.testing.assert_allclose(bits[0].mean(), bits[1].mean(), atol=0.3)


@pytest.mark.slow
def test_bits_are_those_of_the_density():
    """evaluate against the net itself, by hand, and a training loss whose statistics are the same."""
    batch, key = images(), jax.random.key(2)
    noise = jnp.stack([
        jax.random.uniform(jax.random.split(jax.random.fold_in(key, i), 1)[0], IMAGE) for i in range(6)
    ])  # fmt: skip
    y = (jnp.round((batch['image'] + 1) * 127.5) + noise) / 256
    f = small_glow()
    state = f.init(jax.random.key(0), batch, {})
    _, log_p = glow_flow().apply({'params': state.ema['flow']}, y - 0.5)
    expected = -(log_p / 16 - math.log(256)) / math.log(2)
    np.testing.assert_allclose(f.evaluate(state, {}, batch, key)['bits_per_dim'], expected, rtol=1e-4)
    f = small_real_nvp()
    state = f.init(jax.random.key(0), batch, {})
    p = 0.05 + 0.9 * y
    z, log_det = real_nvp_flow().apply({'params': state.ema['flow'], **state.extra}, jnp.log(p / (1 - p)))
    log_p = log_normal(z) + log_det + np.log(0.9 / (p * (1 - p))).reshape(6, -1).sum(-1)
    expected = -(log_p / 16 - math.log(256)) / math.log(2)
    np.testing.assert_allclose(f.evaluate(state, {}, batch, key)['bits_per_dim'], expected, rtol=1e-4)


@pytest.mark.slow
def test_real_nvp_statistics_are_running_means_of_the_averaged_weights():
    f, batch = small_real_nvp(scales=1), images()
    start = f.init(jax.random.key(0), batch, {})
    state, _ = jax.jit(f.update)(start, {}, batch, jax.random.key(1))
    noise = jax.random.uniform(jax.random.split(jax.random.key(1))[1], batch['image'].shape)
    x, _ = real_nvp.to_logit(couplings.to_unit(batch['image'], noise), 0.9)
    _, new = real_nvp_flow(scales=1).apply({'params': state.ema['flow']}, x, True, mutable=['batch_stats'])
    expected = jax.tree.map(lambda a, b: (a + b) / 2, start.extra, new)
    chex.assert_trees_all_close(state.extra, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_penalty_is_of_weight_normalisation_alone_in_nats_of_an_image():
    """H W C log 2 nats of an image are one bit per dimension."""
    batch, key = images(), jax.random.key(1)
    f = small_real_nvp(scales=1, scale_penalty=0.5)
    state = f.init(jax.random.key(0), batch, {})
    _, logs = f.update(state, {}, batch, key)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    g = [leaf for name, leaf in leaves.items() if name.endswith("['scale']") and 'norm' not in name]
    assert sum(len(leaf) for leaf in g) == 4 * 6, 'six convolutions in each of four couplings'
    nats = 0.5 * sum(float(jnp.square(leaf).sum()) for leaf in g)
    per_dim = math.prod(IMAGE) * math.log(2)
    np.testing.assert_allclose((logs['loss'] - logs['bits_per_dim']) * per_dim, nats, rtol=1e-3)


@pytest.mark.slow
def test_accumulation_is_the_whole_batch():
    """Of Glow, whose loss is a mean over examples, up to the noise between levels."""
    batch = images(8)
    f, parts = small_glow(optim=optim(1e-3)), small_glow(optim=optim(1e-3, 2), mixing='lu')
    state = parts.init(jax.random.key(0), batch, {})
    after, logs = jax.jit(parts.update)(state, {}, batch, jax.random.key(1))
    assert np.isfinite(logs['loss']) and int(after.step) == 1
    state = f.init(jax.random.key(0), batch, {})
    _, whole = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
    np.testing.assert_allclose(logs['loss'], whole['loss'], atol=0.2)


@pytest.mark.slow
def test_classes_by_bayes_rule():
    batch = images()
    f = small_glow(classes=3, conditional=True)
    state = f.init(jax.random.key(0), batch, {})
    state = state.replace(ema=shaken(state.ema))
    assert f.conditions == ('label',)
    logits = f.classify(state, {}, {'image': batch['image']}, jax.random.key(0))
    y, net = couplings.to_unit(batch['image']) - 0.5, glow_flow(classes=3)
    apply = jax.jit(lambda label: net.apply({'params': state.ema['flow']}, y, label)[1])
    log_p = np.stack([apply(jnp.full(6, k)) for k in range(3)], 1)
    assert np.ptp(log_p, axis=1).min() > 0.1
    np.testing.assert_allclose(jax.nn.log_softmax(logits), jax.nn.log_softmax(log_p), rtol=1e-3, atol=1e-3)
    # Samples of another class are others, of the same noise.
    a, b = (f.sample(state, {}, {**batch, 'label': jnp.full(6, k)}, jax.random.key(1)) for k in (0, 1))
    assert np.abs(a - b).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize('image, model, count', [
    # One channel fewer in every 3x3 convolution: two in each step, one in each split, one of the top.
    ((32, 32, 3), dict(edge=False), 44_603_604 - 9 * (96 * 512 + 32 * (12 + 24 + 48) + (12 + 24) + 96)),
    ((64, 64, 3), dict(depth=48, levels=4), 112_377_540),
    ((256, 256, 3), dict(coupling='additive', levels=6), 175_099_620),
])  # fmt: skip
def test_size_of_the_published_glow(image, model, count):
    f = glow.build(Context(image, 0, optim()), **model)
    batch = {'image': jax.ShapeDtypeStruct((2, *image), jnp.float32)}
    state = jax.eval_shape(f.init, jax.eval_shape(lambda: jax.random.key(0)), batch, {})
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) == count


@pytest.mark.parametrize('build, model', [
    (small_glow, dict(coupling='linear')), (small_glow, dict(mixing='shuffle')), (small_glow, dict(depth=0)),
    (small_glow, dict(levels=3)), (small_glow, dict(conditional=True)), (small_glow, dict(temperature=-1.0)),
    (small_glow, dict(draws=0)), (small_real_nvp, dict(scales=4)), (small_real_nvp, dict(blocks=0)),
    (small_real_nvp, dict(constraint=1.0)), (small_real_nvp, dict(scale_penalty=-1.0)),
    (small_real_nvp, dict(image=(1, 1, 3), scales=1)),
])  # fmt: skip
def test_mistakes(build, model):
    with pytest.raises(UserError, match=r'config\.') as error:
        build(**model)
    assert '\n' not in str(error.value)
