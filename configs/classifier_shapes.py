"""A classifier of all seven factors of the drawn scenes (jaxgen/data/shapes.py), 32x32.

    python -m jaxgen.main --config=configs/classifier_shapes.py

Its features compare samples with these scenes: with the shape as its only target, they might be blind to colour and
position.

A circle looks the same in every rotation, a square in every third of the 12: over all shapes no more than half of the
rotations can be right, and no more than 92.9% of all factors.

Time: 4.5 minutes on 2 CPU cores with other work on them
Paper: none
Ours: 91.1% of all factors right (2,000 held-out scenes): shape, size, x and y 99.8% or more, colour and
background 100%, rotation 37.9% (96% of hearts and crescents).
`:64`, scenes of 64x64: 91.7% of all, shape 100.0%, size 100.0%, colour 100.0%, background 100.0%, rotation 42.0%
"""

from jaxgen.config import make
from jaxgen.data.shapes import FACTORS


def get_config(variant: str = ''):
    return make(
        variant,
        family='classifier',
        data=dict(source='shapes', size=32, channels=3, features=('image', 'factors'), batch=64),
        model=dict(
            width=32,
            stride=2,
            features=128,
            dropout=0.1,
            target='factors',
            counts=tuple(FACTORS.values()),
        ),
        optim=dict(name='adamw', lr=4e-3, schedule='cosine', warmup=50, weight_decay=0.1, ema=0.99, ema_warmup=True),
        train=dict(steps=2400, updates_per_call=10, log_every=100, save_every=800, sample_every=0),
        variants={
            'tiny': dict(model=dict(width=8, stride=1, levels=1, features=8), optim=dict(warmup=2)),
            '64': dict(data=dict(size=64), model=dict(width=16, levels=3)),
        },
    )
