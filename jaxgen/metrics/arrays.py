"""Metrics of arrays: images in the features of a network, or features.

What `features` may be:
  None                arrays are features already, [n, d] (logits [n, c] for the Inception Score)
  a Run that encodes  as of jaxgen.load('runs/classifier_digits'), or its directory
  a file              weights of the Inception network, see inception.load: then frechet_distance is FID, and
                      kernel_distance KID
  a function          uint8 [b, H, W, C] -> [b, d], or {'features': [b, d], 'logits': [b, c]}
What compares images with texts takes embeddings, or images, texts and a run of clip. Images are uint8 [n, H, W, C], or
floats in [-1, 1], which are rounded to 8 bits; a sequence whose slices are images (data.FolderImages) is read a batch
at a time. Samples come first, the data that they are compared with second. Extract once what several metrics read:
`extract(images, run)['features']`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgen import data, functions, log, options, sharding
from jaxgen.errors import UserError
from jaxgen.metrics import features as networks
from jaxgen.metrics import moments, neighbours, retrieval, scores

SUBSET = 1000  # images of one of KID's subsets (Binkowski et al. 2018)


@functools.lru_cache(maxsize=2)
def inception(path: str, time: int) -> tuple[networks.Features, Any]:
    """(network, mesh) of a file that was last changed at `time`."""
    mesh = sharding.make_mesh(1)
    return networks.of_inception(path, os.path.join(data.root({'dir': ''}), 'weights'), mesh), mesh


@functools.lru_cache(maxsize=2)
def loaded(path: str, time: int):
    """The run in a directory whose checkpoints last changed at `time`."""
    from jaxgen.run import load

    return load(path)


def network(features) -> tuple[networks.Features, Any]:
    """(network, mesh) of a run or a file.

    Raises:
      UserError: it is neither.
    """
    if isinstance(features, str | os.PathLike):
        path = os.path.abspath(os.path.expanduser(os.fspath(features).removeprefix('run:')))
        if not os.path.isdir(path):
            return inception(path, os.stat(path).st_mtime_ns if os.path.isfile(path) else 0)
        inner = os.path.join(path, 'checkpoints')
        features = loaded(path, os.stat(inner).st_mtime_ns if os.path.isdir(inner) else 0)
    if not hasattr(features, 'assembled'):
        raise UserError(
            'features must be a run that encodes, its directory, a file with the weights of Inception, or a function '
            f'of uint8 images; it is a {type(features).__name__}'
        )
    return features.features, features.assembled.mesh


def as_uint8(name: str, images) -> np.ndarray:
    """Images as uint8 [n, H, W, C]."""
    array = functions.as_array(name, images)
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise UserError(f'{name} must be images [n, H, W, C] with C = 1 or 3; they are {list(array.shape)}')
    array = functions.as_images(name, array, array.shape[1:])
    return functions.as_uint8(array, np.empty(0, np.uint8)) if array.dtype != np.uint8 else array


def extract(images, features, batch: int = 256, name: str = 'images') -> dict[str, np.ndarray]:
    """Outputs of a network for images: 'features' float32 [n, d], and 'logits' and 'spatial' where it has them.

    Args:
      features: see above.
      batch: images at a time.

    Raises:
      UserError: the arrays are no images, or the network does not read such ones.
    """
    if not hasattr(images, '__getitem__') or not len(images):
        raise UserError(f'{name} must be images [n, H, W, C] with n of 1 or more')
    if callable(features):
        size = batch

        def one(part: np.ndarray) -> dict[str, Any]:
            outputs: Any = features(part)
            return dict(outputs) if isinstance(outputs, dict) else {'features': outputs}
    else:
        net, mesh = network(features)
        net.shapes(as_uint8(name, images[:1]).shape[1:])
        size = sharding.round_up(mesh, min(batch, len(images)))

        def one(part: np.ndarray) -> dict[str, Any]:
            return networks.extract(net, mesh, part, size)

    parts = [one(as_uint8(name, images[i : i + size])) for i in range(0, len(images), size)]
    outputs = {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}
    for key, values in outputs.items():
        if values.shape[0] != len(images) or values.ndim != 2:
            raise UserError(f'features must give [n, d] for n images; of {key!r} it gave {list(values.shape)}')
    return outputs


def outputs_of(name: str, array, features, batch: int, key: str = 'features') -> np.ndarray:
    """One output, [n, d], of images in a network, or the array itself where there is none.

    Raises:
      UserError: it is no such array, or the network has no such output.
    """
    if features is not None:
        outputs = extract(array, features, batch, name)
        if key not in outputs:
            raise UserError(f'these features have no {key}: they have {", ".join(outputs)}')
        return outputs[key]
    values = functions.as_array(name, array)
    if values.ndim != 2 or not jnp.issubdtype(values.dtype, np.floating):
        hint = ': name the network, features=...' if values.ndim == 4 else ''
        raise UserError(f'{name} must be {key} [n, d], floats; they are {values.dtype} {list(values.shape)}{hint}')
    return values


def both(samples, reference, features, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of both sets.

    Raises:
      UserError: they have different dimensions.
    """
    a = outputs_of('samples', samples, features, batch)
    b = outputs_of('reference', reference, features, batch)
    if a.shape[1] != b.shape[1]:
        raise UserError(f'samples have {a.shape[1]} features and the reference {b.shape[1]}')
    return a, b


