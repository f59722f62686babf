"""Splits: a test source, validation examples out of the training data, folders of splits."""

from __future__ import annotations

import os

import numpy as np
import pytest
from data_sets import grey, make, refused, write_folder

from jaxgen import data
from jaxgen.data import splits


def values(config: dict, split: str) -> list[int]:
    """The grey values of a split of `write_folder`'s images, in its order."""
    examples = data.dataset(config, split)
    return [int(x) for x in examples.take(np.arange(len(examples)))['image'][:, 0, 0, 0]]


def labelled(config: dict, split: str) -> dict[int, int]:
    """{grey value: label}."""
    examples = data.dataset({**config, 'features': ('image', 'label')}, split)
    batch = examples.take(np.arange(len(examples)))
    return dict(zip(batch['image'][:, 0, 0, 0].tolist(), batch['label'].tolist(), strict=True))


def test_fraction_is_held_out_of_every_class():
    rng = np.random.default_rng(0)
    for n, fraction in ((10, 0.1), (97, 0.1), (1000, 0.25), (1000, 0.001), (50, 0.9), (2, 0.5), (3, 0.01)):
        for classes in (np.zeros(n, int), rng.integers(0, 7, n), np.arange(n) % 3):
            counts = np.bincount(classes)
            held = splits.fraction_of(rng.permutation(n), classes, fraction)
            inside = np.bincount(classes[held], minlength=len(counts))
            assert np.all(inside <= np.maximum(counts - 1, 0))  # every class is trained on
            if np.all(counts[counts > 0] * (1 - fraction) >= 1):  # no class is too small for it
                total = max(round(fraction * n), 1)
                assert held.sum() == total
                assert np.all(np.abs(inside - counts * total / n) < 1)
    # The smallest keys of each class: 4 of 8 and 2 of 4.
    classes, keys = np.array([0, 1, 0] * 4), np.array([9, 8, 1, 2, 0, 11, 10, 3, 5, 4, 6, 7])
    assert keys[splits.fraction_of(keys, classes, 0.5)].tolist() == [1, 2, 0, 3, 5, 4]
    assert not splits.fraction_of(np.arange(3), np.arange(3), 0.5).any()  # of three classes with one example each


def test_validation_fraction_of_digits(prepared):
    config = make(prepared, features=('image', 'label'))
    whole, part = data.dataset(config, 'train'), {**config, 'validation_fraction': 0.1}
    train, validation = data.dataset(part, 'train'), data.dataset(part, 'validation')
    assert len(train) + len(validation) == len(whole) == 1438 and len(validation) == 144
    own = {split: data.dataset(part, split).take(np.arange(len(data.dataset(part, split)))) for split in splits.SPLITS}
    everything = whole.take(np.arange(1438))
    np.testing.assert_array_equal(  # disjoint and complete: sorted, they are the training split
        np.sort([x.tobytes() for split in ('train', 'validation') for x in own[split]['image']]),
        np.sort([x.tobytes() for x in everything['image']]),
    )
    counts, held = (np.bincount(labels, minlength=10) for labels in (everything['label'], own['validation']['label']))
    assert np.all(np.abs(held - counts * 144 / 1438) < 1)
    np.testing.assert_array_equal(data.labels(part, 'validation'), own['validation']['label'])
    # The rule is not that of the order: what is held out is not the first or last part of the set.
    numbers = data.dataset(part, 'validation').records.numbers
    assert numbers.min() < 100 and numbers.max() > 1300
    identities = {data.dataset({**config, 'validation_fraction': f}, 'train').identity for f in (0.0, 0.1, 0.2)}
    assert len(identities | {validation.identity}) == 4
    assert data.dataset(part, 'test').identity == data.dataset(config, 'test').identity
    assert data.held_out(part) == 'validation' and data.held_out(config) == 'test'


