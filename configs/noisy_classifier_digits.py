"""A classifier of noisy 8x8 digits: its gradient guides diffusion models to a class.

    python -m jaxgen.main --config=configs/noisy_classifier_digits.py

Time: 4.6 minutes on 2 CPU cores with other work on them
Paper: none
Ours: of 359 held-out digits, clean and 25, 50 and 75% of the way to noise, 99.4%, 98.1%, 79.7%, 40.7% right
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='noisy_classifier',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label'), batch=128),
        model=dict(
            process='cosine',
            network=dict(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16, dropout=0.1),
        ),
        optim=dict(name='adamw', lr=1e-3, schedule='cosine', warmup=50, weight_decay=0.05, ema=0.99, ema_warmup=True),
        train=dict(steps=800, log_every=50, save_every=400, sample_every=0),
        variants={
            'tiny': dict(
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(channels=8, multipliers=(1,), attention=(), head_channels=4),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
