"""StarGAN v2 on scikit-learn's 8x8 handwritten digits: the ten digits are the domains, and hands are styles.

    python -m jaxgen.main --config=configs/stargan2_digits.py

`--mode=sample --film=11` displays three rows for every image: its translations into each digit in a style from noise;
reference images; and its translations into their domains and styles. In images so small a digit and a style of 16
numbers are nearly everything: translations look like their references, and little is left of the source image.

Scenes of 32x32, each shape a domain, are too much for minutes on a CPU: 1,200 updates of 8 scenes (0.29 s each)
translated backgrounds into those of the references, but no shape into another.

Time: 6.7 minutes of CPU (21 minutes on a core shared with other work)
Paper: none
Ours: Fréchet distance 0.20 (classifier_digits, 500 samples; held-out digits have 0.19); by that classifier all of them
      are of the target class; cycle error 0.123, style error 0.025 (359 held-out digits)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='stargan2',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label', 'domain'), batch=32),
        model=dict(
            width=24,
            max_width=48,
            halvings=1,
            blocks=2,
            norm='group',
            latent=8,
            style=16,
            hidden=64,
            mapping_layers=2,
            r1=0.1,
            diversity_steps=2500,
        ),
        optim=dict(lr=1e-3, schedule='half_linear', b1=0.0, b2=0.99, ema=0.995, ema_warmup=True),
        train=dict(steps=2500, updates_per_call=10, log_every=50, save_every=500, sample_every=0),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(width=4, max_width=8, halvings=1, blocks=0, latent=4, style=4, hidden=8, mapping_layers=1)
            ),
        },
    )
