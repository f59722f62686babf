"""Where examples come from: a TFDS builder, prepared once as ArrayRecord files, or files that are read as they are.

    examples = open_records(resolve(config.data), config.data, 'train')
    len(examples), examples[5]  # 1438, {'image': a PNG file's bytes, 'label': 3}

Two processes may prepare one set at once: a file lock lets the second wait for the first. TFDS
writes beside the set's directory and renames at the end, so what was interrupted never looks
complete. TensorFlow is not imported: images stay encoded. Only other people's builders may want
it to encode theirs. What is read as it is has a reader for its kind of file, see records.py.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import requests
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.registered import DatasetNotFoundError

from jaxgen import addresses, files, locks
from jaxgen.data import (
    archives,
    arrayrecords,
    builders,
    cifar,
    folder,
    gaussians,
    guard,
    idx,
    matlab,
    metadata,
    numpy_files,
    parquet,
    records,
    shapes,
    tars,
    texts,
    zips,
)
from jaxgen.data.records import Feature, root
from jaxgen.errors import RunError, UserError
from jaxgen.sections import sides

# The test splits of these sets have no labels; papers measure on 'validation'.
UNLABELLED_TEST = ('imagenet2012', 'i_naturalist')
STYLES = (*shapes.STYLES, *shapes.NEW)
OWN = ('digits', 'shapes', *(f'shapes:{style}' for style in STYLES[1:]), 'gaussians:1', 'gaussians:2')
GAUSSIANS = {'gaussians:1': 1, 'gaussians:2': 2}  # their dimensions
CLASS_MAPS = re.compile('mask|seg|label|class')  # in the name of a part of pairs: a palette's indices are classes
PROBE_SECONDS = 5  # to find out whether a host answers
ENDINGS = {f'.{kind}': kind for kind in addresses.READ} | {'.gz': 'idx', '.tgz': 'cifar'}  # of files, usually
EXTRA = {'tensorflow': 'TensorFlow', 'bs4': 'Beautiful Soup'}  # what the extra 'prepare' installs


class Source(NamedTuple):
    """A set of examples: one that is prepared or can be, by its `builder`, or one that is read as it is, `contents`."""

    name: str
    features: Callable[[], dict[str, Feature]]  # prepares nothing, needs no network
    builder: Callable[[], tfds.core.DatasetBuilder] | None = None  # a fresh one: it looks at the disk when it is made
    check: Callable[[], None] = lambda: None  # refuses a prepared set that does not suit the config
    own: bool = True  # made by jaxgen, so that remains of it may be deleted
    captioned: tuple[int, ...] = ()  # entries of the feature 'factors' whose values the feature 'caption' states
    values: Mapping[str, tuple[int, tuple[str, ...]]] = {}  # see factor_names
    test_scenes: str = ''  # test examples of one number show one scene in all sources with the same name here
    sample_metrics: Callable[[np.ndarray], dict[str, dict]] | None = None  # see the function of this name
    # Of files that are read as they are; None: that is settled when they are looked at, and the builder is there too.
    contents: Callable[[], records.Contents | None] | None = None
    confined: bool = False  # nothing is written through links out of the directory: a run's config may have named it


def canonical(source: str) -> str:
    """A source's name with its folder, if it names one, in canonical spelling: absolute, links followed, no slash at
    the end. Two names are of one folder where these are equal; whether two folders hold the same images is decided by
    `Examples.identity`."""
    address = addresses.parse(source)
    if not address or not address.path:
        return source
    return str(address._replace(path=os.path.realpath(os.path.expanduser(address.path))))


# --- which source


def resolve(data) -> Source:
    """The source that `data.source` names. Reads and prepares nothing yet."""
    return named_source(data)._replace(confined=bool(data['dir']))


def named_source(data) -> Source:
    name, here = data['source'], root(data)
    address = addresses.parse(f'{name}:' if name in addresses.KINDS else name)
    if address and not address.path:
        what = 'folder' if address.kind in addresses.PREPARED else 'file or folder'
        raise UserError(f'config.data.source: name the {what}, as in {address.kind}:/home/me/images')
    return SOURCES.get(name.partition(':')[0], tfds_source)(data, here)


def digits_source(data, here: str) -> Source:
    if data['source'] != 'digits':
        return tfds_source(data, here)
    features = builders.JaxgenDigits.features(None)
    return Source('digits', lambda: batch_features(features), lambda: builders.JaxgenDigits(data_dir=here))


def shapes_source(data, here: str) -> Source:
    name = data['source']
    style = name.partition(':')[2] or shapes.STYLES[0]
    if style not in STYLES:
        raise UserError(f'config.data.source: {name} must be shapes:STYLE, one of {", ".join(STYLES)}')
    styled = '' if style == shapes.STYLES[0] else f'{style}_'
    height, width = sides(data['size'])
    size = f'{height}' if height == width else f'{height}x{width}'
    config = builders.ShapesConfig(name=f'{styled}size{size}', size=(height, width), style=style)
    features = builders.JaxgenShapes.features(config)
    new = style in shapes.NEW  # its shape is no value of the factor
    values = {name: (list(shapes.FACTORS).index(name), names) for name, names in shapes.NAMES.items()}
    values = {name: value for name, value in values.items() if not (new and name == 'shape')}
    return Source(
        name,
        lambda: batch_features(features),
        lambda: builders.JaxgenShapes(config=config, data_dir=here),
        captioned=tuple(sorted(which for which, _ in values.values())),
        values=values,
        test_scenes='' if new or style == 'centred' else 'shapes',  # the latter are moved to the middle
        sample_metrics=functools.partial(shapes.shown, style) if new else None,
    )


def tfds_source(data, here: str) -> Source:
    builder = functools.partial(tfds_builder, data['source'], here)
    return Source(data['source'], lambda: batch_features(builder().info.features), builder, own=False)


def read_source(data, here: str) -> Source:
    """The source of files that are read as they are."""
    contents = functools.cache(lambda: read_contents(data))

    def features() -> dict[str, Feature]:
        # As of a folder: where the config is complete without the files, these may be on another machine.
        path = os.path.expanduser(addresses.parse(data['source']).path)
        if set(data['features']) <= {'image', 'label'} and not os.path.lexists(path):
            label = {'label': Feature(('label',), dtype=np.int32, classes=data['classes'])} if data['classes'] else {}
            if set(data['features']) <= {'image', *label}:
                return {'image': Feature(('image',), image=True), **label}
        return contents().features

    return Source(data['source'], features, contents=contents)


def read_contents(data) -> records.Contents:
    """What the reader of the kind that data.source names has read of it: no image. That of a few sources is kept while
    their files stay as they are."""
    address = addresses.parse(data['source'])
    path = os.path.realpath(os.path.expanduser(address.path))
    key = str(sorted((name, data[name]) for name in READ_BY))
    try:
        stamps, contents = _contents.get(key, ((), None))
        if contents is None or stamps != latest(path, contents):
            options = {'caption': data['caption']} if data['caption'] and 'caption' in data['features'] else {}
            options = {**options, **address.options} if address.kind in CAPTIONED else address.options
            contents = READERS[address.kind](address._replace(path=path, options=options), data)
            while len(_contents) >= KEPT:
                _contents.pop(next(iter(_contents)), None)
            _contents[key] = stamps_of(path, contents), contents
    except OSError as e:
        raise UserError(f'config.data.source: cannot read {e.filename or path}: {e.strerror or e}') from e
    announce(contents)
    return contents


def announce(contents: records.Contents) -> None:
    """One line on stderr of what is left out, see folder.announce."""
    folder.announce(folder.Listing(contents.path, (), (), contents.notes), [])


def contents_of(source: Source) -> records.Contents | None:
    """What the source's files hold where they are read as they are; None where the set is prepared."""
    return source.contents() if source.contents else None


