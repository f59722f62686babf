"""A folder of a person's own images: what is in it, what of that can be read, what is held out.

listing = scan('~/images/cats')
files = readable(listing, max_corrupt=0.01, threads=4, report='unreadable.txt')
train, test = split(list(files), test_fraction=0.2)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxgen import log
from jaxgen.data import trees, workers
from jaxgen.data.transforms import FORMATS, MAX_PIXELS, load, to_array
from jaxgen.data.trees import HELD_OUT, IRREGULAR, TEST, TRAIN, VALIDATION, is_folder, ordered
from jaxgen.errors import UserError

BYTES_PER_PIXEL = 8  # that a file may have at most, as 16-bit RGBA has, beside some that are no pixels
OTHER_BYTES = 2**24


class File(NamedTuple):
    path: str  # below the folder, parts separated by '/'
    size: int  # bytes
    time: int  # of the last change, ns
    split: str = ''  # 'train', 'validation' or 'test' where the folder has sub-folders for these

    @property
    def inner(self) -> str:
        """The path below the split's folder."""
        return self.path.split('/', 1)[1] if self.split else self.path


class Listing(NamedTuple):
    """The images of a folder by their names, unread."""

    folder: str  # absolute path, links followed
    files: tuple[File, ...]  # by path
    classes: tuple[str, ...]  # first-level sub-folders, in order; () if an image lies outside of them
    skipped: tuple[str, ...] = ()  # what was left out and why, '40 files with other endings (40 .heic)'

    @property
    def test_folder(self) -> str:
        """The sub-folder that is the test split, '' where there is none."""
        return next((top(file.path) for file in self.files if file.split == 'test'), '')


class Read(NamedTuple):
    """Size and digest of an image that decodes."""

    size: tuple[int, int]  # width, height, after the rotation of its EXIF data
    digest: str  # SHA-256 of the file


def scan(path: str, links: bool = False) -> Listing:
    """Lists the folder's images, at any depth. Hidden files and folders are left out, links are followed: a folder, or
    a file, with several paths is taken where it lies, or else by the first link to it.

    Where all first-level sub-folders have names of splits ('train', 'test', 'val', ...), they are: the classes are
    the sub-folders of the training split. Classes are in the order of their names, or of their numbers if all are
    integers.

    Args:
      links: take a file as often as there are links to it.

    Raises:
      UserError: no such folder, or no image in it.
    """
    root, counts = root_of(path), Counter()
    return listing(root, trees.walk(root, links, counts), counts)


def listing(root: str, listed: trees.Listed, counts: Counter) -> Listing:
    """The listing of a folder whose images are known; `counts` are of what is left out, by reason."""
    counts = Counter(counts)
    files = into_splits(as_files(listed), counts)
    own = [file for file in files if file.split not in HELD_OUT]
    classes = ordered({top(file.inner) for file in own}) if all('/' in file.inner for file in own) else ()
    if classes:
        files = of_classes(root, files, classes, counts)
    return Listing(root, tuple(files), classes, tuple(f'{n} {what}' for what, n in counts.items() if n))


def as_files(listed: trees.Listed) -> list[File]:
    """The images, by path."""
    columns = (listed.sizes.tolist(), listed.times.tolist())
    return sorted(File(*row) for row in zip(listed.names, *columns, strict=True))


def root_of(path: str) -> str:
    """A folder's path, absolute, links followed.

    Raises:
      UserError: there is no such folder.
    """
    root = os.path.realpath(os.path.expanduser(path))
    if not os.path.isdir(root):
        what = 'is a file, not a folder' if os.path.exists(root) else 'does not exist'
        raise UserError(f'the folder {root} {what}')
    return root


def image_files(root: str, links: bool, counts: Counter) -> list[File]:
    """The files below `root` with the ending of an image, by path; counts what is left out.

    Raises:
      UserError: there are none.
    """
    return as_files(trees.walk(root, links, counts))


def of_classes(root: str, files: list[File], classes: tuple[str, ...], counts: Counter) -> list[File]:
    """The files without held-out images of other classes; counts these, classes of one image and empty folders."""
    own = [file for file in files if file.split not in HELD_OUT]
    kept = [f for f in files if f.split not in HELD_OUT or (top(f.inner) in classes and '/' in f.inner)]
    lost = Counter(f.split for f in files) - Counter(f.split for f in kept)
    for split in HELD_OUT:
        counts[f'{split} images of no class that training has'] = lost[split]
    once = sum(n == 1 for n in Counter(top(file.inner) for file in own).values())
    if not any(file.split in HELD_OUT for file in kept):
        counts['classes of one image, too rare to be in the test split'] = once if once < len(own) else 0
    prefix = {file.path.split('/', 1)[0] + '/' for file in own if file.split}
    empty = [name for name in folders(os.path.join(root, *prefix)) if name not in classes]
    counts[f'folders without images ({", ".join(map(ascii, empty[:3]))})'] = len(empty)
    return kept


