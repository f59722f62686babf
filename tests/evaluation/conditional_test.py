"""The conditions that samples get, on the command line and by number, and whether the samples show them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assemble, path

from jaxgen import conditions, data, sharding
from jaxgen import config as configs
from jaxgen.data import shapes
from jaxgen.errors import UserError
from jaxgen.evaluation import conditional
from jaxgen.metrics.features import Features

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes


@functools.cache
def assembled():
    config = configs.load(path('attngan_shapes'))
    return assemble(config), config


def test_a_caption_is_a_condition():
    text = 'A small red heart, on a white background'
    given = conditions.first(*assembled(), 3, {'caption': text})
    assert given['caption'].shape == (3, 64)
    assert shapes.decode_caption(given['caption'][2]) == text


def test_labels_are_those_of_the_training_classes():
    config = configs.load(path('conditional_gan_digits'))
    config.data.keep_classes = (7, 2, 4)
    assert conditions.first(assemble(config), config, 5, {})['label'].tolist() == [2, 4, 7, 2, 4]
    with pytest.raises(UserError, match=r'one of the training classes, \[2, 4, 7\]'):
        conditions.first(assemble(config), config, 5, {'label': 3})


@pytest.mark.parametrize('text, message', [
    ('', 'has none'), ('!?', 'has none'), ('a ' * 40, '80 bytes'), ('a ' * 11, '11 words are more than the 8'),
    ('a small red hart', "'hart'; did you mean heart"), ('a qqqqqq', "'qqqqqq'; they have a, an, background, beige"),
])  # fmt: skip
def test_captions_that_cannot_be_read(text, message, no_compile):
    with pytest.raises(UserError, match=message) as error:
        conditions.first(*assembled(), 1, {'caption': text})
    assert '\n' not in str(error.value)


def reads_pixels(variables, batch):
    """Correct where the first row of pixels equals the factors."""
    right = batch['image'][:, 0, :7, 0] == batch['factors']
    return {'accuracy': right.mean(-1), **{f'accuracy/{i}': right[:, i].astype(jnp.float32) for i in range(7)}}


CLASSIFIER = Features('classifier', '', None, None, None, ('factors',), reads_pixels)


def requested(family, section) -> conditional.Attributes | None:
    return conditional.requested(family, section, CLASSIFIER, sharding.make_mesh(1, jax.devices()[:1]))


def test_conditional_accuracy_of_captions():
    """A classifier that reads the factors off the first pixels; two samples of three are as their captions say."""
    a, config = assembled()
    attributes = requested(a.family, config.data.to_dict())
    given = conditions.first(a, config, 3, {})
    factors = attributes.of(given)['factors']
    texts = [shapes.decode_caption(x) for x in given['caption']]
    assert [shapes.caption(f) for f in factors] == texts
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[:, 0, :7, 0] = factors
    images[0, 0, 0, 0] += 1  # another shape
    images[1, 0, 3:6, 0] += 1  # elsewhere and rotated, which no caption names
    correct = attributes.correct(images, given, 2)
    assert {name: x.tolist() for name, x in correct.items()} == {
        'conditional_accuracy/0': [0, 1, 1], 'conditional_accuracy/1': [1, 1, 1], 'conditional_accuracy/2': [1, 1, 1],
        'conditional_accuracy/6': [1, 1, 1], 'conditional_accuracy/caption': [0, 1, 1],
    }  # fmt: skip
    # Without captions all factors count.
    correct = attributes._replace(captioned=None).correct(images, given, 2)
    np.testing.assert_allclose(correct['conditional_accuracy'], [6 / 7, 4 / 7, 1], rtol=1e-6)


def test_attributes_are_requested_where_they_are_known(monkeypatch):
    a, config = assembled()
    section = config.data.to_dict()
    assert requested(a.family._replace(conditions=()), section) is None
    label = CLASSIFIER._replace(attributes=('label',))
    of_label = a.family._replace(conditions=('label',))
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    given = {'label': np.array([3, 1]), 'index': np.arange(2)}
    attributes = conditional.requested(of_label, section, label, mesh)
    assert attributes.of(given)['label'].tolist() == [3, 1]
    assert requested(of_label, section) is None, 'a class does not determine the factors'
    assert requested(a.family, {**section, 'source': 'digits', 'size': 8, 'channels': 1}) is None, 'it has none'
    assert requested(a.family, section) is not None
    new = {**section, 'source': 'shapes:hourglass'}  # of whose shape there is no factor
    assert [requested(a.family, x).captioned for x in (section, new)] == [(0, 1, 2, 6), (1, 2, 6)]
    assert requested(a.family, {**new, 'test_source': 'shapes'}).captioned == (0, 1, 2, 6)
    spec = data.spec({**section, 'features': ('image', 'factors')})
    monkeypatch.setattr(data, 'spec', lambda section: spec._replace(captioned=()))
    assert requested(a.family, section) is None, 'which factors its captions state is unknown'


@pytest.mark.parametrize(
    'other, known', [('digits', False), ('shapes:centred', False), ('shapes:outlined', True), ('shapes', True)]
)
def test_attributes_of_translated_images_are_known_where_both_styles_have_the_same_scenes(other, known):
    a, _ = assembled()
    translating = a.family._replace(conditions=('other',))
    section = {**configs.load(path('attngan_shapes')).data.to_dict(), 'source': 'shapes', 'other': other}
    assert (requested(translating, section) is not None) == known
