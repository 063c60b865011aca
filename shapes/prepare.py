"""Make everything the shapes world ships, from nothing: python -m shapes.prepare.

Stages run in order; each writes its result to --work and is skipped when that is there, and a stage that
was interrupted goes on from its last checkpoint.

    vae      AutoencoderKL on rendered scenes
"""

import io
import json
import string
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from model import Flux, FluxConfig, init_weights
from leaps import rollout
from pictures import contact_sheet
from pipeline import Text, pack, sigmas, unpack, velocity_of
from shapes.world import COLORS, SHAPES, TASKS, Prompt, accuracy, all_prompts, by_task, distort, judge, render, scenes

PROMPTS = by_task(all_prompts())
TASK_WEIGHTS = (0.5, 1, 1, 0.7, 1.5, 2)  # single two count color position attr: more of what is harder to learn
TEXT_LENGTH = 12  # the longest caption has 11 tokens
SHIFT = 3.0  # of the noise levels, in training and in sampling
TINY = FluxConfig(
    in_channels=32,
    out_channels=32,
    vec_in_dim=64,
    context_in_dim=96,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=4,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(8, 12, 12),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=False,
)


@dataclass
class Config:
    work: Path = Path("runs/prepare")
    """Folder for the stages' results and checkpoints."""
    stages: tuple[str, ...] = ("vae",)
    """Stages to run, in this order."""
    seed: int = 0
    threads: int = 2


def sample_prompts(n: int, rng: np.random.Generator, weights: Iterable[float] = (1,) * 6) -> list[Prompt]:
    """n prompts: a task by weight (order of TASKS), then a prompt of the task uniformly."""
    p = np.array(list(weights), float)
    return [PROMPTS[t][rng.integers(len(PROMPTS[t]))] for t in rng.choice(TASKS, size=n, p=p / p.sum())]


