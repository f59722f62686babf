"""Sections of a few fields, for the loader alone."""

from __future__ import annotations

import numpy as np
import pytest

from jaxgen import data
from jaxgen.config import DEFAULTS
from jaxgen.errors import UserError


def test_the_other_fields_have_their_defaults():
    few, whole = {'source': 'digits', 'batch': 4}, DEFAULTS['data'] | {'source': 'digits', 'batch': 4}
    assert data.spec(few) == data.spec(whole) and len(data.dataset(few, 'test')) == len(data.dataset(whole, 'test'))
    np.testing.assert_array_equal(data.labels(few, 'test'), data.labels(whole, 'test'))
    for a, b in zip(data.batches(few, 'train', seed=3), data.batches(whole, 'train', seed=3), strict=False):
        assert a['image'].shape == (4, 8, 8, 1)
        np.testing.assert_array_equal(a['image'], b['image'])
        break


@pytest.mark.parametrize(
    'section, message',
    [
        ({'sorce': 'digits'}, 'config.data.sorce: no such field; did you mean source'),
        ({'size': 'large'}, 'config.data.size must be'),
        ({'batch': 0}, 'config.data.batch must be 1 or more'),
        ({'crop': 'resized', 'jitter': 2}, 'config.data.jitter is for the crops'),
        ('digits', 'a section of fields is needed'),
    ],
)
def test_mistakes(section, message, no_compile):
    for function in (data.spec, lambda s: data.dataset(s, 'train'), lambda s: data.batches(s, seed=0)):
        with pytest.raises(UserError, match=message):
            function(section)
