"""CycleGAN between two styles of drawn scenes (jaxgen/data/shapes.py), 32x32: filled shapes and outlined ones.

    python -m jaxgen.main --config=configs/cyclegan_shapes.py

Scenes of the two styles are not paired. `--mode=sample --film=3` displays both cycles: filled scenes, translated to
outlined ones, and back; then outlined ones, translated to filled ones, and back. Only the test scenes are the same in
both styles.

Time: 19.7 minutes on one CPU core with other work on it
Paper: none
Ours: cycle error 0.031 (filled) and 0.032 (outlined), of pixels in [-1, 1]; Fréchet distance of outlined scenes
translated to filled ones 14.3 (500 samples); most scenes are translated, fillings are rough
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='cyclegan',
        data=dict(source='shapes', other='shapes:outlined', size=32, channels=3, features=('image', 'other'), batch=4),
        model=dict(
            width=12,
            halvings=1,
            blocks=3,
            norm='group',
            discriminator_channels=12,
            discriminator_layers=2,
            discriminator_norm='batch',
        ),
        optim=dict(lr=1e-3, schedule='half_linear', b1=0.5, ema=0.99, ema_warmup=True),
        train=dict(steps=6000, updates_per_call=10, log_every=50, save_every=500, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(model=dict(width=4, blocks=1, pool=6, discriminator_channels=4, discriminator_layers=1)),
        },
    )
