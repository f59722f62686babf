"""A folder of a person's own images: what is in it, what of that can be read, what is held out.

listing = scan('~/pictures/cats')
files = readable(listing, max_corrupt=0.01, threads=4, report='unreadable.txt')
train, test = split(files, test_share=0.2)
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxgen.data.transforms import load, to_array
from jaxgen.errors import UserError

# Files with these endings are taken for images; PIL reads them without programs beside it.
ENDINGS = (
    *('.apng', '.avif', '.bmp', '.dds', '.dib', '.gif', '.icns', '.ico', '.j2c', '.j2k', '.jfif', '.jp2', '.jpe'),
    *('.jpeg', '.jpf', '.jpg', '.jpx', '.pbm', '.pcx', '.pgm', '.png', '.pnm', '.ppm', '.psd', '.qoi', '.ras', '.sgi'),
    *('.tga', '.tif', '.tiff', '.webp', '.xbm', '.xpm'),
)


class File(NamedTuple):
    path: str  # below the folder, parts separated by '/'
    size: int  # bytes
    time: int  # of the last change, ns


class Listing(NamedTuple):
    """The images of a folder by their names, unread."""

    folder: str  # absolute path
    files: tuple[File, ...]  # by path
    classes: tuple[str, ...]  # first-level sub-folders by name; () if an image lies outside of them


def scan(path: str) -> Listing:
    """Lists the folder's images, at any depth. Hidden files and folders are left out, links are followed.

    Raises:
      UserError: no such folder, or no image in it.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(root):
        what = 'is a file, not a folder' if os.path.exists(root) else 'does not exist'
        raise UserError(f'the folder {root} {what}')
    files, others, seen = [], 0, set()
    for place, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        here = os.path.realpath(place)
        if here in seen:  # a link back up
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(f for f in folders if not f.startswith(('.', '__MACOSX')))
        for name in names:
            if name.startswith('.'):
                continue
            if not name.lower().endswith(ENDINGS):
                others += 1
                continue
            full = os.path.join(place, name)
            try:
                about = os.stat(full)
                size, time = about.st_size, about.st_mtime_ns
            except OSError:  # a broken link: listed, and found unreadable later
                size, time = -1, 0
            files.append(File(os.path.relpath(full, root).replace(os.sep, '/'), size, time))
    if not files:
        inside = f'{others} other files' if others else 'no files'
        raise UserError(f'the folder {root} holds no images (.png, .jpg, .webp, ...), but {inside}')
    files.sort()
    inside = all('/' in f.path for f in files)
    return Listing(root, tuple(files), tuple(sorted({top(f.path) for f in files})) if inside else ())


def refuse(e: OSError) -> None:
    raise UserError(f'config.data.source: cannot list {e.filename}: {e.strerror}')


def top(path: str) -> str:
    """First-level sub-folder of a path below the folder."""
    return path.split('/', 1)[0]


def place(listing: Listing, file: File) -> str:
    return os.path.join(listing.folder, file.path)


def digest(*parts) -> str:
    """64 hexadecimal digits, by the text of the parts; names that are no Unicode are fine."""
    return hashlib.sha256('\0'.join(map(str, parts)).encode('utf-8', 'surrogateescape')).hexdigest()


def stem(path: str) -> str:
    """What files of one example have in common: a path below the first-level sub-folder, without the ending."""
    return os.path.splitext(path.split('/', 1)[-1])[0]


