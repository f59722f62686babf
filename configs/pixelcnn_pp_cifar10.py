"""PixelCNN++ on CIFAR-10 as in the paper: 53.7 million weights, 32x32.

    python -m jaxgen.main --config=configs/pixelcnn_pp_cifar10.py

Differs: Adam's eps stands beside the root, there within it; the release trains up to 5,000 epochs, 1,950,000 updates.

Time: not measured
Paper: 2.92 bits/dim (Salimans et al. 2017, table 1)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pixelcnn_pp',
        data=dict(source='cifar10', size=32, channels=3, batch=128),
        model=dict(filters=160, blocks=5, scales=3, mixtures=10, dropout=0.5),
        optim=dict(lr=1e-3, schedule='exponential', decay_rate=0.999995, b1=0.95, b2=0.9995, ema=0.9995),
        train=dict(steps=1_000_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(filters=4, blocks=1, scales=2, mixtures=2, dropout=0.1),
                optim=dict(lr=1e-2, schedule='exponential'),
            ),
        },
    )
