"""Trains the embedded model (obsdiff/data/fashion) and its judge from nothing, then measures them.

    apt-get install dataset-fashion-mnist
    python benchmarks/train_fashion.py --out fashion-model

With the default --minutes 62 minutes of training on two CPU cores, and some ten more for encoding the
photographs and for the evaluation. Small tensors make the allocator matter: preloading tcmalloc
(LD_PRELOAD=libtcmalloc_minimal.so.4) is up to 1.7 times faster. The budgets are of time, not of steps, so two
runs never give the same weights, and a slower machine gives a worse model; twice the time is still a little
better. A phase that has left its file in --out is not trained again, whatever its budget was: delete the file
to repeat it, and everything that came after it.

--smoke proves in about a minute that all of it runs. Its pictures are noise.

The data are Fashion-MNIST's photographs of Zalando articles (MIT licence, © 2017 Zalando SE). They are grey:
the colours are synthetic, painted on by `fashion_data.paint`.
"""

import argparse
import copy
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fashion_data as data
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from obsdiff.files import write_json, write_tensors
from obsdiff.measure.fashion import DATA, Classifier

VAE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 8,
    "mid_block_add_attention": False,
    "norm_num_groups": 8,
    "sample_size": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 8,
    "num_attention_heads": 8,
    "attention_head_dim": 16,
    "caption_projection_dim": 128,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "pos_embed_max_size": 8,
}
TEXT_ENCODER = {
    "vocab_size": 614,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": data.LENGTH,
    "projection_dim": 64,
    "bos_token_id": 612,
    "eos_token_id": 613,
    "pad_token_id": 613,
}
MINUTES = {"vae": 3.5, "flow": 22.0, "flow-more": 34.0, "classifier": 2.5}


