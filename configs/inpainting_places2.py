"""Inpainting with gated convolutions, 256x256, as published: DeepFill v2, a generator of 4.05 million weights.

    python -m jaxgen.main --config=configs/inpainting_places2.py --config.data.source=folder:PATH

Any folder of images will do, or a name of TensorFlow Datasets like `places365_small`. Masks of your own are images too,
white where the hole is: `--config.data.source=pairs:PATH --config.data.features="('image', 'mask')"
--config.model.masks=mask` reads PATH/image/NAME.png and PATH/mask/NAME.png.

Differs: the release cuts 256x256 pixels out of images as they are, here these are resized first; it trains until it is
stopped.

Time: not measured
Paper: table 1 of Yu et al. 2018 has errors on Places2's validation images under squares and free-form masks
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='inpainting',
        data=dict(source='folder:places2', size=256, channels=3, batch=16, crop='random'),
        model=dict(
            masks='both',
            brush=(12.0, 40.0),
            hole=128,
            width=24,
            dilations=(2, 4, 8, 16),
            attention=True,
            l1=1.0,
            discriminator_channels=64,
            discriminator_layers=6,
        ),
        optim=dict(lr=1e-4, b1=0.5, ema=0.0),  # the paper averages no weights
        train=dict(steps=1_000_000, updates_per_call=10, log_every=100, save_every=4000, sample_every=4000, samples=16),
        sample=dict(batch=16),
        evaluate=dict(batch=16),
        variants={
            'tiny': dict(
                data=dict(source='shapes', features=('image', 'mask')),
                model=dict(
                    masks='mask',
                    width=4,
                    dilations=(),
                    attention=False,
                    discriminator_channels=4,
                    discriminator_layers=2,
                ),
                optim=dict(ema=0.9),
            ),
        },
    )
