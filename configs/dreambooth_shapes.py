"""DreamBooth on five scenes of a new shape, 32x32 (jaxgen/data/shapes.py): all weights of the text-to-image model
`ldm_text_shapes` learn what a 'zig' is, beside scenes with the captions that it knows, so that the other shapes stay as
they are (prior preservation; Ruiz et al. 2022).

    python -m jaxgen.main --config=configs/ldm_text_shapes.py           # after its own stages
    python -m jaxgen.main --config=configs/dreambooth_shapes.py
    python -m jaxgen.main --mode=evaluate --workdir=runs/dreambooth_shapes --n=500
    python -m jaxgen.main --mode=evaluate --workdir=runs/dreambooth_shapes --n=2000 --config.data.test_source=shapes

The last two commands measure as those of `lora_shapes`. Variant `alone` is without the other scenes.

Time: 8 minutes on two CPU cores with much other work on them
Paper: none
Ours: 52.1% of 96 samples show the new shape, and of 96 of known captions 83.3% the right one (88.5% before), see
docs/models/fine_tuning.md
"""

from jaxgen.config import make
from jaxgen.configs import ldm_text_shapes


def get_config(variant: str = ''):
    base = ldm_text_shapes.get_config('tiny' if 'tiny' in variant.split(',') else '').to_dict()
    return make(
        variant,
        family='diffusion',
        stages=base['stages'],
        data=dict(
            source='shapes:hourglass',
            size=32,
            channels=3,
            features=('image', 'caption', 'other', 'other_caption'),
            other='shapes',
            batch=16,
        ),
        model=base['model'] | dict(prior_weight=1.0),
        optim=dict(name='adamw', lr=8e-4, schedule='cosine', weight_decay=1e-2, clip=1.0, ema=0.0),
        train=dict(
            initial='runs/ldm_text_shapes', steps=1000, updates_per_call=5, log_every=50, save_every=100, sample_every=0
        ),
        evaluate=dict(features='run:runs/classifier_shapes', samples=500, split='test'),
        variants={
            'alone': dict(data=dict(features=('image', 'caption'), other='')),
            'tiny': dict(train=dict(initial='')),
        },
    )
