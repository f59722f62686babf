"""Networks in torch, and slow computations, that several test files compare with."""

from __future__ import annotations

import math

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgen.networks.masked import Position
from jaxgen.weights import mapping
from jaxgen.weights.files import Tensor


def ncsnpp(network, params, x, t, label=None, augment=None, style=None):
    """NCSN++ and DDPM++ in functions of torch: NHWC arrays to [n, C, H, W].

    The filter is one 4x4 kernel per channel. Where EDM filters after the convolution, so does this.
    """
    import torch
    from torch.nn import functional as F

    params = jax.tree.map(torch.from_numpy, params)
    scale = 1 if network.resampling == 'conv' else 2**-0.5
    taps = torch.tensor([1.0, 3, 3, 1] if network.resampling == 'fir' else [1.0, 1])
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2

    def smaller(x, pad):
        return F.conv2d(x, kernel.repeat(x.shape[1], 1, 1, 1), stride=2, padding=pad, groups=x.shape[1])

    def larger(x):
        weight = 4 * kernel.repeat(x.shape[1], 1, 1, 1)
        return F.conv_transpose2d(x, weight, stride=2, padding=(len(taps) - 1) // 2, groups=x.shape[1])

    def dense(p, x):
        return F.linear(x, p['kernel'].T, p.get('bias'))

    def conv(p, x, stride=1, pad=1):
        kernel = p['kernel'] if p['kernel'].ndim == 4 else p['kernel'][None, None]
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), p.get('bias'), stride=stride, padding=pad)

    def norm(p, x):
        groups = min(x.shape[1] // network.group_size, 32) if network.group_size else network.groups
        return F.group_norm(x, groups, p.get('scale'), p.get('bias'), eps=network.eps)

    def styled(p, name, x):
        x = norm(p.get(name, {}), x)
        if style is None:
            return x
        gain, shift = dense(p[f'{name}_style'], style)[..., None, None].chunk(2, 1)
        return (1 + gain) * x + shift

    def block(name, x, resample=None):
        p = params[name]
        h = F.silu(styled(p, 'norm1', x))
        if resample:
            x, h = resample(x), resample(h)
        h = conv(p['conv1'], h) + dense(p['embedding'], embedding)[..., None, None]
        h = conv(p['conv2'], F.silu(styled(p, 'norm2', h)))
        x = scale * (h + (conv(p['shortcut'], x, pad=0) if 'shortcut' in p else x))
        if f'{name}_attention' in params:
            p = params[f'{name}_attention']
            q, k, v = conv(p['qkv'], norm(p['norm'], x), pad=0).flatten(2).chunk(3, 1)  # [n, C, HW]
            weights = torch.softmax(torch.einsum('ncq,nck->nqk', q, k) / q.shape[1] ** 0.5, -1)
            h = torch.einsum('nqk,nck->ncq', weights, v).reshape(x.shape)
            x = scale * (x + conv(p['out'], h, pad=0))
        return x

    x, t = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)[:, None]
    if network.embedding == 'fourier':
        angles = 2 * np.pi * t * params['frequencies']
    else:
        half = network.channels // 2
        angles = t * 10_000.0 ** (-torch.arange(half) / (half - 1))
    h = torch.cat([angles.sin(), angles.cos()], 1)
    if network.classes:
        one_hot = F.one_hot(torch.from_numpy(label), network.classes)
        h = h + dense(params['label'], one_hot * network.classes**0.5)
    if network.augment:
        h = h + dense(params['augment'], torch.from_numpy(augment))
    embedding = F.silu(dense(params['time2'], F.silu(dense(params['time1'], h))))

    last = len(network.multipliers) - 1
    h, small = conv(params['first'], x), x
    skips = [h]
    for level in range(last + 1):
        for i in range(network.blocks):
            h = block(f'down{level}_{i}', h)
            skips.append(h)
        if level < last:
            if network.resampling == 'conv':
                h = conv(params[f'down{level}'], F.pad(h, (0, 1, 0, 1)), stride=2, pad=0)
            else:
                h = block(f'down{level}', h, lambda x: smaller(x, (len(taps) - 1) // 2))
            if network.pyramid == 'residual':
                p = params[f'input{level}']
                small = smaller(conv({'kernel': p['kernel']}, small, pad=2), 0) + p['bias'][:, None, None]
                h = small = scale * (small + h)
            skips.append(h)
    h = block('middle_1', block('middle_0', h))
    for level in range(last, -1, -1):
        for i in range(network.blocks + 1):
            h = block(f'up{level}_{i}', torch.cat([h, skips.pop()], 1))
        if level and network.resampling == 'conv':
            h = conv(params[f'up{level}'], F.interpolate(h, scale_factor=2, mode='nearest'))
        elif level:
            h = block(f'up{level}', h, larger)
    return conv(params['last0'], F.silu(norm(params['norm0'], h)))


def influence(apply, x, colours: int) -> np.ndarray:
    """Absolute derivatives of each output by each input, [outputs, inputs], in raster order.

    apply: x [n, H, W, C] -> [n, H, W, colours, k].
    """
    _, height, width, _ = x.shape
    direction = np.random.default_rng(2).normal(size=jax.eval_shape(apply, x).shape).astype(np.float32)

    def summed(x):  # over the batch, whose examples are independent: one row of the Jacobian for all of them
        return (apply(x) * direction).sum(-1).sum(0).reshape(-1)

    jacobian = jax.jit(jax.jacrev(summed))(x)  # [outputs, n, H, W, C]
    actual = np.abs(np.asarray(jacobian)).max(1)
    return actual.reshape(height * width * colours, -1)


def outputs_by_pixel(network, params, x, condition, scales: int = 1) -> np.ndarray:
    """The network's output pixel by pixel, by its cache: [n, H, W, ...]."""
    n, height, width, channels = x.shape
    margin = network.margin
    sampled = np.zeros((n, margin + height, width + 2 * margin, channels), np.float32)
    cache, out = {}, []

    def depth(*at):
        return sum(all(a % 2**s == 0 for a in at) for s in range(1, scales))

    def apply(sampled, cache, i, j, depth):
        position = Position(height, width, i, j, depth, margin)
        return network.apply({**params, 'cache': cache}, sampled, condition, False, position, mutable=['cache'])

    row = jax.jit(lambda sampled, cache, i, depth: apply(sampled, cache, i, None, depth)[1]['cache'], static_argnums=3)
    pixel = jax.jit(apply, static_argnums=4)
    # One trace fewer: caches that are not there yet are zeros.
    if network.rows:
        cache = jax.eval_shape(lambda: apply(sampled, {}, 0, None, scales - 1)[1]['cache'])
        cache = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), cache)
    whole = jax.eval_shape(lambda: apply(sampled, cache, 0, 0, scales - 1)[1]['cache'])
    cache = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), whole)
    for i in range(height):
        if network.rows:
            cache = row(sampled, cache, i, depth(i))
        for j in range(width):
            actual, changed = pixel(sampled, cache, i, j, depth(i, j))
            cache = changed['cache']
            out.append(np.asarray(actual)[:, 0, 0])
            sampled[:, margin + i, margin + j] = x[:, i, j]  # only now, so that no output can depend on it
    return np.stack(out, 1).reshape(n, height, width, *out[0].shape[1:])


