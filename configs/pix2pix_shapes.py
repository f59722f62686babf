"""pix2pix on the drawn scenes (jaxgen/data/shapes.py), 32x32: pictures out of line drawings, or out of maps.

    python -m jaxgen.main --config=configs/pix2pix_shapes.py             # out of line drawings: edges
    python -m jaxgen.main --config=configs/pix2pix_shapes.py:segments    # out of maps of what is where: masks

Colours of lines and maps say which colours the scene has, and are not those. `edges` and `mask` of these data say
nothing of colours: what is made of them has colours of the generator's own. `--mode=sample --film=3` shows inputs,
what is made of them, and the scenes that they were made from.

Time: 14.6 minutes on one CPU core with other work on it, 5 minutes of CPU time
Paper: none
Ours: squared error 0.012, of pixels in [-1, 1]; a classifier reads 99 % of the colours, all backgrounds and 49 % of the
shapes as they are
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
