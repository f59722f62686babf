"""PixelCNN on scikit-learn's 8x8 digits, whose residual blocks have masked convolutions.

    python -m jaxgen.main --config=configs/pixelcnn_digits.py

Time: 58 seconds on one CPU core
Paper: none
Ours: 1.86 bits/dim on held-out digits; Fréchet distance 3.37 (500 samples; held-out digits: 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pixelcnn',
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(network=dict(name='pixelcnn', channels=32, blocks=4, kernel=5, head=64, dropout=0.3)),
        optim=dict(lr=3e-3, schedule='cosine', warmup=50, clip=1.0, ema=0.99, ema_warmup=True),
        train=dict(steps=700, updates_per_call=10, log_every=50, save_every=350, sample_every=350),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(network=dict(channels=8, blocks=1, kernel=3, head=12)), optim=dict(lr=1e-2, warmup=2)
            ),
        },
    )
