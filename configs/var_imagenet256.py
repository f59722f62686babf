"""VAR on ImageNet 256x256, class-conditional (Tian et al. 2024): d16, and d20, d24, d30 and, of 512x512 pixels, d36.

    python -m jaxgen.main --config=configs/var_imagenet256.py

after its first stage, `configs/var_vqvae_imagenet256.py`. The others by name, say `var_imagenet256.py:d30`; `d36`
stands on `configs/var_vqvae_imagenet256.py:px512`.

Differs: the warm-up begins at its first update's part of the learning rate, there at 0.005 of it; images are resized by
bicubic interpolation, there Lanczos; float16 there.

Time: not measured
Paper: FID of the released weights, in the release's README: 3.55; d20 2.95, d24 2.33, d30 1.97, d36 at 512x512 2.63
(guidance 1.5, top_k 900, top_p 0.96). The last version of the paper has 3.30; d20 2.57, d24 2.09, d30 1.92
Ours: shape-checked
"""

from jaxgen.config import deep_update, make

EPOCH = 1_281_167
NO_DECAY = ('bias', 'start', 'positions', 'levels', 'log_scale')


def size(
    blocks: int,
    epochs: int,
    gate: float,
    lr: float = 8e-5,
    batch: int = 768,
    floor: float = 0.01,
    weight_decay_end: float = 0.05,
) -> dict:
    """What depends on the depth; lr is that of 256 images, as in the released code. Weight decay goes from 0.05 to
    `weight_decay_end` along half a cosine."""
    steps = epochs * EPOCH // batch
    return dict(
        data=dict(batch=batch),
        model=dict(channels=64 * blocks, blocks=blocks, heads=blocks, drop_path=blocks / 240, gate=gate),
        optim=dict(lr=lr * batch / 256, warmup=steps // 50, floor=floor, weight_decay_end=weight_decay_end),
        train=dict(steps=steps),
    )


def get_config(variant: str = ''):
    base = size(16, 200, 1e-3, lr=1e-4, floor=0.1)
    d36 = dict(
        stages=dict(first='runs/var_vqvae_imagenet256_px512'),
        data=dict(size=512, jitter=64),
        model=dict(shared=True),
        # The table of all blocks' modulation takes its weight decay; what each adds to it takes none.
        optim=dict(no_decay=(*NO_DECAY, 'blocks/modulation')),
    )
    return make(
        variant,
        family='var',
        stages=dict(first='runs/var_vqvae_imagenet256'),
        data=dict(
            source='imagenet2012',
            size=256,
            channels=3,
            features=('image', 'label'),
            # Resized to 1.125 of the size, and cut out anywhere.
            crop='random',
            jitter=32,
            **base['data'],
        ),
        model=dict(conditional=True, label_dropout=0.1, guidance=1.5, top_k=900, top_p=0.96, **base['model']),
        optim=dict(
            name='adamw',
            schedule='linear',
            plateau=0.05,
            b2=0.95,
            clip=2.0,
            weight_decay=0.05,
            weight_decay_schedule='cosine',
            no_decay=NO_DECAY,
            ema=0.0,
            **base['optim'],
        ),
        train=dict(
            log_every=100,
            save_every=5000,
            sample_every=50_000,
            samples=16,
            dtype='bfloat16',
            remat=True,
            **base['train'],
        ),
        mesh=dict(fsdp=4),
        sample=dict(batch=32),
        variants={
            'd20': size(20, 250, 1e-3, lr=1e-4, floor=0.1),
            'd24': size(24, 350, 1e-4),
            'd30': size(30, 350, 1e-5, batch=1024, weight_decay_end=0.08),
            'd36': deep_update(size(36, 350, 5e-6, weight_decay_end=0.08), d36),
            'tiny': dict(
                data=dict(source='shapes', jitter=2),
                model=dict(channels=16, blocks=2, heads=2),
                optim=dict(warmup=0, schedule='linear'),
            ),
        },
    )
