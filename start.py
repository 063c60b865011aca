"""What a run needs, read and checked in the order of cost, before anything expensive starts.

`prepare` looks at the flags, then the prompts, then the headers of the model, then the user's code. train.py builds the
network, and `load_networks` reads all other weights. `open_folder` makes the run's folder.
Every error is a ValueError that names the flag or the file, what was found and what to do.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import HERE, Config, command, sides
from families import Network, NetworkConfig, empty_network
from formats.folders import Description, Pipeline, describe, load_parts
from formats.lora import Changes, add_lora, first_values, wrapped_name
from formats.lora_files import lora_file, merge_lora, read_lora
from formats.names import flux_file
from formats.reading import check_links
from formats.weights import weight_files
from infra.anchor import anchored
from infra.checkpoints import checkpoint_folders, remove_old_checkpoints, update_of
from infra.checks import check_flags, check_folder, check_groups, check_log_names, check_prompts, tell_changes
from infra.distributed import Process
from infra.downloads import check_downloads
from infra.failures import score_or_nan
from infra.files import (
    PART,
    beside,
    check_room,
    check_writable,
    content_hash,
    lock_folder,
    put_in_place,
    recover,
    remove,
    unlock_folder,
    write_whole,
)
from infra.flags import flag_of
from infra.jsonl import Entry, read_log, truncate_log
from infra.meter import network_flops
from infra.methods import (
    Trial,
    find_method,
    method_keywords,
    method_options,
    recorded_flags,
    resume_flags,
    try_method,
    user_code_hashes,
)
from infra.prompts import print_on_first_rank, prompts_hash, prompts_of_update, read_prompts
from infra.user_code import is_user_code, revision
from infra.watch import watched_value
from leaps import Samples
from rewards import RULES, WEIGHTS, Reward, check_rewards, open_reward, reward_hash, reward_name, try_score
from sample import Reader, choose_guidance, is_guided, token_grid, truncation_warning
from samples import Size


@dataclass
class Setup:
    """The inputs of a run. `load_networks` adds pipe, rewards and watched; train.set_up adds base."""

    out: Path
    method: Callable[[Samples], dict[str, Tensor]]  # with its keywords
    group: int  # samples of one prompt, neighbours in the batch
    needs_base: bool  # whether the method compares with the untuned network
    prompts: list[str]
    eval_prompts: list[str]
    model: Description  # the model's small files and the headers of its weights
    sizes: list[Size]  # they take turns, an update each
    weightless_rewards: dict[str, Reward]  # by --reward: those that are no network, the user's code and rules
    pipe: Pipeline | None = None
    rewards: list[Reward] | None = None
    watched: list[Reward] | None = None
    base: Network | None = None  # the untuned network: a copy, or the network itself with a LoRA that is switched off

    def size(self, update: int) -> Size:
        return self.sizes[update % len(self.sizes)]


def prepare(cfg: Config, process: Process, preset: Config | None = None) -> Setup:
    """Read and check everything but weights. `preset` holds the values that the flags started from.

    Raises ValueError naming the flag or the file, what was found and what to do.
    """
    method, group = choose_method(cfg, process, preset or Config())
    out = run_folder(cfg)
    check_writable(f"--out {out}", out)
    if process.rank == 0 and out.exists() and not cfg.export:
        # Does another process train there? `open_folder` asks again, after weights are read, which takes minutes.
        lock_folder(out)
        unlock_folder(out)
    check_folder(cfg, out, recorded_flags(cfg), resume_flags(cfg))
    check_downloads(cfg, WEIGHTS)
    prompts, eval_prompts = read_run_prompts(cfg, out)
    model = describe_model(cfg)
    if not cfg.export:
        check_room(f"--out {out}", out, disk_needs(cfg, model))
    sizes = [size_of(cfg, model, name) for name in cfg.size]
    weightless_rewards, trial = try_user_code(cfg, process, method, group, sizes, prompts, eval_prompts)
    return Setup(out, method, group, trial.needs_base, prompts, eval_prompts, model, sizes, weightless_rewards)


def shared_inputs(cfg: Config, setup: Setup) -> dict[str, Any]:
    """What must be alike on all ranks: each flag, and hashes of what the flags name and of this program."""
    shared = {}
    for name, value in asdict(cfg).items():
        shared[flag_of(name)] = value
    shared["what --prompts says"] = prompts_hash(setup.prompts)
    shared["what --eval-prompts says"] = prompts_hash(setup.eval_prompts)
    shared["your code"] = user_code_hashes(cfg)
    files = weight_files(setup.model.location)
    for component in setup.model.family.FROZEN:
        files += sorted((setup.model.location.folder / component).glob("*.safetensors"))
    shared["the content of --model"] = content_hash(files)
    for spec in (*cfg.reward, *cfg.watch):
        shared[f"the content of the reward {spec}"] = reward_hash(spec)
    sources = [*HERE.glob("*.py"), *HERE.glob("*/*.py")]
    shared["this program"] = content_hash(sorted(sources))
    return shared


def run_folder(cfg: Config) -> Path:
    """--out, or runs/METHOD-seedN."""
    method_name = cfg.method.rpartition(":")[2]
    return cfg.out or Path("runs") / f"{method_name}-seed{cfg.seed}"


# -------------------------------------------------------------------------------------- 1. the flags


def choose_method(cfg: Config, process: Process, preset: Config) -> tuple[Callable, int]:
    """The method with its keywords, and how many samples of one prompt it compares with each other."""
    check_flags(cfg, process)
    method = find_method(cfg.method)
    options = method_options(cfg, preset)
    group = options.get("group", method_keywords(method).get("group", 1))
    check_groups(cfg, process, group)
    method = partial(method, **options)
    # The anchor is wrapped around the method, so neither the method nor train.py knows of it.
    if cfg.anchor:
        method = anchored(method, cfg.anchor, cfg.anchor_on or "velocity")
    return method, group


# ------------------------------------------------------------------------------------ 2. the prompts


def read_run_prompts(cfg: Config, out: Path) -> tuple[list[str], list[str]]:
    """The prompts to train on and to evaluate on, which a resumed run must find as they were."""
    prompts = read_prompts(cfg.prompts)
    eval_prompts = read_prompts(cfg.eval_prompts)
    if cfg.smoke:
        # Evenly spread: prompts of one kind lie together in a file.
        eval_prompts = eval_prompts[:: max(1, len(eval_prompts) // 6)][:6]
    if cfg.resume and (out / "config.json").exists():
        check_prompts(out, prompts, eval_prompts, (cfg.prompts, cfg.eval_prompts))
        tell_changes(out, user_code_hashes(cfg))
    # The judge knows the captions and the image size of the shapes world only.
    for size in cfg.size:
        check_rewards([*cfg.reward, *cfg.watch], eval_prompts, sides(size), f"--eval-prompts {cfg.eval_prompts}")
        check_rewards(cfg.reward, prompts, sides(size), f"--prompts {cfg.prompts}")
    return prompts, eval_prompts


def batch_prompts(cfg: Config, setup: Setup, update: int) -> list[str]:
    """The prompts of an update's batch, each `setup.group` times where a method compares samples of one prompt."""
    distinct_prompts = prompts_of_update(setup.prompts, update, cfg.batch // setup.group, cfg.seed)
    prompts = []
    for prompt in distinct_prompts:
        prompts += [prompt] * setup.group
    return prompts


# ---------------------------------------------------------------------------- 3. the model's headers


def describe_model(cfg: Config) -> Description:
    """All of the model but its weights. Raises ValueError if it cannot do what the flags ask of it."""
    if cfg.base is not None and not lora_file(cfg.model) and not flux_file(cfg.model):
        raise ValueError(f"--base {cfg.base} is for a LoRA or a transformer's file, and --model {cfg.model} is neither")
    model = describe(cfg.model, cfg.base)
    if not cfg.lora:
        # best/ and final/ are whole models, whose frozen parts are copies.
        components = [model.location.folder / component for component in model.family.FROZEN]
        check_links(components, model.location.folder)
    config = model.weights.config
    default = choose_guidance(None, config)
    if default and cfg.guidance is None:
        raise ValueError(f"--guidance is needed, {default} is usual for {model.family.NAME} as {cfg.model}")
    if cfg.guidance is not None and not default and not is_guided(config, cfg.guidance):
        print_on_first_rank(f"note: --guidance {cfg.guidance} is not used: {cfg.model} takes none")
    if (cfg.negative_prompt or cfg.detach_negative) and not is_guided(config, cfg.guidance):
        raise ValueError(
            f"--negative-prompt and --detach-negative are for --guidance by a second evaluation, and --guidance "
            f"{cfg.guidance} of {cfg.model} is none"
        )
    if cfg.lora and cfg.lora > config.hidden_size:
        raise ValueError(
            f"--lora {cfg.lora} is more than the {config.hidden_size} channels of the layers of {cfg.model}"
        )
    changes = earlier_lora(cfg, model.weights.config)
    if changes:  # --model is a LoRA: does it fit into a LoRA of the rank that --lora names?
        for _ in first_values(empty_flux(cfg, model.weights.config), cfg.seed, changes):
            pass
    return model


def size_of(cfg: Config, model: Description, name: str) -> Size:
    """The size that one value of --size names, the noise levels of its rollouts, and what the network costs there."""
    height, width = sides(name)
    rows, columns = token_grid(model, height, width)
    levels = model.family.sigmas(model.schedule, cfg.rollout_steps, rows * columns)
    # FLOPs of the network that is trained: a LoRA adds products, and its frozen weights have no gradient.
    flux = empty_flux(cfg, model.weights.config)
    flux.recompute = cfg.recompute
    flops = network_flops(flux, rows * columns, text_length(cfg, model))
    return Size(height, width, rows, columns, levels, flops)


def disk_needs(cfg: Config, model: Description) -> dict[str, float]:
    """Bytes of what a run must be able to write: without a checkpoint and a model all training is lost."""
    flux = empty_flux(cfg, model.weights.config)
    count = sum(p.numel() for p in flux.parameters() if p.requires_grad)
    bytes_of_state = 4 + 4 + 2 * 4  # weights, averages and AdamW's two moments, in fp32
    if cfg.lean:
        bytes_of_state = 2 + 4 + 2 * 1  # bf16 weights, fp32 averages, moments of 8 bits
    bytes_of_weight = 2 if cfg.bf16 and not cfg.lora else 4
    return {"a checkpoint": count * bytes_of_state, "a model": count * bytes_of_weight}


def text_length(cfg: Config, model: Description) -> int:
    """Tokens of a prompt: --text-length, or the tokenizer's own, at most 512 (some T5 have no limit: 1e30)."""
    return cfg.text_length or min(model.tokenizers[-1].model_max_length, 512)


def empty_flux(cfg: Config, config: NetworkConfig) -> Network:
    """The network that the flags ask for on the meta device: names, shapes and dtypes without memory."""
    flux = empty_network(config)
    if cfg.bf16 and (cfg.lora or cfg.lean):
        flux.to(torch.bfloat16)  # the frozen weights under a LoRA; with --lean the trained ones
    if cfg.lora:
        add_lora(flux, cfg.lora, cfg.lora_alpha or 2 * cfg.lora)
    return flux


def earlier_lora(cfg: Config, config: NetworkConfig) -> Changes | None:
    """The changes of the LoRA that --lora continues: --model is that LoRA. None without one."""
    file = lora_file(cfg.model) if cfg.lora else None
    return read_lora(file, config) if file else None


def initial_tensors(cfg: Config, flux: Network, model: Description) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters of `flux`, read from disk as they are asked for.

    With --fp8 the frozen linear layers of `flux` become Fp8Linear first, in place.
    """
    for note in model.weights.notes:
        print_on_first_rank(note)
    tensors = model.weights.tensors
    lora = model.location.lora
    if lora and not cfg.lora:
        # --model is a LoRA and all weights are trained: they start from the base with the LoRA merged.
        tensors = merge_lora(tensors, read_lora(lora, flux.config))
    if not cfg.lora:
        return tensors
    names = {name for name, _ in flux.named_parameters()}
    tensors = ((wrapped_name(name, names), tensor) for name, tensor in tensors)
    if cfg.fp8:
        from infra.fp8 import quantize_frozen

        tensors = quantize_frozen(flux, tensors)
    return itertools.chain(tensors, first_values(flux, cfg.seed, earlier_lora(cfg, flux.config)))


# ------------------------------------------------------------------------------- 4. the user's code


def try_user_code(
    cfg: Config,
    process: Process,
    method: Callable,
    group: int,
    sizes: list[Size],
    prompts: list[str],
    eval_prompts: list[str],
) -> tuple[dict[str, Reward], Trial]:
    """The rewards that are no network, and what the method asks for. All of it is run once, on small inputs."""
    # A size has noise levels of its own: what the method does at any of them counts.
    trials = [try_method(method, size.sigmas, group) for size in sizes]
    trial = Trial(
        needs_gradient=any(trial.needs_gradient for trial in trials),
        needs_base=any(trial.needs_base for trial in trials),
        logged_names=set().union(*(trial.logged_names for trial in trials)),
    )
    check_needs(cfg, trial.needs_gradient)
    # Rewards with weights are this repository's and need no trial. The user's functions are tried before any weights
    # are read.
    weightless_rewards = {}
    for spec in (*cfg.reward, *cfg.watch):
        if is_user_code(spec) or reward_name(spec) in RULES:
            options = dict(size=sides(cfg.size[0]), prompts=eval_prompts)
            weightless_rewards[spec] = open_reward(spec, process.device, **options)
    for spec in cfg.reward:
        if is_user_code(spec):
            # Evaluations are at the first size, so only what is trained on sees the others.
            for size in cfg.size[1:]:
                try_score(weightless_rewards[spec].score, spec, process.device, sides(size), prompts)
        if spec in weightless_rewards and trial.needs_gradient:
            check_gradient(weightless_rewards[spec], prompts[:1], sides(cfg.size[0]), process.device)
    check_log_names(cfg, trial.logged_names, weightless_rewards, eval_prompts)
    return weightless_rewards, trial


def check_needs(cfg: Config, needs_gradient: bool) -> None:
    """Raise ValueError if the rewards are not what a method asks for: their gradient, or their scores as they are."""
    names = [reward_name(spec) for spec in cfg.reward]
    if needs_gradient and "judge" in names:
        raise ValueError(f"--reward judge has no gradient, which {cfg.method} needs: flow_grpo does without")
    if cfg.lam and not needs_gradient:
        raise ValueError(f"--lam means nothing with --method {cfg.method}, which takes the rewards as they are")


def check_gradient(reward: Reward, prompts: list[str], size: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError if a reward has no gradient in an image, or one that is not finite."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, *size, generator=generator).to(device).requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(reward.score(image, prompts).sum(), image)
    except (RuntimeError, ValueError) as error:  # numpy takes no tensor that has a gradient; a score may have no graph
        raise ValueError(
            f"--reward {reward.name} has no gradient in the images ({error}): watch it, or take a method that needs "
            "none, such as flow_grpo"
        ) from error
    if not gradient.isfinite().all():
        raise ValueError(f"--reward {reward.name} has a gradient that is not finite on a random image")


# ----------------------------------------------------------------------------------- 5. the networks


def load_networks(cfg: Config, setup: Setup, flux: Network, process: Process) -> None:
    """Read VAE, text encoders and rewards around the network that is trained."""
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    length = text_length(cfg, setup.model)
    setup.pipe = load_parts(setup.model, flux, process.device, dtype, length, cfg.offload_encoders)
    setup.pipe.sampling = {
        "rollout_steps": cfg.rollout_steps,
        "size": cfg.size[0],
        "guidance": cfg.guidance,
        "negative_prompt": cfg.negative_prompt,
        "text_length": length,
        "bf16": cfg.bf16,
    }
    if cfg.vae_bf16:
        setup.pipe.vae.to(torch.bfloat16)
    everything = cfg.recompute == "blocks"  # of VAE and rewards, too
    if everything:
        setup.pipe.vae.enable_gradient_checkpointing()
    rewards = []
    for spec in (*cfg.reward, *cfg.watch):
        reward = setup.weightless_rewards.get(spec)
        rewards.append(reward or open_reward(spec, process.device, setup.pipe.clip_tokenizer, everything))
    if process.world_size > 1:
        rewards = [replace(reward, score=partial(score_or_nan, reward.score)) for reward in rewards]
    if process.rank == 0:
        # What is truncated is neither drawn nor learned, and nobody would see it in the pictures.
        readers = [Reader(reward.name, *reward.reads) for reward in rewards if reward.reads]
        warning = truncation_warning(setup.pipe, [*setup.prompts, *setup.eval_prompts], readers)
        if warning:
            print_on_first_rank(warning)
    setup.rewards = rewards[: len(cfg.reward)]
    setup.watched = rewards[len(cfg.reward) :]
    # Without --lam a reward has its default lambda, or no hinge.
    if cfg.lam:
        setup.rewards = [replace(reward, lam=lam) for reward, lam in zip(setup.rewards, cfg.lam, strict=True)]
    setup.sizes = [replace(size, sigmas=size.sigmas.to(process.device)) for size in setup.sizes]


# -------------------------------------------------------------------------------- the run's folder


@dataclass
class History:
    """Where a run stands: updates made, evaluations so far, and the one whose weights best/ holds."""

    first: int  # the update that the run starts with
    evaluations: list[Entry]
    best: Entry | None
    watched: list[str]  # names of the watched rewards; the first one chooses best/

    def is_better(self, entry: Entry) -> bool:
        """Whether an evaluation is the best so far by the first watched reward."""
        if not self.watched:
            return False
        name = self.watched[0]
        return self.best is None or watched_value(entry, name) > watched_value(self.best, name)


def open_folder(cfg: Config, setup: Setup, first: int) -> History:
    """Make the run's folder; or remove from its logs what a resumed run will write again, from update `first` on.

    Raises ValueError if another process trains there.
    """
    out = setup.out
    # Two runs in one folder would mix their logs and remove each other's checkpoints. Another run may have begun, or
    # ended, since the folder was checked.
    lock_folder(out)
    if cfg.smoke:
        remove(out)
    check_folder(cfg, out, recorded_flags(cfg), resume_flags(cfg))
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for name in ("best", "final"):
        recover(out / name)  # from a kill while it was replaced
    write_config(cfg, setup)
    set_later_checkpoints_aside(cfg, out, first)
    remove_old_checkpoints(out, cfg.keep)  # a save that was killed has not done so
    watched = [reward.name for reward in setup.watched]
    best = evaluation_of_best(out, watched)
    if cfg.at is not None and best and best["step"] > first:
        # best/ belongs to an evaluation that this run forgets: keep it under another name. Without --at the run makes
        # the same evaluation again, bitwise where kernels are deterministic.
        mark = f".step_{best['step']:06d}"
        put_in_place(out / "best", beside(out / "best", mark))
        print_on_first_rank(f"{out / 'best'} is of step {best['step']}, and is kept as best{mark}")
    if first and watched and not best and (out / "best").exists():
        # eval.jsonl was lost: any evaluation would count as better than what is in best/.
        put_in_place(out / "best", beside(out / "best", ".unknown"))
        print_on_first_rank(f"no evaluation of {out / 'best'} is in eval.jsonl: it is kept as best.unknown")
    truncate_log(out / "metrics.jsonl", first)
    # The evaluation at `first` is made again if the loop evaluates there. Where it does not, as after the end of a run
    # that is made longer, the old one stays.
    evaluates_first = first % cfg.eval_every == 0 or first == cfg.updates
    evaluations = truncate_log(out / "eval.jsonl", first if evaluates_first else first + 1)
    return History(first, evaluations, evaluation_of_best(out, watched), watched)


def write_config(cfg: Config, setup: Setup) -> None:
    """config.json: every flag, what made the run, and hashes of the prompts and of the user's code.

    --resume compares the flags and the hashes.
    """
    origin = {
        "command": command(cfg),
        "revision": revision(),
        "prompts_read": [prompts_hash(setup.prompts), prompts_hash(setup.eval_prompts)],
        "code_read": user_code_hashes(cfg),
    }
    write_whole(setup.out / "config.json", json.dumps(recorded_flags(cfg) | origin, indent=2) + "\n")


def set_later_checkpoints_aside(cfg: Config, out: Path, first: int) -> None:
    """Checkpoints of later updates: removed if --at asks for an older one, kept aside if they could not be read."""
    for folder in checkpoint_folders(out):
        if update_of(folder) <= first:
            continue
        if cfg.at is not None:
            shutil.rmtree(folder)
        else:  # the disk may have been at fault, not the checkpoint
            put_in_place(folder, beside(folder, ".unreadable"))
            print_on_first_rank(f"{folder} is kept as {folder.name}.unreadable, and made again")
    for unfinished in (out / "checkpoints").glob(f"*{PART}"):  # of a save that was killed, up to 190 GB
        remove(unfinished)


def evaluation_of_best(out: Path, watched: list[str]) -> Entry | None:
    """The evaluation whose weights best/ holds, by the run's log; None if there is no best/."""
    evaluations = read_log(out / "eval.jsonl")
    if not evaluations or not watched or not (out / "best").exists():
        return None
    saved = [entry for entry in evaluations if "saved_to" in entry]
    return saved[-1] if saved else None


def announce(cfg: Config, setup: Setup, process: Process) -> str:
    """What a run is, in a few lines; all of it is in config.json."""
    trained = sum(p.numel() for p in setup.pipe.flux.parameters() if p.requires_grad)
    rewards = [r.name if r.lam is None else f"{r.name} (lambda {r.lam})" for r in setup.rewards]
    watched = [r.name for r in setup.watched] or ["nothing"]
    rollout_batch = cfg.rollout_batch or cfg.batch // process.world_size
    return f"""\
{command(cfg)}
{cfg.method} on {cfg.model}: {trained / 1e6:.1f} M trained parameters
raises {", ".join(rewards)}; watches {", ".join(watched)}
{cfg.batch} rollouts of {cfg.rollout_steps} steps an update on {process.world_size} x {process.device.type}
{rollout_batch} rollouts at a time, {cfg.micro_batch or rollout_batch} in a backward
all flags are in {setup.out / "config.json"}"""
