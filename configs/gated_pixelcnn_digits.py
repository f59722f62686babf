"""Gated PixelCNN, class-conditional, on scikit-learn's 8x8 digits.

    python -m jaxgen.main --config=configs/gated_pixelcnn_digits.py

Time: 1.5 minutes on one CPU core
Paper: none
Ours: 1.80 bits/dim on held-out digits; Fréchet distance 2.44 (500 samples; held-out digits: 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pixelcnn',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label'), batch=64),
        model=dict(
            network=dict(name='gated', channels=32, blocks=4, kernel=3, hidden_kernel=3, head=64, dropout=0.3),
            conditional=True,
        ),
        optim=dict(lr=3e-3, schedule='cosine', warmup=50, clip=1.0, ema=0.99, ema_warmup=True),
        train=dict(steps=700, updates_per_call=10, log_every=50, save_every=350, sample_every=350),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(network=dict(channels=8, blocks=1, head=12)), optim=dict(lr=1e-2, warmup=2)),
        },
    )
