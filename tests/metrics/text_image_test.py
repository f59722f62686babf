"""Metrics of images and texts in the space of a CLIP run: the run's own embeddings, images of any size, mistakes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from PIL import Image
from support import assemble, first_batch, random_weights, tiny

from jaxgen import metrics
from jaxgen.errors import UserError
from jaxgen.metrics.features import resized
from jaxgen.run import Run


@functools.cache
def clip() -> Run:
    config = tiny('clip_shapes')
    a = assemble(config)
    state = jax.eval_shape(a.family.init, jax.random.key(0), first_batch(config), a.frozen)
    state = state.replace(step=np.int32(0), ema=random_weights(state.ema))
    return Run('runs/clip', a.config, a, state.replace(params=None, opt=None), 'ema')


def images(n: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), np.uint8)


TEXTS = ['a red circle', 'a blue square', 'a large green heart', 'a red circle']


@pytest.mark.slow
def test_of_images_and_texts_as_of_their_embeddings():
    run, x = clip(), images(4)
    x[1] //= 8
    embeddings, texts = run.encode(x), run.encode_text(TEXTS)
    cosines = np.diagonal(run.similarity(x, TEXTS))
    assert (cosines < 0).any() and (cosines > 0).any()
    expected = 100 * np.maximum(cosines, 0).mean()
    assert metrics.clip_score(x, TEXTS, features=run) == pytest.approx(expected, rel=1e-4)
    assert metrics.clip_score(embeddings, texts) == pytest.approx(expected, rel=1e-4)
    score = metrics.clip_score(x, TEXTS, features=run, weight=2.5)
    assert score == pytest.approx(expected / 40, rel=1e-4)
    distance = metrics.clip_distance(x, x[:2], features=run)
    assert distance == pytest.approx(metrics.clip_distance(embeddings, embeddings[:2]), rel=1e-4) and distance > 0
    for arrays in ((x, TEXTS, run), (embeddings, texts)):
        precision = metrics.r_precision(*arrays, candidates=2)
        similarity = run.similarity(x, TEXTS)
        assert precision in {k / 4 for k in range(5)}
        beaten = [all(similarity[i, i] > similarity[i, j] for j in range(3) if TEXTS[i] != TEXTS[j]) for i in range(4)]
        assert precision >= np.mean(beaten), 'what no other text beats is right whichever is drawn'


@pytest.mark.slow
@pytest.mark.parametrize('height, width', [(8, 8), (16, 16), (37, 23), (5, 9)])
def test_images_of_any_size_are_brought_to_that_of_the_run(height, width):
    """As by PIL, which rounds to 8 bits, and cuts what lies beyond, after each axis: so images are of middle greys."""
    x = np.kron(64 + images(2, -(-height // 4), -(-width // 4)) // 2, np.ones((1, 4, 4, 1), np.uint8))[
        :, :height, :width
    ]
    factor = 8 / min(height, width)
    size = max(int(factor * width), 8), max(int(factor * height), 8)
    left, top = (size[0] - 8) // 2, (size[1] - 8) // 2
    enlarged = [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in x]
    expected = np.stack([np.asarray(one.crop((left, top, left + 8, top + 8)), int) for one in enlarged])
    brought = np.asarray(resized(x, (8, 8, 3)), int)
    assert np.abs(brought - expected).max() <= 1 and np.abs(brought - expected).mean() < 0.3
    run = clip()
    np.testing.assert_allclose(
        metrics.extract(x, run)['features'], run.encode(brought.astype(np.uint8)), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(run.similarity(x, TEXTS), run.similarity(brought.astype(np.uint8), TEXTS), atol=1e-3)


@pytest.mark.slow
def test_grey_images_have_three_equal_channels():
    run, x = clip(), images(3, channels=1)
    np.testing.assert_allclose(metrics.extract(x, run)['features'], run.encode(x.repeat(3, 3)), rtol=1e-3, atol=1e-5)


def test_probabilities_of_classes_by_prompts():
    """The softmax of scaled cosines with the mean of a class's embeddings, brought to length 1."""
    run, x = clip(), images(5)
    classes, templates = ['circle', ['square', 'box'], 'heart'], ('a {}', 'a photo of a {}, {}')
    texts = [['a circle', 'a photo of a circle, circle'],
             ['a square', 'a box', 'a photo of a square, square', 'a photo of a box, box'],
             ['a heart', 'a photo of a heart, heart']]  # fmt: skip
    means = np.stack([run.encode_text(one).astype(np.float64).mean(0) for one in texts])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    logits = np.exp(run.state.ema['scale']['value']) * run.encode(x) @ means.T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = run.zero_shot(x, classes, templates)
    assert probabilities.shape == (5, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
    one = run.zero_shot(x, TEXTS[:3])
    np.testing.assert_array_equal(one.argmax(1), run.similarity(x, TEXTS[:3]).argmax(1))


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: metrics.clip_score(images(3), TEXTS[:3]), 'texts must be features'),
        (lambda: metrics.clip_score(images(3), TEXTS, clip()), 'belong together in order'),
        (lambda: metrics.clip_score(images(3), 'a red circle', clip()), 'texts must be a list'),
        (lambda: metrics.clip_score(images(3), TEXTS[:3], lambda x: x.reshape(3, -1)), 'must be a run of clip'),
        (lambda: metrics.r_precision(images(4), TEXTS, clip()), 'takes 99 captions'),
        (lambda: metrics.clip_distance(images(3), images(3)), 'name the network'),
        (lambda: clip().zero_shot(images(3), 'a circle'), 'classes must be a list'),
        (lambda: clip().zero_shot(images(3), []), 'classes must be a list'),
        (lambda: clip().zero_shot(images(3), [3]), 'a class must be a text'),
        (lambda: clip().zero_shot(images(3), ['circle'], 'a {}'), 'templates must be texts'),
        (lambda: clip().zero_shot(images(3), ['circle'], ['a photo']), 'must hold {}'),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message) as e:
        call()
    assert '\n' not in str(e.value)
