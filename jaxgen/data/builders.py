"""TFDS builders of our own sources: digits, shapes, points of Gaussians, a folder.

They yield encoded bytes, so that TFDS writes them without TensorFlow. A change to what a builder
yields needs a new VERSION: prepared sets of the old one are then left alone.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxgen.data import folder, gaussians, shapes
from jaxgen.data.transforms import MAX_PIXELS, uniform
from jaxgen.errors import UserError

Examples = Iterator[tuple[int, dict]]
TEST_SHARE = 0.2  # of digits
SHAPES = {'train': 10_000, 'test': 2_000}  # scenes of each split
FIRST = {'train': 0, 'test': 1_000_000_000}  # number of its first one
STYLES_APART = 100_000_000  # from the first training scene of one style to that of the next
POINTS = {'train': 10_000, 'test': 2_000}  # of a mixture of Gaussians


def png(x: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W], [H, W, 1] or [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(x[..., 0] if x.shape[2:] == (1,) else x).save(file, 'PNG', compress_level=1)
    return file.getvalue()


class Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: our sets are in no bucket, and looking for them leaves a temporary directory behind."""


class JaxgenBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stores examples in the order in which they are generated."""

    VERSION = tfds.core.Version('1.0.0')

    @staticmethod
    def features(config) -> dict[str, tfds.features.FeatureConnector]:
        """What an example holds; needs no prepared set."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.features(self.builder_config))
        return Info(builder=self, features=features, metadata=tfds.core.MetadataDict(), disable_shuffling=True)

    def _generate_examples(self, examples: Examples) -> Examples:
        return examples


class JaxgenDigits(JaxgenBuilder, skip_registration=True):
    """1,797 handwritten digits, 8 x 8 pixels of 17 grey levels (Alpaydin and Kaynak 1998), from scikit-learn."""

    @staticmethod
    def features(config):
        del config
        return {'image': tfds.features.Image(shape=(8, 8, 1)), 'label': tfds.features.ClassLabel(num_classes=10)}

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        del dl_manager
        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        # A fixed order independent of the label; of each class the same fraction is held out.
        order = np.argsort(uniform(0, np.arange(len(images)), stream=0))
        test = np.zeros(len(images), bool)
        for label in range(10):
            members = order[digits.target[order] == label]
            test[members[: round(TEST_SHARE * len(members))]] = True

        def examples(chosen):
            for key, i in enumerate(chosen):
                yield key, {'image': png(images[i]), 'label': int(digits.target[i])}

        return {
            name: self._generate_examples(examples(order[test[order] == (name == 'test')]))
            for name in ('train', 'test')
        }


