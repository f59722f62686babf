"""LoRA on five scenes of a new shape, 32x32 (jaxgen/data/shapes.py): the text-to-image model `ldm_text_shapes`, whose
weights stay as they are, learns what a 'zig' is (Hu et al. 2021). Beside them it is trained on scenes with the captions
that it knows, so that the other shapes stay as they are.

    python -m jaxgen.main --config=configs/ldm_text_shapes.py           # after its own stages
    python -m jaxgen.main --config=configs/lora_shapes.py
    python -m jaxgen.main --mode=evaluate --workdir=runs/lora_shapes --n=500
    python -m jaxgen.main --mode=evaluate --workdir=runs/lora_shapes --n=2000 --config.data.test_source=shapes

The second command draws samples of held-out captions with the new word: new_object is the fraction that show the new
shape, conditional_accuracy/1, 2 and 6 those with the right colour, size and background. The third draws samples of the
captions that the base was trained on: whether the other shapes are as before. Variant `alone` is without the other
scenes.

Time: 18 minutes on two CPU cores with much other work on them
Paper: none
Ours: 224,064 parameters; 52.1% of 96 samples show the new shape, and of 96 of known captions 86.5% the right one (88.5%
before); at `--config.model.adapters.own.scale=1.5` 89.1% and 70.3% of 64, see docs/models/fine_tuning.md
"""

from jaxgen.config import make
from jaxgen.configs import ldm_text_shapes


def get_config(variant: str = ''):
    base = ldm_text_shapes.get_config('tiny' if 'tiny' in variant.split(',') else '').to_dict()
    return make(
        variant,
        family='diffusion',
        stages=dict(base='runs/ldm_text_shapes', **base['stages']),
        data=dict(
            source='shapes:hourglass',
            size=32,
            channels=3,
            features=('image', 'caption', 'other', 'other_caption'),
            other='shapes',
            batch=16,
        ),
        model=base['model'] | dict(adapter=dict(name='lora', rank=8, layers=('*',))),
        optim=dict(name='adamw', lr=1e-3, weight_decay=1e-2, clip=1.0, ema=0.0),
        train=dict(steps=2400, updates_per_call=5, log_every=50, save_every=100, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=500, split='test'),
        variants={
            'alone': dict(data=dict(features=('image', 'caption'), other='')),
            'tiny': dict(model=dict(adapter=dict(rank=2))),
        },
    )
