"""An autoencoder of scikit-learn's 8x8 handwritten digits: 16 latent numbers an image.

    python -m jaxgen.main --config=configs/autoencoder_digits.py

Time: 6.4 minutes on 2 CPU cores with other work on them
Paper: none
Ours: squared error 0.031 of a held-out digit (pixels in [-1, 1]); it is no generative model: images of latents from
N(0, I) have Fréchet distance 10.3 (classifier_digits, 500 samples; held-out digits have 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='autoencoder',
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(width=32, hidden=16, latent=4),
        optim=dict(lr=2e-3, schedule='cosine', ema=0.99, ema_warmup=True),
        train=dict(steps=2000, updates_per_call=20, log_every=100, save_every=1000, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(width=8, blocks=1, hidden=4)),
        },
    )
