"""ControlNet on drawn scenes and their captions (jaxgen/data/shapes.py), 32x32: the outline of a shape, or its mask,
controls the text-to-image model `ldm_text_shapes`, whose weights stay as they are (Zhang et al. 2023).

    python -m jaxgen.main --config=configs/ldm_text_shapes.py           # after its own stages
    python -m jaxgen.main --config=configs/controlnet_shapes.py         # edges
    python -m jaxgen.main --config=configs/controlnet_shapes.py:mask --workdir=runs/controlnet_shapes_mask

`--mode=sample --condition=edges=photo.png --condition=caption='a large red circle on a white background'` draws by a
person's own outline; `--config.model.control.own.scale=0.5` makes it weaker, and `.start` and `.end` limit it to some
of the steps. `--mode=evaluate` compares the edges of samples, or their objects, with those that were requested.

Time: 14.5 minutes on two CPU cores with much other work on them
Paper: none
Ours: edges F1 0.990 of 1,000 samples by edges of test images (`python -m jaxgen.main --mode=evaluate
--workdir=runs/controlnet_shapes --n=1000`); 96.2% of them show the shape of the caption, 95.6% all four parts of it;
`:mask` in 25 minutes: IoU with the mask 0.885 of 500 samples, 97.4% and 97.0%
"""

from jaxgen.config import make
from jaxgen.configs import ldm_text_shapes


def get_config(variant: str = ''):
    base = ldm_text_shapes.get_config('tiny' if 'tiny' in variant.split(',') else '').to_dict()
    model = base['model']
    model['conditioning']['caption']['dropout'] = 0.5
    return make(
        variant,
        family='diffusion',
        stages=dict(base='runs/ldm_text_shapes', **base['stages']),
        data=dict(source='shapes', size=32, channels=3, features=('image', 'caption', 'edges'), batch=64),
        model=model | dict(controlnet=dict(name='latent_unet', condition='edges', hint=(16, 32, 64), image_channels=1)),
        optim=dict(lr=5e-4, warmup=50, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=2000, updates_per_call=5, log_every=50, save_every=500, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'mask': dict(
                data=dict(features=('image', 'caption', 'mask')), model=dict(controlnet=dict(condition='mask'))
            ),
            'tiny': dict(model=dict(controlnet=dict(hint=(4,))), optim=dict(warmup=2)),
        },
    )
