"""Denoising diffusion GAN on CIFAR-10 as in the paper: 48.4 and 12.7 million weights, 32x32, four steps.

    python -m jaxgen.main --config=configs/ddgan_cifar10.py

Differs: learning rates fall by update, there by epoch.

Time: not measured
Paper: FID 3.75, Inception Score 9.63 (Xiao et al. 2021, table 1)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='ddgan',
        data=dict(source='cifar10', size=32, channels=3, batch=256, flip=True),
        # The published code takes the penalty every 15 updates, and does not count it 15 times.
        model=dict(r1=0.02 / 15, r1_every=15),
        optim=dict(
            lr=1.25e-4,
            schedule='cosine',
            floor=1e-5 / 1.25e-4,
            b1=0.5,
            b2=0.9,
            ema=0.9999,
            networks=dict(generator=dict(lr=1.6e-4, floor=1e-5 / 1.6e-4)),
        ),
        train=dict(steps=351_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=2),
                    generator=dict(
                        latent=3, style=4, mapping_layers=1, channels=4, multipliers=(1, 1), blocks=1, attention=()
                    ),
                    discriminator=dict(channels=4, multipliers=(1, 1), embedding=4),
                    r1_every=1,
                ),
                optim=dict(lr=1e-3, ema=0.9, schedule='cosine'),
            ),
        },
    )
