"""Real NVP on CIFAR-10 as in the paper: 19.6 million weights, 32x32.

    python -m jaxgen.main --config=configs/real_nvp_cifar10.py

Differs: sizes and settings are those of a public port, chrischute/real-nvp, which clips the gradient of its loss, in
nats, at a norm of 100, trains 100 epochs, 78,200 updates, and averages no weights.

Time: not measured
Paper: 3.49 bits/dim (Dinh et al. 2016, table 1)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='real_nvp',
        data=dict(source='cifar10', size=32, channels=3, batch=64, flip=True),
        model=dict(width=64, blocks=8, scales=2, norm=True, constraint=0.9, scale_penalty=5e-5),
        optim=dict(lr=1e-3, ema=0.999),
        train=dict(steps=200_000, log_every=100, save_every=5000, sample_every=20_000, remat=True),
        variants={
            'tiny': dict(data=dict(source='shapes'), model=dict(width=4, blocks=2), train=dict(remat=True)),
        },
    )
