"""pix2pix that recovers drawn scenes (jaxgen/data/shapes.py) of 32x32 pixels from blur and noise.

    python -m jaxgen.main --config=configs/recovery_shapes.py

Schawinski et al. 2017 (arXiv 1702.00403) recover galaxies so: images are degraded as by a worse telescope, and the pair
trains the generator.

Time: 2.0 minutes on one CPU core with other work on the other
Paper: none
Ours: squared error 0.0069, of pixels in [-1, 1], of the degraded images 0.0497; conditional accuracy, by a
classifier, 71% (shape)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pix2pix',
        data=dict(source='shapes', size=32, channels=3, batch=8),
        model=dict(
            condition='image',
            blur=1.5,
            noise=0.2,
            norm='group',
            width=16,
            full=1,
            halvings=4,
            dropouts=0,
            discriminator_channels=16,
            discriminator_layers=2,
        ),
        optim=dict(
            lr=2e-3,
            schedule='half_linear',
            b1=0.5,
            ema=0.99,
            ema_warmup=True,
            networks=dict(discriminator=dict(lr=4e-4)),
        ),
        train=dict(steps=2000, updates_per_call=10, log_every=50, save_every=500, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(blur=0.5, width=4, halvings=2, dropouts=1, discriminator_channels=4, discriminator_layers=1)
            ),
        },
    )
