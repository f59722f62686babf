"""Start, memory and throughput of the loader on a folder of many files, as JSON on stdout.

    python benchmarks/folder.py --files=1000000 --out=benchmarks/results/folder_million.json

The folder has 1,000 classes of as many small PNG and JPEG files, 32 x 32 pixels. It is written once, which takes some
minutes and 4 GB of a disk with blocks of 4 kB, and removed at the end unless --folder names it. The start is the time
from the call to the first batch: listing, classes, splits, order. It is measured twice, each in a new process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from jaxgen.files import save_json

DIFFERENT = 200  # images; the files are as many as there are, each with a number behind its image


def write(folder: str, files: int) -> None:
    """A folder of this many images in 1,000 sub-folders; what is there already is left as it is."""
    rng, contents = np.random.default_rng(0), []
    for i in range(DIFFERENT):
        form = ('PNG', 'JPEG')[i % 2]
        file = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(file, form)
        contents.append((file.getvalue(), ('png', 'jpg')[i % 2]))
    for c in range(1000):
        directory = os.path.join(folder, f'class{c:04d}')
        os.makedirs(directory, exist_ok=True)
        for i in range(c * files // 1000, (c + 1) * files // 1000):
            content, ending = contents[i % DIFFERENT]
            with (
                contextlib.suppress(FileExistsError),
                open(os.path.join(directory, f'image_{i:07d}.{ending}'), 'xb') as out,
            ):
                out.write(content + i.to_bytes(4, 'big'))


def resident() -> dict[str, float]:
    """Megabytes of this process: those in memory now, and the most that there were."""
    with open('/proc/self/status', encoding='ascii') as file:
        fields = dict(line.split(':', 1) for line in file)
    return {name: int(fields[key].split()[0]) / 1024 for name, key in (('now', 'VmRSS'), ('most', 'VmHWM'))}


def measure(folder: str, batches: int, batch: int, fields: dict) -> dict:
    """What a loader of the folder takes, in this process."""
    from jaxgen import data
    from jaxgen.config import DEFAULTS

    chosen = {'source': f'folder:{folder}', 'size': 32, 'channels': 3, 'features': ('image', 'label'), 'batch': batch}
    chosen |= {'processes': 0, 'disk_mb': 0}  # what one process takes
    section = {**DEFAULTS['data'], **chosen, 'dir': f'{folder}_sets', 'flip': True, **fields}
    imported, began, busy = resident(), time.perf_counter(), time.process_time()
    stream = data.batches(section, seed=0)
    next(stream)
    started, own, at_start = time.perf_counter() - began, time.process_time() - busy, resident()
    began, busy = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(stream)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    at_end = resident()
    stream.close()
    return {
        'seconds_to_first_batch': started,
        'of_a_core': own,
        'megabytes': {'imported': imported['now'], 'started': at_start['now'], 'most_in_start': at_start['most'],
                      'after_batches': at_end['now'], 'most': at_end['most']},
        'images_per_second': batches * batch / seconds,
        'images_per_second_of_a_core': batches * batch / busy,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--files', type=int, default=1_000_000)
    parser.add_argument('--batches', type=int, default=5000)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--folder', default='', help='where the files are, or are written to, and stay')
    parser.add_argument('--out', default='', help='write the JSON here too')
    parser.add_argument('--once', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(measure(arguments.folder, arguments.batches, arguments.batch, {})))
        return
    folder = arguments.folder or os.path.join(tempfile.mkdtemp(), 'in')
    try:
        write(folder, arguments.files)
        command = [
            sys.executable,
            os.path.abspath(__file__),
            '--once',
            f'--folder={folder}',
            f'--batch={arguments.batch}',
        ]
        starts = []
        for batches in (0, arguments.batches):
            out = subprocess.run([*command, f'--batches={batches}'], check=True, stdout=subprocess.PIPE).stdout
            starts.append(json.loads(out))
    finally:
        if not arguments.folder:
            shutil.rmtree(os.path.dirname(folder))
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'files': arguments.files,
        'batch': arguments.batch,
        'batches': arguments.batches,
        'seconds_to_first_batch': [one.pop('seconds_to_first_batch') for one in starts],
        'seconds_of_a_core_to_first_batch': [one.pop('of_a_core') for one in starts],
        **starts[-1],
        'cores': len(os.sched_getaffinity(0)),
        'machine': platform.machine(),
        'python': platform.python_version(),
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        save_json(arguments.out, record)


if __name__ == '__main__':
    main()
