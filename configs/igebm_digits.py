"""IGEBM, an energy-based model, on scikit-learn's 8x8 digits.

    python -m jaxgen.main --config=configs/igebm_digits.py

Time: 13 minutes on 2 CPU cores with much other work on them, 3.6 minutes of CPU time
Paper: none
Ours: Fréchet distance 2.62 (classifier_digits, 500 samples from noise; held-out digits have 0.19); the energy of every
one of 359 held-out digits is below that of its own pixels shuffled
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='ebm',
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(
            network='residual',
            width=16,
            multipliers=(1, 4),
            blocks=1,
            buffer=2000,
            steps=15,
            step=40.0,
            noise=0.01,
            clamp=0.005,
            data_noise=0.03,
            regulariser=0.1,
            sample_steps=200,
        ),
        optim=dict(lr=1e-3, b1=0.0, schedule='linear', warmup=50, ema=0.99, ema_warmup=True),
        train=dict(steps=1500, updates_per_call=10, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(width=8, multipliers=(1,), buffer=24, steps=3, sample_steps=4), optim=dict(warmup=2)
            ),
        },
    )
