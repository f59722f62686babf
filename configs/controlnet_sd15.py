"""ControlNet of Stable Diffusion 1.5, 512x512, by the edges of images (Zhang et al. 2023, arXiv 2302.05543).

    python -m jaxgen.main --config=configs/controlnet_sd15.py --mode=describe
    python -m jaxgen.main --mode=import --config=controlnet_sd15 --config.stages.base=runs/sd15 \\
        --config.stages.first=runs/sd15/stages/first --config.stages.text=runs/sd15/stages/text \\
        --from=sd-controlnet-canny --workdir=runs/canny
    python -m jaxgen.main --mode=sample --workdir=runs/canny --condition=edges=canny.png \\
        --condition=caption='a house in the mountains'

The base is an imported Stable Diffusion, see `stable_diffusion`; folders of the hub (ControlNetModel) and the files of
lllyasviel are imported. Edges, depth, poses, ... differ in weights alone: the image is read as it is, so edges are made
beforehand. To train one on a run's own images: `--config=runs/sd15:controlnet --config.data.source=PATH`.

361,279,120 weights.

Differs: data are drawn scenes, where a person names no others. Published: 3 million images with edges, 600 GPU-hours on
A100 (README of the model); half of the captions left out.

Time: not measured
Paper: none for edges; FID 15.27 by segments of ADE20K (table 3)
Ours: shape-checked
"""

from jaxgen.config import make
from jaxgen.configs import stable_diffusion


def get_config(variant: str = ''):
    base = stable_diffusion.get_config('tiny' if 'tiny' in variant.split(',') else '').to_dict()
    model = base['model']
    model['conditioning']['caption']['dropout'] = 0.5
    return make(
        variant,
        family='diffusion',
        stages=dict(base='runs/stable_diffusion', **base['stages']),
        data=dict(source='shapes', size=512, channels=3, features=('image', 'caption', 'edges'), batch=32),
        model=model | dict(controlnet=dict(name='latent_unet', condition='edges')),
        optim=dict(name='adamw', lr=1e-5, weight_decay=0.01, ema=0.0),
        train=dict(steps=100_000, log_every=100, save_every=5000, sample_every=50_000, samples=4, dtype='bfloat16'),
        evaluate=dict(features='inception', samples=5000),
        sample=dict(batch=4),
        variants={'tiny': dict(model=dict(controlnet=dict(hint=(4, 4))))},
    )
