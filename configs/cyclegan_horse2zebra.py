"""CycleGAN on horses and zebras, 256x256, as published: ResNet-9 generators, 28.3 million weights in all.

    python -m jaxgen.main --config=configs/cyclegan_horse2zebra.py

The data (https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/horse2zebra.zip) unpack to a folder horse2zebra, with
horses in trainA and zebras in trainB; or name any two folders of your own, images of any size:

    --config.data.source=folder:PATH/paintings --config.data.other=folder:PATH/photographs

Samples are images of `other` translated into the domain of `source`: horses into zebras. The paper trains 200 epochs of
1,334 images, one at a time. Its learning rate is constant for the first half and falls to 0 in the second.

Differs: the learning rate falls by update, there by epoch.

Time: not measured
Paper: images; no metric for this set
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='cyclegan',
        data=dict(
            source='folder:horse2zebra/trainB',
            other='folder:horse2zebra/trainA',
            size=256,
            channels=3,
            features=('image', 'other'),
            batch=1,
            jitter=30,
            flip=True,
            test_fraction=0.02,
        ),
        model=dict(width=64, halvings=2, blocks=9, cycle=10.0, identity=0.5, pool=50),
        optim=dict(lr=2e-4, schedule='half_linear', b1=0.5, ema=0.0),  # the paper averages no weights
        train=dict(steps=266_800, updates_per_call=10, log_every=100, save_every=4000, sample_every=4000, samples=16),
        sample=dict(batch=8),
        evaluate=dict(batch=8),
        variants={
            'tiny': dict(
                data=dict(source='shapes', other='shapes:outlined', jitter=2),
                model=dict(width=4, halvings=1, blocks=1, pool=6, discriminator_channels=4, discriminator_layers=1),
                optim=dict(ema=0.9),
            ),
        },
    )
