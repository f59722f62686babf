"""The Inception network whose features FID compares (Szegedy et al. 2016, arXiv 1512.00567).

FID (Heusel et al. 2017), KID, the Inception Score and sFID are metrics in the features of one particular network: the
TensorFlow graph of 2015-12-05, with its slips, on images resized as in TensorFlow 1. Other weights, another resize or
an average pool that counts the padding give other values. Modules have the names that the weights have in torch.
"""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.layers import BatchNorm

Array = jax.Array

CLASSES = 1008  # of the graph's softmax; ImageNet has 1000

# The network as data: one line per branch, steps one after another. A convolution is name, kernel, features; it is
# padded to keep the size, unless /stride follows its kernel. Pools are 3x3. What stands around | goes side by side.
STEM = (
    'Conv2d_1a_3x3 3x3/2 32 > Conv2d_2a_3x3 3x3/1 32 > Conv2d_2b_3x3 3x3 64 > max/2 > '
    'Conv2d_3b_1x1 1x1 80 > Conv2d_4a_3x3 3x3/1 192 > max/2'
)
BLOCK_5 = """
branch1x1 1x1 64
branch5x5_1 1x1 48 > branch5x5_2 5x5 64
branch3x3dbl_1 1x1 64 > branch3x3dbl_2 3x3 96 > branch3x3dbl_3 3x3 96
average > branch_pool 1x1 {}"""
BLOCK_6A = """
branch3x3 3x3/2 384
branch3x3dbl_1 1x1 64 > branch3x3dbl_2 3x3 96 > branch3x3dbl_3 3x3/2 96
max/2"""
BLOCK_6 = """
branch1x1 1x1 192
branch7x7_1 1x1 {0} > branch7x7_2 1x7 {0} > branch7x7_3 7x1 192
branch7x7dbl_1 1x1 {0} > branch7x7dbl_2 7x1 {0} > branch7x7dbl_3 1x7 {0} > \
branch7x7dbl_4 7x1 {0} > branch7x7dbl_5 1x7 192
average > branch_pool 1x1 192"""
BLOCK_7A = """
branch3x3_1 1x1 192 > branch3x3_2 3x3/2 320
branch7x7x3_1 1x1 192 > branch7x7x3_2 1x7 192 > branch7x7x3_3 7x1 192 > branch7x7x3_4 3x3/2 192
max/2"""
BLOCK_7 = """
branch1x1 1x1 320
branch3x3_1 1x1 384 > branch3x3_2a 1x3 384 | branch3x3_2b 3x1 384
branch3x3dbl_1 1x1 448 > branch3x3dbl_2 3x3 384 > branch3x3dbl_3a 1x3 384 | branch3x3dbl_3b 3x1 384
{} > branch_pool 1x1 192"""
BLOCKS = {
    'Mixed_5b': BLOCK_5.format(32),
    'Mixed_5c': BLOCK_5.format(64),
    'Mixed_5d': BLOCK_5.format(64),
    'Mixed_6a': BLOCK_6A,
    'Mixed_6b': BLOCK_6.format(128),
    'Mixed_6c': BLOCK_6.format(160),
    'Mixed_6d': BLOCK_6.format(160),
    'Mixed_6e': BLOCK_6.format(192),
    'Mixed_7a': BLOCK_7A,
    'Mixed_7b': BLOCK_7.format('average'),
    'Mixed_7c': BLOCK_7.format('max'),  # where the paper has an average: a slip, but so the weights were trained
}
POOLS = {
    'average': functools.partial(nn.avg_pool, window_shape=(3, 3), padding='SAME', count_include_pad=False),
    'max': functools.partial(nn.max_pool, window_shape=(3, 3), padding='SAME'),
    'max/2': functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2)),
}


def resize_tf1(images: Array, height: int, width: int) -> Array:
    """Bilinear as TensorFlow 1 did it by default: pixel i of the result is read at i * old size / new size.

    No half-pixel centres and no filter against aliasing, so images shift a little and large ones alias.

    Args:
      images: float32 [n, H, W, C].

    Returns:
      float32 [n, height, width, C].
    """

    def resize(x, axis, size):
        at = np.arange(size, dtype=np.float32) * np.float32(x.shape[axis] / size)
        low = at.astype(np.int32)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = np.expand_dims(at - low.astype(np.float32), tuple(range(1, x.ndim - axis)))
        left, right = (jnp.take(x, i, axis, mode='clip') for i in (low, high))
        return left + (right - left) * part

    return resize(resize(images, 2, width), 1, height)


class ConvBN(nn.Module):
    """Convolution, batch norm by stored statistics, ReLU."""

    kernel: str
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, _, stride = self.kernel.partition('/')
        kernel = tuple(int(size) for size in kernel.split('x'))
        padding = 'VALID' if stride else 'SAME'
        # Products of fewer bits, the default of accelerators, would change the metrics.
        options = dict(use_bias=False, precision='highest', name='conv')
        x = nn.Conv(self.features, kernel, int(stride or 1), padding, **options)(x)
        return nn.relu(BatchNorm(train=False, eps=1e-3, name='bn')(x))


def branch(x: Array, line: str, block: str = '') -> Array:
    """One line of the tables, within the network's __call__."""
    for step in line.split(' > '):
        if step in POOLS:
            x = POOLS[step](x)
        else:
            convolutions = [one.split() for one in step.split(' | ')]
            parts = [ConvBN(kernel, int(features), name=block + name)(x) for name, kernel, features in convolutions]
            x = jnp.concatenate(parts, -1)
    return x


class Inception(nn.Module):
    """Images uint8 or float32 [n, H, W, 3] in 0..255, of any size, to float32 features.

    Returns:
      {'features': [n, 2048], what FID and KID compare;
        'logits': [n, 1008], without the bias, as the Inception Score has always been computed;
        'spatial': [n, 2023], 17 x 17 positions of 7 channels, what sFID compares (Nash et al. 2021, arXiv 2103.03841):
        the graph's `mixed_6/conv:0`, which is the first branch of Mixed_6d after its ReLU}.
    """

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        chex.assert_shape(images, (None, None, None, 3))
        x = (resize_tf1(images.astype(jnp.float32), 299, 299) - 128) / 128
        x = branch(x, STEM)
        for block, lines in BLOCKS.items():
            x = jnp.concatenate([branch(x, line, f'{block}.') for line in lines.split('\n')[1:]], -1)
            if block == 'Mixed_6d':
                spatial = x[..., :7].reshape(len(x), -1)
        features = x.mean((1, 2))
        weight = self.param('fc.kernel', nn.initializers.lecun_normal(), (features.shape[-1], CLASSES))
        self.param('fc.bias', nn.initializers.zeros, (CLASSES,))  # part of the weights, though no metric reads it
        return {'features': features, 'logits': jnp.dot(features, weight, precision='highest'), 'spatial': spatial}
