"""Text to image on drawn scenes and their captions (jaxgen/data/shapes.py), 32x32: latent diffusion by a U-Net that
attends to the caption's tokens, the system of Stable Diffusion.

    python -m jaxgen.main --config=configs/classifier_shapes.py    # for the autoencoder's perceptual distance
    python -m jaxgen.main --config=configs/kl_shapes.py:robust     # the autoencoder, whose latents these are
    python -m jaxgen.main --config=configs/clip_shapes.py          # the text encoder
    python -m jaxgen.main --config=configs/ldm_text_shapes.py

`--mode=sample --condition=caption='a large red circle on a white background'` draws one caption, with
`--condition=negative_caption=blue` away from another. `--mode=evaluate` gives the conditional accuracy by
`classifier_shapes`: conditional_accuracy/0 is the fraction of right shapes, 1 that of colours, 2 of sizes, 6 of
backgrounds, conditional_accuracy/caption that of samples of which all four are right.

    python -m jaxgen.main --config=configs/classifier_shapes.py:64
    python -m jaxgen.main --config=configs/kl_shapes.py:64
    python -m jaxgen.main --config=configs/ldm_text_shapes.py:64

train on with scenes of 64x64, and

    python -m jaxgen.main --config=configs/ldm_text_shapes.py:inpainting --workdir=runs/filling_shapes
    python -m jaxgen.main --config=configs/ldm_text_shapes.py:variations --workdir=runs/varying_shapes

go on from its weights, with a mask and what is known beside the latents, and with CLIP's embedding of the image as a
further token: docs/own_images.md has what they draw.

Time: 29 minutes on two CPU cores with other work on them
Paper: none
Ours: of 2,000 samples of held-out captions 89.8% show the shape, of which 12.5% is chance, 99.8% the colour, all the
background, 96.5% the size; 88.2% show all four; Fréchet distance 2.86 by the scenes' classifier
(`python -m jaxgen.main --mode=evaluate --workdir=runs/ldm_text_shapes --n=2000`); 73.2% and 71.1% after 2,400 updates.
`:64` goes on from this run with scenes of 64x64 (17 minutes): 85.9% show the shape, 99.9% the colour, all the
background, 96.9% the size; 84.8% show all four; Fréchet distance 5.06 by `classifier_shapes:64`
(`python -m jaxgen.main --mode=evaluate --workdir=runs/ldm_text_shapes_64 --n=2000`)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    def tuned(steps: int) -> dict:
        return dict(
            optim=dict(lr=7e-4, warmup=50),
            train=dict(initial='runs/ldm_text_shapes', steps=steps, save_every=200, sample_every=0),
        )

    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/kl_shapes_robust', text='runs/clip_shapes'),
        data=dict(source='shapes', size=32, channels=3, features=('image', 'caption'), batch=64),
        model=dict(
            process='flow',
            network=dict(
                name='latent_unet',
                channels=40,
                multipliers=(1, 2),
                blocks=1,
                depths=(0, 1),
                middle_depth=1,
                heads=4,
                group_size=4,
            ),
            training=dict(prediction='flow', times=dict(name='logit_normal', mean=0.0, std=1.0)),
            conditioning=dict(caption=dict(kind='text', tokens=('text/last',), dropout=0.1)),
            sampler=dict(name='euler', steps=25, clip=False),
            guidance=dict(scale=2.0),
            latent_scale=1.05,
        ),
        optim=dict(lr=1.5e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=6000, updates_per_call=5, log_every=50, save_every=500, sample_every=1500),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'inpainting': dict(model=dict(conditioning=dict(inpainting={})), **tuned(1200)),
            'variations': dict(
                stages=dict(clip='runs/clip_shapes'),
                model=dict(
                    conditioning=dict(
                        caption=dict(dropout=0.5), image=dict(kind='image_embedding', scale=8.0, dropout=0.1)
                    )
                ),
                **tuned(600),
            ),
            'tiny': dict(
                model=dict(
                    network=dict(channels=8, multipliers=(1,), depths=(1,), heads=2),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
                optim=dict(warmup=2),
                train=dict(initial=''),
            ),
            # That run trained on with scenes of 64x64 pixels, as Stable Diffusion's was at 256 before 512.
            '64': dict(
                stages=dict(first='runs/kl_shapes_64'),
                data=dict(size=64, batch=16),
                optim=dict(lr=7e-4),
                train=dict(steps=2000, initial='runs/ldm_text_shapes'),
                evaluate=dict(features='run:runs/classifier_shapes_64'),
            ),
        },
    )
