"""Variational diffusion model on scikit-learn's 8x8 digits, the ends of its schedule learned.

    python -m jaxgen.main --config=configs/vdm_digits.py

Time: 11.0 minutes on 2 CPU cores with other work on them
Paper: none
Ours: Fréchet distance 3.25 (classifier_digits, 500 samples; held-out digits have 0.19)
2.07 bits/dim of 256 levels (variational bound, 359 held-out digits)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vdm',
        data=dict(source='digits', size=8, channels=1, batch=128),
        # The digits have 17 grey levels, 2 / 16 apart: of that period is the feature of 2^3.
        model=dict(
            network=dict(channels=32, blocks=4, fourier=(3, 6, 7), dropout=0.1),
            sampler=dict(steps=100),
            likelihood=dict(times=32),
        ),
        optim=dict(lr=2e-3, warmup=50, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=800, log_every=50, save_every=200, sample_every=400),
        evaluate=dict(features='run:runs/classifier_digits', samples=500),
        variants={
            'tiny': dict(
                model=dict(network=dict(channels=8, blocks=1), sampler=dict(steps=5), likelihood=dict(times=3)),
                optim=dict(warmup=2),
            ),
        },
    )
