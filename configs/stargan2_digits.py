"""StarGAN v2 on scikit-learn's 8x8 handwritten digits: the ten digits are the domains, and hands are styles.

    python -m jaxgen.main --config=configs/stargan2_digits.py

`--mode=sample --film=11` shows of every picture three rows: the picture as each digit in a style from noise; pictures
to take after; and what it becomes after these. So small, a digit and a style of 16 numbers are all there is to say: the
results look like the pictures that they take after, and little is left of the picture that is turned.

Scenes of 32x32, each shape a domain, are too much for minutes on a CPU: 1,200 updates of 8 scenes (0.29 s each)
turned backgrounds into those of the pictures taken after, but no shape into another.

Time: 6.7 minutes of CPU (21 minutes on a core shared with other work)
Paper: none
Ours: Fréchet distance 0.20 (classifier_digits, 500 samples; held-out digits have 0.19); by that classifier all of them
      are the digit that was asked for; error of the way there and back 0.123, of styles 0.025 (359 held-out digits)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='stargan2',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label', 'domain'), batch=32),
        model=dict(
            width=24,
            most=48,
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
                model=dict(width=4, most=8, halvings=1, blocks=0, latent=4, style=4, hidden=8, mapping_layers=1)
            ),
        },
    )
