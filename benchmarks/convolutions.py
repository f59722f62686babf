"""Rates of 3x3 convolutions and of their gradients on one CPU core, in jaxgen and in torch, GFLOP/s.

    python benchmarks/convolutions.py --out=benchmarks/results/convolutions.json

The shapes are those of `ddpm_digits` at batch 128 and of `ddpm_cifar10` at batch 8; time is that of the processor, the
second least of five.
"""

from __future__ import annotations

import argparse
import json
import os
import time

SHAPES = (  # images, side, channels in, channels out
    *((128, 8, 32, 32), (128, 8, 96, 32), (128, 4, 64, 64), (128, 4, 128, 64)),
    *((8, 32, 128, 128), (8, 32, 256, 128), (8, 16, 256, 256), (8, 16, 512, 256), (8, 8, 256, 256), (8, 4, 512, 256)),
)


def rate(action, flops: int) -> float:
    action()
    times = []
    for _ in range(5):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return flops / sorted(times)[1] / 1e9


def of_jaxgen(n: int, side: int, channels: int, features: int, flops: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from jaxgen.networks.convolution import convolve

    x, w = jnp.ones((n, side, side, channels)), jnp.ones((3, 3, channels, features))
    dy = jnp.ones((n, side, side, features))

    def forward(x, w):
        return convolve(x, w, (1, 1), 'SAME')

    functions = {
        'forward': lambda x, w, dy: forward(x, w),
        'input': lambda x, w, dy: jax.vjp(lambda x: forward(x, w), x)[1](dy),
        'kernel': lambda x, w, dy: jax.vjp(lambda w: forward(x, w), w)[1](dy),
    }
    jitted = {name: jax.jit(f) for name, f in functions.items()}
    return {name: rate(lambda f=f: jax.block_until_ready(f(x, w, dy)), flops) for name, f in jitted.items()}


def of_torch(n: int, side: int, channels: int, features: int, flops: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    x, w, dy = (
        torch.ones(shape)
        for shape in ((n, channels, side, side), (features, channels, 3, 3), (n, features, side, side))
    )

    def gradient(*wanted: bool):
        fixed = [features], [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(dy, x, w, *fixed, list(wanted))

    functions = {
        'forward': lambda: torch.nn.functional.conv2d(x, w, padding=1),
        'input': lambda: gradient(True, False, False),
        'kernel': lambda: gradient(False, True, False),
    }
    with torch.no_grad():
        return {name: rate(f, flops) for name, f in functions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='', help='write the JSON here too')
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before the threads of either framework are
    from jaxgen import files

    rows = []
    for n, side, channels, features in SHAPES:
        size = n, side, channels, features
        flops = 2 * n * side * side * 9 * channels * features
        rows.append({'shape': size, 'jaxgen': of_jaxgen(*size, flops), 'torch': of_torch(*size, flops)})
    record = {'command': 'python benchmarks/convolutions.py --out=benchmarks/results/convolutions.json', 'rates': rows}
    print(json.dumps(record))
    if arguments.out:
        files.save_json(arguments.out, record)


if __name__ == '__main__':
    main()
