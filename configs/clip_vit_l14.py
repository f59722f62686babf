"""CLIP's largest published model at 224 pixels, ViT-L/14 (Radford et al. 2021, arXiv 2103.00020, table 20). Its text
tower is the text encoder of Stable Diffusion 1, one of SDXL's two and of Stable Diffusion 3's three.

    python -m jaxgen.main --config=configs/clip_vit_l14.py --config.data.source='tar:~/pairs/{00000..00999}.tar'

Variants: `:vit_b32`, `:vit_b16`; `:vit_h14`, OpenCLIP's of Stable Diffusion 2, and `:vit_bigg14`, SDXL's second.

The state of training is 6.8 GB, of the last two variants 15.8 and 40.6, which lie over 4 and 8 devices (`mesh.fsdp`).

Time: not measured
Paper: 75.5% of ImageNet's validation images right without training on them (ViT-L/14, table 11); 427,616,513 parameters
Ours: 427,616,513 parameters, 151,277,313 of `:vit_b32`, not trained here. The 400 million pairs that it was trained on
are not public; without a source of your own it is trained on drawn scenes
"""

from jaxgen.config import make


def tower(channels: int, blocks: int, heads: int, **more) -> dict:
    return dict(channels=channels, blocks=blocks, heads=heads, **more)


def get_config(variant: str = ''):
    return make(
        variant,
        family='clip',
        data=dict(source='shapes', size=224, channels=3, features=('image', 'caption'), batch=32_768),
        model=dict(text=tower(768, 12, 12), vision=tower(1024, 24, 16, patch=14), features=768, normalisation='clip'),
        optim=dict(name='adamw', lr=4e-4, b2=0.98, schedule='cosine', warmup=2000, weight_decay=0.2, ema=0.0),
        train=dict(steps=390_000, save_every=10_000, sample_every=0, dtype='bfloat16', remat=True),
        variants={
            'vit_b32': dict(model=dict(text=tower(512, 12, 8), vision=tower(768, 12, 12, patch=32), features=512)),
            'vit_b16': dict(model=dict(text=tower(512, 12, 8), vision=tower(768, 12, 12, patch=16), features=512)),
            'vit_h14': dict(
                model=dict(
                    text=tower(1024, 24, 16), vision=tower(1280, 32, 16, patch=14), features=1024, activation='gelu'
                ),
                mesh=dict(fsdp=4),
            ),
            'vit_bigg14': dict(
                model=dict(
                    text=tower(1280, 32, 20),
                    vision=tower(1664, 48, 16, patch=14, hidden=8192),
                    features=1280,
                    activation='gelu',
                ),
                mesh=dict(fsdp=8),
            ),
            'tiny': dict(
                data=dict(batch=16),
                model=dict(text=tower(8, 2, 2, vocabulary=520, length=8), vision=tower(8, 2, 2, patch=8), features=4),
                optim=dict(warmup=2),
                train=dict(dtype='float32', remat=False),
            ),
        },
    )
