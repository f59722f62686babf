"""AttnGAN on drawn scenes and their captions (jaxgen/data/shapes.py), in two stages: 16x16, then 32x32. All shapes are
in the middle of the image; `:anywhere` has them anywhere, which captions do not state.

    python -m jaxgen.main --config=configs/attngan_shapes.py

`--mode=sample --condition=caption='a large red circle on a white background'` draws one caption; `--film=2` shows both
stages. `--mode=evaluate` gives the conditional accuracy by `classifier_shapes`: conditional_accuracy/0 is the fraction
of right shapes, 1 that of colours, 2 of sizes, 6 of backgrounds, conditional_accuracy/caption that of samples of which
all four are right. Captions here are few and exact: their condition is not drawn (kl = 0).

Time: 27.8 minutes on 2 CPU cores; `:anywhere` 15.2
Paper: none
Ours: of 2,000 samples of held-out captions 75.3% show the shape, of which 12.5% is chance, all the colour and the
background, and 89.4% the size; 72.7% show all four. Fréchet distance 17.8. `:anywhere`: 33.8% of shapes, 99.9% of
colours, 100% of backgrounds, 65.9% of sizes; 30.0% show all four. Fréchet distance from its scenes 13.9. Its rings and
discs are good, the rest is rough
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='attngan',
        data=dict(source='shapes:centred', size=32, channels=3, features=('image', 'caption'), batch=32, flip=True),
        model=dict(
            **dict(stages=2, doublings=2, width=16, latent=32, condition=32, blocks=1, kl=0.0),
            **dict(discriminator_width=32, discriminator_norm=False, r1=0.2, matching=0.1, swap=True),
            **dict(words=1024, length=8, embedding=32, features=48, dropout=0.0, encoder_width=16),
        ),
        optim=dict(
            lr=2e-3,
            b1=0.5,
            b2=0.99,
            schedule='half_linear',
            ema=0.995,
            ema_warmup=True,
            networks={
                name: dict(name='adamw', lr=4e-3, b1=0.9, schedule='cosine', warmup=50, weight_decay=0.1)
                for name in ('text', 'encoder')
            },
        ),
        train=dict(steps=6000, updates_per_call=20, log_every=100, save_every=1000, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'anywhere': dict(data=dict(source='shapes'), train=dict(steps=4000)),
            'tiny': dict(
                data=dict(source='shapes', batch=16),
                model=dict(
                    **dict(stages=2, doublings=1, width=4, latent=4, condition=4, discriminator_width=4),
                    **dict(words=64, embedding=4, features=4, encoder_width=4),
                ),
                optim=dict(lr=1e-3),
            ),
        },
    )
