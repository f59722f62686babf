"""CLIP on drawn scenes and their captions (jaxgen/data/shapes.py), 32x32: the text encoder of text-to-image models
here.

    python -m jaxgen.main --config=configs/clip_shapes.py
    python -m jaxgen.main --mode=evaluate --workdir=runs/clip_shapes

Captions are few: two scenes in a batch often have the same, which is not held against them (`duplicates`). The second
command measures retrieval, and classification by prompts: the template makes all 1,536 captions, and an image's class
is that of the likeliest of them together.

Time: 65 minutes on 2 CPU cores with other work on them
Paper: none of this size
Ours: 645,985 parameters. Of 2,000 held-out scenes: recall@1 of captions 80.7%, of images 86.8%; recall@10 99.9% and
100%; R-precision 98.4%. By prompts 99.9% of colours, 100% of backgrounds, 92.0% of sizes and 73.8% of shapes are right
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