# Fields of config.data that readers may depend on.
READ_BY = (
    *('source', 'dir', 'features', 'classes', 'keep_classes', 'test_fraction', 'max_pixels', 'cache_mb', 'channels'),
    *('size', 'threads', 'max_corrupt', 'caption'),
)
CAPTIONED = ('arrayrecord', 'mat', 'npy', 'npz', 'parquet')  # kinds whose addresses name what captions are in
KEPT = 4  # contents of sources
_contents: dict[str, tuple] = {}  # by the fields that they depend on, with the stamps of their files


def latest(path: str, contents: records.Contents) -> tuple:
    """`stamps_of`, () where a file is gone."""
    try:
        return stamps_of(path, contents)
    except OSError:
        return ()


def stamps_of(path: str, contents: records.Contents) -> tuple:
    """What changes when the files of a source do."""
    about = [os.stat(one) for one in (*({path} if os.path.exists(path) else ()), *contents.files)]
    return tuple((one.st_ino, *files.version_of(one)) for one in about)


def gaussians_source(data, here: str) -> Source:
    name = data['source']
    dimensions = GAUSSIANS.get(name)
    if dimensions is None:
        raise UserError(f'config.data.source: {name} must be gaussians:1 or gaussians:2, by the number of dimensions')
    channels = gaussians.CHANNELS[dimensions]
    if data['size'] != 1 or data['channels'] != channels:
        raise UserError(
            f'config.data: the points of {name} are images of one pixel: set size = 1 and channels = {channels}'
        )
    config = builders.GaussiansConfig(name=f'dimensions{dimensions}', dimensions=dimensions)
    features = builders.JaxgenGaussians.features(config)
    return Source(
        name,
        lambda: batch_features(features),
        lambda: builders.JaxgenGaussians(config=config, data_dir=here),
        sample_metrics=functools.partial(gaussians.coverage, dimensions),
    )


