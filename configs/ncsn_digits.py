"""NCSN on scikit-learn's 8x8 digits: scores at seven noise levels, sampled by annealed Langevin dynamics.

    python -m jaxgen.main --config=configs/ncsn_digits.py

Time: 4.6 minutes on 2 CPU cores with other work on them
Paper: none
Ours: Fréchet distance 1.39 (classifier_digits, 500 samples; held-out digits have 0.19)
4.68 bits/dim of 256 levels (variational bound of a chain of 7 steps, 359 held-out digits)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='digits', size=8, channels=1, batch=128),
        model=dict(
            process=dict(name='geometric', timesteps=7, sigma_min=0.1, sigma_max=2.0),
            network=dict(name='refinenet', channels=16),
            training=dict(prediction='score'),
            sampler=dict(name='annealed_langevin', langevin_steps=30, langevin_size=0.002, clip=False),
            likelihood=dict(variance='fixed_small'),
        ),
        optim=dict(lr=3e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=800, log_every=50, save_every=200, sample_every=400),
        evaluate=dict(features='run:runs/classifier_digits', samples=500),
        variants={
            'tiny': dict(
                model=dict(
                    process=dict(timesteps=4), network=dict(channels=8, stages=2), sampler=dict(langevin_steps=2)
                ),
                optim=dict(warmup=2),
            ),
        },
    )
