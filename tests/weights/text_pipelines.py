"""Pipelines of diffusers with tiny networks of random weights that read texts."""

from __future__ import annotations

import numpy as np
import pytest
from references import randomise

from jaxgen.text import tokenizers

LENGTH, VOCABULARY = 11, 560
PROMPTS, NEGATIVES = ['a red heart on a mat', 'star star blue'], ['blurred', '']


def text(transformers, cls: str = 'CLIPTextModel', width: int = 32, embedding: int = 20, heads: int = 4, **options):
    torch = pytest.importorskip('torch')
    own = dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, eos_token_id=2, projection_dim=embedding)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=heads)
    return randomise(torch, getattr(transformers, cls)(transformers.CLIPTextConfig(**own, **sizes, **options)))


def t5(transformers, width: int):
    torch = pytest.importorskip('torch')
    sizes = dict(vocab_size=VOCABULARY, d_model=width, d_kv=10, d_ff=48, num_layers=2, num_heads=4)
    return randomise(torch, transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj='gated-gelu')))


def autoencoder(diffusers, **options):
    torch = pytest.importorskip('torch')
    kinds = dict(down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
    sizes = dict(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=32, norm_num_groups=32)
    return randomise(torch, diffusers.AutoencoderKL(**kinds, **sizes | options))


def unet(diffusers, first: bool, **options):
    """A U-Net with transformers on the first level, or on the last."""
    torch = pytest.importorskip('torch')
    kinds = ['CrossAttnDownBlock2D', 'DownBlock2D'][:: 1 if first else -1]
    sizes = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32)
    ups = [kind.replace('Down', 'Up') for kind in kinds[::-1]]
    return randomise(torch, diffusers.UNet2DConditionModel(
        down_block_types=kinds, up_block_types=ups, **sizes, **options))  # fmt: skip


BETAS = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, clip_sample=False)
FIRST = dict(set_alpha_to_one=False, steps_offset=1)
XL = dict(use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=8)


def stable_diffusion(diffusers, transformers, tokenizer):
    network = unet(diffusers, True, cross_attention_dim=64, attention_head_dim=4)
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(diffusers), text_encoder=text(transformers, width=64, heads=1), tokenizer=tokenizer,
        unet=network, scheduler=diffusers.DDIMScheduler(**BETAS, **FIRST), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(diffusers, transformers, tokenizer):
    network = unet(
        diffusers, False, cross_attention_dim=80, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=20 + 48, **XL,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(diffusers, scaling_factor=0.13025), text_encoder=text(transformers),
        text_encoder_2=text(transformers, 'CLIPTextModelWithProjection', 48, hidden_act='gelu'), tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=network, scheduler=diffusers.DDIMScheduler(**BETAS, **FIRST),
        add_watermarker=False,
    )  # fmt: skip


