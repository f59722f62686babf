"""The noisy classifier that guides ADM on ImageNet 64x64 (Dhariwal & Nichol 2021).

    python -m jaxgen.main --config=configs/noisy_classifier_imagenet64.py

Differs: the random crop is of the whole shorter side, the published one up to a fifth smaller.

Time: not measured
Paper: no figure of its own
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='noisy_classifier',
        data=dict(
            source='imagenet2012',
            size=64,
            channels=3,
            batch=256,
            flip=True,
            features=('image', 'label'),
            crop='random',
        ),
        model=dict(
            process='cosine',
            network=dict(
                channels=128, group_size=0, multipliers=(1, 2, 3, 4), blocks=4, attention=(32, 16, 8), head_channels=64
            ),
        ),
        optim=dict(name='adamw', lr=3e-4, schedule='linear', weight_decay=0.05, ema=0.0),
        train=dict(steps=300_000, log_every=100, save_every=5000, sample_every=0, dtype='bfloat16'),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(channels=8, group_size=2, multipliers=(1,), blocks=1, attention=(), head_channels=4),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
