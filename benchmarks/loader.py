"""Images a second out of the data loader, by size and kind of file, threads and processes, as JSON on stdout.

    python benchmarks/loader.py --out=benchmarks/results/loader.json
    python benchmarks/loader.py --sizes=64 --threads=1,8 --processes=8,16 --folder=/scratch/loader

The images are drawn: smooth shapes and noise, so that their files are about as long as photographs' are. Each kind is
read straight from a folder (`data.direct=0`), once as pixels that are kept in memory (`data.cache_mb`) and once as
pixels that are kept on disk (`data.disk_mb`), all of which are in the page cache here. `photo` are JPEG files of
512 x 384 pixels that are cropped and reduced, in full and with `data.draft`, of which the difference is measured on the
two photographs of scikit-learn. Rates are by the clock; what a core gives is images per second of processor time, that
of the processes that decode included, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
from importlib import resources

import numpy as np
from PIL import Image

import jaxgen
from jaxgen import data, files
from jaxgen.config import DEFAULTS
from jaxgen.data import decoding, loader

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


def processor_time(stream) -> float:
    """Seconds of this process and of those that decode for it."""
    seconds = time.process_time()
    lease = stream.examples.workers
    for worker in lease.pool.workers if lease else ():
        with open(f'/proc/{worker.process.pid}/stat', encoding='ascii', errors='replace') as file:
            user, system = file.read().rpartition(')')[2].split()[11:13]
        seconds += (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')
    return seconds


def measure(fields: dict, seconds: float) -> dict:
    """Images a second by the clock and by processor time."""
    stream = data.batches(fields, 'train', seed=0)
    try:
        kept = fields['cache_mb'] or fields['disk_mb']
        for _ in range(2 * len(stream.examples) // fields['batch'] if kept else 8):  # of what is kept two epochs
            next(stream)
        began, busy, n = time.perf_counter(), processor_time(stream), 0
        while time.perf_counter() - began < seconds:
            n += len(next(stream)['image'])
        return {
            'images_per_second': n / (time.perf_counter() - began),
            'per_core': n / (processor_time(stream) - busy),
        }
    finally:
        stream.close()


def best(fields: dict, seconds: float, turns: int) -> dict:
    """The best of several measurements."""
    measured = [measure(fields, seconds) for _ in range(turns)]
    return {name: round(max(one[name] for one in measured)) for name in measured[0]}


def difference(fields: dict) -> dict:
    """How far drafts of photographs are from the images, of 255: root of the mean square, and largest."""
    target, out = decoding.Target('image', (fields['size'], fields['size'], 3)), []
    for name in ('china.jpg', 'flower.jpg'):
        content = (resources.files('sklearn.datasets') / 'images' / name).read_bytes()
        full, draft = (
            decoding.prepared(content, target, {**fields, 'draft': draft}, decoding.Crops()).astype(float)
            for draft in (0, fields['draft'])
        )
        out.append(draft - full)
    return {'rms': round(float(np.sqrt(np.mean(np.square(out)))), 2), 'largest': int(np.abs(out).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', default='32,64,128,256')
    parser.add_argument('--threads', default='1,2')
    parser.add_argument('--processes', default='2')
    parser.add_argument('--seconds', type=float, default=0.7, help='of one measurement')
    parser.add_argument('--turns', type=int, default=2, help='of which the best counts')
    parser.add_argument('--folder', default='', help='for the images; a temporary one by default')
    parser.add_argument('--out', default='', help='write the JSON here too')
    arguments = parser.parse_args()
    sizes, threads, processes = (
        [int(n) for n in text.split(',') if n] for text in (arguments.sizes, arguments.threads, arguments.processes)
    )
    rows = []
    loader.FEW = 0  # so that these small sets are kept on disk as large ones are
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        os.environ['XDG_CACHE_HOME'] = os.path.join(temporary, 'cache')
        kinds = [(name, {'cache_mb': 0, 'disk_mb': 0}) for name in KINDS]
        kinds += [('photo', {'cache_mb': 0, 'disk_mb': 0, 'draft': 2})]
        kinds += [('png', {'cache_mb': 0, 'disk_mb': 2**20}), ('png', {'cache_mb': 2**20, 'disk_mb': 0})]
        for size in sizes:
            for kind, fields in kinds:
                path = write(folder, kind, size)
                length = np.mean([os.path.getsize(entry) for entry in os.scandir(path)])
                base = section(path, size, direct=0, **fields)
                decodes = not fields['cache_mb'] and not fields['disk_mb']
                row = {'kind': kind, 'size': size, 'fields': fields, 'bytes': round(float(length))}
                for name, numbers in (('threads', threads), ('processes', processes if decodes else [])):
                    usual = {'processes': 0} if name == 'threads' else {}
                    row[name] = {
                        n: best({**base, **usual, name: n}, arguments.seconds, arguments.turns) for n in numbers
                    }
                if 'draft' in fields:
                    row['difference'] = difference(base)
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
