"""Textual inversion on five scenes of a new shape, 32x32 (jaxgen/data/shapes.py): 'zig' is a new word for the
text-to-image model `ldm_text_shapes`, of which nothing else is learned (Gal et al. 2022).

    python -m jaxgen.main --config=configs/ldm_text_shapes.py           # after its own stages
    python -m jaxgen.main --config=configs/inversion_shapes.py
    python -m jaxgen.main --mode=sample --workdir=runs/inversion_shapes --n=16 \
        --condition=caption='a large red zig on a white background'
    python -m jaxgen.main --mode=evaluate --workdir=runs/inversion_shapes --n=500

The last command measures as that of `lora_shapes`. Without the new word every sample is the base's.

Time: 7 minutes on two CPU cores with much other work on them
Paper: none
Ours: 384 parameters; 16.7% of 96 samples show the new shape, and of 96 of known captions 88.5% the right one as before,
see docs/models/fine_tuning.md
"""

from jaxgen.config import make
from jaxgen.configs import ldm_text_shapes


def get_config(variant: str = ''):
    base = ldm_text_shapes.get_config('tiny' if 'tiny' in variant.split(',') else '').to_dict()
    return make(
        variant,
        family='diffusion',
        stages=dict(base='runs/ldm_text_shapes', **base['stages']),
        data=dict(source='shapes:hourglass', size=32, channels=3, features=('image', 'caption'), batch=16),
        model=base['model'] | dict(adapter=dict(name='inversion', word='zig', vectors=4, initial='star')),
        optim=dict(name='adamw', lr=5e-3, weight_decay=0.0, clip=1.0, ema=0.0),
        train=dict(steps=600, updates_per_call=5, log_every=50, save_every=100, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=500, split='test'),
        variants={'tiny': dict(data=dict(prompt='a zig'), model=dict(adapter=dict(vectors=2, initial='')))},
    )