def sample_metrics(data) -> Callable[[np.ndarray], dict[str, dict]] | None:
    """The source's own metrics of samples, a function from uint8 [n, H, W, C] to {name: {'value', 'n', ...}}, where the
    data's distribution is known; else None."""
    return resolve(data).sample_metrics


def factor_names(data) -> Mapping[str, tuple[int, tuple[str, ...]]]:
    """{name of an entry of the feature 'factors': (which entry, the names of its values)}, of those that have names."""
    return resolve(data).values


def same_test_scenes(data) -> bool:
    """Whether test example i of `data.source` and of `data.other` show one scene, so that what is known of the one
    (label, factors) holds of a translation to the domain of the other."""
    first = data['test_source'] or data['source']
    if first.startswith('split:'):
        return False
    own, other = (resolve({**data, 'source': source}).test_scenes for source in (first, data['other']))
    return bool(own) and own == other


def folder_source(data, here: str) -> Source:
    """A folder that is verified and prepared, or, where it holds more images than data.direct, read as it is."""
    path = data['source'].partition(':')[2]
    images = functools.cache(lambda: archives.listed(path, data['direct']))
    scan = functools.cache(lambda: folder.listing(images().root, images().listed, images().counts))

    def features() -> dict[str, Feature]:
        # Where the config is complete without it, the folder is not read: it may be on another machine.
        if 'caption' in data['features']:
            return archives.of_folder(images(), data).features
        if 'label' not in data['features']:
            return {'image': Feature(('image',), image=True)}
        elsewhere = data['classes'] and not os.path.isdir(os.path.expanduser(path))
        names = () if elsewhere else (direct().tree if direct() else scan()).classes
        n = data['classes'] or len(names)
        label = {'label': Feature(('label',), dtype=np.int32, classes=n, names=names)} if n else {}
        return {'image': Feature(('image',), image=True), **label}

    def check_classes(n: int) -> None:
        if 'label' in data['features'] and not n:
            raise UserError(f'{images().root} has no labels: put every image into a sub-folder named after its class')
        if 'label' in data['features'] and 0 < data['classes'] < n:
            raise UserError(f'config.data.classes = {data["classes"]}, but {images().root} has {n} sub-folders')

    @functools.cache
    def config() -> builders.FolderConfig:
        check_classes(len(scan().classes))
        return folder_config(data, here, scan())

    direct = functools.cache(lambda: images() if is_direct(images(), config, data, here) else None)

    def contents() -> records.Contents | None:
        if not direct():
            return None
        check_classes(len(images().tree.classes))
        archive = archives.of_folder(images(), data)
        announce(archive)
        return archive

    return from_folder(data['source'], features, config, here)._replace(contents=contents)


def is_direct(images: archives.Folder, config: Callable[[], builders.FolderConfig], data, here: str) -> bool:
    """Whether a folder is read as it is: with captions, which prepared sets lack, or since it is large. One that was
    prepared before stays as it was."""
    if 'caption' in data['features']:
        return True
    if len(images.listed.names) <= data['direct']:
        return False
    pattern = f'{folder.title(images.root)}-*'
    prepared = glob.glob(os.path.join(glob.escape(here), builders.JaxgenFolder.name, pattern))
    return not prepared or not complete(builders.JaxgenFolder(config=config(), data_dir=here))