def folders(path: str) -> list[str]:
    """Names of the sub-folders that are not hidden."""
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        return sorted(e.name for e in entries if is_folder(e) and not e.is_symlink() and e.name[0] != '.')
    return []


def into_splits(files: list[File], counts: Counter) -> list[File]:
    """The files with their splits, where the first-level sub-folders are splits; the same files else."""
    tops = {top(file.path) for file in files}
    by_name = {name.lower(): name for name in tops}
    train = next((by_name[name] for name in TRAIN if name in by_name), None)
    if train is None or not all('/' in file.path for file in files) or not by_name.keys() <= {*TRAIN, *TEST}:
        return files
    within = [file for file in files if top(file.path) == train]
    labelled = all(file.path.count('/') > 1 for file in within)

    def usable(name: str) -> bool:
        return any(top(f.path) == name and (f.path.count('/') > 1 or not labelled) for f in files)

    test = next((by_name[name] for name in TEST if name in by_name and usable(by_name[name])), None)
    beside = [by_name[name] for name in VALIDATION if name in by_name and usable(by_name[name])]
    validation = next(iter(beside), None) if test and test.lower() not in VALIDATION else None
    for name in sorted(tops - {train, test, validation}):
        n = sum(top(file.path) == name for file in files)
        counts[f'files in {name}/, which is not used' + (f' beside {test}/' if test else '')] = n
    splits = {train: 'train', validation: 'validation', test: 'test'}
    return [file._replace(split=splits[top(file.path)]) for file in files if top(file.path) in splits]


def top(path: str) -> str:
    """First-level sub-folder of a path below the folder."""
    return path.split('/', 1)[0]


def full_path(listing: Listing, file: File) -> str:
    return os.path.join(listing.folder, file.path)


def digest(*parts) -> str:
    """64 hexadecimal digits, by the text of the parts; names that are no Unicode are fine."""
    return hashlib.sha256('\0'.join(map(str, parts)).encode('utf-8', 'surrogateescape')).hexdigest()


def stem(file: File) -> str:
    """What files of one example have in common: the split, and a path below the part's folder, without the ending."""
    return f'{file.split}/{os.path.splitext(file.inner.split("/", 1)[-1])[0]}'


def open_regular(path: str):
    """The file at `path`, open for reading; never waits.

    Raises:
      OSError, ValueError: it is not there, or a pipe or device.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), 'rb')
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError('it is no regular file')
    return file


def read_file(path: str, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an image's file.

    Raises:
      OSError, ValueError: it is not there, no regular file, or has more bytes than an image of max_pixels.
    """
    most, content = BYTES_PER_PIXEL * max_pixels + OTHER_BYTES, b''
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError('it is no regular file')
        # In one piece as a rule: a file of its size ends where one byte more is not there.
        while about.st_size <= most >= len(content):
            part = os.read(handle, (about.st_size - len(content) if about.st_size else 2**16) + 1)
            content += part
            if not part or len(content) == about.st_size:
                break
    finally:
        os.close(handle)
    if about.st_size > most or len(content) > most:
        raise ValueError(f'it has more than the {most} bytes of an image of config.data.max_pixels = {max_pixels}')
    return content


def paired(listing: Listing, required: tuple[str, ...]) -> tuple[str, ...]:
    """The sub-folders, each of which holds one image of every example: files of one name belong together.

    Raises:
      UserError: one that is required is not there, or a file has no partner.
    """
    parts = ordered({top(file.inner) for file in listing.files if '/' in file.inner})
    missing = [part for part in required if part not in parts]
    outside = [file.path for file in listing.files if '/' not in file.inner]
    if missing or outside:
        what = f'{outside[0]!r} lies outside of all sub-folders' if outside else f'{missing[0]} is not there'
        raise UserError(f'the folder {listing.folder} must hold its images in {", ".join(required)}: {what}')
    within: dict[str, dict[str, str]] = {part: {} for part in parts}
    for file in listing.files:
        part, name = top(file.inner), stem(file)
        if name in within[part]:
            raise UserError(f'{listing.folder}: {within[part][name]} and {file.path} have one name')
        within[part][name] = file.path
    for part, files in within.items():
        for other, others in within.items():
            alone = [path for name, path in files.items() if name not in others]
            if alone:
                raise UserError(
                    f'{listing.folder}: {len(alone)} of the images in {part}/ have no partner in {other}/, '
                    f'like {alone[0]!r}'
                )
    return parts


