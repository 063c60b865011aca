"""What a run needs, read and checked before anything expensive starts."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import PRESETS, Config, sides
from formats.folders import Pipeline, describe, load_parts
from formats.lora import Change, add_lora, first_values, wrapped_name
from formats.lora_files import lora_file, merge_lora, read_lora
from formats.reading import flux_file
from infra.anchor import frozen_copy
from infra.checkpoints import checkpoint_folders
from infra.checks import check_flags, check_folder, check_groups, check_prompts, tell_changes
from infra.distributed import Process, fill, shard_flux
from infra.files import PART, recover, remove, replacing, set_aside
from infra.fp8 import in_fp8, to_fp8
from infra.jsonl import Entry, read_log, truncate_log
from infra.meter import Flops, network_flops
from infra.methods import (
    find_method,
    method_keywords,
    method_options,
    recorded_flags,
    resume_flags,
    try_method,
    user_code_hashes,
)
from infra.prompts import print_once, prompts_hash, read_prompts
from infra.user_code import describe_error, is_user_code
from infra.watch import best_evaluation
from leaps import Samples
from model import Flux, FluxConfig
from rewards import RULES, Reward, check_rewards, open_reward, reward_name, try_score
from sample import sigmas, token_grid, truncation_warning


@dataclass
class Size:
    """An image's, and what follows from it."""

    height: int  # in pixels, as width
    width: int
    tokens: tuple[int, int]  # rows and columns
    levels: Tensor  # noise levels of a rollout, (T + 1,)
    flops: Flops  # of an evaluation of the network


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
    sizes: list[Size]  # they take turns
    base: Flux | None  # what --anchor holds the network to: a copy, or itself with a LoRA that can be off
    out: Path

    def size(self, step: int) -> Size:
        return self.sizes[step % len(self.sizes)]


# -------------------------------------------------------------------------------------------- checks


def earlier_lora(cfg: Config, config: FluxConfig) -> dict[str, list[Change]] | None:
    """What the LoRA changes that --lora goes on with; None without one."""
    file = lora_file(cfg.model) if cfg.lora else None
    return read_lora(file, config) if file else None


def check_model(cfg: Config) -> list[Tensor]:
    """The noise levels of a rollout at each size; raises ValueError if the model cannot do what the flags ask of it."""
    if cfg.base and not lora_file(cfg.model) and not flux_file(cfg.model):
        raise ValueError(f"--base {cfg.base} is for a LoRA or a transformer's file, and --model {cfg.model} is neither")
    description = describe(cfg.model, cfg.base)
    if description.weights.config.guidance_embed and cfg.guidance is None:
        raise ValueError(f"--guidance is needed: {cfg.model} is distilled with guidance (3.5 for FLUX.1-dev)")
    if cfg.lora and (changes := earlier_lora(cfg, description.weights.config)):
        flux = empty_flux(cfg, description.weights.config)
        try:
            for _ in first_values(flux, cfg.seed, changes):
                pass
        except ValueError as error:
            raise ValueError(f"--lora {cfg.lora} on --model {cfg.model}, itself a LoRA: {error}") from None
    tokens = [math.prod(token_grid(description, *sides(size))) for size in cfg.size]
    return [sigmas(description.schedule, cfg.rollout_steps, n) for n in tokens]


