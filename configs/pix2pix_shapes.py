"""pix2pix on the drawn scenes (jaxgen/data/shapes.py), 32x32: pictures out of line drawings, or out of masks.

    python -m jaxgen.main --config=configs/pix2pix_shapes.py

The variant `mask` sees which pixels are the shape's, `:mask`. Neither says a colour: the generator takes one.
`--mode=sample --film=3` shows drawings, what is made of them, and the scenes that they were made from.

Time: not measured
Paper: none
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pix2pix',
        data=dict(source='shapes', size=32, channels=3, features=('image', 'edges'), batch=8),
        model=dict(
            condition='edges',
            norm='batch',
            width=16,
            full=1,
            halvings=5,
            dropouts=2,
            l1=10.0,
            discriminator_channels=16,
            discriminator_layers=2,
        ),
        optim=dict(
            lr=1e-3,
            schedule='half_linear',
            b1=0.5,
            ema=0.99,
            ema_warmup=True,
            networks=dict(discriminator=dict(lr=4e-4)),
        ),
        train=dict(steps=3000, updates_per_call=10, log_every=50, save_every=1000, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'mask': dict(data=dict(features=('image', 'mask')), model=dict(condition='mask')),
            'tiny': dict(
                data=dict(size=8, batch=8),
                model=dict(width=4, halvings=2, dropouts=1, discriminator_channels=4, discriminator_layers=1),
                optim=dict(lr=3e-3, schedule='constant'),
                train=dict(steps=4, updates_per_call=1, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8, features='none'),
            ),
        },
    )
