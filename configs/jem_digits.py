"""JEM on scikit-learn's 8x8 digits: one network that is a classifier and an energy of images.

    python -m jaxgen.main --config=configs/jem_digits.py

Time: 19 minutes on 2 CPU cores with much other work on them, 4.1 minutes of CPU time
Paper: none
Ours: 93.0% of 359 held-out digits right; Fréchet distance 1.43 (classifier_digits, 500 samples from noise; held-out
digits have 0.19); the energy of every held-out digit is below that of its own pixels shuffled
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='ebm',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label'), batch=64),
        model=dict(
            network='wide_resnet',
            width=16,
            multipliers=(1, 4),
            blocks=1,
            joint=True,
            buffer=2000,
            steps=15,
            step=1.0,
            noise=0.01,
            clamp=0.0,
            bounded=False,
            data_noise=0.03,
            regulariser=0.0,
            sample_steps=200,
        ),
        optim=dict(lr=1e-3, schedule='linear', warmup=100, ema=0.99, ema_warmup=True),
        train=dict(steps=1500, updates_per_call=10, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(width=8, multipliers=(1,), buffer=24, steps=3, sample_steps=4), optim=dict(warmup=2)
            ),
        },
    )
