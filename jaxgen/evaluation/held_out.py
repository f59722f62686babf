"""Metrics of held-out examples: the family's own, and how far its latents disentangle the factors of the data."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxgen import fsdp, log, randomness, sample, sharding
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation.bound import BoundModel
from jaxgen.losses.matching import unit
from jaxgen.metrics import detection, disentanglement, retrieval


@functools.lru_cache(maxsize=64)
def program(family) -> Callable:
    """The jitted evaluation of a family: (state, frozen, batch, seed) -> {metric: [n]}."""

    def evaluate(state, frozen, batch, seed):
        rng = randomness.stream(jax.random.key(seed), 'evaluate')
        return fsdp.of_model(family.evaluate)(state, frozen, sample.to_inside(batch), rng)

    return sharding.jit(evaluate, family.deterministic)


def metric_names(assembled, size: int) -> list[str]:
    """Names of the family's own metrics, by abstract evaluation of a batch of this size."""
    features = assembled.features
    batch = {name: jax.ShapeDtypeStruct((size, *f.shape), f.dtype) for name, f in features.items()}
    batch['index'] = jax.ShapeDtypeStruct((size,), np.int32)
    with jax.sharding.use_abstract_mesh(assembled.mesh.abstract_mesh):
        return list(jax.eval_shape(program(assembled.family), assembled.abstract, assembled.frozen, batch, 0))


@functools.lru_cache(maxsize=64)
def encoder(family) -> Callable:
    """The jitted encoder of a family: (state, frozen, batch, seed) -> {'latents': [n, ...]}."""

    def encode(state, frozen, batch, seed):
        images = {'image': sample.to_inside(batch)['image']}
        rng = randomness.stream(jax.random.key(seed), 'encode')
        return {'latents': fsdp.of_model(family.encode)(state, frozen, images, rng)}

    return sharding.jit(encode, family.deterministic)


def map_examples(
    program: Callable, model: BoundModel, source, n: int, batch: int, seed: int, title: str = '', quiet: bool = False
) -> dict[str, np.ndarray]:
    """Outputs of a jitted program for the first n examples of `source`, float64 {name: [n, ...]}.

    Each batch holds 'index', the examples' numbers, beside the data: random estimates depend on the example and the
    seed alone.

    Args:
      program: (state, frozen, batch, seed) -> {name: [b, ...]}.
      batch: examples at a time.
      title: of the progress bar.
      quiet: without one.
    """
    size = model.batch_size(batch, n)
    outputs: dict[str, list] = {}
    with log.bar(n, title, quiet or jax.process_index() != 0) as bar:
        for start in range(0, n, size):
            index = np.arange(start, min(start + size, n), dtype=np.int32)
            values = model.apply(program, {**source.take(index), 'index': index}, size, seed)
            for name, x in values.items():
                outputs.setdefault(name, []).append(x.astype(np.float64))
            bar.update(len(index))
    return {name: np.concatenate(parts) for name, parts in outputs.items()}


def mean(values: np.ndarray) -> dict:
    """{'value', 'stderr', 'n'} of float64 [n]: the mean and its standard error, which one value does not have."""
    n = len(values)
    stderr = {'stderr': float(values.std(ddof=1) / np.sqrt(n))} if n > 1 else {}
    return {'value': float(values.mean()), **stderr, 'n': n}


def evaluate(
    model: BoundModel, source, n: int, batch: int, seed: int, anomalous: np.ndarray | None = None, split: str = 'test'
) -> dict[str, dict]:
    """{metric: {'value', 'stderr', 'n'}}: means of the family's own metrics over the first n examples of `source`.

    Args:
      batch: examples at a time.
      anomalous: bool [n], which examples are of classes that training left out. 'auc/METRIC' then is the area under
        the ROC curve of each metric as an anomaly score, higher meaning anomalous; its 'n' counts the anomalous
        examples and 'n_reference' the others.
      split: that the examples are of, for messages.

    Raises:
      RunError: a metric is not finite; names it and the example.
    """
    values, results = map_examples(program(model.family), model, source, n, batch, seed, f'{split} split'), {}
    for name, x in values.items():
        if not np.isfinite(x).all():
            raise RunError(f'{name} is not finite for example {int(np.argmin(np.isfinite(x)))} of the {split} split')
        results[name] = mean(x)
    if anomalous is not None and (anomalous.all() or not anomalous.any()):
        log.say(f'the first {n} test examples are all of one kind: no area under an ROC curve')
    elif anomalous is not None:
        for name, x in values.items():
            area, stderr = detection.roc_auc(x, anomalous)
            numbers = {'n': int(anomalous.sum()), 'n_reference': int((~anomalous).sum())}
            results[f'auc/{name}'] = {'value': area, **({'stderr': stderr} if stderr == stderr else {}), **numbers}
    return results


