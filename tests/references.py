"""Networks in torch, and slow computations, that several test files compare with."""

from __future__ import annotations

import jax
import numpy as np


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
