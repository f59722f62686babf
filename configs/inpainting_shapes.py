"""Inpainting of drawn scenes (jaxgen/data/shapes.py), 32x32, under strokes of a brush: gated convolutions.

    python -m jaxgen.main --config=configs/inpainting_shapes.py

`--mode=sample --film=4` displays masked images, coarse completions, fine ones, and ground truth.

Contextual attention is left out: at 8x8 positions hardly a patch has no unknown pixels.

Time: 15.4 minutes on a CPU core with other work beside it
Paper: none
Ours: squared error 0.0125, within holes (a quarter of the image) 0.051; Fréchet distance of completed images 8.5
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='inpainting',
        data=dict(source='shapes', size=32, channels=3, batch=16),
        model=dict(
            masks='both',
            brush=(2.0, 5.0),
            hole=10,
            width=8,
            dilations=(2, 4),
            attention=False,
            l1=10.0,
            discriminator_channels=12,
            discriminator_layers=3,
        ),
        optim=dict(lr=2e-3, schedule='half_linear', b1=0.5, ema=0.99, ema_warmup=True),
        train=dict(steps=9000, updates_per_call=10, log_every=50, save_every=1000, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    brush=(1.0, 2.0),
                    hole=3,
                    width=4,
                    dilations=(),
                    attention=True,
                    discriminator_channels=4,
                    discriminator_layers=2,
                )
            ),
        },
    )
