"""PixelCNN on CIFAR-10 at the size of the paper: 15 blocks, 5.3 million weights, 32x32.

    python -m jaxgen.main --config=configs/pixelcnn_cifar10.py

Masked weights are counted.

Differs: the paper gives RMSProp, a batch of 16 and that its learning rate was set by hand; the rest is ours, and so is
the averaging of weights.

Time: not measured
Paper: 3.14 bits/dim (van den Oord et al. 2016, table 4)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pixelcnn',
        data=dict(source='cifar10', size=32, channels=3, batch=16),
        model=dict(network=dict(name='pixelcnn', channels=128, blocks=15, kernel=7, hidden_kernel=3, head=1024)),
        optim=dict(name='rmsprop', lr=1e-4, b2=0.95, ema=0.9995),
        train=dict(steps=500_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(network=dict(channels=6, blocks=1, kernel=3, head=12)),
                optim=dict(lr=1e-2),
            ),
        },
    )