def prepare(cfg: Config, process: Process, preset: Config | None = None) -> Setup:
    """Read and check all inputs; `preset` is what the flags started from: what differs from it was asked for.

    Raises ValueError naming the flag or the file, what is wrong and what to do.
    """
    check_flags(cfg, process)
    method, options = find_method(cfg.method), method_options(cfg, preset or Config())
    out = cfg.out or Path("runs") / f"{cfg.method.rpartition(':')[2]}-seed{cfg.seed}"
    check_folder(cfg, out, recorded_flags(cfg), recorded_flags(Config(method=cfg.method)), resume_flags(cfg))
    prompts, eval_prompts = read_prompts(cfg.prompts), read_prompts(cfg.eval_prompts)
    if cfg.resume and (out / "config.json").exists():
        check_prompts(out, prompts, eval_prompts, (cfg.prompts, cfg.eval_prompts))
        tell_changes(out, user_code_hashes(cfg))
    for size in cfg.size:
        check_rewards([*cfg.reward, *cfg.watch], eval_prompts, sides(size), f"--eval-prompts {cfg.eval_prompts}")
        check_rewards(cfg.reward, prompts, sides(size), f"--prompts {cfg.prompts}")
    levels = check_model(cfg)
    group = options.get("group", method_keywords(method).get("group", 1))
    check_groups(cfg, process, group)
    method = partial(method, **options)
    for of_size in levels:
        needs_gradient = try_method(method, of_size, group)
    check_needs(cfg, needs_gradient)
    specs, first = [*cfg.reward, *cfg.watch], sides(cfg.size[0])
    # Functions are tried before weights are read; of networks it is known that they have a gradient.
    tried = [s for s in specs if is_user_code(s) or reward_name(s) in RULES]
    functions = {s: open_reward(s, process.device, size=first, prompts=eval_prompts) for s in tried}
    # Evaluations are at the first size, so only what is trained on sees the others.
    for size, spec in itertools.product(map(sides, cfg.size[1:]), filter(is_user_code, cfg.reward)):
        try_score(functions[spec].score, spec, process.device, size, prompts)
    for reward in (functions[s] for s in cfg.reward if s in functions and needs_gradient):
        check_gradient(reward, prompts[:1], first, process.device)

    pipe = load_inputs(cfg, process)
    if process.rank == 0 and (warning := truncation_warning(pipe, [*prompts, *eval_prompts])):
        print_once(warning)
    rewards = [functions.get(s) or open_reward(s, pipe.device, pipe.clip_tokenizer, cfg.recompute) for s in specs]
    rewards, watched = rewards[: len(cfg.reward)], rewards[len(cfg.reward) :]
    if cfg.lam or not needs_gradient:
        rewards = [replace(r, lam=lam) for r, lam in zip(rewards, cfg.lam or [None] * len(rewards), strict=True)]
    sizes = []
    for size, of_size in zip(cfg.size, levels, strict=True):
        height, width = sides(size)
        rows, columns = token_grid(pipe, height, width)
        cost = flops_of(cfg, pipe, rows * columns)
        sizes.append(Size(height, width, (rows, columns), of_size.to(process.device), cost))
    base = None
    if cfg.anchor and not cfg.export:
        base = pipe.flux if cfg.lora else frozen_copy(pipe.flux, process, pipe.compute)
    return Setup(pipe, method, group, rewards, watched, prompts, eval_prompts, sizes, base, out)


def check_needs(cfg: Config, needs_gradient: bool) -> None:
    """Raise ValueError if the rewards are not what a method asks for: their gradient, or them as they are."""
    if needs_gradient and "judge" in map(reward_name, cfg.reward):
        raise ValueError(f"--reward judge has no gradient, which {cfg.method} needs: flow_grpo does without")
    if cfg.lam and not needs_gradient:
        raise ValueError(f"--lam means nothing with --method {cfg.method}, which takes the rewards as they are")


