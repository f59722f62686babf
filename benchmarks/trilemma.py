"""The generative learning trilemma, measured: quality, diversity and speed of every system on one data set.

    python benchmarks/trilemma.py --dataset=digits

Trains what is missing of `configs/*_<dataset>.py`, the classifier whose features are compared first, then evaluates
every run: its samples against the training split, the speed of sampling of all systems in turns in one
process at one batch size, parameters of what sampling needs, and the time that training took. Beside
them stand the held-out images, evaluated as if a model had made them: no model can be closer to the
data than they are. Prints the table, and writes benchmarks/results/trilemma_<dataset>.json
and the plot docs/images/trilemma_<dataset>.png (pip install -e '.[bench]').

    python benchmarks/trilemma.py --dataset=digits --only=gan_digits,dcgan_digits,vae_digits --name=gans

takes the runs named alone, and writes gans_digits.json and gans_digits.png.

The trilemma: Xiao et al. 2022, Tackling the Generative Learning Trilemma with Denoising Diffusion GANs.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import tables

import jaxgen
from jaxgen import assembly, conditions, data, describe, directory, files, run, sample
from jaxgen import config as configs
from jaxgen.evaluation import cache, samples

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def trained(workdir: str, config) -> bool:
    """Whether the run in `workdir` has a checkpoint of its config's last step."""
    folder = os.path.join(workdir, 'checkpoints', str(config.train.steps))
    return os.path.isdir(folder)


def train(path: str, workdir: str) -> None:
    subprocess.run([sys.executable, '-m', 'jaxgen.main', f'--config={path}', f'--workdir={workdir}'], check=True)


def training_seconds(workdir: str) -> float:
    """What the log says: the clock of every stretch between two starts, added up. Compiling counts."""
    total = last = 0.0
    with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as file:
        for line in file:
            seconds = json.loads(line).get('seconds', last)
            total += last if seconds < last else 0.0
            last = seconds
    return total + last


def images_per_second(runs: dict[str, run.Run], batch: int, turns: int) -> dict[str, float]:
    """Median over turns; in every turn each run draws one batch, so that a busy machine is busy for all."""
    given = {name: conditions.first(r.assembled, r.config, batch, {}) for name, r in runs.items()}

    def draw(name: str, seed: int) -> float:
        r = runs[name]
        began = time.perf_counter()
        sample.draw_batch(r.model, given[name], batch, seed)
        return time.perf_counter() - began

    for name in runs:
        draw(name, 0)  # compiles
    seconds = {name: [] for name in runs}
    for turn in range(turns):
        for name in runs:
            seconds[name].append(draw(name, turn + 1))
    return {name: batch / statistics.median(times) for name, times in seconds.items()}


def find_runs(folder: str, like, only: Sequence[str] = ()) -> dict[str, run.Run]:
    """Finished runs in `folder`, all or those named, that draw images of the data set of the config `like`."""
    runs = {}
    for path in sorted(glob.glob(os.path.join(folder, '*', 'config.json'))):
        workdir = os.path.dirname(path)
        if only and os.path.basename(workdir) not in only:
            continue
        config = directory.saved_config(workdir)
        same = all(config.data[key] == like.data[key] for key in ('source', 'size', 'channels', 'box', 'keep_classes'))
        if same and trained(workdir, config) and assembly.assemble(config).family.sample is not None:
            runs[os.path.basename(workdir)] = run.load(workdir, all_weights=True)
    return runs


def held_out(evaluator: samples.Evaluator, section: dict) -> dict:
    """Metrics of the test split's images, as if a model had made them."""
    source = data.dataset({**section, 'features': ('image',)}, 'test')
    images = source.take(np.arange(len(source)))['image']
    return evaluator.compare_images(images, 'held-out images')


def row(run_name: str, metrics: dict, network: str, more: dict | None = None) -> dict:
    named = {name: f'{name}/{network}' for name, *_ in tables.COLUMNS}
    chosen = {name: metrics[key] for name, key in named.items() if key in metrics}
    return {'name': run_name, 'metrics': chosen, **(more or {})}


