"""Retrieval against sorting written out."""

from math import comb

import numpy as np
import pytest

from jaxgen.errors import RunError, UserError
from jaxgen.metrics.retrieval import clip_scores, normalised, r_precision, recall


def test_recall_is_that_of_sorted_answers():
    rng = np.random.default_rng(0)
    queries, answers = rng.normal(size=(50, 4)), rng.normal(size=(40, 4))
    of_queries, of_answers = rng.integers(0, 12, 50), np.arange(40) % 12
    by_hand = dict.fromkeys((1, 3, 40), 0)
    for query, number in zip(queries, of_queries, strict=True):
        order = sorted(range(40), key=lambda j, query=query: -query @ answers[j])
        for k in by_hand:
            by_hand[k] += any(of_answers[j] == number for j in order[:k]) / 50
    found = recall(queries, answers, (of_queries, of_answers), tuple(by_hand))
    np.testing.assert_allclose([found[k] for k in by_hand], list(by_hand.values()))


def test_embeddings_that_are_all_alike_find_nothing():
    same = np.ones((20, 3))
    assert recall(same, same, (np.arange(20), np.arange(20)), (1, 19, 20)) == {1: 0.0, 19: 0.0, 20: 1.0}


def test_clip_scores_by_hand():
    """Cosines 1, 0.6, -1: a negative one counts as 0."""
    images, texts = np.array([[2.0, 0], [3, 4], [1, 0]]), np.array([[5.0, 0], [1, 0], [-1, 0]])
    np.testing.assert_allclose(clip_scores(images, texts), [100, 60, 0], rtol=1e-12)
    np.testing.assert_allclose(clip_scores(images, texts, weight=2.5), [2.5, 1.5, 0], rtol=1e-12)
    with pytest.raises(RunError, match='embeddings of sample 1'):
        clip_scores(images, np.array([[1.0, 0], [np.nan, 0], [0, 1]]))


def test_r_precision_is_that_of_the_rank_among_all():
    """Of a text that b of n - 1 others are more similar than, k drawn ones hold none of these with the probability
    C(n - 1 - b, k) / C(n - 1, k)."""
    n, k = 60, 9
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, 6))
    texts = images + rng.normal(size=(n, 6))
    cosines = normalised(images) @ normalised(texts).T
    above = (cosines > np.diagonal(cosines)[:, None]).sum(1)
    expected = np.mean([comb(n - 1 - b, k) / comb(n - 1, k) for b in above])
    drawn = [r_precision(images, texts, np.arange(n), k + 1, seed).mean() for seed in range(200)]
    np.testing.assert_allclose(np.mean(drawn), expected, atol=4 * np.std(drawn) / np.sqrt(200))
    np.testing.assert_array_equal(r_precision(images, texts, np.arange(n), n), above == 0)


def test_r_precision_draws_no_caption_that_is_the_own():
    """Three texts, each of several images: the other images' copies are not held against it."""
    same = np.array([7, 1, 7, 1, 5, 7, 1, 5])
    images = np.eye(8)[same] + 0.01 * np.random.default_rng(0).normal(size=(8, 8))
    assert r_precision(images, np.eye(8)[same], same, 4).all()
    assert not r_precision(images, np.eye(8)[same], np.arange(8), 8).any(), 'copies are as similar'
    with pytest.raises(UserError, match=r'takes 6 captions .* of 8 as few as 5 are others') as e:
        r_precision(images, np.eye(8)[same], same, 7)
    assert '\n' not in str(e.value)


def test_r_precision_of_embeddings_that_are_all_alike_is_0():
    assert not r_precision(np.ones((200, 3)), np.ones((200, 3)), np.arange(200)).any()