def frechet_distance(samples, reference, features=None, batch: int = 256) -> float:
    """Squared Frechet distance of the Gaussians with the moments of both sets; FID for features of Inception.

    It is biased upwards by few samples: compare at equal n, of ten times as many images as features or more.

    Raises:
      UserError: fewer than two on a side, or arrays that are none of images or features; see above.
      RunError: a feature is not finite.
    """
    a, b = both(samples, reference, features, batch)
    if min(len(a), len(b)) <= a.shape[1]:
        log.say(f'WARNING: a Frechet distance of {a.shape[1]} features by {min(len(a), len(b))} images is mostly bias')
    return moments.frechet(moments.Moments.of(a), moments.Moments.of(b))


def kernel_distance(
    samples, reference, features=None, batch: int = 256, subsets: int = 100, size: int = SUBSET
) -> tuple[float, float]:
    """(mean, standard deviation) over random subsets of the squared maximum mean discrepancy; KID for features of
    Inception. See scores.kernel_distance.

    Args:
      subsets, size: how many, and how many of either set are in each; fewer where a set is smaller.
    """
    a, b = both(samples, reference, features, batch)
    return scores.kernel_distance(a, b, subsets, min(size, len(a), len(b)))


def clip_distance(samples, reference, features=None, batch: int = 256) -> float:
    """CMMD: squared maximum mean discrepancy of embeddings of images by a CLIP run, times 1000. See
    scores.gaussian_discrepancy.

    Raises:
      UserError: arrays that are none of images or features; see above.
      RunError: a feature is not finite.
    """
    return scores.gaussian_discrepancy(*both(samples, reference, features, batch))


def pairs(images, texts, features, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [n, d] of images and of their texts, and int [n], equal where texts are the same.

    Raises:
      UserError: they are no such pairs, or `features` does not read texts.
    """
    if features is None:
        embedded = outputs_of('texts', texts, None, batch)
        _, same = np.unique(embedded, axis=0, return_inverse=True)
    else:
        net = network(features)[0] if not callable(features) else None
        if net is None or net.texts is None:
            raise UserError('features must be a run of clip, or its directory: texts are read by it')
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f'texts must be a list of them, one for each image; it is {options.shown(texts)}')
        embedded, tokens = net.texts(list(texts))
        _, same = np.unique(tokens, axis=0, return_inverse=True)
    embeddings = outputs_of('images', images, features, batch)
    if embeddings.shape != embedded.shape:
        raise UserError(
            f'images and texts must belong together in order; they are {list(embeddings.shape)} and '
            f'{list(embedded.shape)}'
        )
    return embeddings, embedded, same.reshape(-1)


def clip_score(images, texts, features=None, batch: int = 256, weight: float = 100.0) -> float:
    """Mean CLIP score of images and their texts, weight * max(cosine, 0); see retrieval.clip_scores.

    Args:
      texts: one for each image; embeddings where `features` is None.
      weight: 100, as most tables have it; the paper's is 2.5.
    """
    embeddings, embedded, _ = pairs(images, texts, features, batch)
    return float(retrieval.clip_scores(embeddings, embedded, weight).mean())


def r_precision(images, texts, features=None, batch: int = 256, candidates: int = 100, seed: int = 2020) -> float:
    """Fraction of images to which, of their own text and 99 others, their own is the most similar; see
    retrieval.r_precision.

    Args:
      texts: one for each image; embeddings where `features` is None.
      candidates: texts of each image.
      seed: by which the others are drawn.
    """
    embeddings, embedded, same = pairs(images, texts, features, batch)
    return float(retrieval.r_precision(embeddings, embedded, same, candidates, seed).mean())


def neighbourhood(
    samples, reference, features=None, batch: int = 256, k_precision: int = 3, k_density: int = 5
) -> dict[str, float]:
    """'precision', 'recall', 'density', 'coverage' and 'authenticity' by nearest neighbours; see
    neighbours.neighbourhood. Take as many samples as data: balls shrink as a set grows."""
    a, b = both(samples, reference, features, batch)
    return neighbours.neighbourhood(b, a, k_precision, k_density)


def inception_score(samples, features=None, batch: int = 256, splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation) of the Inception Score over parts, in the order of the samples.

    Args:
      samples: images, or logits [n, c] where `features` is None.
    """
    return scores.inception_score(outputs_of('samples', samples, features, batch, 'logits'), splits)
