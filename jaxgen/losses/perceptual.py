"""Perceptual distance: the distance of two images in a network's feature maps (Zhang et al. 2018, arXiv 1801.03924).

Feature maps of several depths are normalised along their channels, and their squared differences are summed over
channels, each with its weight, and averaged over positions (eq. 1). The network is one of two:

- LPIPS: VGG-16, with weights of the channels that were fitted to human similarity judgements. Both come from files that
  a person has. As a loss of autoencoders it takes half of the training's memory and time.
- Any run that encodes, a classifier of the same data above all (`config.stages.perceptual`), every channel with the
  weight 1: what the paper calls the baseline. It needs no file and works for small images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgen import log
from jaxgen.contract import Family
from jaxgen.errors import UserError
from jaxgen.networks.vgg import CHANNELS, LEAST, VGG16
from jaxgen.weights import mapping
from jaxgen.weights.features import LPIPS_RENAMED
from jaxgen.weights.features import lpips as lpips_names
from jaxgen.weights.files import Tensor, Weights, open_weights

Array = jax.Array

# Files whose distance is the published LPIPS, version 0.1, and digits of their SHA-256.
PUBLISHED = {
    'https://download.pytorch.org/models/vgg16-397923af.pth': '397923af',
    'https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth': (
        'a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868'
    ),
}
ADVICE = f'give two files as config.model.lpips = (VGG, LPIPS); the published ones are {" and ".join(PUBLISHED)}'
# LPIPS's own scaling of images in [-1, 1], red, green and blue: nearly that of torchvision's images in [0, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPS = 1e-10


def normalised(x: Array) -> Array:
    """Channels [..., c] as a vector of length 1 at every position, or 0 where all are 0. Float32."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    # The root has no derivative at 0, and a map of ReLUs has positions where all is 0.
    return x / (jnp.sqrt(jnp.maximum(square, EPS**2)) + EPS)


def distance(a: Sequence[Array], b: Sequence[Array], weights: Sequence[Array] | None = None) -> Array:
    """Sum over depths of the mean over positions of the weighted squared differences, float32 [n].

    Args:
      a, b: feature maps [n, h, w, c] or features [n, c] by depth, c the same at each depth in both.
      weights: [c] by depth; None: all 1, and each depth adds 0 to 4 (0 to 2 for maps without negative values).
    """
    total = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        chex.assert_equal_shape([x, y])
        square = jnp.square(normalised(x) - normalised(y))
        square = square.sum(-1) if weights is None else square @ weights[i]
        total = total + square.reshape(len(square), -1).mean(1)
    return total


def of_stage(stage: Family) -> Callable:
    """Distance by the features of an earlier stage: (its (state, frozen), x, y) -> [n].

    With 'maps' in the batch its `encode` returns maps of several depths; one that has none returns its features, and
    these are compared.

    Raises:
      UserError: its family has no features.
    """
    if stage.encode is None or stage.latents.grids:
        raise UserError('config.stages.perceptual must be a run with features: name one of a classifier')

    def maps(weights, images):
        features = stage.encode(*weights, {'image': images, 'maps': True}, jax.random.key(0))
        return features if isinstance(features, tuple | list) else (features,)

    return lambda weights, x, y: distance(maps(weights, x), maps(weights, y))


def measure(stages: dict[str, Family], paths: tuple[str, ...], image: tuple[int, int, int]) -> Callable | None:
    """Distance (frozen, x, y) -> [n] of images [n, H, W, C] by the run config.stages.perceptual or by the files
    config.model.lpips (`paths`). None: the config names neither.

    Raises:
      UserError: it names both, or one that cannot be used.
    """
    if 'perceptual' not in stages:
        weights = load(paths, image) if paths else None
        return (lambda frozen, x, y: lpips(weights, x, y)) if paths else None
    if paths:
        raise UserError('give config.stages.perceptual or config.model.lpips, not both')
    by_stage = of_stage(stages['perceptual'])
    return lambda frozen, x, y: by_stage(frozen['perceptual'], x, y)


def lpips(weights: dict, x: Array, y: Array) -> Array:
    """LPIPS of images [n, H, W, 1 or 3] in [-1, 1], float32 [n]. Grey ones are repeated in all three channels.

    weights: see `load`.
    """

    def maps(images):
        images = jnp.broadcast_to(images, (*images.shape[:-1], 3))
        return VGG16().apply({'params': weights['vgg']}, (images - SHIFT) / SCALE)

    return distance(maps(x), maps(y), weights['channels'])


def load(paths: tuple[str, ...], image: tuple[int, int, int] = (256, 256, 3)) -> dict:
    """Reads the weights of LPIPS on VGG-16 from a person's files.

    Args:
      paths: one or more files that together hold them: .safetensors, or what torch wrote (reading these takes torch),
        with the names of torchvision's vgg16 and of the `lpips` package. Other entries are ignored.
      image: H, W, C of the images that are to be compared.

    Returns:
      {'vgg': params of VGG16, 'channels': [float32 [c] by depth]}, numpy arrays.

    Raises:
      UserError: a file cannot be read, weights are missing or of other shapes, or the images are too small.
    """
    if min(image[:2]) < LEAST:
        raise UserError(
            f'LPIPS needs images of {LEAST} x {LEAST} pixels or more: name a run of a classifier as '
            'config.stages.perceptual instead'
        )
    tensors: dict[str, Tensor] = {}
    published: set[str] = set()
    for path in paths:
        opened = read(path)
        published |= {digits for digits in PUBLISHED.values() if opened.sha256.startswith(digits)}
        tensors |= {mapping.substituted(name, LPIPS_RENAMED): tensor for name, tensor in opened.items()}
    try:
        mapping.check(entries(), tensors, '.*', ', '.join(paths), 'LPIPS on VGG-16')
    except UserError as e:
        raise UserError(f'{e}; {ADVICE}') from e
    if len(published) < len(PUBLISHED):
        log.say(f'WARNING: {", ".join(paths)} are not the published weights: distances by them are not LPIPS')

    arrays = {entry.path: entry.read(tensors).astype(np.float32) for entry in entries()}
    tree = unflatten_dict(arrays, sep='/')
    return {'vgg': tree['vgg'], 'channels': [tree['channels'][str(i)] for i in range(len(CHANNELS))]}


@functools.cache
def entries() -> list[mapping.Entry]:
    """The tensors of all arrays that LPIPS needs."""
    image = jax.ShapeDtypeStruct((1, LEAST, LEAST, 3), jnp.float32)
    ours = flatten_dict(jax.eval_shape(VGG16().init, jax.random.key(0), image)['params'], sep='/')
    shapes = {f'vgg/{path}': leaf.shape for path, leaf in ours.items()}
    shapes |= {f'channels/{i}': (group[-1],) for i, group in enumerate(CHANNELS)}
    return mapping.entries(lpips_names(CHANNELS), shapes)


def read(path: str) -> Weights:
    """The tensors of a .safetensors file or of one that torch wrote."""
    try:
        return open_weights(path, 'config.model.lpips')
    except UserError as e:
        raise UserError(f'{e}; {ADVICE}') from e
