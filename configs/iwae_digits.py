"""Importance weighted autoencoder on scikit-learn's 8x8 digits, in bits that are drawn anew in each update.

    python -m jaxgen.main --config=configs/iwae_digits.py

Trained on the bound of k = 50 importance samples; the variants `k5` and `k1` have 5 and 1, the latter the ELBO.

Time: 3.2 minutes on 2 CPU cores with much other work on them; `k5` 1.5, `k1` 2.6
Paper: none
Ours: 22.44 nats, bound of 5,000 importance samples (359 held-out digits, in fixed bits); `k5` 22.70, `k1` 22.91
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vae',
        data=dict(source='digits', size=8, channels=1, batch=20, binarise='dynamic'),
        model=dict(
            network='mlp',
            hidden=(200, 200),
            activation='tanh',
            latent=50,
            likelihood='bernoulli',
            encoder_range='unit',
            samples=50,
            iwae_samples=5000,
        ),
        optim=dict(lr=1e-3, b1=0.99, eps=1e-4, schedule='cosine', ema=0.999, ema_warmup=True),
        train=dict(steps=10_000, updates_per_call=50, log_every=500, save_every=5000, sample_every=5000),
        variants={
            'k1': dict(model=dict(samples=1)),
            'k5': dict(model=dict(samples=5)),
            'tiny': dict(model=dict(hidden=(16, 12), latent=4, samples=3, iwae_samples=3)),
        },
    )
