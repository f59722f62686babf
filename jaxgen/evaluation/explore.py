"""Sheets of images that show a model: its latent space, its reconstructions, and whether its samples are copies.

Which of them there are depends on the family's functions: reconstructions need `encode` and `decode`; interpolations,
traversals and maps want latents that are real numbers, not codes; a family that only decodes (a GAN) interpolates
between draws of N(0, I), each row under one condition where it has any (a class, a caption, an image to translate);
nearest neighbours need samples alone.
"""

from __future__ import annotations

import colorsys
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from jaxgen import conditions, data, files, functions, log, origin, randomness
from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.evaluation.bound import BoundModel
from jaxgen.functions import linear, spherical

FRAMES = 11  # of an interpolation or a traversal
ROWS = 10  # directions that are traversed
POINTS = 1000  # of a map
NEAREST = 6  # neighbours of a sample
SPAN = 2.5  # standard deviations, to either side, of a traversal
COPY = 0.5  # a sample is a copy below this fraction of the least distance of a test image to the training images


def directions(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions [k, ...] of latents [n, ...] and their standard deviations [k], the largest first.

    Of vectors the axes themselves, since disentangled factors lie along them; of maps the principal components, since
    one position of a map is a few pixels and no more.
    """
    flat = z.reshape(len(z), -1)
    if z.ndim == 2:
        std = flat.std(0)
        widest = np.argsort(-std, kind='stable')[:ROWS]
        return np.eye(flat.shape[1], dtype=flat.dtype)[widest], std[widest]
    _, singular_values, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    k = min(ROWS, len(axes))
    return axes[:k].reshape(k, *z.shape[1:]), singular_values[:k] / np.sqrt(len(z))


def nearest(samples: np.ndarray, examples, k: int, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square distances [n, k] of images uint8 [n, ...] to the nearest of a set, and their indices [n, k].

    Pixels in [-1, 1]. The set is read `chunk` examples at a time.
    """

    def flat(images):
        return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1

    x = flat(samples)
    squares, indices = np.full((len(x), k), np.inf), np.zeros((len(x), k), np.int64)
    for start in range(0, len(examples), chunk):
        index = np.arange(start, min(start + chunk, len(examples)))
        y = flat(examples.take(index)['image'])
        new = np.stack([np.square(row - y).mean(1) for row in x])
        squares = np.concatenate([squares, new], 1)
        indices = np.concatenate([indices, np.broadcast_to(index, new.shape)], 1)
        least = np.argsort(squares, 1, kind='stable')[:, :k]
        squares, indices = np.take_along_axis(squares, least, 1), np.take_along_axis(indices, least, 1)
    return np.sqrt(squares), indices


def scatter(images: np.ndarray, points: np.ndarray, labels: np.ndarray | None, size: int = 1200) -> np.ndarray:
    """A scatter plot of images uint8 [n, H, W, C] at points [n, 2], framed in the colours of their classes:
    uint8 [size, size, 3]."""
    low, high = points.min(0), points.max(0)
    each = 26
    corner = np.round((points - low) / np.maximum(high - low, 1e-12) * (size - each - 8)).astype(int) + 4
    sheet = np.full((size, size, 3), 255, np.uint8)
    classes = int(labels.max()) + 1 if labels is not None else 1
    colours = [np.array(colorsys.hsv_to_rgb(i / classes, 0.85, 0.85)) * 255 for i in range(classes)]
    for i, (left, top) in enumerate(corner):
        image = Image.fromarray(images[i, ..., 0] if images.shape[-1] == 1 else images[i]).convert('RGB')
        frame = np.full((each, each, 3), colours[int(labels[i])] if labels is not None else 128, np.uint8)
        frame[3:-3, 3:-3] = np.asarray(ImageOps.pad(image, (each - 6, each - 6), color='white'))
        sheet[top : top + each, left : left + each] = frame
    return sheet


def flat_map(z: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Latents [n, ...] embedded in two dimensions [n, 2]: 'pca', or 'tsne' of the first 50 principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    flat = z.reshape(len(z), -1)
    kept = 2 if method == 'pca' else min(50, *flat.shape)
    flat = PCA(kept, random_state=seed).fit_transform(flat)
    if method == 'pca':
        return flat
    # Where other work is on the cores, OpenMP's threads spin for each other: two took two hundred times as long as one.
    with threadpool_limits(1, 'openmp'):
        return TSNE(2, perplexity=min(30, (len(z) - 1) / 3), init='pca', random_state=seed).fit_transform(flat)


def labelled(section: dict) -> dict:
    """The section `data` of a config with the label among its features, where the source has one."""
    more = {**section, 'features': (*section['features'], 'label')}
    try:
        return section if 'label' in section['features'] or not data.spec(more).classes else more
    except UserError:
        return section


class LatentSpace(NamedTuple):
    """Encoder and decoder of a model on host arrays of any number."""

    model: BoundModel
    batch: int  # examples at a time
    seed: int

    def encode(self, images: np.ndarray):
        """Latents [n, ...], or a tuple of codes, of uint8 images."""
        return functions.apply(self.model, 'encode', {'image': images}, self.batch, self.seed)

    def decode(self, z, conditions: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """uint8 images of latents [n, ...], under conditions {name: [n, ...]} if any, or of a tuple of codes."""
        latents = functions.as_latents(self.model, 'latents', z, self.model.family.image)
        images = functions.apply(self.model, 'decode', {**latents, **(conditions or {})}, self.batch, self.seed)
        return np.asarray(data.to_uint8(jnp.asarray(images)))


def interpolations(
    space: LatentSpace, ends: np.ndarray, conditions: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Sheets of FRAMES images a row, from each of the latents [2n, ...] of even index to the next.

    conditions: {name: [n, ...]}, one for a row.
    """
    repeated = {name: np.repeat(value, FRAMES, 0) for name, value in (conditions or {}).items()}
    t = np.linspace(0, 1, FRAMES)
    sheets = {}
    for name, between in (('linear', linear), ('spherical', spherical)):
        z = einops.rearrange(between(ends[::2], ends[1::2], t), 'row frame ... -> (row frame) ...')
        sheets[f'interpolation_{name}'] = files.grid(space.decode(z, repeated), FRAMES)
    return sheets


def traversals(space: LatentSpace, z: np.ndarray) -> np.ndarray:
    """A sheet: a row for each direction of the latents z [n, ...], along which the first one is moved."""
    axes, std = directions(z)
    steps = np.linspace(-SPAN, SPAN, FRAMES)
    # Along an axis from the mean of the data, everything else as the first example has it.
    along = ((z[:1] - z.mean(0)) * axes).reshape(len(axes), -1).sum(1)
    moves = steps * std[:, None] - along[:, None]  # [k, FRAMES]
    moved = z[0] + moves.reshape(*moves.shape, *[1] * (z.ndim - 1)) * axes[:, None]
    return files.grid(space.decode(moved.reshape(-1, *z.shape[1:])), FRAMES)


Write = Callable[[str, np.ndarray], None]  # (name, sheet uint8 [H, W, C])


def explore_encoder(space: LatentSpace, test, n: int, seed: int, write: Write) -> dict[str, dict]:
    """Sheets of a family that encodes: 'reconstructions' of the first 2n examples of `test`, 'interpolation_...'
    between them, 'traversals', and 'map_pca' and 'map_tsne' of its first POINTS examples. Returns the metrics."""
    family, metrics = space.model.family, {}
    examples = test.take(np.arange(min(POINTS, len(test))))
    images, labels = examples['image'], examples.get('label')
    inputs = images[: 2 * n]
    z = space.encode(inputs if family.latents.grids else images)
    if family.decode is not None:
        outputs = space.decode(jax.tree.map(lambda a: a[: len(inputs)], z))
        columns = max(1, min(len(inputs), n))
        rows = [a[i : i + columns] for i in range(0, len(inputs), columns) for a in (inputs, outputs)]
        write('reconstructions', files.grid(np.concatenate(rows), columns))
        error = np.sqrt(np.square((outputs.astype(float) - inputs) / 127.5).mean())
        metrics['reconstruction_error'] = {'value': float(error), 'n': len(inputs)}
    if not family.latents.grids:
        if family.decode is not None:
            if len(inputs) > 1:
                for name, sheet in interpolations(space, z[: len(inputs) // 2 * 2]).items():
                    write(name, sheet)
            write('traversals', traversals(space, z))
        if len(z) > 3 and z[0].size > 1:
            for method in ('pca', 'tsne'):
                write(f'map_{method}', scatter(images, flat_map(z, method, seed), labels))
    return metrics


def explore_prior(space: LatentSpace, conditions: dict[str, np.ndarray], n: int, seed: int, write: Write) -> None:
    """Sheets of a family that only decodes: 'interpolation_...' between 2n draws of N(0, I)."""
    keys = jax.random.split(randomness.stream(jax.random.key(seed), 'latents'), 2 * n)
    draw = functools.partial(jax.random.normal, shape=space.model.family.latents.shape)
    for name, sheet in interpolations(space, np.asarray(jax.vmap(draw)(keys)), conditions).items():
        write(name, sheet)


def explore_samples(samples: np.ndarray, train, test, write: Write) -> dict[str, dict]:
    """The sheet 'neighbours': samples beside their nearest training images. Returns the mean distance of the samples
    and of as many test images from these, and the fraction of samples that are 'copies'."""
    k = min(NEAREST, len(train))
    held_out = test.take(np.arange(min(len(samples), len(test))))['image']
    distance, indices = nearest(samples, train, k)
    rows = [[s, *train.take(those)['image']] for s, those in zip(samples, indices, strict=True)]
    write('neighbours', files.grid(np.stack([image for row in rows for image in row]), k + 1))
    expected = nearest(held_out, train, 1)[0]
    # A copy is nearer to a training image than any held-out image is.
    copies = distance[:, 0] < COPY * expected.min()
    return {
        'distance_of_samples': {'value': float(distance[:, 0].mean()), 'n': len(samples)},
        'distance_of_test_images': {'value': float(expected.mean()), 'n': len(held_out)},
        'copies': {'value': float(copies.mean()), 'n': len(samples)},
    }


def explore(run, n: int, seed: int, out: str) -> dict[str, dict]:
    """The metrics of a run's sheets, for explore.json; the sheets are written as PNG files into `out`.

    Args:
      run: a run.Run.
      n: rows of the sheets; twice as many examples are reconstructed, and as many samples are looked up.

    Raises:
      UserError: the family has nothing to show.
    """
    model, config = run.model, run.config
    family = model.family
    if family.encode is None and family.decode is None and family.sample is None:
        raise UserError(f'a {config.family} encodes nothing and draws nothing: there is nothing to explore')
    origin.check_named(run.assembled.unnamed, *configs.DATA_PATHS)  # before `labelled` reads its spec
    test = run.assembled.dataset('test', features=labelled(config.data.to_dict())['features'])
    space = LatentSpace(model, config.evaluate.batch, seed)
    metrics: dict[str, dict] = {}

    def write(name: str, sheet: np.ndarray) -> None:
        if jax.process_index() == 0:
            files.save_png(os.path.join(out, f'{name}.png'), sheet)
            log.say(f'{name}.png')

    if family.encode is not None:
        metrics |= explore_encoder(space, test, n, seed, write)
    elif family.decode is not None and family.latents.shape:
        given = conditions.first(run.assembled, config, n, {}) if family.conditions else {}
        explore_prior(space, given, n, seed, write)
    if family.sample is not None:
        metrics |= explore_samples(run.sample(2 * n, seed), run.assembled.dataset('train'), test, write)
    return metrics