@functools.lru_cache(maxsize=64)
def pair_encoder(family) -> Callable:
    """The jitted encoders of a family that reads texts: (state, frozen, batch, seed) -> {'image', 'text': [n, d]}, both
    of length 1, and the texts' 'tokens'."""

    def encode(state, frozen, batch, seed):
        image = family.encode(state, frozen, sample.to_inside(batch), randomness.stream(jax.random.key(seed), 'encode'))
        text = unit(family.encode_text(state, frozen, batch['tokens']).embedding)
        return {'image': image, 'text': text, 'tokens': batch['tokens']}

    return sharding.jit(encode)


RECALLS = (1, 5, 10)


def evaluate_retrieval(model: BoundModel, source, n: int, batch: int, seed: int) -> dict[str, dict]:
    """{metric: {'value', 'n'}} of the first n pairs of image and caption: 'recall@k/text', the fraction of images of
    whose k most similar captions one is theirs, and 'recall@k/image' the other way round. A caption that is word for
    word the same as an image's own is right. 'r_precision' is the fraction of images to which of 100 captions their own
    is the most similar, where there are as many."""
    embeddings = map_examples(pair_encoder(model.family), model, source, n, batch, seed, 'retrieval')
    _, number = np.unique(embeddings['tokens'], axis=0, return_inverse=True)
    number = number.reshape(-1)
    results: dict[str, dict] = {}
    for name, queries, answers in (('text', 'image', 'text'), ('image', 'text', 'image')):
        ks = [k for k in RECALLS if k < n]
        recalls = retrieval.recall(embeddings[queries], embeddings[answers], (number, number), ks)
        results |= {f'recall@{k}/{name}': {'value': value, 'n': n} for k, value in recalls.items()}
    precision = r_precision(embeddings['image'], embeddings['text'], number)
    return results | ({'r_precision': precision} if precision else {})


def r_precision(images: np.ndarray, texts: np.ndarray, same: np.ndarray) -> dict:
    """{'value', 'stderr', 'n', 'of'} of retrieval.r_precision; {} where there are not enough other texts."""
    try:
        right = retrieval.r_precision(images, texts, same)
    except UserError as e:
        log.say(f'no R-precision: {e}')
        return {}
    return {**mean(right.astype(np.float64)), 'of': retrieval.CANDIDATES}


def evaluate_disentanglement(model: BoundModel, source, n: int, batch: int, seed: int) -> dict[str, dict]:
    """{metric: {'value', 'n'}} of the latents of the first n examples of `source`, which has 'factors': 'mig',
    'mig/0', 'mig/1', ... by factor, and 'beta_vae_score'; see jaxgen/metrics/disentanglement.py.

    Beside the gap of a factor stand the index of the 'latent' with the highest mutual information, and that
    information over the factor's entropy, 'known'. {} where the latents are not vectors of two numbers or more.
    """
    like = {'image': source.take(np.arange(1))['image']}
    shape = jax.eval_shape(encoder(model.family), model.state, model.frozen, like, seed)['latents'].shape
    if len(shape) != 2 or shape[1] < 2:
        return {}
    factors = source.take(np.arange(n))['factors']
    latents = map_examples(encoder(model.family), model, source, n, batch, seed, 'latents')['latents']
    gap, gaps = disentanglement.mutual_information_gap(latents, factors)
    score, stderr = disentanglement.beta_vae_score(latents, factors)
    information = disentanglement.normalised_information(latents, factors)
    each = {
        f'mig/{i}': {'value': float(g), 'n': n, 'latent': int(row.argmax()), 'known': float(row.max())}
        for i, (g, row) in enumerate(zip(gaps, information, strict=True))
        if g == g
    }
    return {'mig': {'value': gap, 'n': n}, **each, 'beta_vae_score': {'value': score, 'stderr': stderr, 'n': n}}