def test_validation_fraction_of_some_classes(prepared):
    part = make(prepared, validation_fraction=0.2, keep_classes=(3, 5), features=('image', 'label'))
    inside = {split: set(data.labels(part, split).tolist()) for split in splits.SPLITS}
    assert inside == {'train': {3, 5}, 'validation': {3, 5}, 'test': set(range(10))}
    kept = len(data.dataset({**part, 'validation_fraction': 0.0}, 'train'))
    assert len(data.dataset(part, 'validation')) == round(0.2 * kept)
    assert len(data.dataset(part, 'train')) == kept - round(0.2 * kept)


def test_validation_images_of_a_folder_stay_when_others_come(tmp_path):
    source = write_folder(tmp_path / 'in', range(0, 240, 2))
    config = make(tmp_path, source=source, validation_fraction=0.25)
    before = {split: set(values(config, split)) for split in splits.SPLITS}
    assert sum(map(len, before.values())) == 120 == len(set.union(*before.values()))
    for value in range(1, 21, 2):
        grey(value).save(tmp_path / 'in' / f'{value}.png')
    after = {split: set(values(config, split)) for split in splits.SPLITS}
    assert before['test'] <= after['test']
    # A quarter of ten more are two or three more, which moves the limit by as many.
    assert len(after['validation'] ^ before['validation'] - after['validation']) <= len(after['validation'])
    assert len(before['train'] & after['validation']) + len(before['validation'] & after['train']) <= 3


def test_too_few_examples_for_validation(tmp_path):
    """A class loses none of its examples where it has one, and training not its only one."""
    source = write_folder(tmp_path / 'in', [], **{f'c{i}': [i] for i in range(6)})
    elsewhere = write_folder(tmp_path / 'test', [], c0=[99])
    for config in (
        make(tmp_path, source=source, validation_fraction=0.3, test_source=elsewhere),
        make(tmp_path, source=write_folder(tmp_path / 'one', [1, 2]), validation_fraction=0.5),
    ):
        for split in ('train', 'validation'):
            with refused(r'validation_fraction = 0.\d: none of the \d training examples can be held out'):
                data.dataset(config, split)


def test_folder_of_three_splits(tmp_path, capfd):
    inside = {
        'train/cat': range(10),
        'train/dog': range(10, 20),
        'test/dog': [200],
        'Val/cat': [100, 101],
        'Val/emu': [9],
    }
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [], **inside), features=('image', 'label'))
    assert labelled(config, 'train') == {i: i // 10 for i in range(20)}
    assert labelled(config, 'test') == {200: 1} and labelled(config, 'validation') == {100: 0, 101: 0}
    assert '1 validation images of no class that training has' in capfd.readouterr().err
    assert data.held_out(config) == 'validation'
    # A validation split beside the others leaves their identity, by which checkpoints know their data, as it was.
    without = {name: inside[name] for name in ('train/cat', 'train/dog', 'test/dog')}
    alone = make(tmp_path, source=write_folder(tmp_path / 'alone', [], **without), features=('image', 'label'))
    for split in ('train', 'test'):
        assert data.dataset(alone, split).identity == data.dataset(config, split).identity
    before = data.dataset(config, 'validation').identity
    grey(102).save(tmp_path / 'in' / 'Val' / 'cat' / '102.png')
    assert data.dataset(config, 'validation').identity != before
    with refused('has no validation split: set config.data.validation_fraction'):
        data.dataset(alone, 'validation')


def test_validation_folder_beside_a_test_source(tmp_path):
    """Without a test source a folder val/ is the test split, and with one it is what it says."""
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [], train=range(9), val=[50, 51]))
    assert sorted(values(config, 'test')) == [50, 51] and data.held_out(config) == 'test'
    other = write_folder(tmp_path / 'other', [70, 71, 72])
    config = {**config, 'test_source': other}
    assert sorted(values(config, 'train')) == list(range(9))
    assert sorted(values(config, 'validation')) == [50, 51] and sorted(values(config, 'test')) == [70, 71, 72]


