"""Mode collapse, measured: samples of GANs beside the 25 Gaussians that they were trained on.

    python benchmarks/modes.py --runs=runs/gan_gaussians,runs/gan_gaussians_minimax

Prints a table of modes covered, the fraction of samples within three standard deviations of one, and the divergence of
their distribution over modes; writes docs/images/modes_gaussians.png (pip install -e '.[bench]').
"""

from __future__ import annotations

import argparse
import os

import numpy as np

import jaxgen
from jaxgen import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', required=True, help='run directories, with commas between')
    parser.add_argument('--n', type=int, default=2500, help='samples of each')
    options = parser.parse_args()

    runs = [jaxgen.load(folder) for folder in options.runs.split(',')]
    measure = data.sample_metrics(runs[0].config.data)
    test = data.dataset(runs[0].config.data, 'test')
    points = {'held-out data': test.take(np.arange(min(options.n, len(test))))['image']}
    points |= {os.path.basename(os.path.abspath(run.workdir)): run.sample(options.n) for run in runs}
    print('| points | modes covered, of 25 | fraction of good ones | KL of the modes, nats |\n|---|---|---|---|')
    for name, images in points.items():
        points[name] = images.reshape(len(images), -1)[:, :2] / 127.5 - 1
        good, covered, kl = (metric['value'] for metric in measure(images).values())
        print(f'| {name} | {covered} | {good:.3f} | {kl:.3f} |')

    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(points), figsize=(2.1 * len(points), 2.3), sharex=True, sharey=True)
    for axis, (name, xy) in zip(axes, points.items(), strict=True):
        axis.plot(*xy.T, ',', color='tab:blue' if axis is not axes[0] else '0.35')
        axis.set_title(name.removeprefix('gan_gaussians_'), fontsize=8)
        axis.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[], aspect='equal')
    figure.tight_layout()
    figure.savefig(os.path.join(ROOT, 'docs', 'images', 'modes_gaussians.png'), dpi=100)


if __name__ == '__main__':
    main()
