"""IGEBM on CIFAR-10, unconditional, with the large network of the published code.

    python -m jaxgen.main --config=configs/igebm_cifar10.py

Differs: see families/ebm.py; noise of data is normal, in the release uniform and as wide; the buffer has the paper's
10,000 chains, the release's has 50,000 and keeps them in 8 bits, with uniform noise when they go on. It trains until it
is stopped.

Time: not measured
Paper: FID 40.58, Inception score 6.02 (Du & Mordatch 2019, table 1, unconditional, single model)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='ebm',
        data=dict(source='cifar10', size=32, channels=3, batch=128),
        model=dict(
            network='residual',
            width=128,
            multipliers=(1, 2, 4),
            blocks=3,
            buffer=10_000,
            fresh=0.05,
            steps=60,
            # The code's images are in [0, 1], with step 10, noise 0.005 and gradients cut off at 0.01: here x is
            # twice as large, and the gradient half.
            step=40.0,
            noise=0.01,
            clamp=0.005,
            data_noise=0.0023,  # as wide as the code's uniform noise, half a grey level to either side
            regulariser=1.0,
            start='buffer',
        ),
        optim=dict(lr=3e-4, b1=0.0, ema=0.0),
        train=dict(steps=120_000, log_every=100, save_every=1000, sample_every=5000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(width=8, multipliers=(1, 2), blocks=1, buffer=24, steps=3, sample_steps=4),
                optim=dict(warmup=2),
            ),
        },
    )
