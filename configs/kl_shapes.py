"""A KL autoencoder of the drawn scenes (jaxgen/data/shapes.py): 32x32 pixels to 8x8x4 latents.

    python -m jaxgen.main --config=configs/classifier_shapes.py    # for the perceptual distance
    python -m jaxgen.main --config=configs/kl_shapes.py
    python -m jaxgen.main --config=configs/kl_shapes.py:robust    # for models that draw latents inexactly

The first stage of a latent diffusion. Its samples are no scenes: latents need a prior.

Time: 11.4 minutes on one CPU core; `:robust` not measured
Paper: none
Ours: squared error 0.0025 and absolute error 0.025, of pixels in [-1, 1]; 1,114 nats. With absolute differences in
place of squares (`pixels`) objects still had two colours for all eight after 1,500 updates. `:robust`: of 512 held-out
scenes 97.1% of reconstructions have the right shape by `classifier_shapes` (of the scenes themselves 99.8%), all the
colour and background, 99.6% the size; 28.8 dB. With noise of 0.2 of the latents' standard deviation
97.5%, 100% and 99.6% (`python benchmarks/latents.py --first=runs/kl_shapes_robust`). Of 256 scenes of 64x64, on which
it was not trained, 98.4% have the right shape by `classifier_shapes:64`, 90.2% the colour, 99.6% the size (with
`--size=64 --classifier=runs/classifier_shapes_64`). `:64` goes on from there with scenes of 64x64 (9 minutes): of 512
99.8% have the right shape, all the colour, size and background, 31.7 dB; with that noise all four are in all,
31.1 dB (`python benchmarks/latents.py --first=runs/kl_shapes_64 --classifier=runs/classifier_shapes_64 --noise=0,0.2`)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqgan',
        stages=dict(perceptual='runs/classifier_shapes'),
        data=dict(source='shapes', size=32, channels=3, batch=16),
        model=dict(
            regulariser='kl',
            channels=16,
            multipliers=(1, 2, 4),
            blocks=1,
            latent=4,
            kl_weight=1e-3,
            first_log_var=-6.0,
            pixels='l2',
            perceptual=0.1,
            adversarial=0.0,
        ),
        optim=dict(lr=2e-3, schedule='cosine', warmup=50, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=3000, updates_per_call=10, log_every=50, save_every=300, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    channels=8, multipliers=(1,), adversarial=0.5, discriminator_channels=4, discriminator_layers=1
                ),
                optim=dict(warmup=2),
            ),
            # Noisier latents, and a decoder that bears noise: see docs/models/latent_diffusion.md.
            'robust': dict(
                model=dict(channels=12, kl_weight=0.03),
                optim=dict(lr=3e-3),
                train=dict(steps=2400, save_every=400),
            ),
            # That one trained on with scenes of 64x64 pixels, to 16x16x4 latents.
            '64': dict(
                stages=dict(perceptual='runs/classifier_shapes_64'),
                data=dict(size=64, batch=8),
                model=dict(channels=12, kl_weight=0.03),
                optim=dict(lr=1e-3),
                train=dict(steps=600, save_every=200, initial='runs/kl_shapes_robust'),
                evaluate=dict(features='run:runs/classifier_shapes_64'),
            ),
        },
    )