def pairs_source(data, here: str) -> Source:
    """A folder whose sub-folders hold the image features of an example in files of one name; the captions are those of
    the files in image/."""

    # Features that are made of others are no folders.
    made = {'low_resolution'} if data['low_resolution'] else set()
    required = tuple(name for name in dict.fromkeys(('image', *data['features'])) if name not in made)
    if labels := {'label', 'domain'} & set(required):
        raise UserError(f'config.data.features: {data["source"]} has images and captions, and no {min(labels)}')

    path = data['source'].partition(':')[2]
    images = functools.cache(lambda: archives.listed(path, data['direct'], links=True))

    @functools.cache
    def config() -> builders.FolderConfig:
        listing = folder.listing(images().root, images().listed, images().counts)
        return folder_config(data, here, listing, folder.paired(listing, required))

    # What the config names is taken to exist: it may be on another machine.
    features = {
        name: Feature((name,), image=True, palette=bool(CLASS_MAPS.search(name)))
        for name in required
        if name != 'caption'
    }

    @functools.cache
    def contents() -> records.Contents | None:
        if not is_direct(images(), config, data, here):
            return None
        archive = archives.of_pairs(images(), features, data)
        announce(archive)
        return archive

    def known() -> dict[str, Feature]:
        archive = contents() if 'caption' in data['features'] else None
        return archive.features if archive else features

    return from_folder(data['source'], known, config, here)._replace(contents=contents)


def folder_config(data, here: str, listing: folder.Listing, parts: tuple[str, ...] = ()) -> builders.FolderConfig:
    """The config of the builder that prepares a listed folder in `here`, under a name that changes with its files."""
    key = folder.key(listing, data['test_fraction'], data['max_pixels'], parts)
    return builders.FolderConfig(
        name=key,
        listing=listing,
        test_fraction=data['test_fraction'],
        max_corrupt=data['max_corrupt'],
        threads=data['threads'],
        max_pixels=data['max_pixels'],
        report=os.path.join(here, builders.JaxgenFolder.name, key, 'unreadable.txt'),
        parts=parts,
    )


def from_folder(name: str, features: Callable, config: Callable[[], builders.FolderConfig], here: str) -> Source:
    """The source of a folder whose config, which reads the folder, is made only when the set is prepared."""

    def check() -> None:
        folder.check(config().listing, config().max_corrupt, config().report)

    return Source(name, features, lambda: builders.JaxgenFolder(config=config(), data_dir=here), check)


SOURCES: dict[str, Callable[[Any, str], Source]] = {
    'digits': digits_source,
    'shapes': shapes_source,
    'gaussians': gaussians_source,
    'folder': folder_source,
    'pairs': pairs_source,
    **dict.fromkeys(addresses.READ, read_source),
}
READERS: dict[str, records.Reader] = {
    'arrayrecord': arrayrecords.read,
    'cifar': cifar.read,
    'idx': idx.read,
    'mat': matlab.read,
    'npy': numpy_files.read_npy,
    'npz': numpy_files.read_npz,
    'parquet': parquet.read,
    'tar': tars.read,
    'zip': zips.read,
}


def tfds_builder(name: str, here: str) -> tfds.core.DatasetBuilder:
    """A TFDS builder by its name, or a UserError."""
    try:
        # What has a colon and no version behind it is a community set, which is looked up in the network.
        if not re.fullmatch(r'\w+(/[^:]+)?(:[\d.*]+)?', name):
            raise DatasetNotFoundError(name)
        with quiet():
            return tfds.builder(name, data_dir=here)
    except DatasetNotFoundError:
        pass
    except UserError:
        raise
    except Exception as e:
        raise UserError(f'config.data.source: {name} cannot be had: {reason(e)}') from e
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        raise UserError(f'config.data.source: for the images in a folder write folder:{name}')
    if os.path.isfile(path):
        kind = ENDINGS.get(os.path.splitext(path)[1].lower(), 'KIND')
        raise UserError(f'config.data.source: for a file write {kind}:{name}; kinds: {", ".join(addresses.READ)}')
    known = [*OWN, *tfds.list_builders(with_community_datasets=False)]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    kinds = ', '.join(f'{kind}:PATH' for kind in addresses.KINDS)
    listed = f'digits, shapes, {kinds}, gaussians:1, gaussians:2 and the names of TFDS'
    hint = f'did you mean {" or ".join(close)}?' if close else f'known: {listed}'
    raise UserError(f'config.data.source: no source {name!r}; {hint}')


