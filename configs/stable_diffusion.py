"""Stable Diffusion 1.5, 512x512 (Rombach et al. 2022, arXiv 2112.10752): the U-Net of latent diffusion with
attention to the last hidden states of CLIP's text tower.

    python -m jaxgen.main --config=configs/stable_diffusion.py --mode=describe
    python -m jaxgen.main --mode=import --from=stable-diffusion-v1-5 --workdir=runs/sd15
    python -m jaxgen.main --mode=sample --workdir=runs/sd15 --condition=caption='an astronaut riding a horse'

A folder of the hub is imported with its autoencoder, text encoder and tokenizer, and needs no config; this one is for
`--mode=describe`, for a single file (`--config=stable_diffusion --from=v1-5-pruned-emaonly.safetensors`), and to train.

Variants: `:v2`, Stable Diffusion 2.1 at 512 pixels, which reads OpenCLIP's ViT-H/14, one block before its last;
`:v2,v`, its 768 pixels, which predict v; `:inpainting`, the
model of 1.5 that fills holes, of 9 channels: latents, a mask and latents of what is known.

859,520,964 weights; 865,910,724 of `:v2`, 859,535,364 of `:inpainting`.

Differs: data are drawn scenes, where a person names no others; LAION is not to be had any more. Published: batch of
2,048, a learning rate of 1e-4 after 10,000 steps of warm-up (model card).

Time: not measured
Paper: no table for 1.5; 1.45 billion parameters on MS-COCO: FID 12.63 with guidance (Rombach et al. 2022, table 2)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/kl_f8_imagenet256_size512', text='runs/clip_text_l14'),
        data=dict(source='shapes', size=512, channels=3, features=('image', 'caption'), batch=2048),
        model=dict(
            process='scaled_linear',
            network=dict(name='latent_unet', channels=320),
            conditioning=dict(caption=dict(kind='text', tokens=('text/last',), dropout=0.1)),
            sampler=dict(name='ddim', steps=50, clip=False),
            guidance=dict(scale=7.5),
            latent_scale=0.18215,
        ),
        optim=dict(name='adamw', lr=1e-4, warmup=10_000, weight_decay=0.01, ema=0.9999),
        train=dict(steps=500_000, log_every=100, save_every=5000, sample_every=50_000, samples=4, dtype='bfloat16'),
        evaluate=dict(features='inception', samples=10_000),
        sample=dict(batch=4),
        mesh=dict(fsdp=1),
        variants={
            'v2': dict(
                stages=dict(text='runs/clip_text_l14_h14'),
                model=dict(
                    network=dict(head_channels=64),
                    conditioning=dict(caption=dict(tokens=('text/last',))),
                ),
            ),
            'v': dict(
                stages=dict(first='runs/kl_f8_imagenet256_size768'),
                data=dict(size=768),
                model=dict(training=dict(prediction='v')),
            ),
            'inpainting': dict(model=dict(conditioning=dict(inpainting={}))),
            'tiny': dict(
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(channels=8, multipliers=(1, 2), depths=(1, 0), blocks=1, heads=2, group_size=4),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
            ),
        },
    )