def check_aspects(listing: Listing, sizes: dict[str, tuple[int, int]], pairs) -> None:
    """Refuses partners, given by their paths, whose aspect ratios differ by more than rounding to whole pixels does:
    crops of them would not correspond."""
    for one, other in pairs:
        (w, h), (v, g) = max(sizes[one], sizes[other]), min(sizes[one], sizes[other])
        if abs(w * g - v * h) >= max(w, h):
            raise UserError(
                f'{listing.folder}: {one} is {sizes[one][0]} x {sizes[one][1]} pixels and {other} is '
                f'{sizes[other][0]} x {sizes[other][1]}: images of a pair must have one aspect ratio'
            )


def title(root: str) -> str:
    """What the names of sets begin with that are prepared of a folder."""
    return re.sub(r'[^A-Za-z0-9]+', '_', os.path.basename(root))[:32].strip('_') or 'folder'


def key(listing: Listing, test_fraction: float, max_pixels: int, parts: tuple[str, ...] = ()) -> str:
    """A name for the set prepared from this listing: another one as soon as a file changes."""
    files = (field for file in listing.files for field in file)
    known = digest(listing.folder, test_fraction, max_pixels, *listing.classes, *parts, *files)
    return f'{title(listing.folder)}-{known[:16]}'


def content_digest(files: dict[File, Read], test_fraction: float, parts: tuple[str, ...]) -> str:
    """64 hexadecimal digits that are the same for the same training and test images under the same names, wherever the
    folder lies."""
    rows = ((file.path, file.split, read.digest) for file, read in sorted(files.items()) if file.split != 'validation')
    return digest(test_fraction, *parts, *(field for row in rows for field in row))


def validation_digest(files: dict[File, Read], parts: tuple[str, ...]) -> str:
    """The same of the validation images."""
    held_out = {file._replace(split=''): read for file, read in files.items() if file.split == 'validation'}
    return content_digest(held_out, 0.0, parts)


def ranked(files: list[File]) -> tuple[list[File], dict[File, float]]:
    """The files in an order independent of their names, by ranks, uniform in [0, 1), and these."""
    ranks = {file: int(digest(file.path)[:13], 16) / 16**13 for file in files}
    return sorted(files, key=ranks.__getitem__), ranks


def split(files: list[File], test_fraction: float, classes: bool = False) -> tuple[list[File], list[File]]:
    """(train, test), both in an order independent of the names.

    Where a file goes depends on its path below the folder and on test_fraction only, so it stays there
    when others come or go. Of two or more files at least one lands on each side.

    Args:
      classes: of every class, too, at least one is trained on.
    """
    order, ranks = ranked([file for file in files if file.split != 'validation'])
    if any(file.split == 'test' for file in order):
        return [f for f in order if f.split == 'train'], [f for f in order if f.split == 'test']
    n = sum(ranks[file] < test_fraction for file in order)
    n = min(max(n, 1), len(order) - 1)
    train, test = order[n:], order[:n]
    if classes:
        last = {top(file.inner): file for file in order}  # of every class the one that is held out last
        trained = {top(file.inner) for file in train}
        held = [file for file in test if top(file.inner) in trained or file != last[top(file.inner)]]
        if not held:  # the test split has the rarest alone
            lasts = set(last.values())
            held = [file for file in order if file not in lasts][:1] or test
        out = set(held)
        train, test = [file for file in order if file not in out], held
    return train, test


def readable(
    listing: Listing, max_corrupt: float, threads: int, report: str, max_pixels: int = MAX_PIXELS
) -> dict[File, Read]:
    """The files that decode, with size and digest. The others are listed with their faults in `report`.

    Args:
      threads: that decode; 0: by the number of cores.

    Raises:
      UserError: more than max_corrupt of the files do not decode, or none does.
    """

    def read(file: File) -> Read | str:
        try:
            content = read_file(full_path(listing, file), max_pixels)
            return Read(load(content, 3, max_pixels).size, hashlib.sha256(content).hexdigest())
        except Exception as e:
            return f'{type(e).__name__}: {" ".join(str(e).split())}'

    files, results = listing.files, []
    with (
        ThreadPoolExecutor(min(threads or workers.cores(), len(files))) as pool,
        tqdm(total=len(files), desc=f'reading {listing.folder}', disable=None, leave=False, delay=2) as bar,
    ):
        for start in range(0, len(files), 256):
            results += pool.map(read, files[start : start + 256])
            bar.update(len(results) - start)
    bad = {ascii(file.path): why for file, why in zip(files, results, strict=True) if isinstance(why, str)}
    if os.path.lexists(report):  # a link, maybe, that leads elsewhere
        os.remove(report)
    if bad:
        with open(report, 'x', encoding='utf-8', errors='backslashreplace') as f:
            f.writelines(f'{name}\t{why}\n' for name, why in bad.items())
    check(listing, max_corrupt, report)
    return {file: read for file, read in zip(files, results, strict=True) if isinstance(read, Read)}