SHIFTED = dict(shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


def stable_diffusion_3(diffusers, transformers, tokenizer):
    torch = pytest.importorskip('torch')
    network = randomise(torch, diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=84, caption_projection_dim=32, pooled_projection_dim=44, out_channels=16,
        pos_embed_max_size=24, qk_norm='rms_norm', dual_attention_layers=(0,),
    ))  # fmt: skip
    projected = 'CLIPTextModelWithProjection'
    return diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(diffusers, latent_channels=16, scaling_factor=1.5305, **SHIFTED),
        text_encoder=text(transformers, projected),
        text_encoder_2=text(transformers, projected, 48, 24, hidden_act='gelu'), text_encoder_3=t5(transformers, 84),
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer, transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(diffusers, transformers, tokenizer):
    torch = pytest.importorskip('torch')
    network = randomise(torch, diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ))  # fmt: skip
    return diffusers.FluxPipeline(
        vae=autoencoder(diffusers, scaling_factor=0.3611, **SHIFTED), text_encoder=text(transformers),
        text_encoder_2=t5(transformers, 64), tokenizer=tokenizer, tokenizer_2=tokenizer, transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


LENGTHS = {'sd3': 256, 'flux': 512}  # tokens of T5
# {case: (pipeline, options of the call)}
PIPELINES = {
    'sd': (stable_diffusion, dict(guidance_scale=3.0, negative_prompt=NEGATIVES)),
    # Where nothing is unwanted its prompt is zeros, and one of its two is ''.
    'sdxl': (stable_diffusion_xl, dict(guidance_scale=3.0, negative_prompt=['blurred', 'blue'])),
    'sd3': (stable_diffusion_3, dict(guidance_scale=3.0, negative_prompt=NEGATIVES)),
    'flux': (flux, dict(guidance_scale=3.0)),
}


def save_tokenizer(folder: str) -> str:
    """The folder, with a tokenizer of CLIP's kind in it."""
    texts = (f'a {a} {b} on a mat' for a in ('red', 'blue') for b in ('heart', 'star'))
    tokenizers.train(texts, 550, LENGTH).save(folder)
    return folder


def saved(make, tokenizer: str, folder):
    """The pipeline, saved in a folder."""
    diffusers, transformers = pytest.importorskip('diffusers'), pytest.importorskip('transformers')
    pipeline = make(diffusers, transformers, transformers.CLIPTokenizer.from_pretrained(tokenizer))
    pipeline.save_pretrained(folder)
    return pipeline


def by_bfl(state: dict) -> dict:
    """The tensors of a FluxTransformer2DModel by the names of Black Forest Labs, flux/model.py."""
    out = {}
    for theirs, ours in (
        ('img_in', 'x_embedder'), ('txt_in', 'context_embedder'), ('final_layer.linear', 'proj_out'),
        *((f'{a}.{c}', f'time_text_embed.{b}.linear_{d}') for a, b in (
            ('time_in', 'timestep_embedder'), ('vector_in', 'text_embedder'), ('guidance_in', 'guidance_embedder'),
        ) for c, d in (('in_layer', 1), ('out_layer', 2))),
    ):  # fmt: skip
        out |= {f'{theirs}.{kind}': state[f'{ours}.{kind}'] for kind in ('weight', 'bias')}
    for kind in ('weight', 'bias'):  # their scale and shift change places
        out[f'final_layer.adaLN_modulation.1.{kind}'] = np.concatenate(
            np.split(state[f'norm_out.linear.{kind}'], 2)[::-1]
        )
    for i in range(2):
        block, single = f'transformer_blocks.{i}', f'single_transformer_blocks.{i}'
        for kind in ('weight', 'bias'):
            for stream, name, qkv in (('img', '', 'to_{}'), ('txt', '_context', 'add_{}_proj')):
                own = f'double_blocks.{i}.{stream}_'
                joined = [state[f'{block}.attn.{qkv.format(part)}.{kind}'] for part in 'qkv']
                out[f'{own}attn.qkv.{kind}'] = np.concatenate(joined)
                out[f'{own}mod.lin.{kind}'] = state[f'{block}.norm1{name}.linear.{kind}']
                for number, part in ((0, 'net.0.proj'), (2, 'net.2')):
                    out[f'{own}mlp.{number}.{kind}'] = state[f'{block}.ff{name}.{part}.{kind}']
            out[f'double_blocks.{i}.img_attn.proj.{kind}'] = state[f'{block}.attn.to_out.0.{kind}']
            out[f'double_blocks.{i}.txt_attn.proj.{kind}'] = state[f'{block}.attn.to_add_out.{kind}']
            parts = [state[f'{single}.attn.to_{part}.{kind}'] for part in 'qkv']
            out[f'single_blocks.{i}.linear1.{kind}'] = np.concatenate([*parts, state[f'{single}.proj_mlp.{kind}']])
            out[f'single_blocks.{i}.linear2.{kind}'] = state[f'{single}.proj_out.{kind}']
            out[f'single_blocks.{i}.modulation.lin.{kind}'] = state[f'{single}.norm.linear.{kind}']
        for short, long in (('q', 'query'), ('k', 'key')):
            for stream, name in (('img', 'norm'), ('txt', 'norm_added')):
                out[f'double_blocks.{i}.{stream}_attn.norm.{long}_norm.scale'] = state[
                    f'{block}.attn.{name}_{short}.weight'
                ]
            out[f'single_blocks.{i}.norm.{long}_norm.scale'] = state[f'{single}.attn.norm_{short}.weight']
    return out
