"""CLIP on drawn scenes and their captions (jaxgen/data/shapes.py), 32x32: the text encoder of text-to-image models
here.

    python -m jaxgen.main --config=configs/clip_shapes.py

Captions are few: two scenes in a batch often have the same, which is not held against them (`duplicates`).

Time: not measured
Paper: none of this size
Ours: 645,985 parameters; not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='clip',
        data=dict(source='shapes', size=32, channels=3, features=('image', 'caption'), batch=128),
        model=dict(
            text=dict(vocabulary=640, length=16, channels=96, blocks=2, heads=4),
            vision=dict(patch=4, channels=96, blocks=3, heads=4),
            features=64,
            activation='gelu',
            duplicates='ignore',
        ),
        optim=dict(name='adamw', lr=2e-3, schedule='cosine', warmup=100, weight_decay=0.1, ema=0.99, ema_warmup=True),
        evaluate=dict(templates=('a {size} {colour} {shape} on a {background} background',), ensemble='probabilities'),
        train=dict(steps=1500, updates_per_call=10, log_every=100, save_every=500, sample_every=0),
        variants={
            'tiny': dict(
                model=dict(
                    text=dict(vocabulary=520, length=8, channels=8, blocks=2, heads=2),
                    vision=dict(patch=4, channels=8, blocks=2, heads=2),
                    features=4,
                ),
                optim=dict(warmup=2),
            ),
        },
    )
