"""The encoder of T5 1.1 XXL (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202), which reads the
prompts of Stable Diffusion 3 and FLUX.

    python -m jaxgen.main --config=configs/t5_xxl.py --mode=import --from=FLUX.1-dev/text_encoder_2

Variants: `:xl`, `:large`, `:base`, `:small`.

Time: imported, not trained
Paper: 11 billion parameters with the decoder (arXiv 1910.10683, section 3.7)
Ours: 4,762,310,656 parameters, not trained here
"""

from jaxgen.config import make


def size(channels: int, blocks: int, heads: int, hidden: int) -> dict:
    return dict(model=dict(network=dict(channels=channels, blocks=blocks, heads=heads, hidden=hidden)))


def get_config(variant: str = ''):
    return make(
        variant,
        family='encoder',
        data=dict(source='shapes', size=224, channels=3, features=('image', 'caption'), batch=32),
        model=dict(network=dict(name='t5', channels=4096, blocks=24, heads=64, hidden=10_240)),
        train=dict(sample_every=0),
        variants={
            'xl': size(2048, 24, 32, 5120),
            'large': size(1024, 24, 16, 2816),
            'base': size(768, 12, 12, 2048),
            'small': size(512, 8, 6, 1024),
            'tiny': dict(
                data=dict(size=32, batch=4),
                model=dict(
                    network=dict(channels=8, blocks=2, heads=2, head_channels=4, hidden=16, vocabulary=520, length=8)
                ),
            ),
        },
    )