announced = set()  # lines that this process has written


def summary(listing: Listing, bad: list[str]) -> str:
    """'4 of 100 files, which cannot be read as images ('a.png', 'b.png', 'c.png', ...)'."""
    names = ', '.join(bad[:3]) + (', ...' if len(bad) > 3 else '')
    return f'{len(bad)} of {len(listing.files)} files, which cannot be read as images ({names})'


def check(listing: Listing, max_corrupt: float, report: str) -> None:
    """Writes to stderr, once a process, what is left out of a folder and why.

    Raises:
      UserError: more than max_corrupt of it, or all, is unreadable according to the report.
    """
    bad = []
    if os.path.isfile(report):
        with open(report, encoding='utf-8') as f:
            bad = [line.split('\t')[0] for line in f]
    if bad and (len(bad) == len(listing.files) or len(bad) > max_corrupt * len(listing.files)):
        what = f'{listing.folder}: {summary(listing, bad)}'
        if len(bad) == len(listing.files):
            raise UserError(f'{what}: that is all of them (why: {report})')
        raise UserError(
            f'{what}, are more than config.data.max_corrupt = {max_corrupt:g}; '
            f'repair or remove them, or raise it (all and why: {report})'
        )
    announce(listing, [f'{summary(listing, bad)}; all and why: {report}'] if bad else [])


def announce(listing: Listing, more: list[str]) -> None:
    """One line on stderr of what is left out of a folder, unless this process has written it before."""
    if listing.skipped or more:
        say(f'{listing.folder}: left out {", ".join([*listing.skipped, *more])}')


def say(line: str) -> None:
    """Writes one line to stderr, unless this process has written it before."""
    if line not in announced:
        announced.add(line)
        log.say(ascii(line)[1:-1] if not line.isprintable() else line)  # whole lines, from threads too


class FolderImages:
    """All images of a folder as they are, to be measured: `len(images)`, and `images[3:7]`, uint8 [4, H, W, C].

    Nothing is left out and nothing is resized: either would change what is measured.

    Raises:
      UserError: no such folder, a file that is no image, or an image of another size than `image` = (H, W, C).
    """

    def __init__(self, path: str, image: tuple[int, int, int]):
        self.listing, self.image = scan(path, links=True), image
        if odd := [what for what in self.listing.skipped if what.endswith(IRREGULAR)]:
            raise UserError(f'{self.listing.folder} holds {odd[0]}: remove them')
        announce(self.listing, [])
        for file in self.listing.files:  # by their headers: all mistakes before any computing
            try:
                with (
                    open_regular(full_path(self.listing, file)) as opened,
                    Image.open(opened, formats=FORMATS) as header,
                ):
                    size = header.size
            except Exception as e:
                raise self.unreadable(file, e) from e
            if size != (image[1], image[0]):
                raise UserError(
                    f"{full_path(self.listing, file)} is {size[1]} x {size[0]} pixels, and the data set's images are "
                    f'{image[0]} x {image[1]}: only images of one size can be compared (config.data.size)'
                )

    def __len__(self) -> int:
        return len(self.listing.files)

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.stack([self.read(file) for file in self.listing.files[part]])

    def read(self, file: File) -> np.ndarray:
        try:
            content, most = read_file(full_path(self.listing, file)), self.image[0] * self.image[1]
            x = to_array(load(content, self.image[2], most))
            if x.shape != self.image:  # rotated by its EXIF data
                raise ValueError(f'it is {x.shape[0]} x {x.shape[1]} pixels once rotated')
        except Exception as e:
            raise self.unreadable(file, e) from e
        return x

    def unreadable(self, file: File, e: Exception) -> UserError:
        why = ' '.join(str(e).split())[:200]
        return UserError(f'{full_path(self.listing, file)} cannot be measured ({why}): repair it or remove it')
