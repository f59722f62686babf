"""VQ-VAE-2 of scikit-learn's 8x8 handwritten digits: 2x2 coarse codes and 4x4 fine ones, out of 64.

    python -m jaxgen.main --config=configs/vqvae2_digits.py

Time: 9.1 minutes on 2 CPU cores with other work on them
Paper: none
Ours: of a held-out digit 0.011 squared error (pixels in [-1, 1]), 5.8 bits per code; samples of independent
codes have Fréchet distance 5.12 (classifier_digits, 500 samples; held-out digits have 0.19): they need a prior
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqvae',
        data=dict(source='digits', size=8, channels=1, batch=128),
        model=dict(levels=2, width=64, hidden=32, halvings=1, vocabulary=64, latent=16, variance=0.56, restart=0.1),
        optim=dict(lr=2e-3, schedule='cosine', ema=0.99, ema_warmup=True),
        train=dict(steps=2000, updates_per_call=20, log_every=100, save_every=1000, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(width=8, blocks=1, hidden=4, vocabulary=8, latent=4)),
        },
    )
