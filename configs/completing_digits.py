"""An autoencoder that completes 8x8 digits under a mask of 4x4 pixels.

    python -m jaxgen.main --config=configs/completing_digits.py

Time: 1.1 minutes on 2 CPU cores with other work on them
Paper: none
Ours: squared error 0.042 of a completed held-out digit (pixels in [-1, 1]), 0.159 of the masked one
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='autoencoder',
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(corruption='mask', hole=4, width=32, hidden=16, latent=16),
        optim=dict(lr=2e-3, schedule='cosine', ema=0.99, ema_warmup=True),
        train=dict(steps=2000, updates_per_call=20, log_every=100, save_every=1000, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(width=8, blocks=1, hidden=4)),
        },
    )
