"""AttnGAN in the size that is published for birds (CUB): three stages, 64, 128 and 256 pixels.

    python -m jaxgen.main --config=configs/attngan_cub.py

No TFDS set has these birds with their captions; the drawn scenes stand in for them, to show the size. The published
image encoder is Inception; this one is smaller. Words have 5,450 numbers by their hashes, where each of the published
ones has its own.

Differs: the release trains text and image encoder first, in batches of 48, on images at 299 pixels, and lets their
learning rate fall by epoch; here they learn beside the generator. Images are enlarged by 19 % and cut out anywhere, as
there, but not mirrored: the scenes' captions say left and right.

Time: not measured
Paper: Inception Score 4.36 (Xu et al. 2017)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='attngan',
        data=dict(
            source='shapes', size=256, channels=3, features=('image', 'caption'), batch=20, crop='random', jitter=48
        ),
        model=dict(),
        optim=dict(
            lr=2e-4,
            b1=0.5,
            ema=0.999,
            # By a fiftieth in an epoch of 8,855 birds, to a tenth.
            decay_rate=0.98,
            decay_every=443,
            floor=0.1,
            networks=dict(
                text=dict(lr=2e-3, clip=0.25, schedule='exponential'), encoder=dict(lr=2e-3, schedule='exponential')
            ),
        ),
        train=dict(steps=264_000, log_every=100, save_every=2000, sample_every=2000),  # 600 epochs of 8,855 birds
        variants={
            'tiny': dict(
                data=dict(batch=4),
                model=dict(
                    **dict(stages=2, doublings=1, width=4, latent=4, condition=4, blocks=1, discriminator_width=4),
                    **dict(words=64, length=8, embedding=4, features=4, encoder_width=4),
                ),
                optim=dict(lr=2e-4),
            ),
        },
    )