def paired(listing: Listing, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The sub-folders, each of which holds one image of every example: files of one name belong together.

    Raises:
      UserError: one that is wanted is not there, or a file has no partner.
    """
    within = {part: {} for part in listing.classes}
    missing = [part for part in wanted if part not in within]
    if missing:
        what = f'{missing[0]} is not there' if within else 'an image lies outside of all sub-folders'
        raise UserError(f'the folder {listing.folder} must hold its images in {", ".join(wanted)}: {what}')
    for file in listing.files:
        part, name = top(file.path), stem(file.path)
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
    return listing.classes


def key(listing: Listing, test_share: float, parts: tuple[str, ...] = ()) -> str:
    """A name for the set prepared from this listing: another one as soon as a file changes."""
    title = re.sub(r'[^A-Za-z0-9]+', '_', os.path.basename(listing.folder))[:32].strip('_') or 'folder'
    files = (field for file in listing.files for field in file)
    return f'{title}-{digest(listing.folder, test_share, *parts, *files)[:16]}'


def split(files: list[File], test_share: float) -> tuple[list[File], list[File]]:
    """(train, test), both in an order that says nothing of the names.

    Where a file goes depends on its path below the folder and on test_share only, so it stays there
    when others come or go. Of two or more files at least one lands on each side.
    """
    shares = {file: int(digest(file.path)[:13], 16) / 16**13 for file in files}
    order = sorted(files, key=shares.get)
    n = sum(shares[file] < test_share for file in order)
    n = min(max(n, 1), len(order) - 1)
    return order[n:], order[:n]


def readable(listing: Listing, max_corrupt: float, threads: int, report: str) -> list[File]:
    """The files that decode. The others are counted on stderr and listed with their faults in `report`.

    Raises:
      UserError: more than max_corrupt of the files do not decode, or none does.
    """

    def fault(file: File) -> str:
        try:
            with open(place(listing, file), 'rb') as f:
                load(f.read(), channels=3)
        except Exception as e:
            return f'{type(e).__name__}: {" ".join(str(e).split())}'
        return ''

    files, faults = listing.files, []
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(files), desc=f'reading {listing.folder}', disable=None, leave=False, delay=2) as bar,
    ):
        for start in range(0, len(files), 256):
            faults += pool.map(fault, files[start : start + 256])
            bar.update(len(faults) - start)
    bad = {ascii(file.path): why for file, why in zip(files, faults, strict=True) if why}
    if bad:
        with open(report, 'w', encoding='utf-8', errors='backslashreplace') as f:
            f.writelines(f'{name}\t{why}\n' for name, why in bad.items())
    elif os.path.exists(report):
        os.remove(report)
    check(listing, max_corrupt, report)
    if bad:
        print(f'{listing.folder}: left out {summary(listing, list(bad))}; all and why: {report}', file=sys.stderr)
    return [file for file, why in zip(files, faults, strict=True) if not why]


def summary(listing: Listing, bad: list[str]) -> str:
    """'4 of 100 files, which cannot be read as images ('a.png', 'b.png', 'c.png', ...)'."""
    names = ', '.join(bad[:3]) + (', ...' if len(bad) > 3 else '')
    return f'{len(bad)} of {len(listing.files)} files, which cannot be read as images ({names})'


def check(listing: Listing, max_corrupt: float, report: str) -> None:
    """Refuses a folder if more than max_corrupt of it, or all, is unreadable according to the report."""
    if not os.path.exists(report):
        return
    with open(report, encoding='utf-8') as f:
        bad = [line.split('\t')[0] for line in f]
    if len(bad) < len(listing.files) and len(bad) <= max_corrupt * len(listing.files):
        return
    what = f'{listing.folder}: {summary(listing, bad)}'
    if len(bad) == len(listing.files):
        raise UserError(f'{what}: that is all of them (why: {report})')
    raise UserError(
        f'{what}, are more than config.data.max_corrupt = {max_corrupt:g}; '
        f'repair or remove them, or raise it (all and why: {report})'
    )


class Pictures:
    """All pictures of a folder as they are, to be measured: `len(pictures)`, and `pictures[3:7]`, uint8 [4, H, W, C].

    Nothing is left out and nothing is resized: either would change what is measured.

    Raises:
      UserError: no such folder, a file that is no picture, or a picture of another size than `image` = (H, W, C).
    """

    def __init__(self, path: str, image: tuple[int, int, int]):
        self.listing, self.image = scan(path), image
        for file in self.listing.files:  # by their headers: all mistakes before any computing
            try:
                with Image.open(place(self.listing, file)) as header:
                    size = header.size
            except Exception as e:
                raise self.unreadable(file, e) from e
            if size != (image[1], image[0]):
                raise UserError(
                    f"{place(self.listing, file)} is {size[1]} x {size[0]} pixels, and the data set's pictures are "
                    f'{image[0]} x {image[1]}: only pictures of one size can be compared (config.data.size)'
                )

    def __len__(self) -> int:
        return len(self.listing.files)

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.stack([self.read(file) for file in self.listing.files[part]])

    def read(self, file: File) -> np.ndarray:
        try:
            with open(place(self.listing, file), 'rb') as f:
                picture = to_array(load(f.read(), channels=self.image[2]))
            if picture.shape != self.image:  # turned by its EXIF data
                raise ValueError(f'it is {picture.shape[0]} x {picture.shape[1]} pixels once turned')
        except Exception as e:
            raise self.unreadable(file, e) from e
        return picture

    def unreadable(self, file: File, e: Exception) -> UserError:
        why = ' '.join(str(e).split())[:200]
        return UserError(f'{place(self.listing, file)} cannot be measured ({why}): repair it or remove it')
