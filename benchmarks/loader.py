"""Images a second out of the data loader, by size and kind of file, threads and processes, as JSON on stdout.

    python benchmarks/loader.py --out=benchmarks/results/loader.json
    python benchmarks/loader.py --sizes=64 --threads=1,8,32 --processes=1,8 --folder=/scratch/loader

The images are drawn: smooth shapes and noise, so that their files are about as long as photographs' are. Each kind is
read straight from a folder (`data.direct=0`), and once as pixels that are kept in memory (`data.cache_mb`). `photo` are
JPEG files of 512 x 384 pixels that are cropped and reduced, in full and with `data.draft`. What a core gives is images
per second of processor time of one loader of one thread, which other work on the machine changes little. Processes are
loaders of one thread each side by side, as of as many hosts: what they give without handing anything over.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time

import numpy as np
from PIL import Image

import jaxgen
from jaxgen import data, files
from jaxgen.config import DEFAULTS

KINDS = {'jpeg': ('JPEG', {'quality': 90}), 'png': ('PNG', {}), 'photo': ('JPEG', {'quality': 90})}
PHOTO = (384, 512)
COUNT = {'photo': 300, 32: 2000, 64: 1000, 128: 500, 256: 200}  # images of a folder, of a kind or by size


def drawn(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth colours with noise, a little as a photograph is."""
    coarse = Image.fromarray(
        rng.normal(128, 50, (max(height // 8, 2), max(width // 8, 2), 3)).clip(0, 255).astype('u1')
    )
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def write(folder: str, kind: str, size: int) -> str:
    """The folder of these images, made if it is not there."""
    path = os.path.join(folder, kind if kind == 'photo' else f'{kind}{size}')
    form, options = KINDS[kind]
    if not os.path.isdir(path):
        os.makedirs(path)
        rng = np.random.default_rng(size)
        for i in range(COUNT['photo'] if kind == 'photo' else COUNT.get(size, 200)):
            file = io.BytesIO()
            drawn(rng, *(PHOTO if kind == 'photo' else (size, size))).save(file, form, **options)
            with open(os.path.join(path, f'{i:06d}.{form.lower()}'), 'wb') as out:
                out.write(file.getvalue())
    return path


def section(path: str, size: int, **fields) -> dict:
    """The section `data` of a config."""
    chosen = {'source': f'folder:{path}', 'dir': os.path.join(os.path.dirname(path), 'sets'), 'size': size}
    return {**DEFAULTS['data'], **chosen, 'channels': 3, 'batch': 64, 'flip': True, **fields}


def measure(fields: dict, seconds: float, start=None) -> dict:
    """Images a second by the clock and by processor time of one loader."""
    stream = data.batches(fields, 'train', seed=0)
    try:
        for _ in range(80 if fields['cache_mb'] else 4):  # of what is kept in memory an epoch and more
            next(stream)
        if start:
            start.wait()
        began, busy, n = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < seconds:
            n += len(next(stream)['image'])
        return {
            'images_per_second': n / (time.perf_counter() - began),
            'per_core': n / (time.process_time() - busy),
        }
    finally:
        stream.close()


def work(fields: dict, seconds: float, start, results) -> None:
    results.put(measure(fields, seconds, start)['images_per_second'])


def side_by_side(fields: dict, seconds: float, n: int) -> float:
    """Images a second of n loaders in a process each."""
    context = multiprocessing.get_context('spawn')
    start, results = context.Barrier(n), context.Queue()
    workers = [context.Process(target=work, args=(fields, seconds, start, results)) for _ in range(n)]
    for worker in workers:
        worker.start()
    rates = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', default='32,64,128,256')
    parser.add_argument('--threads', default='1,2,4')
    parser.add_argument('--processes', default='2')
    parser.add_argument('--seconds', type=float, default=2.0, help='of one measurement')
    parser.add_argument('--turns', type=int, default=3, help='of which the best counts')
    parser.add_argument('--folder', default='', help='for the images; a temporary one by default')
    parser.add_argument('--out', default='', help='write the JSON here too')
    arguments = parser.parse_args()
    sizes, threads, processes = (
        [int(n) for n in text.split(',') if n] for text in (arguments.sizes, arguments.threads, arguments.processes)
    )
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        kinds = [(name, {'cache_mb': 0}) for name in KINDS]
        kinds += [('photo', {'cache_mb': 0, 'draft': 2}), ('png', {'cache_mb': 2**20})]
        for size in sizes:
            for kind, fields in kinds:
                path = write(folder, kind, size)
                length = np.mean([os.path.getsize(entry) for entry in os.scandir(path)])
                base = section(path, size, direct=0, **fields)
                row = {'kind': kind, 'size': size, 'fields': fields, 'bytes': round(float(length)), 'threads': {}}
                for n in threads:
                    best = [measure({**base, 'threads': n}, arguments.seconds) for _ in range(arguments.turns)]
                    row['threads'][n] = round(max(one['images_per_second'] for one in best))
                    if n == 1:
                        row['per_core'] = round(max(one['per_core'] for one in best))
                if kind == 'jpeg':
                    row['processes'] = {
                        n: round(max(side_by_side({**base, 'threads': 1}, arguments.seconds, n) for _ in range(2)))
                        for n in processes
                    }
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'rows': rows,
        'cores': len(os.sched_getaffinity(0)),
        'machine': platform.machine(),
        'versions': {'jaxgen': jaxgen.__version__, 'python': platform.python_version(), 'pillow': Image.__version__},
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        files.save_json(arguments.out, record)


if __name__ == '__main__':
    main()
