"""What a run needs, read and checked before anything expensive starts."""

import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config
from infra.checkpoints import folders
from infra.distributed import World, fill, shard_flux, shard_frozen
from infra.folders import describe, is_lora, load
from infra.logs import truncate
from infra.lora import add_lora, first_values, wrapped_name
from infra.prompts import read_prompts
from leaps import pick_leaps
from model import Flux
from rewards import Reward, check_rewards, name_of, open_rewards
from sample import Pipeline, grid, sigmas
from shapes.world import SIZE, parse

FREE = {"out", "resume", "export", "at", "steps", "keep", "save_every", "log", "device", "rollout_batch", "micro_batch",
        "recompute", "compile", "shard", "keep_gathered", "shard_frozen", "offload_encoders", "check_every",
        "skip_nonfinite", "patience", "stop_early"}  # fmt: skip


@dataclass
class Setup:
    """A run's inputs."""

    pipe: Pipeline
    rewards: list[Reward]
    watched: list[Reward]
    prompts: list[str]
    eval_prompts: list[str]
    levels: Tensor
    out: Path


def pick(cfg: Config, levels: Tensor, generator: torch.Generator) -> tuple[int, ...]:
    """The steps of a rollout that the method differentiates. Raises ValueError if the flags leave none."""
    steps = len(levels) - 1
    if cfg.method == "full":
        return tuple(range(steps))
    if cfg.method == "refl":  # a random one of the last 11 of 25 steps, as in the paper's baseline
        return (steps - 1 - int(torch.randint(max(1, round(steps * 11 / 25)), (), generator=generator)),)
    return pick_leaps(levels, generator, cfg.leaps, cfg.low, cfg.high, cfg.distance)


def check_model(cfg: Config) -> Tensor:
    """The noise levels of a rollout; raises ValueError if the model cannot do what the flags ask of it."""
    told = describe(cfg.model)
    if told.config.guidance_embed and cfg.guidance is None:
        raise ValueError(f"--guidance is needed: {cfg.model} is distilled with guidance (3.5 for FLUX.1-dev)")
    if cfg.lora and is_lora(cfg.model):
        raise ValueError(f"--lora on --model {cfg.model}, itself a LoRA: train its base, or go on with all weights")
    rows, columns = grid(told, cfg.size, cfg.size)
    levels = sigmas(told.schedule, cfg.rollout_steps, rows * columns)
    pick(cfg, levels, torch.Generator())
    return levels