def batch_features(features) -> dict[str, Feature]:
    """{name: Feature} of all features that a batch can hold.

    'image' is the image feature of that name, or else the first one; 'label' the class label; others go by their
    path, like 'attributes/Smiling', if they are images too, texts or lists of texts, or numbers of a fixed shape.
    Integers and bools become int32, but uint8 stays; floats become float32. 'caption' is the text of that name, or else
    the first whose name is usual for captions.
    """
    others: dict[str, Feature] = {}
    text_features: dict[str, Feature] = {}  # texts
    images: dict[str, Feature] = {}

    def visit(feature, path: tuple[str, ...]) -> None:
        if isinstance(feature, dict | tfds.features.FeaturesDict):
            for key, inner in feature.items():
                visit(inner, (*path, key))
        elif isinstance(feature, tfds.features.Image):
            images['/'.join(path)] = Feature(path, image=True, channels=1 if feature.shape[-1] == 1 else 0)
        elif keys := text_keys(feature):
            for whole in ((*path, *key) for key in keys):
                text_features['/'.join(whole)] = Feature(whole, shape=(records.UNREAD_TEXT,), text=True)
        elif isinstance(feature.shape, tuple) and None not in feature.shape:
            dtype = np.dtype(feature.np_dtype)  # the field dtype would import TensorFlow
            if dtype.kind not in 'biuf' or isinstance(feature, tfds.features.Video | tfds.features.Audio):
                return
            dtype = np.float32 if dtype.kind == 'f' else np.uint8 if dtype == np.uint8 else np.int32
            one = Feature(path, feature.shape, dtype)
            if isinstance(feature, tfds.features.ClassLabel):
                one = one._replace(dtype=np.int32, classes=feature.num_classes or 0, names=class_names(feature))
                others.setdefault('label', one)
            others['/'.join(path)] = one

    visit(features, ())
    main = next((name for name, f in images.items() if f.path[-1] == 'image'), next(iter(images), ''))
    first = {'image': images.pop(main)._replace(channels=0)} if images else {}
    rank = {name: i for i, name in enumerate(('caption', *metadata.COLUMNS))}
    usual = sorted((rank[f.path[-1]], len(f.path), name) for name, f in text_features.items() if f.path[-1] in rank)
    if usual and 'caption' not in others:
        text_features.setdefault('caption', text_features[usual[0][-1]])
    return {**first, **others, **images, **text_features}


def text_keys(feature) -> list[tuple[str, ...]]:
    """Where in a feature of TFDS texts are: [()] of a text or a list of texts, [('text',)] of a list of dicts."""
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(inner, dict | tfds.features.FeaturesDict):
            return [(key,) for key, one in inner.items() if () in text_keys(one)]
        feature = inner
    if isinstance(feature.shape, tuple) and not feature.shape and np.dtype(feature.np_dtype).kind in 'OSU':
        return [()]
    return []


def class_names(feature: tfds.features.ClassLabel) -> tuple[str, ...]:
    """Names of the classes by number; () where they have none but their numbers."""
    try:
        names = tuple(map(str, feature.names))
    except (AttributeError, TypeError, ValueError):  # TFDS knows their number alone
        return ()
    return () if names == tuple(map(str, range(len(names)))) else names


def choose(source: Source, data) -> dict[str, Feature]:
    """The features that `data.features` names.

    Raises:
      UserError: one that the source lacks, or a number of classes that is not the source's.
    """
    known = dict(source.features())
    if 'label' in known:
        known.setdefault('domain', known['label'])
    if data['caption'] and 'caption' in data['features'] and source.builder and not contents_of(source):
        if data['caption'] in known:
            known['caption'] = known[data['caption']]
        else:
            known.pop('caption', None)
            missing_caption(source, data['caption'], known)
    if data['low_resolution']:
        known['low_resolution'] = known['image']._replace(side=data['low_resolution'])
    missing = [name for name in data['features'] if name not in known]
    if missing:
        close = difflib.get_close_matches(missing[0], known, n=3, cutoff=0.6)
        hint = f'did you mean {" or ".join(close)}?' if close else f'it has {", ".join(list(known)[:20])}'
        if not close and len(known) > 20:
            hint += f', ... ({len(known)} in all)'
        if 'low_resolution' in missing:
            hint = 'config.data.low_resolution makes one of the image'
        elif source.name.startswith(('folder:', 'zip:', 'tar:')) and 'caption' in missing:
            hint = archives.CAPTIONLESS
        elif source.name.startswith('folder:') and 'label' in missing:
            hint = 'put every image into a sub-folder named after its class'
        raise UserError(f'config.data.features: {source.name} has no {", ".join(map(repr, missing))}; {hint}')
    chosen = {name: known[name] for name in data['features']}
    if 'label' in chosen:
        n = chosen['label'].classes
        if n and data['classes'] and n != data['classes']:
            raise UserError(
                f'config.data.classes = {data["classes"]}, but {source.name} has {n} classes: leave it at 0'
            )
        if not n and not data['classes']:
            raise UserError(f'{source.name} has an unknown number of classes: set config.data.classes')
        chosen['label'] = chosen['label']._replace(classes=n or data['classes'])
    return chosen