def draw(rows: list[dict], network: str, title: str, path: str) -> None:
    """Speed to the right, quality upwards, diversity as the size of the dot."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout='constrained')
    real = next(r for r in rows if 'images_per_second' not in r)
    models = sorted((r for r in rows if r is not real), key=lambda r: r['images_per_second'])
    colours = plt.get_cmap('tab20').colors
    for i, r in enumerate(models):
        x, y = r['images_per_second'], r['metrics']['frechet']['value']
        recall, colour = r['metrics']['recall']['value'], colours[i % len(colours)]
        axes.scatter(x, y, s=20 + 400 * recall, color=colour, alpha=0.6, linewidths=0)
        # The name stands beside the plot: systems of one kind lie too near each other.
        axes.scatter([], [], s=40, color=colour, alpha=0.6, linewidths=0, label=f'{r["name"]}, recall {recall:.2f}')
    figure.legend(loc='outside right upper', fontsize=7, title='slow to fast', title_fontsize=7)
    floor = real['metrics']['frechet']['value']
    axes.axhline(floor, color='0.5', linestyle='--', linewidth=1)
    axes.text(0.01, floor, 'held-out images', transform=axes.get_yaxis_transform(), va='bottom', fontsize=8)
    axes.set(xscale='log', yscale='log', xlabel='samples per second (faster is right)')
    axes.set(ylabel=f'Fréchet distance, {network} (better is up)', title=title)
    speeds = [r['images_per_second'] for r in models]
    values = [floor, *(r['metrics']['frechet']['value'] for r in models)]
    axes.set_xlim(min(speeds) / 4, max(speeds) * 4)
    axes.set_ylim(max(values) * 2, min(values) / 2)  # upside down
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', default='digits', help="the last part of the configs' names")
    parser.add_argument('--runs', default='runs', help='where the runs lie, and where missing ones are trained')
    parser.add_argument('--n', type=int, default=2000, help='samples of every run')
    parser.add_argument('--batch', type=int, default=256, help='samples drawn at once when speed is measured')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--only', default='', help='names of runs, separated by commas')
    parser.add_argument('--name', default='trilemma', help='of the files that are written')
    arguments = parser.parse_args()
    paths = sorted(glob.glob(os.path.join(ROOT, 'configs', f'*_{arguments.dataset}.py')))
    if not paths:
        parser.error(f'no config is named *_{arguments.dataset}.py')
    paths.sort(key=lambda path: configs.load(path).family != 'classifier')  # the others are evaluated with it
    only = [name for name in arguments.only.split(',') if name]
    if only:
        paths[1:] = [path for path in paths[1:] if configs.name(path) in only]
    for path in paths:
        workdir = os.path.join(arguments.runs, configs.name(path))
        if not trained(workdir, configs.load(path)):
            train(path, workdir)

    like = configs.load(paths[0])
    network = configs.name(paths[0])
    if like.family != 'classifier':
        parser.error(f'no config of a classifier is named *_{arguments.dataset}.py: the runs are evaluated with it')
    runs = find_runs(arguments.runs, like, only)
    if absent := sorted({*only} - {*runs}):
        parser.error(f'no finished run that draws {arguments.dataset} is named {", ".join(absent)}')
    like.evaluate.features = f'run:{os.path.join(arguments.runs, network)}'
    evaluator = run.make_evaluator(like, next(iter(runs.values())).assembled.mesh)
    evaluator.check(arguments.n)
    speeds = images_per_second(runs, arguments.batch, arguments.turns)
    rows = [row(f'(held-out {arguments.dataset})', held_out(evaluator, like.data.to_dict()), network)]
    for name, r in runs.items():
        more = {
            'images_per_second': speeds[name],
            'parameters': describe.count(r.assembled.abstract.params),
            'training_seconds': training_seconds(r.workdir),
            'step': r.step,
        }
        rows.append(row(name, r.compare(evaluator, arguments.n), network, more))
        cache.clear(r.workdir)
    text = tables.trilemma(rows)
    print(text)
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'rows': rows,
        'samples': arguments.n,
        'batch': arguments.batch,
        **evaluator.about(),
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'cores': len(os.sched_getaffinity(0)),
        'versions': {'jax': jax.__version__, 'jaxgen': jaxgen.__version__},
    }
    here = os.path.join(ROOT, 'benchmarks')
    files.save_json(os.path.join(here, 'results', f'{arguments.name}_{arguments.dataset}.json'), record)
    title = f'Quality, diversity, speed: {arguments.dataset}'
    draw(rows, network, title, os.path.join(ROOT, 'docs', 'images', f'{arguments.name}_{arguments.dataset}.png'))


if __name__ == '__main__':
    main()
