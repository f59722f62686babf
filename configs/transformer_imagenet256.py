"""Class-conditional transformer of VQGAN on ImageNet 256x256 (Esser et al. 2020).

    python -m jaxgen.main --config=configs/transformer_imagenet256.py

after its first stage, `configs/vqgan_imagenet256.py:k16384`. On fewer than four devices --config.mesh.fsdp=1.

Differs: the release does not say the batch of its run; 96 is that of its first stage, and the learning rate 4.5e-6 for
each of its images, by the release's rule. Images are resized by bicubic interpolation, there bilinear.

Time: not measured
Paper: FID 15.98 and 15.78 by different decoding; 5.20 with rejection by a classifier (the release's README)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='transformer',
        stages=dict(first='runs/vqgan_imagenet256_k16384'),
        data=dict(
            source='imagenet2012',
            size=256,
            channels=3,
            batch=96,
            features=('image', 'label'),
            crop='random',
        ),
        model=dict(channels=1536, blocks=48, heads=24, conditional=True, top_k=250),
        # Weight decay of the matrices alone: not of biases, norms and embeddings.
        optim=dict(
            name='adamw',
            lr=96 * 4.5e-6,
            b2=0.95,
            weight_decay=0.01,
            no_decay=('bias', 'scale', 'embedding', 'positions'),
            ema=0.0,
        ),
        train=dict(
            steps=2_000_000,
            log_every=100,
            save_every=5000,
            sample_every=50_000,
            samples=16,
            dtype='bfloat16',
            remat=True,
        ),
        # The state of training is 22.6 GB, more than a chip of 16 GB holds.
        mesh=dict(fsdp=4),
        sample=dict(batch=32),
        variants={
            'tiny': dict(
                data=dict(source='shapes'), model=dict(channels=16, blocks=2, heads=2), optim=dict(warmup=0, ema=0.9)
            ),
        },
    )
