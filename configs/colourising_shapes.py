"""A colourising autoencoder of grey scenes (jaxgen/data/shapes.py) of 32x32 pixels.

    python -m jaxgen.main --config=configs/colourising_shapes.py

Time: 3.5 minutes on 2 CPU cores with other work on them
Paper: none
Ours: squared error 0.010 of a colourised held-out scene (pixels in [-1, 1]), 0.067 of the grey one (500 scenes)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='autoencoder',
        data=dict(source='shapes', size=32, channels=3, batch=32),
        model=dict(corruption='grey', width=32, hidden=16, latent=16),
        optim=dict(lr=2e-3, schedule='cosine', ema=0.99, ema_warmup=True),
        train=dict(steps=3000, updates_per_call=20, log_every=100, save_every=1000, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(model=dict(width=8, blocks=1, hidden=4)),
        },
    )
