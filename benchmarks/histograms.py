"""A plot of a generator of one number: histograms of the data and of its samples, one above the other.

    python benchmarks/histograms.py --run=runs/js_generator_gaussians

Writes docs/images/<run>.png, and prints the Jensen-Shannon divergence of the two histograms, in nats, beside
that of the test split and as many training examples (pip install -e '.[bench]').
"""

from __future__ import annotations

import argparse
import os

import numpy as np

import jaxgen
from jaxgen import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CELLS = 64  # of the 256 grey levels


def histogram(levels: np.ndarray) -> np.ndarray:
    """Relative frequencies [CELLS] of grey levels."""
    return np.histogram(levels, CELLS, (0, 256))[0] / levels.size


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two histograms, in nats."""
    m = (p + q) / 2
    return sum(np.sum(a[a > 0] * np.log(a[a > 0] / m[a > 0])) for a in (p, q)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', required=True, help='run directory')
    options = parser.parse_args()

    run = jaxgen.load(options.run)
    test = data.dataset(run.config.data, 'test')
    training = data.dataset(run.config.data, 'train')
    n = len(test)
    histograms = {
        'data': histogram(test.take(np.arange(n))['image']),
        'samples': histogram(run.sample(n=n)),
        'training': histogram(training.take(np.arange(n))['image']),
    }
    for name in ('samples', 'training'):
        value = divergence(histograms['data'], histograms[name])
        print(f'Jensen-Shannon divergence of {n} {name} from the test split: {value:.4f}')

    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    centres = (np.arange(CELLS) + 0.5) * 2 / CELLS - 1
    figure, rows = plt.subplots(2, 1, sharex=True, sharey=True, figsize=(4.1, 4.1))
    for row, name, colour in zip(rows, ('data', 'samples'), ('0.35', 'tab:blue'), strict=True):
        row.bar(centres, histograms[name], 2 / CELLS, color=colour)
        row.set_ylabel(f'fraction of {name}')
    rows[1].set_xlabel('x')
    figure.tight_layout()
    name = os.path.basename(os.path.abspath(options.run))
    figure.savefig(os.path.join(ROOT, 'docs', 'images', f'{name}.png'), dpi=100)


if __name__ == '__main__':
    main()
