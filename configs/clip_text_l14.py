"""The text tower of CLIP's ViT-L/14 alone (Radford et al. 2021, arXiv 2103.00020): the text encoder of Stable
Diffusion 1 and one of SDXL's two.

    python -m jaxgen.main --config=configs/clip_text_l14.py --mode=import --from=stable-diffusion-v1-5/text_encoder

Variants: `:projection`, with the map to the space of images, as Stable Diffusion 3 has it; `:h14`, OpenCLIP's of Stable
Diffusion 2, published without its last block; `:bigg14`, OpenCLIP's, SDXL's second and Stable Diffusion 3's.

Time: imported, not trained
Paper: its own table has the two towers together, see clip_vit_l14.py
Ours: 123,060,480 parameters; 123,650,304 of `:projection`, 340,387,840 of `:h14`, 694,659,840 of `:bigg14`
"""

from jaxgen.config import make


def tower(channels: int, blocks: int, heads: int, **more) -> dict:
    return dict(model=dict(network=dict(channels=channels, blocks=blocks, heads=heads, **more)))


def get_config(variant: str = ''):
    return make(
        variant,
        family='encoder',
        data=dict(source='shapes', size=224, channels=3, features=('image', 'caption'), batch=32),
        model=dict(network=dict(name='clip', channels=768, blocks=12, heads=12, features=0)),
        train=dict(sample_every=0),
        variants={
            'projection': dict(model=dict(network=dict(features=768))),
            'h14': tower(1024, 23, 16, activation='gelu'),
            'bigg14': tower(1280, 32, 20, features=1280, activation='gelu'),
            'tiny': dict(
                data=dict(size=32, batch=4),
                model=dict(network=dict(channels=8, blocks=2, heads=2, vocabulary=520, length=8)),
            ),
        },
    )