def test_test_source(tmp_path, prepared):
    source, other = write_folder(tmp_path / 'in', range(20)), write_folder(tmp_path / 'test', range(100, 107))
    plain, config = make(tmp_path, source=source), make(tmp_path, source=source, test_source=other)
    assert len(values(plain, 'train')) < 20
    assert sorted(values(config, 'train')) == list(range(20)) and sorted(values(config, 'test')) == [*range(100, 107)]
    part = {**config, 'validation_fraction': 0.2}
    assert len(values(part, 'validation')) == 4
    assert sorted(values(part, 'train') + values(part, 'validation')) == list(range(20))
    named = {**config, 'validation_source': write_folder(tmp_path / 'val', [200, 201])}
    assert sorted(values(named, 'validation')) == [200, 201] and data.held_out(named) == 'validation'
    assert values(named, 'train') == values(config, 'train')
    # A source with a test split of its own gives that one, and one with a test split loses nothing to training.
    digits = make(prepared, source='digits', test_source=source)
    assert len(data.dataset(digits, 'train')) == 1438 and len(data.dataset(digits, 'test')) == 20
    images = make(prepared, source=source, test_source='digits', size=8)
    assert len(data.dataset(images, 'train')) == 20 and len(data.dataset(images, 'test')) == 359
    with refused('config.data.test_source = .* is config.data.source'):
        data.dataset({**plain, 'test_source': source + '/'}, 'test')
    with refused("config.data.test_source: no source 'digit'"):
        data.dataset({**plain, 'test_source': 'digit'}, 'test')
    with refused('has no labels: put every image into a sub-folder'):
        data.dataset({**digits, 'features': ('image', 'label')}, 'test')
    with refused('split:extra: digits has no such split to hold out; it has test'):
        data.dataset(make(prepared, source='digits', test_source='split:extra'), 'test')
    with refused('split:train: .* has no such split to hold out'):
        data.dataset(make(prepared, source='digits', validation_source='split:train'), 'validation')
    with refused('split:test: .* has no such split to hold out; it has none'):  # a fraction is trained on then
        data.dataset({**plain, 'test_source': 'split:test'}, 'test')


def test_classes_of_a_test_source_are_those_of_training(tmp_path, prepared):
    source = write_folder(tmp_path / 'in', [], ant=range(5), bee=range(10, 15), cat=range(20, 25))
    other = write_folder(tmp_path / 'test', [], bee=[110, 111], cat=[120])  # cat is number 1 here and 2 in training
    config = make(tmp_path, source=source, test_source=other, features=('image', 'label'))
    assert labelled(config, 'test') == {110: 1, 111: 1, 120: 2}
    assert data.labels(config, 'test').tolist() == list(labelled(config, 'test').values())
    os.makedirs(tmp_path / 'test' / 'emu')
    grey(1).save(tmp_path / 'test' / 'emu' / '1.png')
    with refused("config.data.test_source = .*: its class 'emu' is none of the training classes .ant, bee, cat.*"):
        data.dataset(config, 'test')
    # Of classes without names the number is the name: digits have none, and a folder of some digits has these.
    some = write_folder(tmp_path / 'digits', [], **{'3': [30, 31], '10'[:1]: [11], '7': [70]})
    config = make(prepared, test_source=some, features=('image', 'label'))
    assert labelled(config, 'test') == {30: 3, 31: 3, 11: 1, 70: 7}
    with refused("its class '10' is none"):
        labelled({**config, 'test_source': write_folder(tmp_path / 'more', [], **{'10': [1]})}, 'test')


def test_both_kinds_of_validation_are_refused():
    from support import tiny

    with refused('validation_fraction holds validation examples out of the training data, and'):
        tiny('vae_digits', data={'validation_fraction': 0.1, 'validation_source': 'digits'})


@pytest.mark.parametrize('fraction', [0.0, 0.1])
def test_training_order_is_a_function_of_seed_and_number(prepared, fraction):
    config = make(prepared, validation_fraction=fraction)
    examples = data.dataset(config, 'train')
    first = next(iter(data.batches(config, 'train', seed=3)))['image']
    from jaxgen.data.loader import order

    np.testing.assert_array_equal(first, examples.take(order(3, len(examples))(np.arange(8)))['image'])
