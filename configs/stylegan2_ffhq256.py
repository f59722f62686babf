"""StyleGAN2 with adaptive discriminator augmentation on FFHQ, 256x256, by the configurations of the ADA paper's code.

    python -m jaxgen.main --config=configs/stylegan2_ffhq256.py:paper256 --config.data.source=folder:FFHQ

Without a variant it is the network of 1024x1024 pixels without its last resolution levels, 30.0 and 28.9 million
weights; `paper256`, what the paper trains at this size, has half the channels in those above 32x32, 24.8 and 24.0
million; `auto`, the code's default for one GPU, has a mapping network of two layers besides, 23.2 million. With a few
thousand images of one's own take `auto`, and folder:PATH. The images of FFHQ are for a person to fetch
(https://github.com/NVlabs/ffhq-dataset).

Time: not measured
Paper: no metric that we could check
Ours: shape-checked
"""

from jaxgen.config import make


def optim(lr: float, halflife: float, rampup: float = 0.0) -> dict:
    """Adam's rates for lazy penalties, see families/stylegan2.py."""
    return dict(
        lr=lr,
        b1=0.0,
        b2=0.99,
        ema_halflife=halflife,
        ema_rampup=rampup,
        networks=dict(
            generator=dict(lr=lr * 4 / 5, b2=0.99 ** (4 / 5)),
            discriminator=dict(lr=lr * 16 / 17, b2=0.99 ** (16 / 17)),
        ),
    )


def get_config(variant: str = ''):
    return make(
        variant,
        family='stylegan2',
        data=dict(source='folder:FFHQ', size=256, channels=3, batch=32, flip=True, test_fraction=0.02),
        model=dict(latent=512, mapping_layers=8, channel_base=32768, channel_max=512, r1=10.0),
        optim=optim(2e-3, 10_000.0),
        train=dict(steps=781_250, log_every=100, save_every=5000, sample_every=20_000),
        sample=dict(batch=64),
        evaluate=dict(batch=64),
        variants={
            'paper256': dict(
                data=dict(batch=64),
                model=dict(channel_base=16384, group=8, r1=1.0),
                optim=optim(2.5e-3, 20_000.0),
                train=dict(steps=390_625),
            ),
            'auto': dict(
                data=dict(batch=16),
                model=dict(channel_base=16384, mapping_layers=2, r1=0.0002 * 256**2 / 16),
                optim=optim(2.5e-3, 5000.0, rampup=0.05),
                train=dict(steps=1_562_500),
            ),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(latent=8, mapping_layers=2, channel_base=64, channel_max=8, projection_steps=2),
                optim=dict(lr=2e-3),
            ),
        },
    )