def missing_caption(source: Source, name: str, known: dict[str, Feature]) -> None:
    """Raises UserError: data.caption names no feature."""
    candidates = [name for name, f in known.items() if f.text] or list(known)
    raise UserError(f'config.data.caption: {source.name} has no {name!r}; it has {", ".join(candidates[:20])}')


# --- preparing


def prepare(source: Source) -> tfds.core.DatasetBuilder:
    """The source's builder, its set prepared. One that is there is never prepared again.

    Raises:
      UserError: it cannot be prepared; names what is missing and what to do.
    """
    with quiet():
        builder = source.builder()
        if not complete(builder):
            if source.confined:
                guard.check_inside(os.fspath(builder.data_dir_root), builder.data_dir)
            with lock(builder):
                builder = source.builder()
                if not complete(builder):
                    generate(source, builder)
                    builder = source.builder()
    source.check()
    return builder


def complete(builder) -> bool:
    return os.path.isfile(os.path.join(builder.data_dir, 'dataset_info.json'))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices of TFDS: their every line would look like a mistake."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def lock(builder) -> Iterator[None]:
    """Held by one process at a time for one set; goes with the process, however that ends."""
    directory = os.path.dirname(builder.data_dir)
    try:
        os.makedirs(directory, exist_ok=True)
        file = os.open(os.path.join(directory, '.lock'), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as e:
        raise UserError(f'cannot write to {e.filename}: {e.strerror}; name another directory by config.data.dir') from e
    try:
        try:
            locks.hold(file)
        except BlockingIOError:
            print(f'waiting for another process that prepares {builder.name}', file=sys.stderr)
            locks.hold(file, wait=True)
        yield
    finally:
        os.close(file)


def generate(source: Source, builder) -> None:
    """Writes the set."""
    path = builder.data_dir
    if source.own:
        # Nobody else writes here while the lock is held, so these are dead.
        for remains in [path, *glob.glob(os.path.join(glob.escape(os.path.dirname(path)), 'incomplete.*'))]:
            shutil.rmtree(remains, ignore_errors=True)
    elif os.path.isdir(path):
        raise UserError(
            f'{path} holds a part of {source.name} only (no dataset_info.json): delete it, and it is prepared anew'
        )
    if sys.stderr.isatty() and source.name.partition(':')[0] not in ('digits', 'shapes', 'gaussians'):
        tfds.enable_progress_bar()
    else:
        tfds.disable_progress_bar()
    available = source.own or online(builder)
    if available and not source.own:
        note = (
            '' if importlib.util.find_spec('tensorflow') else "; if it wants TensorFlow: pip install 'jaxgen[prepare]'"
        )
        print(f'preparing {source.name} in {builder.data_dir}{note}', file=sys.stderr)
    try:
        with contextlib.nullcontext() if available else no_retries(), guard.arrays_only():
            builder.download_and_prepare(file_format='array_record')
    except UserError:
        raise
    except Exception as e:
        raise UserError(failure(source, builder, e)) from e


def online(builder) -> bool:
    """Whether a host that the set comes from answers. (Files that were fetched by hand need none.)"""
    urls = {urllib.parse.urlsplit(url).netloc: url for url in builder.url_infos or {} if url.startswith('http')}
    for url in list(urls.values())[:3] or ['https://www.tensorflow.org/datasets']:
        with contextlib.suppress(requests.RequestException):
            requests.head(url, timeout=PROBE_SECONDS)
            return True
    return False


@contextlib.contextmanager
def no_retries() -> Iterator[None]:
    """Downloads fail at their first try: without a network TFDS tries for more than three minutes."""
    tries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 0
    try:
        yield
    finally:
        downloader.MAX_RETRIES = tries


def reason(e: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(e, requests.RequestException):
        host = urllib.parse.urlsplit(e.request.url).netloc if e.request is not None else 'its host'
        return f'no connection to {host}'
    cause: BaseException | None = e
    while cause is not None:  # TFDS wraps what builders raise
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, ImportError):
            package = re.search(r"No module named '(\w+)", str(cause))
            package = package[1] if package else cause.name or 'unknown'
            if package in EXTRA:
                return f"it needs {EXTRA[package]} to be prepared: pip install 'jaxgen[prepare]'"
            return f'it needs the package {package}, which is not installed'
        cause = cause.__cause__ or cause.__context__
    text = re.sub(r' ?<_io\.BytesIO object at 0x[0-9a-f]+>', '', ' '.join(str(e).split()))
    text = re.sub(r'^Failed to construct dataset .*?}": ', '', text)
    return f'{type(e).__name__}: {text[:200]}{"..." if len(text) > 200 else ""}'


def failure(source: Source, builder, e: Exception) -> str:
    """Why a set could not be prepared and what can be done, on one line."""
    name, here = source.name, os.fspath(builder.data_dir_root)
    if source.own:
        return f'cannot prepare {name} in {here}: {reason(e)}; config.data.dir names another directory'
    by_hand = os.path.join(here, 'downloads', 'manual')
    instructions = ' '.join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or '').split())
    if instructions and 'manual' in str(e).lower():
        return f'{name} has to be fetched by hand, into {by_hand}: {instructions}'
    files = [info.filename for info in (builder.url_infos or {}).values() if info.filename]
    files[5:] = ['...'] if len(files) > 5 else []
    remedies = [f'put {", ".join(files)} into {by_hand}'] if files else []
    remedies += [f'copy {builder.data_dir} from where it is prepared', 'name a folder of your images by folder:PATH']
    quota = ' (Google Drive often refuses CelebA on quota)' if builder.name.startswith('celeb_a') else ''
    return f'{name} could not be prepared: {reason(e)}{quota}; {", or ".join(remedies)}'


