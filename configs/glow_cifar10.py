"""Glow on CIFAR-10 as in the paper: 44.6 million weights, 32x32.

    python -m jaxgen.main --config=configs/glow_cifar10.py

Differs: the release's Adamax multiplies its first steps by (1 - b2^n)^1/2, and its moving average is corrected for its
start; after 500 updates neither is 1 % any more. It goes on until it is stopped.

Time: not measured
Paper: 3.35 bits/dim (Kingma & Dhariwal 2018, table 2)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='glow',
        data=dict(source='cifar10', size=32, channels=3, batch=512, shift=0.1, fill='edge'),
        model=dict(width=512, depth=32, levels=3, coupling='affine', mixing='matrix', edge=True, learn_top=True),
        # 64 images on each of 8 processes; ten epochs of warm-up; both averages are over one epoch of 98 updates.
        optim=dict(name='adamax', lr=1e-3, warmup=977, b2=1 - 1 / 98, ema=1 - 1 / 98),
        train=dict(steps=200_000, log_every=100, save_every=5000, sample_every=20_000, remat=True),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(width=8, depth=2, levels=2, mixing='lu'),
                optim=dict(warmup=2),
                train=dict(remat=True),
            ),
        },
    )
