"""StarGAN v2 on CelebA-HQ, 256x256, two domains, as published; `afhq` is the three kinds of animal faces of AFHQ.

    python -m jaxgen.main --config=configs/stargan2_celebahq256.py
    python -m jaxgen.main --config=configs/stargan2_celebahq256.py:afhq

Images lie in a folder by domain, celeba_hq/train/female and /male, as the authors' archives have them
(https://github.com/clovaai/stargan-v2 says where those are); or name a folder of your own, with a sub-folder for each
domain. FID and LPIPS of the paper cannot be compared with ours: its Inception network has other weights.

Differs: edges are added everywhere, not where a network for facial landmarks detects them (an image of these
positions among the data's features can be named as config.model.mask); domains come as often as the data have them, not
evenly.

Time: not measured
Paper: FID 13.73, LPIPS 0.452 by latents, 23.84 and 0.388 by references; AFHQ 16.18 and 0.450, 19.78 and 0.432
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='stargan2',
        data=dict(
            source='folder:celeba_hq/train',
            classes=2,
            size=256,
            channels=3,
            features=('image', 'label', 'domain'),
            batch=8,
            # Half of the images are random rectangles.
            crop='resized',
            crop_area=(0.8, 1.0),
            crop_aspect=(0.9, 1.1),
            crop_rate=0.5,
            flip=True,
            test_fraction=0.02,
        ),
        # The published generator has 172,032 weights more: of shortcuts in the decoder, which high_pass leaves out.
        model=dict(halvings=5, high_pass=1.0, skips=(32, 64, 128)),
        optim=dict(lr=1e-4, b1=0.0, b2=0.99, l2=1e-4, ema=0.999, networks=dict(mapping=dict(lr=1e-6))),
        train=dict(steps=100_000, log_every=100, save_every=5000, sample_every=5000),
        sample=dict(batch=32),
        evaluate=dict(batch=32),
        variants={
            'afhq': dict(
                data=dict(source='folder:afhq/train', classes=3),
                model=dict(halvings=4, high_pass=0.0, skips=(), diversity=2.0),
            ),
            'tiny': dict(
                data=dict(source='shapes', classes=0),
                model=dict(
                    width=4,
                    max_width=8,
                    halvings=1,
                    blocks=1,
                    skips=(8,),
                    latent=4,
                    style=4,
                    hidden=8,
                    mapping_layers=1,
                ),
                optim=dict(lr=1e-4),
            ),
        },
    )