def randomised(shapes, seed: int = 0):
    """Weights of these shapes, none of them special."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return (rng.normal(size=leaf.shape) / np.sqrt(math.prod(leaf.shape[:-1]) or 9)).astype(np.float32)

    return jax.tree.map(draw, shapes)


def randomise(torch, model):
    """No weight is special: norms have other scales than 1 and biases other values than 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else 20
            p.copy_(torch.randn_like(p) / fan**0.5 + (0.5 if p.ndim == 1 else 0.0))
    return model.eval()


def read(table, params, theirs, beside=(), root='denoiser/'):
    """Our params of their state dict, every tensor of which is used but those `beside` them; back again are the
    same."""
    shapes = {root + '/'.join(path): leaf.shape for path, leaf in flatten_dict(params).items()}
    state = {name: x.numpy() for name, x in theirs.state_dict().items() if name not in beside}
    entries = mapping.entries(table, shapes)
    assert {name for entry in entries for name in entry.all_names} == set(state)
    tensors = {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in state.items()}
    arrays = {entry.path: entry.read(tensors) for entry in entries}
    for entry in entries:
        for name, x in entry.write(arrays[entry.path]).items():
            np.testing.assert_array_equal(x.reshape(state[name].shape), state[name])
    return unflatten_dict({tuple(path.removeprefix(root).split('/')): x for path, x in arrays.items()})


def shaken(module):
    """The same with biases and scales that are not 0 and 1."""
    import torch

    for parameter in module.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()