def fit(
    name: str,
    modules: nn.ModuleDict,
    loss_fn: Callable[[np.random.Generator], dict[str, Tensor]],
    cfg: Config,
    steps: int,
    lr: float,
    save_every: int = 250,
) -> None:
    """AdamW with a one-cycle schedule on `loss_fn(rng)["loss"]`; resumable, and a no-op when already done.

    The random numbers of a step depend on (seed, stage, step) alone.
    """
    done, partial = cfg.work / f"{name}.pt", cfg.work / f"{name}.partial.pt"
    if done.exists():
        modules.load_state_dict(torch.load(done, weights_only=True))
        print(f"{name}: found {done}")
        return
    params = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    first = 0
    if partial.exists():
        saved = torch.load(partial, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    mean, start = {}, time.time()
    for step in range(first, steps):
        rng = np.random.default_rng((cfg.seed, sum(map(ord, name)), step))
        torch.manual_seed(int(rng.integers(2**31)))
        parts = loss_fn(rng)
        parts["loss"].backward()
        parts["grad"] = nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean = {k: 0.98 * mean.get(k, v.item()) + 0.02 * v.item() for k, v in parts.items()}
        if (step + 1) % 50 == 0:
            seconds = (time.time() - start) / (step + 1 - first)
            print(
                f"{name} {step + 1}/{steps}", *(f"{k} {v:.4f}" for k, v in mean.items()), f"{seconds:.2f} s/step"
            )
        if (step + 1) % save_every == 0 and step + 1 < steps:
            state = dict(modules=modules.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            torch.save(state | dict(schedule=schedule.state_dict()), tmp := partial.with_suffix(".tmp"))
            tmp.rename(partial)
    torch.save(modules.state_dict(), done)
    partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ vae


def make_vae() -> AutoencoderKL:
    """FLUX's kind of autoencoder, f8: 64x64x3 to 8x8x8, with a decoder that costs less than a rollout."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def stage_vae(cfg: Config) -> AutoencoderKL:
    vae = make_vae()

    def loss_fn(rng):
        shape = rng.integers(-1, len(SHAPES), (40, 4))  # fuller than prompts ask for: more to learn an image
        images = render(shape, rng.integers(len(COLORS), size=shape.shape), rng) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        mse, l1 = error.square().mean(), error.abs().mean()
        return dict(loss=mse + 0.5 * l1 + 3e-5 * kl, mse=mse / 4, kl=kl)

    fit("vae", nn.ModuleDict({"vae": vae}), loss_fn, cfg, steps=1900, lr=3e-3)
    vae.eval().requires_grad_(False)
    rng = np.random.default_rng(1)
    prompts = [p for t in TASKS for p in (PROMPTS[t] * 250)[:250]]
    images, _, _ = scenes(prompts, rng)
    latents = torch.cat([vae.encode(i * 2 - 1).latent_dist.mean for i in images.split(100)])
    decoded = torch.cat([vae.decode(z).sample for z in latents.split(100)]) / 2 + 0.5
    print("latents: mean", latents.mean().item(), "std", latents.std().item(), "per channel", latents.std((0, 2, 3)))
    print("judge on reconstructions", accuracy(judge(decoded, prompts), prompts), "mse", F.mse_loss(decoded, images))
    return vae


# ----------------------------------------------------------------------------------- tokenizers


def make_tokenizers(folder: Path) -> None:
    """Write `tokenizer/` (CLIP's kind of BPE) and `tokenizer_2/` (T5's sentencepiece) for the world's captions.

    Words are single pieces; any other text falls back to its characters.
    """
    captions = [p.text for p in all_prompts()]
    words = sorted({word for caption in captions for word in caption.split()})

    spiece = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *string.printable[:95] * 2]),
        model_writer=spiece,
        vocab_size=200,
        hard_vocab_limit=False,
        user_defined_symbols=["\u2581" + word for word in words],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_2" / "spiece.model").write_bytes(spiece.getvalue())
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer_2", extra_ids=0, model_max_length=TEXT_LENGTH)
    t5.save_pretrained(folder / "tokenizer_2")

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n")
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TEXT_LENGTH)
    clip.save_pretrained(folder / "tokenizer")


# ----------------------------------------------------------------------------------------- base


def make_model(folder: Path) -> nn.ModuleDict:
    """A fresh tiny Flux and the text encoders that are trained with it; tokenizers are read from `folder`."""
    t5_tokens = len(AutoTokenizer.from_pretrained(folder / "tokenizer_2"))
    clip_tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    flux = Flux(TINY)
    init_weights(flux)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_tokens,
            d_model=TINY.context_in_dim,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=TINY.vec_in_dim,
            intermediate_size=2 * TINY.vec_in_dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    return nn.ModuleDict(dict(flux=flux, t5=t5, clip=clip))


def token_table(folder: Path, name: str) -> Tensor:
    """Token ids of every caption in the order of all_prompts(), (236, TEXT_LENGTH)."""
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    captions = [p.text for p in all_prompts()]
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def stage_data(cfg: Config) -> dict[str, Tensor]:
    """Latents of rendered scenes, so that the base need not encode: x (n, 16, 32), the prompt of each, its layout.

    Latents are shifted and scaled to mean 0 and standard deviation 1 here, as FLUX does with its VAE's config.
    """
    done = cfg.work / "data.pt"
    if done.exists():
        return torch.load(done, weights_only=True)
    vae, rng = stage_vae(cfg), np.random.default_rng((cfg.seed, 1))
    counts = dict(single=250, two=300, count=300, color=250, position=200, attr=80)  # scenes a prompt
    prompts = [p for p in all_prompts() for _ in range(counts[p.task])]
    index = torch.arange(len(all_prompts())).repeat_interleave(torch.tensor([counts[p.task] for p in all_prompts()]))
    latents, layouts = [], []
    for i in range(0, len(prompts), 200):
        images, shape, color = scenes(prompts[i : i + 200], rng)
        latents.append(vae.encode(images * 2 - 1).latent_dist.mean)
        layouts.append(torch.from_numpy(np.stack([shape, color], 1)))
    z = torch.cat(latents)
    shift, scale = z.mean(), 1 / z.std()
    data = dict(
        x=pack((z - shift) * scale), prompt=index, layout=torch.cat(layouts), shift_factor=shift, scaling_factor=scale
    )
    torch.save(data, done)
    print(f"data: {len(z)} scenes, shift {shift.item():.4f}, scale {scale.item():.4f}")
    return data


class Sampler:
    """Scenes of the data by prompt, so that a caption can be paired with a scene it describes wrongly."""

    def __init__(self, data: dict[str, Tensor]):
        self.prompts = all_prompts()
        self.number = {p: i for i, p in enumerate(self.prompts)}
        self.rows = [torch.nonzero(data["prompt"] == i)[:, 0].numpy() for i in range(len(self.prompts))]

    def draw(self, n: int, wrong: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Indices of n captions and of n scenes; a caption is wrong in a detail with probability `wrong`."""
        captions = sample_prompts(n, rng, TASK_WEIGHTS)
        seen = [distort(p, rng) if rng.random() < wrong else p for p in captions]
        scene = [rng.choice(self.rows[self.number[p]]) for p in seen]
        return torch.tensor([self.number[p] for p in captions]), torch.tensor(np.array(scene))


def flow_loss(model: nn.ModuleDict, tables: tuple[Tensor, Tensor], caption: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """Flow matching: the squared error of the velocity x_1 - x_0 at logit-normal times with shift 3."""
    t5_ids, clip_ids = tables
    t = torch.sigmoid(torch.randn(len(x0)))
    t = 3 * t / (1 + 2 * t)
    text = Text(model["t5"](t5_ids[caption])[0], model["clip"](clip_ids[caption]).pooler_output)
    x = torch.lerp(x0, x1, t[:, None, None])
    return F.mse_loss(velocity_of(model["flux"], text, 4, 4)(x, t), x1 - x0)


def fit_flow(cfg: Config, name: str, model: nn.ModuleDict, wrong: float, steps: int, lr: float) -> None:
    data = stage_data(cfg)
    sampler = Sampler(data)
    tables = token_table(cfg.work, "tokenizer_2"), token_table(cfg.work, "tokenizer")

    def loss_fn(rng):
        caption, scene = sampler.draw(128, wrong, rng)
        x0 = data["x"][scene]
        return dict(loss=flow_loss(model, tables, caption, x0, torch.randn_like(x0)))

    fit(name, model, loss_fn, cfg, steps=steps, lr=lr)


def stage_clean(cfg: Config) -> nn.ModuleDict:
    """The base on right captions: what it knows."""
    if not (cfg.work / "tokenizer").exists():
        make_tokenizers(cfg.work)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg.work)
    fit_flow(cfg, "clean", model, wrong=0.0, steps=5000, lr=2e-3)
    report_base(cfg, "clean", model, steps=25)
    return model


# ------------------------------------------------------------------------------------- straighten


@torch.no_grad()
def generate(
    cfg: Config, model: nn.ModuleDict, caption: Tensor, steps: int, seed: int, batch: int = 250
) -> tuple[Tensor, Tensor]:
    """Noise and the model's own sample for each caption index: both (n, 16, 32)."""
    tables = token_table(cfg.work, "tokenizer_2"), token_table(cfg.work, "tokenizer")
    schedule = dict(use_dynamic_shifting=False, shift=SHIFT)
    generator, ends = torch.Generator().manual_seed(seed), []
    x1 = torch.randn(len(caption), 16, 32, generator=generator)
    for ids, noise in zip(caption.split(batch), x1.split(batch)):
        text = Text(model["t5"](tables[0][ids])[0], model["clip"](tables[1][ids]).pooler_output)
        ends.append(rollout(velocity_of(model["flux"], text, 4, 4), noise, sigmas(schedule, steps, 16)).x[-1])
    return x1, torch.cat(ends)


@torch.no_grad()
def pictures(cfg: Config, x: Tensor) -> Tensor:
    """Packed latents to images in [0, 1]."""
    data, vae = stage_data(cfg), stage_vae(cfg)
    z = unpack(x, 4, 4) / data["scaling_factor"] + data["shift_factor"]
    return torch.cat([vae.decode(part).sample / 2 + 0.5 for part in z.split(100)]).clamp(0, 1)


def report_base(cfg: Config, name: str, model: nn.ModuleDict, steps: int, each: int = 100) -> dict[str, float]:
    """Print the judge's accuracy on every task over all prompts and write a picture."""
    rng = np.random.default_rng(7)
    prompts = [PROMPTS[t][i] for t in TASKS for i in rng.integers(len(PROMPTS[t]), size=each)]
    number = {p: i for i, p in enumerate(all_prompts())}
    _, x0 = generate(cfg, model, torch.tensor([number[p] for p in prompts]), steps, seed=7)
    images = pictures(cfg, x0)
    scores = accuracy(judge(images, prompts), prompts)
    print(f"{name}, {steps} steps:", *(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
    contact_sheet(images[:: each // 8], [p.text for p in prompts[:: each // 8]], cfg.work / f"{name}.png", columns=8)
    return scores


def stage_base(cfg: Config) -> nn.ModuleDict:
    """A light finish on captions that are often wrong in detail: the base still knows, but does not always obey."""
    model = stage_clean(cfg)
    fit_flow(cfg, "base", model, wrong=0.6, steps=500, lr=8e-4)
    report_base(cfg, "base", model, steps=25)
    return model


def stage_reflow(cfg: Config) -> nn.ModuleDict:
    """Reflow: learn the straight line between each noise and the model's own 25-step sample.

    FLUX.1-dev is guidance-distilled and nearly straight; leaps need that. Text encoders are frozen from here on.
    """
    model = stage_base(cfg)
    done = cfg.work / "pairs.pt"
    if not done.exists():
        rng = np.random.default_rng((cfg.seed, 2))
        number = {p: i for i, p in enumerate(all_prompts())}
        caption = torch.tensor([number[p] for p in sample_prompts(24_000, rng)])
        noise, end = generate(cfg, model, caption, steps=25, seed=2)
        torch.save(dict(caption=caption, noise=noise, end=end), done)
    pairs = torch.load(done, weights_only=True)
    tables = token_table(cfg.work, "tokenizer_2"), token_table(cfg.work, "tokenizer")
    model["t5"].requires_grad_(False)
    model["clip"].requires_grad_(False)

    def loss_fn(rng):
        i = torch.from_numpy(rng.integers(len(pairs["caption"]), size=128))
        return dict(loss=flow_loss(model, tables, pairs["caption"][i], pairs["end"][i], pairs["noise"][i]))

    fit("reflow", model, loss_fn, cfg, steps=1500, lr=8e-4)
    for steps in (4, 8, 25):
        report_base(cfg, f"reflow-{steps}", model, steps=steps)
    return model


# --------------------------------------------------------------------------------------- reward


def stage_labels(cfg: Config) -> dict[str, Tensor]:
    """Pictures for the reward: decoded scenes, and images of the models so far, labelled by the judge.

    uint8 images (n, 3, 64, 64), caption (n,), right (n,), layout (n, 2, 4) with -2 where unknown.
    """
    done = cfg.work / "labels.pt"
    if done.exists():
        return torch.load(done, weights_only=True)
    data, rng, prompts = stage_data(cfg), np.random.default_rng((cfg.seed, 3)), all_prompts()
    number = {p: i for i, p in enumerate(prompts)}
    keep = torch.from_numpy(np.concatenate([rng.permutation(rows)[:50] for rows in Sampler(data).rows]))
    images = [pictures(cfg, data["x"][keep])]
    caption, layout = [data["prompt"][keep]], [data["layout"][keep]]
    right = [torch.ones(len(keep), dtype=torch.bool)]
    for model, steps, n in ((stage_base(cfg), 12, 5000), (stage_reflow(cfg), 5, 7000)):
        chosen = sample_prompts(n, rng)
        ids = torch.tensor([number[p] for p in chosen])
        images.append(pictures(cfg, generate(cfg, model, ids, steps, seed=3 + steps)[1]))
        caption.append(ids)
        right.append(judge(images[-1], chosen))
        layout.append(torch.full((n, 2, 4), -2))
        print("labelled", accuracy(right[-1], chosen), flush=True)
    labels = dict(
        images=torch.cat(images).mul(255).round().byte(),
        caption=torch.cat(caption),
        right=torch.cat(right),
        layout=torch.cat(layout),
    )
    torch.save(labels, done)
    return labels


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    cfg.work.mkdir(parents=True, exist_ok=True)
    for stage in cfg.stages:
        globals()[f"stage_{stage}"](cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
