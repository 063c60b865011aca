"""What a run needs, read and checked before anything expensive starts."""

import importlib.util
import inspect
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import baselines
import leaps
from baselines import Log
from config import Config, Experiment, Method
from infra.checkpoints import folders
from infra.distributed import World, fill, shard_flux, shard_frozen
from infra.files import replacing
from infra.folders import Pipeline, describe, is_lora, load
from infra.logs import truncate
from infra.lora import add_lora, first_values, wrapped_name
from infra.prompts import read_prompts
from infra.user_code import is_user_code, load_function, where
from leaps import Samples
from model import Flux
from rewards import Reward, check_rewards, open_rewards
from sample import grid, sigmas


@dataclass
class Setup:
    """A run's inputs."""

    pipe: Pipeline
    method: Callable[[Samples], dict[str, Tensor]]  # with its options
    group: int  # samples of one prompt, neighbours in the batch
    rewards: list[Reward]
    watched: list[Reward]
    prompts: list[str]
    eval_prompts: list[str]
    levels: Tensor  # noise levels of a rollout, (T + 1,)
    out: Path


# ------------------------------------------------------------------------------------------- method


def method_of(name: str) -> Callable[..., dict[str, Tensor]]:
    """The function that --method names: of leaps.py or baselines.py, or FILE.py:FUNCTION. Raises ValueError."""
    if is_user_code(name):
        return load_function(name, "method")
    function = {**vars(baselines), **vars(leaps)}.get(name)
    if not inspect.isfunction(function) or not is_method(inspect.signature(function)):
        raise ValueError(f"--method {name}: it is a function of leaps.py or baselines.py, or FILE.py:FUNCTION of yours")
    return function


def is_method(signature: inspect.Signature) -> bool:
    """Whether a function is one: (s: Samples, *, keyword=default, ...) -> dict[str, Tensor]."""
    first, *others = signature.parameters.values() or [None]
    keyword_only = all(p.kind is p.KEYWORD_ONLY for p in others)
    return first is not None and first.annotation is Samples and keyword_only and signature.return_annotation == Log


def keywords(method: Callable) -> dict[str, Any]:
    """The options of a method and their defaults."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {p.name: p.default for p in parameters}


def options_of(cfg: Config, preset: Config) -> dict[str, Any]:
    """What the flags say of the method's keywords. Raises ValueError for a flag that it does not have."""
    known = keywords(method_of(cfg.method))
    flags = [f.name for f in fields(Method) if f.name not in ("method", "option")]
    for name in flags:
        if name not in known and getattr(cfg, name) != getattr(preset, name):
            raise ValueError(
                f"--{name.replace('_', '-')} means nothing with --method {cfg.method}, which has no such keyword"
            )
    options = {name: getattr(cfg, name) for name in flags if name in known and getattr(cfg, name) is not None}
    for text in cfg.option:
        name, equals, value = text.partition("=")
        if not equals or name not in known or name in flags:
            own = ", ".join(name for name in known if name not in flags) or "none"
            raise ValueError(f"--option {text}: NAME=VALUE, of the keywords of {cfg.method} that are no flags: {own}")
        try:
            options[name] = value if isinstance(known[name], str) else json.loads(value.lower())
        except ValueError:
            raise ValueError(f"--option {text}: {value!r} is no number, true, false or null") from None
    return options


def recorded(cfg: Config) -> dict[str, Any]:
    """The flags as config.json has them: the method's keywords with the values that count."""
    known = keywords(method_of(cfg.method))
    flags = json.loads(json.dumps(asdict(cfg), default=str))
    return flags | {k: v for k, v in known.items() if k in flags and flags[k] is None}


def try_method(method: Callable, levels: Tensor, group: int) -> bool:
    """Run a method once on zeros: whether it asks for the rewards' gradient. Raises ValueError if it cannot run."""
    b, asked = 2 * group, set()
    zeros = torch.zeros(b, 1, 1)

    def note(name: str, value: Tensor) -> Tensor:
        asked.add(name)
        return value

    samples = Samples(
        noise=lambda i: zeros,
        sigmas=levels,
        generator=torch.Generator(),
        velocity=lambda x, sigma: torch.zeros_like(x),
        vjp=lambda x, sigma, u, wrt_x=False: note("vjp", torch.zeros_like(x)),
        reward=lambda x0, weight=None: note("reward", torch.zeros_like(x0)),
        score=lambda x0: note("score", zeros[:, 0, 0]),
        total=b,
        update=0,
    )
    try:
        log = method(samples)
    except ValueError as error:
        raise ValueError(f"--method: {error}") from error
    except Exception as error:
        raise ValueError(f"--method fails on zeros: {where(error)}") from error
    if "vjp" not in asked:
        raise ValueError(f"--method makes no gradient: it never calls vjp in a rollout of {len(levels) - 1} steps")
    if not isinstance(log, dict) or not all(isinstance(v, Tensor) and v.shape in ((), (b,)) for v in log.values()):
        raise ValueError("--method must return a dict of tensors to log, a value a sample (b,) or one for all ()")
    return "reward" in asked


