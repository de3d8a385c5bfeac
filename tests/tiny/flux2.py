"""Random FLUX.2 pipelines: two double and two single blocks, gated MLPs, fused projections, modulation outside the
blocks, four-axis rotary positions that come with a batch, an encoder from three of whose layers embeddings are taken.
`make` is dev: a Mistral 3 encoder, guidance embedded. `make_klein`: a Qwen 3 encoder, guidance by a second call."""

from pathlib import Path

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save

WIDTH = 16  # of the encoder: a third of what the denoiser reads
TEXT = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
DEFAULTS = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 4.0, "max_sequence_length": 16}
# Prompts alone, since the system message would fill the 16 tokens.
CHAT = (
    "{% for message in messages %}{% if message.role == 'user' %}{% if message.content is string %}"
    "{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}{% endif %}{% endfor %}"
)


def make(folder: Path) -> Path:
    tokenizer = _tokenizer()
    text = {**TEXT, "model_type": "mistral", "head_dim": 8, "num_hidden_layers": 30, "vocab_size": len(tokenizer)}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
    }
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,  # the processor that it really has needs torchvision, and does the same to prompts
        transformer=_transformer(guidance=True),
    )
    return save(pipe, folder, {**DEFAULTS, "prompt_tokens": 16})


def make_klein(folder: Path, distilled: bool = False) -> Path:
    tokenizer = _tokenizer()
    config = Qwen3Config(**TEXT, head_dim=8, num_hidden_layers=27, vocab_size=len(tokenizer))
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=_transformer(guidance=False),
        is_distilled=distilled,
    )
    return save(pipe, folder, {**DEFAULTS, "prompt_tokens": 16})


def _transformer(guidance: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    louder(transformer.transformer_blocks)
    louder(transformer.single_transformer_blocks)
    return transformer


def _vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's with a template for chats, and padded on the left."""
    own = load_pipeline(find_source("fashion")).tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        pad_token=own.pad_token,
        eos_token=own.eos_token,
        padding_side="left",
        chat_template=CHAT,
    )
