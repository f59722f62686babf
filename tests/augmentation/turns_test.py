"""Flips, quarter turns and exchanged channels, each image against all that may become of it."""

import itertools

import jax
import numpy as np
import pytest

from jaxgen.augmentation.turns import augment

N = 2000


@pytest.mark.parametrize('channels', [False, True])
def test_each_image_is_one_of_its_changes_and_says_so(channels):
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    out, changed = jax.jit(augment, static_argnums=2)(jax.random.key(0), np.repeat(x, N, 0), channels)
    orders = list(itertools.permutations(range(3))) if channels else [(0, 1, 2)]
    known = {
        np.rot90(one[:, ::-1] if flip else one, k)[..., list(order)].tobytes(): (flip, k, order)
        for one in x
        for flip in (False, True)
        for k in range(4)
        for order in orders
    }
    seen = [known[image.tobytes()] for image in np.asarray(out)]
    as_it_was = np.array([what == (False, 0, (0, 1, 2)) for what in seen])
    assert not (~as_it_was & ~np.asarray(changed)).any()  # whatever was changed says so
    # Half of the images each are flipped, turned and, of these, one in six has its channels where they were.
    expected = 0.5 * 0.5 * ((0.5 + 0.5 / 6) if channels else 1)
    assert abs(as_it_was.mean() - expected) < 5 * np.sqrt(expected / N)
    assert abs(np.mean(changed) - (1 - 0.5 ** (3 if channels else 2))) < 5 * np.sqrt(0.25 / N)
    assert len(set(seen)) == len(known)  # a flip and three quarter turns, and each order of channels
    turned = [k for flip, k, _ in seen if not flip and k]
    assert max(map(turned.count, (1, 2, 3))) < 1.6 * min(map(turned.count, (1, 2, 3)))
