"""MaskGIT on ImageNet 256x256, class-conditional (Chang et al. 2022), over the 1024 codes of VQGAN.

    python -m jaxgen.main --config=configs/maskgit_imagenet256.py

after its first stage, `configs/vqgan_imagenet256.py`.

Differs: the release has no training loop; what its configs and losses say is here. Its first stage is another: of
StyleGAN2's discriminator with blur, R1 of 10, perceptual and adversarial weights of 0.1 and a loss of codes' entropy of
0.1, Adam (0, 0.99) at 1e-4, batch 256, 1,000,000 updates. The paper's random resized crops have no published ranges:
here is a random square of the shorter side, mirrored. Dropout of attention is drawn for each image and head, there once
for all of them.

Time: not measured
Paper: FID 6.18 (8 steps), with a first stage of its own
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='maskgit',
        stages=dict(first='runs/vqgan_imagenet256'),
        data=dict(
            source='imagenet2012',
            size=256,
            channels=3,
            batch=256,
            flip=True,
            features=('image', 'label'),
            crop='random',
        ),
        model=dict(
            channels=768,
            blocks=24,
            heads=16,
            conditional=True,
            attention_dropout=0.1,
            mean='image',
            steps=8,
            choice_temperature=4.5,
        ),
        optim=dict(name='adamw', lr=1e-4, b2=0.96, weight_decay=0.045, warmup=5000, ema=0.999),
        train=dict(
            steps=2_000_000,
            log_every=100,
            save_every=5000,
            sample_every=50_000,
            samples=16,
            dtype='bfloat16',
            remat=True,
        ),
        sample=dict(batch=32),
        variants={
            'tiny': dict(
                data=dict(source='shapes'), model=dict(channels=16, blocks=2, heads=2, steps=3), optim=dict(warmup=0)
            ),
        },
    )