def fit(model: nn.Module, loss: Callable[[int], Tensor], minutes: float, lr: float) -> dict[str, Tensor]:
    """Minimises `loss(step)` for so many minutes and returns the averaged (EMA 0.998) state, float32.

    AdamW with betas 0.9 and 0.99 and decay 0.01, 100 steps of warm-up, then a cosine over the time, gradients
    clipped to 1.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(model).requires_grad_(False)
    start, step, recent = time.monotonic(), 0, float("nan")
    model.train()
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * spent))
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # A young average forgets faster, or a short run would mostly return its first weights.
        share = 1 - min(0.998, (1 + step) / (10 + step))
        for mean, now in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mean.lerp_(now, share) if mean.is_floating_point() else mean.copy_(now)
        recent = value.item() if step == 0 else 0.98 * recent + 0.02 * value.item()
        step += 1
        if step % 100 == 0:
            print(f"  step {step}, {100 * spent:.0f} % of the time, loss {recent:.4f}", flush=True)
    print(f"  {step} steps, loss {recent:.4f}", flush=True)
    return average.state_dict()


def random_batch(args: argparse.Namespace) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """Draws training pictures [n, 3, 32, 32] in random colours, their items and their colours."""
    grey, items = data.photographs(args.data, "train", args.photos)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, colours = torch.randint(len(grey), (count,)), torch.randint(10, (count,))
        return data.paint(grey[rows], colours), items[rows], colours

    return draw


def train_vae(args: argparse.Namespace) -> dict[str, Tensor]:
    vae, draw = AutoencoderKL(**VAE), random_batch(args)

    def loss(step: int) -> Tensor:
        images, _, _ = draw(64)
        posterior = vae.encode(images).latent_dist
        difference = vae.decode(posterior.sample()).sample - images
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return difference.square().mean() + 0.1 * difference.abs().mean() + 3e-4 * divergence

    return fit(vae, loss, args.minutes["vae"], 2e-3)


@torch.no_grad()
def cache_latents(args: argparse.Namespace) -> dict[str, Tensor]:
    """Every photograph in two colours, no held-out pair: normalised latents float16, items, colours."""
    vae = AutoencoderKL(**VAE)
    vae.load_state_dict(load_file(args.out / "vae.safetensors"))
    grey, items = data.photographs(args.data, "train", args.photos)
    colours = data.draw_colours(items, 2, torch.Generator().manual_seed(args.seed))
    grey, items, colours = grey.repeat(2, 1, 1), items.repeat(2), colours.T.flatten()
    parts = zip(grey.split(500), colours.split(500), strict=True)
    latents = torch.cat([vae.encode(data.paint(*part)).latent_dist.mode() for part in parts])
    shift, scale = latents.mean(), 1 / latents.std()
    latents = ((latents - shift) * scale).half()
    return {"latents": latents, "items": items, "colours": colours, "shift": shift, "scale": scale}


def flow_model() -> nn.ModuleDict:
    encoders = {
        name: CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER)) for name in ("text_encoder", "text_encoder_2")
    }
    return nn.ModuleDict({"transformer": SD3Transformer2DModel(**TRANSFORMER), **encoders})


def encode(model: nn.ModuleDict, ids: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of token ids [n, 12]: states [n, 12 + padding, 128] and pooled [n, 128]."""
    outputs = [model[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return nn.functional.pad(states, (0, 0, 0, padding)), torch.cat([output.text_embeds for output in outputs], -1)


def train_flow(args: argparse.Namespace, phase: str, lr: float, first: str | None) -> dict[str, Tensor]:
    """Velocity matching of the transformer and both text encoders, from the weights of the phase `first`."""
    model = flow_model()
    if first:
        model.load_state_dict(load_file(args.out / f"{first}.safetensors"))
    cached = load_file(args.out / "latents.safetensors")
    ids, counts = data.caption_ids(CLIPTokenizer.from_pretrained(args.out / "tokenizer"))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(cached["latents"]), (128,))
        latents = cached["latents"][rows].float()
        noise = torch.randn_like(latents)
        sigmas = torch.randn(128).sigmoid().where(torch.rand(128) >= 0.15, torch.rand(128))
        noisy = torch.lerp(latents, noise, sigmas[:, None, None, None])
        tokens = data.draw_captions(ids, counts, cached["items"][rows], cached["colours"][rows])
        # A pipeline without a T5 appends 256 zero tokens unless told not to: the model must bear them.
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode(model, tokens, 256 if step % 16 == 15 else 0)
            velocity = model["transformer"](
                noisy, encoder_hidden_states=states, pooled_projections=pooled, timestep=sigmas * 1000
            ).sample
        return (velocity.float() - (noise - latents)).square().mean()

    return fit(model, loss, args.minutes[phase], lr)


def train_classifier(args: argparse.Namespace) -> dict[str, Tensor]:
    classifier, draw = Classifier(), random_batch(args)

    def loss(step: int) -> Tensor:
        images, items, colours = draw(128)
        seen_items, seen_colours, _ = classifier(images)
        return nn.functional.cross_entropy(seen_items, items) + nn.functional.cross_entropy(seen_colours, colours)

    return fit(classifier, loss, args.minutes["classifier"], 2e-3)


PHASES: dict[str, Callable[[argparse.Namespace], dict[str, Tensor]]] = {
    "vae": train_vae,
    "latents": cache_latents,
    "flow": partial(train_flow, phase="flow", lr=1.5e-3, first=None),
    "flow-more": partial(train_flow, phase="flow-more", lr=1e-3, first="flow"),
    "classifier": train_classifier,
}


def assemble(out: Path) -> StableDiffusion3Pipeline:
    """The phases' weights as one pipeline, float32; saved in float16 as `out`/pipeline."""
    latents, model, vae = load_file(out / "latents.safetensors"), flow_model(), AutoencoderKL(**VAE)
    vae.load_state_dict(load_file(out / "vae.safetensors"))
    vae.register_to_config(
        scaling_factor=round(latents["scale"].item(), 4), shift_factor=round(latents["shift"].item(), 4)
    )
    model.load_state_dict(load_file(out / "flow-more.safetensors"))
    tokenizers = {name: CLIPTokenizer.from_pretrained(out / "tokenizer") for name in ("tokenizer", "tokenizer_2")}
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder_3=None,
        tokenizer_3=None,
        **dict(model.items()),
        **tokenizers,
    )
    pipeline.to(torch.float16).save_pretrained(out / "pipeline")
    folder = out / "pipeline"
    # Loading and saving a tokenizer adds keys about where it was loaded from.
    for name in tokenizers:
        shutil.copytree(out / "tokenizer", folder / name, dirs_exist_ok=True)
    shutil.copyfile(DATA / "fashion" / "generation_config.json", folder / "generation_config.json")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written as 600
    return pipeline.to(torch.float32)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--data", type=Path, default=data.DATASET, help="folder of Fashion-MNIST's idx.gz files")
    parser.add_argument(
        "--minutes",
        type=float,
        nargs=4,
        metavar=tuple(map(str.upper, MINUTES)),
        default=list(MINUTES.values()),
        help="time for each training phase (default: %(default)s)",
    )
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, and few pictures")
    parser.add_argument("--photos", type=int, help="train on the first ones only (default: all 60,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    args = parser.parse_args()
    args.minutes = dict(zip(MINUTES, [0.05] * 4 if args.smoke else args.minutes, strict=True))
    args.pictures, args.steps = (200, 2) if args.smoke else (500, 20)
    if args.smoke:
        args.photos = 1000
    return args


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer").exists():
        data.train_tokenizer().save_pretrained(args.out / "tokenizer")
    for index, (name, phase) in enumerate(PHASES.items()):
        path = args.out / f"{name}.safetensors"
        print(f"{name}: {'is there' if path.exists() else 'starts'}", flush=True)
        if not path.exists():
            torch.manual_seed(args.seed + index)
            write_tensors(path, phase(args))
    pipeline, classifier = assemble(args.out), Classifier().eval()
    classifier.load_state_dict(load_file(args.out / "classifier.safetensors"))
    data.draw_grid(pipeline, args.seed, args.steps).save(args.out / "samples.png")
    rows = data.evaluate(pipeline, classifier, args.data, args.seed, args.steps, args.pictures)
    write_json(args.out / "results.json", rows)
    print(data.markdown(rows))


if __name__ == "__main__":
    main()