# --- reading


class PreparedRecords:
    """The stored examples of one split of a prepared set: records[i] is {feature: encoded bytes, number or array}.

    `identity` is a text that identifies this split of this set, wherever it lies. `shuffled`: they are in a random
    order of their names, so that any first ones are a fair sample, and stay it when others come or go.
    """

    def __init__(self, path: str, info, stored, chosen: dict[str, Feature], identity: str, shuffled: bool = False):
        self.path, self.stored, self.chosen, self.identity = path, stored, chosen, identity
        self.shuffled, self.info = shuffled, info
        self.read_chosen()

    def read_chosen(self) -> None:
        """Only the chosen features are parsed: an example of CelebA holds 50."""
        parsed = {}
        for path in (f.path for f in self.chosen.values()):
            feature, depth = self.info.features, 0
            while depth < len(path) and not isinstance(feature, tfds.features.Sequence):
                feature, depth = feature[path[depth]], depth + 1
            parsed[path[:depth]] = feature  # a sequence is parsed whole
        self.features = tfds.features.FeaturesDict(nest(parsed))
        self.decoders = nest({f.path: tfds.decode.SkipDecoding() for f in self.chosen.values() if f.image})

    def stamp(self) -> str:
        """See `records.stamp`."""
        about = records.stamp_of_files((os.path.join(self.path, 'dataset_info.json'),))
        return f'{self.identity} {about}'

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            example = self.features.deserialize_example_np(self.stored[i], decoders=self.decoders)
        except Exception as e:  # a file that is gone or damaged: ArrayRecord keeps checksums
            raise RunError(
                f'{self.path}: cannot read example {i} ({reason(e)}); delete it, and it is prepared anew'
            ) from e
        values = {name: functools.reduce(lambda x, key: x[key], f.path, example) for name, f in self.chosen.items()}
        return {name: texts.encoded(x) if self.chosen[name].text else x for name, x in values.items()}


