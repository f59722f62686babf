"""VQ-VAE-2 on ImageNet at 256x256: 32x32 coarse codes and 64x64 fine ones out of 512.

    python -m jaxgen.main --config=configs/vqvae2_imagenet256.py

The sizes are those of rosinality/vq-vae-2-pytorch: 1,388,867 weights and two codebooks of 32,768 numbers. The paper's
own networks were not published.

Differs: the number of updates is the paper's; the port trains 560 epochs.

Time: not measured
Paper: FID 31.1 of samples through its priors (as scored by Dhariwal & Nichol 2021, table 5)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqvae',
        data=dict(source='imagenet2012', size=256, channels=3, batch=128),
        model=dict(levels=2),
        optim=dict(lr=3e-4, ema=0.0),
        train=dict(steps=2_200_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(data=dict(source='shapes'), model=dict(width=8, blocks=1, hidden=4, vocabulary=8, latent=4)),
        },
    )
