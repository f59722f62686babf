"""Improved DDPM on CIFAR-10 (Nichol & Dhariwal 2021), learned variance, 4000 steps.

    python -m jaxgen.main --config=configs/iddpm_cifar10.py
    python -m jaxgen.main --config=configs/iddpm_cifar10.py:imagenet64
    python -m jaxgen.main --config=configs/iddpm_cifar10.py:imagenet64,conditional

The last two are the published models of ImageNet 64x64.

Time: not measured
Paper: FID 3.19, 3.17 bits/dim (hybrid loss, cosine schedule); `:imagenet64` 19.2, 3.57; class-conditional, FID 2.92
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='cifar10', size=32, channels=3, batch=128),
        model=dict(
            process=dict(name='cosine', timesteps=4000, rescale_timesteps=True),
            network=dict(
                name='adm',
                channels=128,
                group_size=0,
                multipliers=(1, 2, 2, 2),
                blocks=3,
                attention=(16, 8),
                heads=4,
                head_channels=0,
                resample_in_blocks=False,
                dropout=0.3,
            ),
            training=dict(variance=dict(name='learned', bound_weight=0.001)),
        ),
        optim=dict(lr=1e-4, ema=0.9999),
        train=dict(steps=500_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'imagenet64': dict(
                data=dict(source='imagenet2012', size=64),
                model=dict(network=dict(multipliers=(1, 2, 3, 4), dropout=0.0)),
                train=dict(steps=1_500_000),
            ),
            'conditional': dict(
                data=dict(batch=2048, features=('image', 'label')),
                # --rescale_timesteps False; --rescale_learned_sigmas False: one term of T, 1 / 4000 of the bound.
                model=dict(
                    process=dict(rescale_timesteps=False),
                    network=dict(channels=192),
                    training=dict(variance=dict(name='learned', bound_weight=1 / 4000)),
                    conditioning=dict(label=dict()),
                ),
                optim=dict(lr=3e-4),
                train=dict(steps=250_000),
            ),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(channels=8, group_size=2, multipliers=(1,), blocks=1, attention=(), heads=2),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
