"""pix2pix on the drawn scenes (jaxgen/data/shapes.py), 32x32: pictures out of maps, line drawings, or masks.

    python -m jaxgen.main --config=configs/pix2pix_shapes.py          # out of maps of what is where
    python -m jaxgen.main --config=configs/pix2pix_shapes.py:edges    # out of line drawings
    python -m jaxgen.main --config=configs/pix2pix_shapes.py:mask     # out of masks of the shape

Only the maps say which colours there are. `--mode=sample --film=3` shows inputs, what is made of them, and the scenes
that they were made from.

Time: not measured
Paper: none
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pix2pix',
        data=dict(source='shapes', size=32, channels=3, features=('image', 'segments'), batch=8),
        model=dict(
            condition='segments',
            norm='batch',
            width=16,
            full=1,
            halvings=4,
            dropouts=1,
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
            'edges': dict(data=dict(features=('image', 'edges')), model=dict(condition='edges')),
            'mask': dict(data=dict(features=('image', 'mask')), model=dict(condition='mask')),
            'tiny': dict(
                data=dict(size=8, batch=8),
                model=dict(width=4, halvings=1, dropouts=1, discriminator_channels=4, discriminator_layers=1),
                optim=dict(lr=3e-3, schedule='constant'),
                train=dict(steps=4, updates_per_call=1, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8, features='none'),
            ),
        },
    )
