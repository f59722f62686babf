"""FLUX.1-dev, 1024x1024 (Black Forest Labs 2024, no paper): flow matching by a transformer of 11.9 billion weights with
blocks of two streams, then of one, rotary positions, T5's hidden states and CLIP's pooled text; its guidance was
distilled into the network, which reads the scale.

    python -m jaxgen.main --config=configs/flux.py --mode=describe
    python -m jaxgen.main --mode=import --from=FLUX.1-dev --workdir=runs/flux
    python -m jaxgen.main --mode=sample --workdir=runs/flux --condition=caption='a tiny astronaut hatching from an egg'

Variant: `:schnell`, distilled to four steps, which reads no scale.

11,901,408,320 weights; 11,891,178,560 of `:schnell`.

Differs: data are drawn scenes, where a person names no others; how it was trained and distilled is not published.

Time: not measured
Paper: none
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/kl_f8_imagenet256_sd3_size1024', text='runs/clip_text_l14', text_2='runs/t5_xxl'),
        data=dict(source='shapes', size=1024, channels=3, features=('image', 'caption'), batch=256),
        model=dict(
            process='flow',
            network='flux',
            training=dict(prediction='flow', times=dict(name='logit_normal', mean=0.0, std=1.0)),
            conditioning=dict(caption=dict(kind='text', tokens=('text_2/last',), pooled=('text/pooled',))),
            # Of 4,096 patches: the shift that the release computes of their number, e^1.15.
            sampler=dict(name='euler', steps=50, shift=3.158, clip=False),
            guidance=dict(distilled=3.5),
            latent_scale=0.3611,
            latent_shift=0.1159,
        ),
        optim=dict(lr=1e-5, ema=0.9999),
        train=dict(
            steps=100_000, log_every=100, save_every=5000, sample_every=50_000, samples=4, dtype='bfloat16', remat=True
        ),
        evaluate=dict(features='inception', samples=10_000),
        sample=dict(batch=4),
        mesh=dict(fsdp=16),
        variants={
            'schnell': dict(
                model=dict(
                    network=dict(distilled=False), sampler=dict(steps=4, shift=1.0), guidance=dict(distilled=1.0)
                ),
            ),
            'tiny': dict(
                model=dict(
                    network=dict(channels=16, heads=2, blocks=1, single_blocks=2, axes=(2, 2, 4)),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
                mesh=dict(fsdp=1),
            ),
        },
    )
