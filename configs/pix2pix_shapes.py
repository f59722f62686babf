"""pix2pix on the drawn scenes (jaxgen/data/shapes.py), 32x32: images from line drawings, or from maps.

    python -m jaxgen.main --config=configs/pix2pix_shapes.py             # from line drawings: edges
    python -m jaxgen.main --config=configs/pix2pix_shapes.py:segments    # from maps of segments: masks

Colours of lines and maps encode the scene's colours, and are not those. `edges` and `mask` of these data do not: their
translations have colours of the generator's own. `--mode=sample --film=3` displays inputs, translations and ground
truth.

Time: 14.6 minutes on one CPU core with other work on it, 5 minutes of CPU time
Paper: none
Ours: squared error 0.012, of pixels in [-1, 1]; conditional accuracy, by a classifier, 99 % (colour), 100 %
(background) and 49 % (shape)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pix2pix',
        data=dict(source='shapes', size=32, channels=3, features=('image', 'sketch'), batch=8),
        model=dict(
            condition='sketch',
            norm='group',
            width=16,
            full=1,
            halvings=4,
            dropouts=1,
            dropout=0.2,
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
        train=dict(steps=3000, updates_per_call=10, log_every=50, save_every=1000, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'segments': dict(data=dict(features=('image', 'segments')), model=dict(condition='segments')),
            'tiny': dict(model=dict(width=4, halvings=1, dropouts=1, discriminator_channels=4, discriminator_layers=1)),
        },
    )
