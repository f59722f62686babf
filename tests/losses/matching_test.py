"""Matching of images and captions against the paper's equations written out, and torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.losses.matching import contrastive_loss, matching_loss, sentence_similarity, word_similarity

N, T, D = 3, 5, 4  # captions, words, features
MASK = np.arange(T) < np.array([[T], [3], [1]])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_word_similarity_is_that_of_the_paper():
    regions, words, (gamma1, gamma2) = normal(2, 7, D), normal(N, T, D, seed=1), (3.0, 2.0)
    expected = np.zeros((2, N))
    for n in range(2):
        for m in range(N):
            e, v = words[m][MASK[m]].astype(np.float64), regions[n].astype(np.float64)
            s = np.exp(e @ v.T)
            alpha = np.exp(gamma1 * s / s.sum(0))
            c = alpha / alpha.sum(1, keepdims=True) @ v
            cosines = (c * e).sum(1) / np.linalg.norm(c, axis=1) / np.linalg.norm(e, axis=1)
            expected[n, m] = np.log(np.exp(gamma2 * cosines).sum())
    np.testing.assert_allclose(word_similarity(regions, words, MASK, gamma1, gamma2), expected, rtol=1e-4)


@pytest.mark.slow  # imports torch
def test_matching_loss_is_cross_entropy_both_ways():
    torch = pytest.importorskip('torch')
    similarity = np.asarray(sentence_similarity(normal(N, D), normal(N, D, seed=1)))
    same = np.eye(N, dtype=bool)
    same[0, 2] = same[2, 0] = True
    logits = torch.tensor(10 * similarity)
    logits[0, 2] = logits[2, 0] = -torch.inf
    right = torch.arange(N)
    expected = sum(torch.nn.functional.cross_entropy(x, right) for x in (logits, logits.T))
    np.testing.assert_allclose(matching_loss(similarity, np.eye(N, dtype=bool), same), expected, rtol=1e-4)
    # Two images among three captions, the last two of which are theirs.
    own = np.eye(N, dtype=bool)[1:]
    logits = torch.tensor(10 * similarity[1:])
    expected = torch.nn.functional.cross_entropy(logits, right[1:]) + torch.nn.functional.cross_entropy(
        logits.T[1:], right[:2]
    )
    np.testing.assert_allclose(matching_loss(similarity[1:], own, own), expected, rtol=1e-4)
    parallel = sentence_similarity(jnp.eye(2), jnp.array([[3.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(parallel, [[1, 0.5**0.5], [0, 0.5**0.5]], atol=1e-5)


def test_contrastive_loss_is_that_of_the_paper():
    """Cross-entropies of rows and columns written out, without and with texts that are the same."""
    logits = normal(N, N).astype(np.float64)

    def expected(kept: np.ndarray) -> np.ndarray:
        weights = np.where(kept, np.exp(logits), 0)
        own = np.diagonal(np.exp(logits))
        return -(np.log(own / weights.sum(1)) + np.log(own / weights.sum(0))) / 2

    np.testing.assert_allclose(contrastive_loss(jnp.asarray(logits)), expected(np.ones((N, N), bool)), rtol=1e-5)
    same = np.eye(N, dtype=bool)
    same[0, 2] = same[2, 0] = True
    kept = ~same | np.eye(N, dtype=bool)
    np.testing.assert_allclose(contrastive_loss(jnp.asarray(logits), same), expected(kept), rtol=1e-5)
