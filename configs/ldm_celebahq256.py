"""Latent diffusion of CelebA-HQ 256x256, unconditional: LDM-4 (Rombach et al. 2022, arXiv 2112.10752).

    python -m jaxgen.main --config=configs/ldm_celebahq256.py

after its first stage, `configs/vq_f4_celebahq256.py`. 274,056,163 weights; the published ones are imported by
`--mode=import --from=model.ckpt`, those of FFHQ have the same networks.

Differs: the release takes about 10,000 of the images for validation by a list of its own, which is not in it here.

Time: not measured
Paper: FID 5.11 against the training images, 50,000 samples of 200 steps of DDIM, eta 0
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/vq_f4_celebahq256'),
        data=dict(source='celeb_a_hq/256', size=256, channels=3, batch=48, flip=True),
        model=dict(
            process=dict(name='scaled_linear', beta_start=0.0015, beta_end=0.0195),
            network=dict(
                name='adm',
                channels=224,
                multipliers=(1, 2, 3, 4),
                blocks=2,
                attention=(32, 16, 8),
                head_channels=32,
                group_size=0,
                scale_shift=False,
                resample_in_blocks=False,
            ),
            sampler=dict(name='ddim', steps=200, eta=0.0, clip=False),
        ),
        optim=dict(lr=48 * 2e-6, ema=0.9999),
        train=dict(steps=410_000, log_every=100, save_every=5000, sample_every=50_000, samples=16, dtype='bfloat16'),
        evaluate=dict(features='inception', samples=50_000),
        sample=dict(batch=32),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(
                        channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8, group_size=2
                    ),
                    sampler=dict(steps=5),
                ),
            ),
        },
    )
