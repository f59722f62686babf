"""Looks into a run: its latent space, its reconstructions, and whether its samples are copies. Pictures, no training.

What a family can show depends on its functions: reconstructions need `encode` and `decode`; interpolations, traversals
and maps want latents that are numbers, not codes; a family that only decodes (a GAN) interpolates between draws of
N(0, I), each row under one condition where it has any (a class, a caption, a picture to turn); nearest neighbours need
nothing but samples.
"""

from __future__ import annotations

import colorsys
import functools
import os

import jax
import numpy as np
from PIL import Image

from jaxgen import data, log, origin, randomness, sample, sharding
from jaxgen.errors import UserError

FRAMES = 11  # of an interpolation or a traversal
ROWS = 10  # directions that are traversed
POINTS = 1000  # of a map
NEAREST = 6  # neighbours of a sample
SPAN = 2.5  # standard deviations that a traversal goes to either side


def linear(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Points on the line from a to b [n, ...] at shares [k] of the way: [n, k, ...]."""
    share = share.reshape(1, -1, *[1] * (a.ndim - 1))
    return (1 - share) * a[:, None] + share * b[:, None]


def spherical(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The same on the great circle (Shoemake 1985): draws of a Gaussian keep their usual length on the way."""
    axes = tuple(range(1, a.ndim))
    cosine = (a * b).sum(axes) / np.maximum(np.sqrt((a**2).sum(axes) * (b**2).sum(axes)), 1e-12)
    angle = np.arccos(np.clip(cosine, -1, 1)).reshape(-1, 1, *[1] * (a.ndim - 1))
    share = share.reshape(1, -1, *[1] * (a.ndim - 1))
    flat = np.sin(angle) < 1e-4  # parallel: the circle is a line, or there is no one circle
    sine = np.where(flat, 1, np.sin(angle))
    circle = (np.sin((1 - share) * angle) * a[:, None] + np.sin(share * angle) * b[:, None]) / sine
    return np.where(flat, (1 - share) * a[:, None] + share * b[:, None], circle)


def directions(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions [k, ...] of latents [n, ...] and their standard deviations [k], the widest first.

    Of vectors the axes themselves, since what a model has learned to keep apart lies along them; of maps the principal
    components, since one place of a map is a few pixels and no more.
    """
    flat = z.reshape(len(z), -1)
    if z.ndim == 2:
        spread = flat.std(0)
        widest = np.argsort(-spread, kind='stable')[:ROWS]
        return np.eye(flat.shape[1], dtype=flat.dtype)[widest], spread[widest]
    _, widths, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    k = min(ROWS, len(axes))
    return axes[:k].reshape(k, *z.shape[1:]), widths[:k] / np.sqrt(len(z))


def nearest(samples: np.ndarray, examples, k: int, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square distances [n, k] of pictures uint8 [n, ...] to the nearest of a set, and their numbers [n, k].

    Pixels in [-1, 1]. The set is read in pieces.
    """

    def flat(images):
        return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1

    x = flat(samples)
    squares, numbers = np.full((len(x), k), np.inf), np.zeros((len(x), k), np.int64)
    for start in range(0, len(examples), chunk):
        index = np.arange(start, min(start + chunk, len(examples)))
        y = flat(examples.take(index)['image'])
        found = np.stack([np.square(row - y).mean(1) for row in x])
        squares = np.concatenate([squares, found], 1)
        numbers = np.concatenate([numbers, np.broadcast_to(index, found.shape)], 1)
        kept = np.argsort(squares, 1, kind='stable')[:, :k]
        squares, numbers = np.take_along_axis(squares, kept, 1), np.take_along_axis(numbers, kept, 1)
    return np.sqrt(squares), numbers


def scatter(images: np.ndarray, places: np.ndarray, labels: np.ndarray | None, size: int = 1200) -> np.ndarray:
    """Pictures uint8 [n, H, W, C] at places [n, 2] on one sheet [size, size, 3], framed in the colours of classes."""
    low, high = places.min(0), places.max(0)
    each = 26
    corner = np.round((places - low) / np.maximum(high - low, 1e-12) * (size - each - 8)).astype(int) + 4
    sheet = np.full((size, size, 3), 255, np.uint8)
    classes = int(labels.max()) + 1 if labels is not None else 1
    colours = [np.array(colorsys.hsv_to_rgb(i / classes, 0.85, 0.85)) * 255 for i in range(classes)]
    for i, (left, top) in enumerate(corner):
        image = Image.fromarray(images[i, ..., 0] if images.shape[-1] == 1 else images[i]).convert('RGB')
        frame = np.full((each, each, 3), colours[int(labels[i])] if labels is not None else 128, np.uint8)
        frame[3:-3, 3:-3] = image.resize((each - 6, each - 6))
        sheet[top : top + each, left : left + each] = frame
    return sheet


def flat_map(z: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Latents [n, ...] in two dimensions [n, 2], by 'pca' or 'tsne' (of the first 50 principal components)."""
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


class Explorer:
    """The functions of a run on host arrays of any number, in batches of one shape."""

    def __init__(self, run, seed: int):
        self.run, self.seed = run, seed
        self.family, self.mesh = run.assembled.family, run.assembled.mesh
        self.size = sharding.round_up(self.mesh, run.config.evaluate.batch)

        def encode(state, frozen, batch, key):
            return self.family.encode(state, frozen, sample.to_inside(batch), key)

        def decode(state, frozen, arrays, key):
            if self.family.latents.grids:
                z, batch = tuple(arrays[str(i)] for i in range(len(arrays))), {}
            else:
                z, batch = arrays['z'], sample.to_inside({k: v for k, v in arrays.items() if k != 'z'})
            return data.to_uint8(self.family.decode(state, frozen, batch, z, key))

        self.programs = {'encode': sharding.jit(encode), 'decode': sharding.jit(decode)}

    def apply(self, name: str, arrays: dict[str, np.ndarray]):
        n, state, frozen = len(next(iter(arrays.values()))), self.run.state, self.run.assembled.frozen
        pieces = []
        for start in range(0, n, self.size):
            piece = {k: v[start : start + self.size] for k, v in arrays.items()}
            placed, real = sharding.put_padded(self.mesh, piece, self.size)
            found = self.programs[name](state, frozen, placed, randomness.stream(jax.random.key(self.seed), name))
            pieces.append(jax.tree.map(lambda a, real=real: sharding.to_host(a)[:real], found))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)

    def encode(self, images: np.ndarray):
        """Latents [n, ...], or a tuple of codes, of uint8 images."""
        return self.apply('encode', {'image': images})

    def decode(self, z, conditions: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """uint8 images of latents [n, ...], under conditions {name: [n, ...]} if any, or of a tuple of codes."""
        if isinstance(z, tuple):
            return self.apply('decode', {str(i): codes for i, codes in enumerate(z)})
        return self.apply('decode', {'z': np.asarray(z, np.float32), **(conditions or {})})


def interpolations(
    explorer: Explorer, ends: np.ndarray, conditions: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Sheets of FRAMES pictures a row, from each of the latents [2n, ...] of even number to the next.

    conditions: {name: [n, ...]}, one for a row.
    """
    given = {name: np.repeat(value, FRAMES, 0) for name, value in (conditions or {}).items()}
    share = np.linspace(0, 1, FRAMES)
    sheets = {}
    for name, between in (('linear', linear), ('spherical', spherical)):
        z = between(ends[::2], ends[1::2], share)
        sheets[f'interpolation_{name}'] = log.grid(explorer.decode(z.reshape(-1, *z.shape[2:]), given), FRAMES)
    return sheets


def traversals(explorer: Explorer, z: np.ndarray) -> np.ndarray:
    """A sheet: a row for each direction of the latents z [n, ...], the first one moved along it."""
    axes, spread = directions(z)
    steps = np.linspace(-SPAN, SPAN, FRAMES)
    # Along an axis from the middle of the data, everything else as the first example has it.
    along = ((z[:1] - z.mean(0)) * axes).reshape(len(axes), -1).sum(1)
    moves = steps * spread[:, None] - along[:, None]  # [k, FRAMES]
    moved = z[0] + moves.reshape(*moves.shape, *[1] * (z.ndim - 1)) * axes[:, None]
    return log.grid(explorer.decode(moved.reshape(-1, *z.shape[1:])), FRAMES)


def explore(run, n: int, seed: int, out: str) -> dict:
    """Writes what the family of a run can show as PNG files into `out`; returns what else was found, for explore.json.

    Args:
      n: rows of the sheets; twice as many examples are reconstructed, and as many samples are looked up.

    Raises:
      UserError: the family has nothing to show.
    """
    family, config = run.assembled.family, run.config
    explorer = Explorer(run, seed)
    if family.encode is None and family.decode is None and family.sample is None:
        raise UserError(f'a {config.family} encodes nothing and draws nothing: there is nothing to explore')
    origin.check_named(run.assembled.unnamed, 'data.source', 'data.other')
    test, found, first = data.dataset(labelled(config.data.to_dict()), 'test'), {}, jax.process_index() == 0

    def write(name: str, sheet: np.ndarray) -> None:
        if first:
            log.save_png(os.path.join(out, f'{name}.png'), sheet)
            log.say(f'written to {os.path.join(out, name)}.png')

    if family.encode is not None:
        examples = test.take(np.arange(min(POINTS, len(test))))
        images, labels = examples['image'], examples.get('label')
        shown = images[: 2 * n]
        z = explorer.encode(shown if family.latents.grids else images)
        if family.decode is not None:
            again = explorer.decode(jax.tree.map(lambda a: a[: len(shown)], z))
            columns = max(1, min(len(shown), n))
            rows = [a[i : i + columns] for i in range(0, len(shown), columns) for a in (shown, again)]
            write('reconstructions', log.grid(np.concatenate(rows), columns))
            error = np.sqrt(np.square((again.astype(float) - shown) / 127.5).mean())
            found['reconstruction_error'] = {'value': float(error), 'n': len(shown)}
        if not family.latents.grids:
            if family.decode is not None:
                if len(shown) > 1:
                    for name, sheet in interpolations(explorer, z[: len(shown) // 2 * 2]).items():
                        write(name, sheet)
                write('traversals', traversals(explorer, z))
            if len(z) > 3 and z[0].size > 1:
                for method in ('pca', 'tsne'):
                    write(f'map_{method}', scatter(images, flat_map(z, method, seed), labels))
    elif family.decode is not None and family.latents.shape:
        keys = jax.random.split(randomness.stream(jax.random.key(seed), 'latents'), 2 * n)
        ends = np.asarray(jax.vmap(functools.partial(jax.random.normal, shape=family.latents.shape))(keys))
        wanted = sample.batches(run.assembled, config, n, {}) if family.conditions else {}
        for name, sheet in interpolations(explorer, ends, wanted).items():
            write(name, sheet)
    if family.sample is not None:
        train = data.dataset(config.data, 'train')
        k = min(NEAREST, len(train))
        samples, held_out = run.sample(2 * n, seed), test.take(np.arange(min(2 * n, len(test))))['image']
        distance, numbers = nearest(samples, train, k)
        rows = [[s, *train.take(those)['image']] for s, those in zip(samples, numbers, strict=True)]
        write('neighbours', log.grid(np.stack([image for row in rows for image in row]), k + 1))
        usual = nearest(held_out, train, 1)[0]
        found['distance_of_samples'] = {'value': float(distance[:, 0].mean()), 'n': len(samples)}
        found['distance_of_test_images'] = {'value': float(usual.mean()), 'n': len(held_out)}
        # A copy is nearer to a training picture than any held-out picture is.
        copies = distance[:, 0] < 0.5 * usual.min()
        found['copies'] = {'value': float(copies.mean()), 'n': len(samples)}
    return found
