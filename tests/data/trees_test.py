"""Names of many files: in little memory what the listing of a folder says of few."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from jaxgen.data import folder, trees

TOPS = (
    *(['cat', 'dog', '1'], ['train', 'test'], ['Train', 'val', 'test'], ['training', 'valid', 'dev'], ['1', '2', '10']),
    *(['val', 'test'], ['train'], ['']),
)


def some_names(rng: random.Random) -> list[str]:
    """Paths of images in folders that are classes, splits, both or neither."""
    tops, names = rng.choice(TOPS), set()
    for _ in range(rng.randint(1, 40)):
        parts = rng.choice(tops), rng.choice(['a', 'b', 'a', 'b', 'c', '']), f'{rng.randint(0, 30)}.png'
        names.add('/'.join(filter(None, parts)))
    return sorted(names)


def test_names_say_what_the_listing_of_a_folder_says():
    rng = random.Random(0)
    for _ in range(500):
        names, counts = some_names(rng), Counter()
        files = folder.into_splits([folder.File(name, 1, 1) for name in names], counts)
        own = [file for file in files if file.split not in folder.HELD_OUT]
        labelled = all('/' in file.inner for file in own)
        classes = folder.ordered({folder.top(file.inner) for file in own}) if labelled else ()
        files = folder.of_classes('/nowhere', files, classes, counts) if classes else files
        tree = trees.arranged(trees.Names.of(names))
        assert tree.classes == classes and sorted(tree.notes) == sorted(
            f'{n} {what}' for what, n in counts.items() if n
        )
        for split in ('train', 'validation', 'test'):
            expected = folder.ranked([file for file in files if (file.split or 'train') == split])[0]
            numbers = tree.splits.get(split, [])
            assert [names[i] for i in numbers] == [file.path for file in expected]
            assert not classes or [classes[tree.labels[i]] for i in numbers] == [folder.top(f.inner) for f in expected]


def test_names_come_back_as_they_were():
    names = ['a/1.png', '', 'caf\udce9 \u2603\n', 'a/2.png']
    kept = trees.Names.of(names)
    assert list(kept) == [kept[i] for i in range(4)] == names and len(trees.Names.of([])) == 0
    assert list(kept.take(np.array([3, 0]))) == ['a/2.png', 'a/1.png']


def test_folders_that_all_lie_in_are_no_classes():
    for below in ('', 'data/', 'data/images/'):
        names = trees.Names.of([f'{below}{name}' for name in ('cat/1.png', 'cat/2.png', 'catfish/1.png')])
        assert list(trees.without_top(names)) == ['cat/1.png', 'cat/2.png', 'catfish/1.png']
    assert list(trees.without_top(trees.Names.of(['a/b/1.png']))) == ['1.png']