def check_flags(cfg: Config, world: World) -> None:
    """Raise ValueError naming the flag that cannot be, and why."""
    counts = ("steps", "batch", "rollout_steps", "eval_every", "text_length", "patience", "save_every", "keep", "lora")
    for name in (*counts, "rollout_batch", "micro_batch", "check_every"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("lr", "weight_decay", "seed", "clip"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(cfg, name)}")
    if cfg.lora_alpha is not None and (not cfg.lora or cfg.lora_alpha <= 0):
        raise ValueError(f"--lora-alpha {cfg.lora_alpha} must be positive, and is for --lora")
    if cfg.tau <= 0:
        raise ValueError(f"--tau must be positive, got {cfg.tau}: the weight of an exact leap is 1 / (2 tau)")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {cfg.ema}")
    if cfg.batch % world.size:
        raise ValueError(f"--batch {cfg.batch} does not divide into {world.size} ranks: take a multiple of it")
    if not cfg.reward or "judge" in map(name_of, cfg.reward):
        raise ValueError(f"--reward {' '.join(cfg.reward)}: give one or more that have a gradient (not the judge)")
    if cfg.lam and len(cfg.lam) != len(cfg.reward):
        raise ValueError(
            f"--lam has {len(cfg.lam)} values for {len(cfg.reward)} rewards: give one each, or none at all"
        )
    if cfg.stop_early and not cfg.watch:
        raise ValueError("--stop-early needs a reward to --watch")
    own = ("weight", "leaps", "low", "high", "distance", "nested_only")
    if cfg.method != "leapalign" and (given := [k for k in own if getattr(cfg, k) != getattr(Config(), k)]):
        name = given[0].replace("_", "-")
        raise ValueError(f"--{name} is a choice of leapalign and means nothing with --method {cfg.method}")
    if missing := [kind for kind in cfg.log if importlib.util.find_spec(kind) is None]:
        raise ValueError(f"--log {missing[0]} needs that package: pip install {missing[0]}, or leave the flag out")
    if cfg.lean and world.size > 1:
        raise ValueError(f"--lean is for one GPU, and there are {world.size} ranks: they share the weights without it")
    if cfg.lean and (cfg.lora or not cfg.bf16):
        raise ValueError("--lean keeps all trained weights in bf16: it needs --bf16, and --lora trains others")
    if cfg.lean and importlib.util.find_spec("torchao") is None:
        raise ValueError("--lean needs torchao's optimizer: pip install torchao")
    if cfg.shard_frozen and cfg.offload_encoders:
        raise ValueError("--shard-frozen and --offload-encoders: T5 is either cut over the ranks or on the CPU")
    if (cfg.export or cfg.at is not None) and not cfg.resume:
        raise ValueError("--export and --at need --resume: they name a checkpoint of the run in --out")


def check_folder(cfg: Config, out: Path) -> None:
    """Raise ValueError if nothing can be written there, or it holds what these flags do not go on with."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: nothing can be written in {there}")
    if cfg.export and cfg.export.exists():
        raise ValueError(f"--export {cfg.export} is there already: give a folder that is not")
    if not cfg.resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out} is occupied: --resume goes on with it, or choose another folder")
        return
    if not (out / "config.json").exists():
        if cfg.export or cfg.at is not None:
            raise ValueError(f"--out {out} holds no run")
        return
    try:
        before = json.loads((out / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{out / 'config.json'} is damaged ({error}): write the run's flags into it again") from None
    now = json.loads(json.dumps(asdict(cfg), default=str))
    free = FREE - {"steps"} if cfg.decay else FREE  # the learning rate falls over all of them
    before = json.loads(json.dumps(asdict(Config()), default=str)) | before  # flags that are younger than the run
    if other := [k for k in now if k not in free and now[k] != before[k]]:
        k = other[0]
        raise ValueError(f"--resume with --{k.replace('_', '-')} {now[k]}, but {out} was started with {before[k]}")


def prepare(cfg: Config, world: World) -> Setup:
    """Read and check all inputs. Raises ValueError naming the flag or the file, what is wrong and what to do."""
    check_flags(cfg, world)
    out = cfg.out or Path("runs") / f"{cfg.method}-seed{cfg.seed}"
    check_folder(cfg, out)
    prompts, eval_prompts = read_prompts(cfg.prompts), read_prompts(cfg.eval_prompts)
    if "judge" in map(name_of, cfg.watch):
        try:
            [parse(text) for text in eval_prompts]
        except ValueError as error:
            raise ValueError(f"--eval-prompts {cfg.eval_prompts}: {error}; --watch without judge takes any") from error
        if cfg.size != SIZE:
            raise ValueError(
                f"--size {cfg.size}: the judge reads {SIZE}x{SIZE} pixels; --watch without judge takes any"
            )
    levels = check_model(cfg)
    check_rewards([*cfg.reward, *cfg.watch])
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32

    def place(flux: Flux, tensors: Iterator[tuple[str, Tensor]]) -> None:
        if cfg.lora:
            add_lora(flux.to(dtype), cfg.lora, cfg.lora_alpha or 2 * cfg.lora)
            known = {name for name, _ in flux.named_parameters()}
            renamed = ((wrapped_name(name, known), tensor) for name, tensor in tensors)
            tensors = itertools.chain(renamed, first_values(flux, cfg.seed))
        flux.recompute = cfg.recompute
        if cfg.compile:
            for block in [*flux.double_blocks, *flux.single_blocks]:
                block.compile()
        if cfg.lean:
            flux.to(dtype)
        else:
            shard_flux(flux, world, dtype)
        fill(flux, tensors, world.device)

    pipe = load(cfg.model, world.device, dtype, cfg.text_length, cfg.offload_encoders, place)
    if cfg.recompute:
        pipe.vae.enable_gradient_checkpointing()
    rewards = open_rewards([*cfg.reward, *cfg.watch], pipe.device, pipe.clip_tokenizer, cfg.recompute, cfg.size)
    if cfg.shard_frozen:
        for model in (pipe.t5, *(r.model for r in rewards if r.model)):
            shard_frozen(model, world)
    rewards, watched = rewards[: len(cfg.reward)], rewards[len(cfg.reward) :]
    for reward in rewards:
        image = torch.rand(1, 3, cfg.size, cfg.size, device=world.device).requires_grad_()
        if not reward.score(image, prompts[:1]).requires_grad:
            raise ValueError(f"--reward {reward.name} has no gradient in the images: it can be watched, not trained on")
    if cfg.lam:
        rewards = [replace(r, lam=lam) for r, lam in zip(rewards, cfg.lam, strict=True)]
    return Setup(pipe, rewards, watched, prompts, eval_prompts, levels.to(world.device), out)


def open_folder(cfg: Config, out: Path, first: int) -> list[dict[str, Any]]:
    """Make the run folder, or take from its logs what will be written again; returns the evaluations that stay."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    (part := out / "config.part").write_text(json.dumps(asdict(cfg), indent=2, default=str) + "\n")
    part.replace(out / "config.json")
    print(json.dumps(asdict(cfg), indent=2, default=str))
    print(f"from step {first}")
    for later in [f for f in folders(out) if f.name > f"step_{first:06d}"]:  # unreadable, or after --at
        shutil.rmtree(later)
    truncate(out / "metrics.jsonl", first)
    return truncate(out / "eval.jsonl", first)
