"""Flags and folders, checked before anything is read: each error names the flag, what was found and what to do."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config
from infra.checkpoints import checkpoint_folders
from infra.distributed import CUT, Process
from infra.files import PART, check_writable
from infra.jsonl import read_log
from infra.prompts import print_once, prompts_hash
from infra.trackers import check_trackers


def check_flags(cfg: Config, process: Process) -> None:
    """Raise ValueError naming the flag that cannot be, and why."""
    counts = (
        "updates",
        "batch",
        "rollout_steps",
        "eval_every",
        "text_length",
        "patience",
        "save_every",
        "keep",
        "lora",
    )
    of_methods = ("active", "nodes", "last", "group", "window", "every")
    for name in (*counts, *of_methods, "rollout_batch", "micro_batch", "check_every"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if cfg.clip <= 0:
        raise ValueError(f"--clip must be positive, got {cfg.clip}: inf does not clip")
    for name in ("lr", "weight_decay", "seed", "anchor", "copies"):
        if (getattr(cfg, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(cfg, name)}")
    if cfg.noise is not None and cfg.noise <= 0:
        raise ValueError(f"--noise must be positive, got {cfg.noise}: a random walk without it has no probabilities")
    if cfg.lora_alpha is not None and (not cfg.lora or cfg.lora_alpha <= 0):
        raise ValueError(f"--lora-alpha {cfg.lora_alpha} must be positive, and is for --lora")
    if cfg.tau is not None and cfg.tau <= 0:
        raise ValueError(f"--tau must be positive, got {cfg.tau}: the weight of an exact leap is 1 / (2 tau)")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {cfg.ema}")
    if cfg.batch % process.world_size:
        raise ValueError(f"--batch {cfg.batch} does not divide into {process.world_size} ranks: take a multiple of it")
    if not cfg.size:
        raise ValueError("--size: give one or more")
    if not cfg.reward:
        raise ValueError("--reward: give one or more")
    if cfg.lam and len(cfg.lam) != len(cfg.reward):
        raise ValueError(
            f"--lam has {len(cfg.lam)} values for {len(cfg.reward)} rewards: give one each, or none at all"
        )
    if cfg.stop_early and not cfg.watch:
        raise ValueError("--stop-early needs a reward to --watch")
    check_trackers(cfg.log)
    if cfg.bf16 and not (cfg.lora or cfg.lean) and process.device.type not in CUT:
        raise ValueError(
            f"--bf16 with --device {cfg.device}: weights that are trained are fp32 there, and compute in it: add --lora"
        )
    if cfg.fp8 and process.device.type not in CUT:
        raise ValueError(f"--fp8 with --device {cfg.device}: only cpu and cuda have numbers of eight bits")
    if cfg.lean and process.world_size > 1:
        raise ValueError(
            f"--lean is for one GPU, and there are {process.world_size} ranks: they share the weights without it"
        )
    if cfg.lean and (cfg.lora or not cfg.bf16):
        raise ValueError("--lean keeps all trained weights in bf16: it needs --bf16, and --lora trains others")
    if cfg.fp8 and (not cfg.lora or process.world_size > 1):
        raise ValueError("--fp8 is for what a LoRA changes, on one GPU: it needs --lora, and several share the weights")
    if cfg.lean and importlib.util.find_spec("torchao") is None:
        raise ValueError("--lean needs torchao's optimizer: pip install torchao")
    if cfg.export and cfg.export.suffix == ".safetensors" and cfg.lora:
        raise ValueError(f"--export {cfg.export}: a LoRA run has a LoRA's file to write, into a folder: give one")
    if (cfg.export or cfg.at is not None) and not cfg.resume:
        raise ValueError("--export and --at need --resume: they name a checkpoint of the run in --out")


def check_groups(cfg: Config, process: Process, group: int) -> None:
    """Raise ValueError if a rank's samples, or those of a rollout, do not divide into groups of one prompt."""
    share = cfg.batch // process.world_size
    if share % group or (cfg.rollout_batch or share) % group:
        raise ValueError(
            f"--group {group}: a rank's {share} of --batch and its --rollout-batch must be multiples of it"
        )


def check_folder(cfg: Config, out: Path, now: dict[str, Any], defaults: dict[str, Any], fixed: Sequence[str]) -> None:
    """Raise ValueError if nothing can be written there, or it holds what these flags do not go on with.

    `now` is what config.json will say, `defaults` what it said before a flag was known, and `fixed` are the names in
    it that a resumed run must find unchanged.
    """
    check_writable(f"--out {out}", out)
    if cfg.export and cfg.export.exists():
        raise ValueError(f"--export {cfg.export} is there already: give a folder or file that is not")
    if not cfg.resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out} is occupied: --resume goes on with it, or choose another folder")
        return
    occupied = f"--out {out} is occupied by something that is no run: choose another folder"
    if not (out / "config.json").exists():
        if cfg.export or cfg.at is not None:
            raise ValueError(f"--out {out} holds no run")
        if out.exists() and any(f.name != "samples" and PART not in f.name for f in out.iterdir()):
            raise ValueError(occupied)
        return
    try:
        before = json.loads((out / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{out / 'config.json'} is damaged ({error}): write the run's flags into it again") from None
    if "method" not in before:
        raise ValueError(occupied)
    for name in fixed:
        earlier = before.get(name, defaults[name])
        if name == "size" and isinstance(earlier, int):  # of a run from before there could be several
            earlier = [str(earlier)]
        if now[name] != earlier:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume with --{flag} {now[name]}, but {out} was started with {earlier}")
    for log in ("metrics.jsonl", "eval.jsonl"):
        read_log(out / log)
    check_checkpoints(cfg, out, [f.name for f in checkpoint_folders(out)])


def check_prompts(out: Path, prompts: list[str], eval_prompts: list[str], paths: Sequence[Path]) -> None:
    """Raise ValueError if a run was started with other prompts than these, which were read from `paths`.

    Their files may have moved since.  A run from before their contents were noted goes by the paths.
    """
    before, now = json.loads((out / "config.json").read_text()), [prompts_hash(prompts), prompts_hash(eval_prompts)]
    names = ("prompts", "eval_prompts")
    if "prompts_read" not in before:
        now, before = list(map(str, paths)), before | dict(prompts_read=[before[name] for name in names])
    for name, path, value, earlier in zip(names, paths, now, before["prompts_read"], strict=True):
        if value != earlier:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume with --{flag} {path}, which says something else than when {out} was started")


def tell_changes(out: Path, now: dict[str, str]) -> None:
    """Warn of files of the user's that are others than those which a run was made with so far, by their hashes."""
    before = json.loads((out / "config.json").read_text()).get("code_read", now)
    for file in sorted(f for f in now if now[f] != before.get(f, now[f])):
        print_once(f"warning: {file} has changed since {out} was started: numbers before and after may not be alike")


def check_checkpoints(cfg: Config, out: Path, names: Sequence[str]) -> None:
    """Raise ValueError if a run has no such checkpoint as is asked for, or goes on from one beyond --steps."""
    has = f"{out} has {', '.join(names) or 'no checkpoint yet'}"
    if cfg.at is not None and f"step_{cfg.at:06d}" not in names:
        raise ValueError(f"--at {cfg.at}: {has}")
    if cfg.export and not names:
        raise ValueError(f"--export: {has}")
    first = cfg.at if cfg.at is not None else max((int(name[-6:]) for name in names), default=0)
    if first > cfg.updates and not cfg.export:
        raise ValueError(f"--updates {cfg.updates}, but the run in {out} is at {first}: --at takes an older checkpoint")
