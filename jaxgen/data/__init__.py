"""Data sets: from a name in the config to batches of uint8 images.

    from jaxgen import data
    c = {'source': 'shapes', 'size': 32, 'channels': 3, 'features': ('image', 'label')}  # the other fields: defaults
    data.spec(c)  # shapes and number of classes; prepares nothing
    data.dataset(c, 'test')[0]['image']  # uint8 [32, 32, 3]
    for batch in data.batches(c, 'train', seed=0, start=1000):
        x = data.to_float(batch['image'])  # float32 [128, 32, 32, 3] in [-1, 1]

`data.source` is one of
  digits       1,797 handwritten digits, 8 x 8, out of scikit-learn
  shapes       scenes drawn here, at any size, with label, factors and caption, mask, edges, segments and sketch
               (see shapes.Scene); shapes:outlined are scenes in another style, and of shapes:centred all shapes are in
               the middle; shapes:hourglass are five scenes of a shape that the others do not have, by the word 'zig' in
               their captions, to fine-tune on
  gaussians:1  points of three Gaussians in one dimension, as images of one grey pixel
  gaussians:2  points of 25 Gaussians in a square: red and green of one pixel
  folder:PATH  a person's own images, any size and mode; classes from sub-folders
  pairs:PATH   images that belong together: PATH/image/NAME.png and, as features, others in sub-folders named as they
               like, PATH/edges/NAME.png
  idx:PATH     MNIST's files, gzipped or not; npz:FILE, npy:PATH and mat:FILE, arrays: see arrays.py; parquet:PATH, the
               hub's sets of images; cifar:PATH, the archives of CIFAR. These are read as they are, see records.py
  a TFDS name  cifar10, celeb_a, imagenet2012, 'name/config', ...
and `data.other` names a second one, whose images are the feature 'other': of another domain, and unpaired. Of any
source `data.low_resolution` makes a feature of that name, the image at so many pixels. Where a source has labels,
'domain' is the label once more: in translation 'domain' is the class of the input, 'label' the class requested.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxgen.data.folder import FolderImages
    from jaxgen.data.loader import Examples, Spec, batches, dataset, resized, spec, spec_from_json, spec_to_json
    from jaxgen.data.sources import canonical, factor_names, root, same_test_scenes, sample_metrics
    from jaxgen.data.splits import held_out, labels
    from jaxgen.data.transforms import to_float, to_uint8

# By their modules, which are imported at their first use: processes that decode need few of them, see workers.py.
WHERE = {
    'folder': ('FolderImages',),
    'loader': ('Examples', 'Spec', 'batches', 'dataset', 'resized', 'spec', 'spec_from_json', 'spec_to_json'),
    'sources': ('canonical', 'factor_names', 'root', 'same_test_scenes', 'sample_metrics'),
    'splits': ('held_out', 'labels'),
    'transforms': ('to_float', 'to_uint8'),
}

__all__ = [
    'Examples',
    'FolderImages',
    'Spec',
    'batches',
    'canonical',
    'dataset',
    'factor_names',
    'held_out',
    'labels',
    'resized',
    'root',
    'same_test_scenes',
    'sample_metrics',
    'spec',
    'spec_from_json',
    'spec_to_json',
    'to_float',
    'to_uint8',
]


def __getattr__(name: str):
    for module, names in WHERE.items():
        if name == module or name in names:
            imported = importlib.import_module(f'jaxgen.data.{module}')
            return imported if name == module else getattr(imported, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