@dataclasses.dataclass(eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    size: tuple[int, int] = (32, 32)  # height, width in pixels
    style: str = 'filled'  # one of shapes.STYLES, or of shapes.NEW


class JaxgenShapes(JaxgenBuilder, skip_registration=True):
    """10,000 training and 2,000 test scenes (jaxgen/data/shapes.py); fewer above 64 pixels, where drawing is slow.

    Each style trains on scenes of its own, so that training images of two styles are unpaired. The test scenes are the
    same in all (but for the position of centred ones), so that translations from style to style can be compared with
    the truth.

    Of a shape of shapes.NEW there are five training scenes, and as many test scenes as of the others; it has no label.
    """

    VERSION = tfds.core.Version('1.4.0')

    @staticmethod
    def features(config):
        of_class = {} if config.style in shapes.NEW else {'label': tfds.features.ClassLabel(names=shapes.SHAPES)}
        return {
            'image': tfds.features.Image(shape=(*config.size, 3)),
            'mask': tfds.features.Image(shape=(*config.size, 1)),
            'edges': tfds.features.Image(shape=(*config.size, 1)),
            'segments': tfds.features.Image(shape=(*config.size, 3)),
            'sketch': tfds.features.Image(shape=(*config.size, 3)),
            **of_class,
            'factors': tfds.features.Tensor(shape=(len(shapes.FACTORS),), dtype=np.int32),
            'caption': tfds.features.Tensor(shape=(shapes.CAPTION,), dtype=np.uint8),
        }

    def _split_generators(self, dl_manager):
        del dl_manager
        size, style = self.builder_config.size, self.builder_config.style
        fraction = min(1, 64 / max(size))
        number = (*shapes.STYLES, *shapes.NEW).index(style)
        first = {**FIRST, 'train': FIRST['train'] + STYLES_APART * number}
        count = {split: max(int(n * fraction), 1) for split, n in SHAPES.items()}
        if style in shapes.NEW:
            count['train'] = shapes.FEW
        names = set(self.features(self.builder_config))

        def examples(split):
            for i in range(count[split]):
                factors = shapes.draw_factors(first[split] + i, style)
                scene = shapes.draw(factors, size, style)
                example = {
                    **{name: png(x) for name, x in scene._asdict().items()},
                    'label': int(factors[0]),
                    'factors': factors,
                    'caption': shapes.encode_caption(shapes.caption(factors, style)),
                }
                yield i, {name: x for name, x in example.items() if name in names}

        return {split: self._generate_examples(examples(split)) for split in SHAPES}


@dataclasses.dataclass(eq=False)
class GaussiansConfig(tfds.core.BuilderConfig):
    dimensions: int = 1  # 1 or 2


class JaxgenGaussians(JaxgenBuilder, skip_registration=True):
    """10,000 training and 2,000 test points of a mixture of Gaussians in [-1, 1], each an image of one pixel.

    See jaxgen/data/gaussians.py. The label is the Gaussian's number.
    """

    @staticmethod
    def features(config):
        return {
            'image': tfds.features.Image(shape=(1, 1, gaussians.CHANNELS[config.dimensions])),
            'label': tfds.features.ClassLabel(num_classes=len(gaussians.mixture(config.dimensions).weights)),
        }

    def _split_generators(self, dl_manager):
        del dl_manager

        def examples(split):
            label, x = gaussians.draw(self.builder_config.dimensions, FIRST[split] + np.arange(POINTS[split]))
            for i, image in enumerate(gaussians.to_images(x)):
                yield i, {'image': png(image), 'label': int(label[i])}

        return {split: self._generate_examples(examples(split)) for split in POINTS}


@dataclasses.dataclass(eq=False)
class FolderConfig(tfds.core.BuilderConfig):
    listing: folder.Listing | None = dataclasses.field(default=None, repr=False)
    test_fraction: float = 0.2
    max_corrupt: float = 0.01
    threads: int = 4
    max_pixels: int = MAX_PIXELS  # of an image; more make a file unreadable
    report: str = ''  # file for the list of unreadable files
    parts: tuple[str, ...] = ()  # sub-folders that hold an example's images in files of one name; (): they are classes


class JaxgenFolder(JaxgenBuilder, skip_registration=True):
    """A person's own images, their files' bytes as they are.

    Metadata: 'content', a digest of the training and test images that is the same wherever the folder lies, and
    'validation', one of those in a sub-folder for this.
    """

    VERSION = tfds.core.Version('1.1.0')

    @staticmethod
    def features(config):
        if config.parts:
            return {part: tfds.features.Image() for part in config.parts}
        image = {'image': tfds.features.Image()}
        n = len(config.listing.classes)
        return image | ({'label': tfds.features.ClassLabel(num_classes=n)} if n else {})

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        listing = config.listing
        decoded = folder.readable(listing, config.max_corrupt, config.threads, config.report, config.max_pixels)
        files = list(decoded)
        within = {part: {folder.stem(f): f for f in files if folder.top(f.inner) == part} for part in config.parts}
        if config.parts:  # without what has lost a partner
            files = [f for name, f in within['image'].items() if all(name in part for part in within.values())]
            sizes = {file.path: read.size for file, read in decoded.items()}
            pairs = ((f.path, part[folder.stem(f)].path) for f in files for part in within.values())
            folder.check_aspects(listing, sizes, pairs)
        if not files:
            raise UserError(f'{listing.folder}: no example is left of which all images can be read')
        self.info.metadata['content'] = folder.content_digest(decoded, config.test_fraction, config.parts)
        self.info.metadata['validation'] = folder.validation_digest(decoded, config.parts)

        def content(file):
            return folder.read_file(folder.full_path(listing, file), config.max_pixels)

        def examples(chosen):
            for key, file in enumerate(chosen):
                name = folder.stem(file)
                example = {part: content(within[part][name]) for part in config.parts} or {'image': content(file)}
                if listing.classes and not config.parts:
                    example['label'] = listing.classes.index(folder.top(file.inner))
                yield key, example

        train, test = folder.split(files, config.test_fraction, bool(listing.classes) and not config.parts)
        validation = folder.ranked([file for file in files if file.split == 'validation'])[0]
        splits = {'train': train, 'test': test, 'validation': validation}
        return {name: self._generate_examples(examples(chosen)) for name, chosen in splits.items() if chosen}
