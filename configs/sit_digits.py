"""SiT on scikit-learn's 8x8 digits: DiT's network, a straight line from noise to image, sampled as an SDE.

    python -m jaxgen.main --config=configs/sit_digits.py

Time: 14.5 minutes on 2 CPU cores with other work on them
Paper: none
Ours: Fréchet distance 0.38 (classifier_digits, 500 samples; held-out digits have 0.19)
4.54 bits/dim of 256 levels (by the ODE (64 digits))
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='digits', size=8, channels=1, batch=128, features=('image', 'label')),
        model=dict(
            process='flow',
            network=dict(name='dit', channels=128, blocks=6, heads=4, patch=2),
            training=dict(prediction='flow'),
            conditioning=dict(label=dict(dropout=0.1)),
            sampler=dict(name='euler_maruyama', steps=100, clip=False),
            guidance=dict(scale=1.5),
        ),
        optim=dict(lr=1e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1000, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=500, examples=64),
        variants={
            'tiny': dict(
                model=dict(
                    network=dict(channels=16, blocks=2, heads=2), sampler=dict(steps=4), likelihood=dict(steps=3)
                ),
                optim=dict(warmup=2),
            ),
        },
    )
