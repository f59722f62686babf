"""pix2pix as published: photographs of facades from maps of their parts, 256x256, 57.2 million weights.

    python -m jaxgen.main --config=configs/pix2pix_facades.py --config.data.source=pairs:PATH

Pairs of your own are two sub-folders with files of one name, of any size: PATH/image/NAME.png, the target, and
PATH/input/NAME.png, the input; more sub-folders are more features, of which `config.model.condition` names
one. The published sets (http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/facades.tar.gz) have both side by side in
one image, the photograph to the left. To cut them apart, with ImageMagick:

    mkdir -p facades/image facades/input
    magick mogrify -path facades/image -gravity West -crop 50%x100%+0+0 +repage train/*.jpg
    magick mogrify -path facades/input -gravity East -crop 50%x100%+0+0 +repage train/*.jpg

Differs: the learning rate falls by update, there by epoch; batch normalisation of one image is instance normalisation.

Time: not measured
Paper: images; no metric for this set
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pix2pix',
        data=dict(
            source='pairs:facades',
            size=256,
            channels=3,
            features=('image', 'input'),
            batch=1,
            jitter=30,
            flip=True,
            test_fraction=0.05,
        ),
        model=dict(condition='input', width=64, halvings=8, dropouts=3, norm='instance', l1=100.0),
        optim=dict(lr=2e-4, schedule='half_linear', b1=0.5, ema=0.0),  # the paper averages no weights
        train=dict(steps=80_000, updates_per_call=10, log_every=100, save_every=4000, sample_every=4000, samples=16),
        sample=dict(batch=8),
        evaluate=dict(batch=8),
        variants={
            'tiny': dict(
                data=dict(source='shapes', features=('image', 'mask'), jitter=2),
                model=dict(
                    condition='mask',
                    width=4,
                    halvings=2,
                    dropouts=1,
                    discriminator_channels=4,
                    discriminator_layers=1,
                ),
                optim=dict(ema=0.9),
            ),
        },
    )
