"""Retrieval against sorting written out."""

import numpy as np

from jaxgen.metrics.retrieval import recall


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