# -------------------------------------------------------------------------------------------- checks


def check_model(cfg: Config) -> Tensor:
    """The noise levels of a rollout; raises ValueError if the model cannot do what the flags ask of it."""
    description = describe(cfg.model)
    if description.config.guidance_embed and cfg.guidance is None:
        raise ValueError(f"--guidance is needed: {cfg.model} is distilled with guidance (3.5 for FLUX.1-dev)")
    if cfg.lora and is_lora(cfg.model):
        raise ValueError(f"--lora on --model {cfg.model}, itself a LoRA: train its base, or go on with all weights")
    rows, columns = grid(description, cfg.size, cfg.size)
    return sigmas(description.schedule, cfg.rollout_steps, rows * columns)


def check_groups(cfg: Config, world: World, group: int) -> None:
    """Raise ValueError if a rank's samples, or those of a rollout, do not divide into groups of one prompt."""
    share = cfg.batch // world.size
    if share % group or (cfg.rollout_batch or share) % group:
        raise ValueError(
            f"--group {group}: a rank's {share} of --batch and its --rollout-batch must be multiples of it"
        )


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
    if cfg.tau is not None and cfg.tau <= 0:
        raise ValueError(f"--tau must be positive, got {cfg.tau}: the weight of an exact leap is 1 / (2 tau)")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {cfg.ema}")
    if cfg.batch % world.size:
        raise ValueError(f"--batch {cfg.batch} does not divide into {world.size} ranks: take a multiple of it")
    if not cfg.reward:
        raise ValueError("--reward: give one or more")
    if cfg.lam and len(cfg.lam) != len(cfg.reward):
        raise ValueError(
            f"--lam has {len(cfg.lam)} values for {len(cfg.reward)} rewards: give one each, or none at all"
        )
    if cfg.stop_early and not cfg.watch:
        raise ValueError("--stop-early needs a reward to --watch")
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
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out}: nothing can be written in {existing}")
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
    now = recorded(cfg)
    before = recorded(Config(method=cfg.method)) | before  # flags that are younger than the run
    kept = [f.name for f in fields(Experiment)] + ["method", "option", *keywords(method_of(cfg.method))]
    kept += ["steps"] if cfg.decay else []  # the learning rate falls over all of them
    for name in kept:
        if name in now and now[name] != before[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume with --{flag} {now[name]}, but {out} was started with {before[name]}")


def prepare(cfg: Config, world: World, preset: Config | None = None) -> Setup:
    """Read and check all inputs; `preset` holds what the flags changed.

    Raises ValueError naming the flag or the file, what is wrong and what to do.
    """
    check_flags(cfg, world)
    method, options = method_of(cfg.method), options_of(cfg, preset or Config())
    out = cfg.out or Path("runs") / f"{cfg.method.rpartition(':')[2]}-seed{cfg.seed}"
    check_folder(cfg, out)
    prompts, eval_prompts = read_prompts(cfg.prompts), read_prompts(cfg.eval_prompts)
    levels = check_model(cfg)
    group = options.get("group", keywords(method).get("group", 1))
    check_groups(cfg, world, group)
    method = partial(method, **options)
    needs_gradient = try_method(method, levels, group)
    check_rewards([*cfg.reward, *cfg.watch], eval_prompts, cfg.size)

    pipe = load_pipeline(cfg, world)
    rewards = open_rewards([*cfg.reward, *cfg.watch], pipe.device, pipe.clip_tokenizer, cfg.recompute, cfg.size)
    if cfg.shard_frozen:
        for model in (pipe.t5, *(r.model for r in rewards if r.model)):
            shard_frozen(model, world)
    rewards, watched = rewards[: len(cfg.reward)], rewards[len(cfg.reward) :]
    if needs_gradient:
        for reward in rewards:
            image = torch.rand(1, 3, cfg.size, cfg.size, device=world.device).requires_grad_()
            if not reward.score(image, prompts[:1]).requires_grad:
                raise ValueError(
                    f"--reward {reward.name} has no gradient in the images: watch it, or take a method that needs "
                    "none, such as flow_grpo"
                )
    if cfg.lam:
        rewards = [replace(r, lam=lam) for r, lam in zip(rewards, cfg.lam, strict=True)]
    return Setup(pipe, method, group, rewards, watched, prompts, eval_prompts, levels.to(world.device), out)


def load_pipeline(cfg: Config, world: World) -> Pipeline:
    """The model folder, its transformer placed as the flags say: cut over the ranks, with a LoRA, in bf16, compiled."""
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
    return pipe


def open_folder(cfg: Config, out: Path, first: int) -> list[dict[str, Any]]:
    """Make the run folder, or take from its logs what will be written again; returns the evaluations that stay."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    with replacing(out / "config.json") as part:
        part.write_text(json.dumps(recorded(cfg), indent=2) + "\n")
    for later in [f for f in folders(out) if f.name > f"step_{first:06d}"]:  # unreadable, or after --at
        shutil.rmtree(later)
    truncate(out / "metrics.jsonl", first)
    return truncate(out / "eval.jsonl", first)