def nest(flat: dict[tuple[str, ...], Any]) -> dict:
    """{('a', 'b'): 1} -> {'a': {'b': 1}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        functools.reduce(lambda x, key: x.setdefault(key, {}), path[:-1], tree)[path[-1]] = leaf
    return tree


def open_records(source: Source, data, split: str) -> records.Records:
    """The records of a split, prepared if need be. What a config makes of them: splits.py.

    split: 'train', 'validation' or 'test'; 'whole' and 'rest', what 'train' and 'validation' are where the test split
      comes from elsewhere; 'own_test', 'test' unless it is a fraction of the training data; 'split:NAME', see
      `split_name`.

    Raises:
      UserError: it cannot be prepared or read, or has no such split.
    """
    chosen = choose(source, data)
    if contents := contents_of(source):
        return records.open_split(contents, chosen, data, split, root(data))
    builder = prepare(source)
    guard.check_shards(builder)
    part = split_name(source, builder, split, data['test_fraction'])
    try:
        method = tfds.decode.DeserializeMethod.RAW_BYTES
        with quiet():
            stored = builder.as_data_source(part, deserialize_method=method)
        with open(os.path.join(builder.data_dir, 'dataset_info.json'), 'rb') as file:  # holds the sizes of all files
            identity = f'{builder.info.full_name} {part} {hashlib.file_digest(file, "sha256").hexdigest()}'
        if isinstance(builder, builders.JaxgenFolder):  # wherever it lies
            content = builder.info.metadata['validation' if part == 'validation' else 'content']
            identity = f'{builder.name} {builder.version} {part} {content}'
        shuffled = isinstance(builder, builders.JaxgenFolder)
        return PreparedRecords(builder.data_dir, builder.info, stored, chosen, identity, shuffled)
    except NotImplementedError as e:
        raise UserError(
            f'{builder.data_dir} is stored as {builder.info.file_format.value}, which is not read by number; run once '
            f'python -m tensorflow_datasets.scripts.convert_format --dataset_version_dir={builder.data_dir} '
            "--out_file_format=array_record (pip install 'jaxgen[prepare]' for it), or name another config.data.dir"
        ) from e
    except UserError:
        raise
    except Exception as e:
        raise UserError(f'{builder.data_dir} cannot be read: {reason(e)}; delete it, and it is prepared anew') from e


def has_split(source: Source, split: str) -> bool:
    """Whether a set comes with one of the splits of `own_splits`. It is prepared for that."""
    if contents := contents_of(source):
        return bool(records.own_splits([name for name, part in contents.splits.items() if part.n]).get(split))
    return bool(own_splits(prepare(source)).get(split))


def own_splits(builder) -> dict[str, str]:
    """{split: the name by which TFDS has it} of the splits that a set comes with beside its training split, '' where it
    has none.

    'own_test' is 'test', or 'validation' where there is none or it has no labels; 'validation' is one beside that;
    'rest' is what 'validation' is where the test split comes from elsewhere.
    """
    sizes = {name: info.num_examples for name, info in builder.info.splits.items() if info.num_examples}
    listing = builder.builder_config.listing if isinstance(builder, builders.JaxgenFolder) else None
    if listing and not listing.test_folder:  # the test split is a fraction held out
        return {'own_test': '', 'validation': '', 'rest': ''}
    tests = [name for name in ('test', 'validation') if name in sizes]
    if builder.name.startswith(UNLABELLED_TEST):
        tests.reverse()
    test, other = (*tests, '', '')[:2]
    rest = 'validation' if 'validation' in sizes else ''
    if listing and listing.test_folder.lower() in folder.VALIDATION:
        rest = test
    return {'own_test': test, 'validation': other if other == 'validation' else '', 'rest': rest}


def split_name(source: Source, builder, split: str, test_fraction: float) -> str:
    """The name by which TFDS has a split.

    'test' is the set's own, or else the last test_fraction of 'train', which 'train' then goes without, and 'whole'
    does not. 'split:NAME' is the set's own split of that name, if it is none that is trained on.
    """
    sizes = {name: info.num_examples for name, info in builder.info.splits.items() if info.num_examples}
    own = own_splits(builder)
    if split.startswith('split:'):
        return named_split(source, split, [name for name in sizes if name != 'train' and any(own.values())])
    if split in ('validation', 'rest', 'none'):
        if not own.get(split):
            raise UserError(
                f'{source.name} has no validation split: set config.data.validation_fraction, to 0.1, say, or '
                'config.data.validation_source'
            )
        return own[split]
    if split == 'test' and own['own_test']:
        return own['own_test']
    if 'train' not in sizes:
        raise UserError(f'{source.name} has no split train, only {", ".join(sizes) or "empty ones"}')
    if split == 'whole':  # a fraction of a folder is a split of its own, of other sets it is a part of 'train'
        return 'train+test' if source.own and not own['own_test'] and 'test' in sizes else 'train'
    if split == 'train' and (own['own_test'] or source.own):
        return 'train'
    if split == 'test' and source.own and 'test' in sizes:
        return 'test'
    held = 0 if source.own else max(round(test_fraction * sizes['train']), 1)
    if not 0 < held < sizes['train']:
        raise UserError(f'{source.name} has too few images ({sizes["train"]}) to hold some out for testing')
    return f'train[:-{held}]' if split == 'train' else f'train[-{held}:]'


def named_split(source: Source, split: str, others: list[str]) -> str:
    """NAME of 'split:NAME'.

    Args:
      others: the splits that the set comes with beside the training split.

    Raises:
      UserError: it is none of them.
    """
    name = split.partition(':')[2]
    if name not in others:
        has = f'it has {", ".join(others)}' if others else 'it has none beside its training data'
        raise UserError(f'{split}: {source.name} has no such split to hold out; {has}')
    return name