def check_gradient(reward: Reward, prompts: list[str], size: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError if a reward has no gradient in an image."""
    image = torch.rand(1, 3, *size, device=device).requires_grad_()
    try:
        score, why = reward.score(image, prompts), ""
    except Exception as error:  # numpy takes nothing that has a gradient
        score, why = None, f" ({describe_error(error)})"
    if score is None or not score.requires_grad:
        raise ValueError(
            f"--reward {reward.name} has no gradient in the images{why}: watch it, or take a method that needs none, "
            "such as flow_grpo"
        )


def empty_flux(cfg: Config, config: FluxConfig) -> Flux:
    """The network that the flags ask for, without memory."""
    with torch.device("meta"):
        flux = Flux(config)
        if cfg.lora:
            add_lora(flux, cfg.lora, cfg.lora_alpha or 2 * cfg.lora)
    return flux


def load_inputs(cfg: Config, process: Process) -> Pipeline:
    """The model folder, its transformer placed as the flags say: cut over the ranks, with a LoRA, in bf16, compiled."""
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32

    def place(flux: Flux, tensors: Iterator[tuple[str, Tensor]]) -> None:
        if cfg.lora:
            changes = earlier_lora(cfg, flux.config)
            add_lora(flux.to(dtype), cfg.lora, cfg.lora_alpha or 2 * cfg.lora)
            known = {name for name, _ in flux.named_parameters()}
            renamed = ((wrapped_name(name, known), tensor) for name, tensor in tensors)
            if cfg.fp8:
                to_fp8(flux)
                renamed = in_fp8(renamed, {name for name, _ in flux.named_parameters()})
            tensors = itertools.chain(renamed, first_values(flux, cfg.seed, changes))
        flux.recompute = cfg.recompute
        if cfg.compile:
            # Blocks share their variants, at each size with and without gradients: more than the 8 that are allowed.
            torch._dynamo.config.recompile_limit = 64
            for block in [*flux.double_blocks, *flux.single_blocks]:
                block.compile()
        if cfg.lean:
            flux.to(dtype)
        elif not cfg.fp8:  # whose one GPU has all, and whose LoRA casts itself
            shard_flux(flux, process, dtype)
        fill(flux, tensors, process.device)

    description = describe(cfg.model, cfg.base)
    config, tensors, lora = description.weights.config, description.weights.tensors, description.location.lora
    if lora and not cfg.lora:  # with --lora the LoRA goes on beside the base
        tensors = merge_lora(tensors, read_lora(lora, config))
    with torch.device("meta"):
        flux = Flux(config)
    place(flux, tensors)
    pipe = load_parts(description, flux, process.device, dtype, cfg.text_length, cfg.offload_encoders)
    if cfg.recompute:
        pipe.vae.enable_gradient_checkpointing()
    return pipe


def flops_of(cfg: Config, pipe: Pipeline, tokens: int) -> Flops:
    """What an evaluation of the network costs."""
    flux = empty_flux(cfg, pipe.flux.config)
    flux.recompute = cfg.recompute
    return network_flops(flux, tokens, pipe.text_length)


def announce(cfg: Config, preset: Config, setup: Setup, process: Process) -> str:
    """What a run is, in a few lines; all of it is in config.json."""
    name = next(name for name, (_, known) in PRESETS.items() if known is preset)
    changed = {f.name: value for f in fields(Config) if (value := getattr(cfg, f.name)) != getattr(preset, f.name)}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
    trained = sum(p.numel() for p in setup.pipe.flux.parameters() if p.requires_grad)
    rewards = ", ".join(r.name if r.lam is None else f"{r.name} (lambda {r.lam})" for r in setup.rewards)
    together = cfg.rollout_batch or cfg.batch // process.world_size
    return f"""\
{name} {flags}
{cfg.method} on {cfg.model}: {trained / 1e6:.1f} M trained parameters
raises {rewards}; watches {", ".join(r.name for r in setup.watched) or "nothing"}
{cfg.batch} rollouts of {cfg.rollout_steps} steps an update on {process.world_size} x {process.device.type}
{together} rollouts at a time, {cfg.micro_batch or together} in a backward
all flags are in {setup.out / "config.json"}"""


def open_folder(cfg: Config, setup: Setup, first: int) -> tuple[list[Entry], Entry | None]:
    """Make the run folder, or take from its logs what will be written again.

    Returns the evaluations that stay, and the one of them that best/ is of.
    """
    out = setup.out
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for name in ("best", "final"):
        recover(out / name)
    read = dict(
        prompts_read=[prompts_hash(setup.prompts), prompts_hash(setup.eval_prompts)], code_read=user_code_hashes(cfg)
    )
    with replacing(out / "config.json") as part:
        part.write_text(json.dumps(recorded_flags(cfg) | read, indent=2) + "\n")
    for later in [f for f in checkpoint_folders(out) if f.name > f"step_{first:06d}"]:
        if cfg.at is not None:
            shutil.rmtree(later)
        else:  # the disk may have been at fault, not what is on it
            set_aside(later, ".unreadable")
            print_once(f"{later} is kept as {later.name}.unreadable, and made again")
    for part in (out / "checkpoints").glob(f"*{PART}"):  # of a save that was killed, up to 190 GB
        remove(part)
    kept = of_best(out, setup)
    if cfg.at is not None and kept and kept["step"] > first:  # an evaluation that is forgotten
        set_aside(out / "best", mark := f".step_{kept['step']:06d}")
        print_once(f"{out / 'best'} is of step {kept['step']}, and is kept as best{mark}")
    truncate_log(out / "metrics.jsonl", first)
    again = first % cfg.eval_every == 0 or first == cfg.updates  # or its evaluation, the last of a shorter run, stays
    return truncate_log(out / "eval.jsonl", first if again else first + 1), of_best(out, setup)


def of_best(out: Path, setup: Setup) -> Entry | None:
    """The evaluation that best/ is of, by the run's log; None if there is no best/."""
    evals = read_log(out / "eval.jsonl")
    if not evals or not setup.watched or not (out / "best").exists():
        return None
    kept = [e for e in evals if "kept" in e]  # older runs have none
    return kept[-1] if kept else best_evaluation(evals, setup.watched[0].name)
