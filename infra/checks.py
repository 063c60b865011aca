"""Flags and the run's folder, checked before a model is read. Errors name the flag, what was found and what to do."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config
from infra.checkpoints import NEWEST, checkpoint_folders, update_of
from infra.distributed import FSDP_DEVICES, Process
from infra.files import PART, check_writable
from infra.flags import check_ranges, flag_of
from infra.jsonl import check_numbers_of, read_log
from infra.logs import EvaluationLog, UpdateLog
from infra.prompts import print_on_first_rank, prompts_hash
from infra.reading import parse_json
from rewards import COSINES, Reward, reward_name, split_weight

NEEDS = {  # flag -> the flag that it says something about
    "lora_alpha": "lora",
    "fp8": "lora",
    "lean": "bf16",
    "anchor_on": "anchor",
    "stop_early": "watch",
    "export": "resume",
    "at": "resume",
}

# ------------------------------------------------------------------------------------------- flags


def check_flags(cfg: Config, process: Process) -> None:
    """Raise ValueError naming the flag that cannot be used, and why."""
    # In the order in which a user meets them: a number first, then what the machine can do, then flags together.
    if cfg.lam and len(cfg.lam) != len(cfg.reward):
        raise ValueError(f"--lam has {len(cfg.lam)} values for {len(cfg.reward)} rewards: give one each, or none")
    check_numbers(cfg)
    check_machine(cfg, process)
    for name in ("size", "reward"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name}: give one or more")
    if not any(split_weight(spec)[1] for spec in cfg.reward):
        raise ValueError("--reward: every weight is 0, which trains nothing")
    for name, base_flag in NEEDS.items():
        if getattr(cfg, name) != getattr(Config, name) and not getattr(cfg, base_flag):
            raise ValueError(f"{flag_of(name)} means nothing without --{base_flag}")
    if cfg.smoke and cfg.resume:
        raise ValueError("--smoke empties its folder, so --resume and --export find no run there: leave it out")
    suffix = cfg.export.suffix if cfg.export else ""
    # A folder may end with .5, which is no kind of file.
    if suffix[1:].isalpha() and suffix != ".safetensors":
        raise ValueError(f"--export {cfg.export}: give FILE.safetensors, or a folder, whose name has no {suffix}")
    if suffix == ".safetensors" and cfg.lora:
        raise ValueError(f"--export {cfg.export}: a LoRA run has a LoRA's file to write, into a folder: give one")


def check_numbers(cfg: Config) -> None:
    """Raise ValueError for a number out of its range, and tell of one that means nothing here."""
    check_ranges(cfg)
    for name in ("active", "last", "window"):
        value = getattr(cfg, name)
        if isinstance(value, int) and value > cfg.rollout_steps:  # not None, nor a word such as random
            raise ValueError(f"--{name} {value}: a rollout has {cfg.rollout_steps} steps (--rollout-steps)")
    for spec, lam in zip(cfg.reward, cfg.lam):  # --lam may be empty
        if lam is not None and lam > 1 and reward_name(spec) in COSINES:
            print_on_first_rank(f"note: --lam {lam}: scores of {spec} are cosines, which never reach more than 1")
    # Of one alone the other is the method's own.
    if cfg.low is not None and cfg.high is not None and cfg.low > cfg.high:
        raise ValueError(f"--low {cfg.low} is above --high {cfg.high}: leaps start from noise levels between the two")
    if cfg.cps and (cfg.noise or 0) >= 1:
        raise ValueError(f"--noise must be below 1 with --cps, got {cfg.noise}: 1 is all of the noise")


def check_machine(cfg: Config, process: Process) -> None:
    """Raise ValueError if the flags ask for what the device, the number of ranks or the packages here cannot do."""
    ranks = process.world_size
    has_fsdp = process.device.type in FSDP_DEVICES
    # Every rank takes the same number of samples, so that the mean over ranks is the mean over the batch.
    if cfg.batch % ranks:
        raise ValueError(f"--batch {cfg.batch} does not divide into {ranks} ranks: take a multiple of {ranks}")
    if cfg.bf16 and not has_fsdp and not (cfg.lora or cfg.lean):
        # FSDP2 keeps fp32 weights beside a bf16 network; without FSDP2 the weights compute in the dtype they have.
        raise ValueError(f"--bf16 with --device {cfg.device}: trained weights are fp32 there: add --lora")
    # fp8 and lean keep weights in dtypes that FSDP2 would gather and cast in its own way.
    if cfg.fp8 and not has_fsdp:
        raise ValueError(f"--fp8 with --device {cfg.device}: only cpu and cuda have numbers of eight bits")
    if (cfg.fp8 or cfg.lean) and ranks > 1:
        raise ValueError(f"--fp8 and --lean are for one GPU, and {ranks} ranks share the weights without them")
    if cfg.lean and cfg.lora:
        raise ValueError("--lean trains all weights, in bf16, and --lora trains others")
    packages = {f"--log {kind}": kind for kind in cfg.log}
    if cfg.lean:
        packages["--lean"] = "torchao"
    for flag, package in packages.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{flag} needs a package: pip install {package}, or leave the flag out")


def check_groups(cfg: Config, process: Process, group: int) -> None:
    """Raise ValueError if a rank's samples, or those of a rollout, do not divide into groups of one prompt."""
    if not isinstance(group, int) or group < 1:  # of your method
        raise ValueError(f"--method {cfg.method}: its group is {group!r}, and must be 1 or more samples of a prompt")
    rows_per_rank = cfg.batch // process.world_size
    # A group that is split over two ranks or rollouts could not compare its samples.
    if rows_per_rank % group or (cfg.rollout_batch or rows_per_rank) % group:
        raise ValueError(
            f"--group {group}: a rank's {rows_per_rank} of --batch and its --rollout-batch must be multiples of it"
        )


def check_log_names(cfg: Config, method_names: set[str], weightless: dict[str, Reward], prompts: Sequence[str]) -> None:
    """Raise ValueError if two values would be logged under one name. `weightless` are the rewards without weights."""
    # Three sources of names in one file: the run's own, the method's and the rewards'. A name of two sources would
    # silently hold the value of the last one.
    tasks = set()
    for reward in weightless.values():
        if reward.task_of:
            tasks |= {reward.task_of(prompt) for prompt in prompts}
    reward_names = {reward_name(spec) for spec in (*cfg.reward, *cfg.watch)}
    sources = {
        "the run": UpdateLog.__annotations__.keys() | EvaluationLog.__annotations__.keys(),
        "the judge, as a task,": tasks,
        "--method": method_names,
        "--reward or --watch": reward_names,
    }
    source_of_name: dict[str, str] = {}
    for source, names in sources.items():
        for name in sorted(names):
            if name in source_of_name:
                raise ValueError(f"{source} logs {name!r}, and so does {source_of_name[name]}: give it another name")
            source_of_name[name] = source


# ---------------------------------------------------------------------------------- the run's folder


def check_folder(cfg: Config, out: Path, flags: dict[str, Any], fixed: Sequence[str]) -> None:
    """Raise ValueError if `out` holds a run that these flags do not continue.

    `flags` is what config.json will say, and `fixed` names the flags that a resumed run must find unchanged.
    """
    if cfg.export and cfg.export.exists():
        raise ValueError(f"--export {cfg.export} exists: give a path that does not")
    if cfg.export:
        check_writable(f"--export {cfg.export}", cfg.export)
    has_files = out.exists() and any(out.iterdir())
    if not cfg.resume:
        if has_files and not cfg.smoke:
            raise ValueError(f"--out {out} is occupied: --resume goes on with it, or choose another folder")
        return
    if not (out / "config.json").exists():
        if cfg.export or cfg.at is not None:
            raise ValueError(f"--out {out} holds no run")
        # A run that was killed at its very start leaves samples/ and an unfinished config.json.
        if has_files and any(f.name != "samples" and PART not in f.name for f in out.iterdir()):
            raise ValueError(f"--out {out} is occupied by something that is no run: choose another folder")
        return
    recorded = read_run_config(out)
    # Other flags, such as --micro-batch or --keep, may change from start to start.
    for name in fixed:
        if flags[name] != recorded.get(name):
            started = recorded.get(name)
            raise ValueError(f"--resume with {flag_of(name)} {flags[name]}, but {out} was started with {started}")
    # A damaged line is reported now, not after the weights are loaded.
    read_log(out / "metrics.jsonl", lambda entry: check_numbers_of(entry, ["reward"]))
    watched = [reward_name(spec) for spec in cfg.watch]
    read_log(out / "eval.jsonl", lambda entry: check_numbers_of(entry, ["reward", *watched], watched))
    check_checkpoints(cfg, out)


def read_run_config(out: Path) -> dict[str, Any]:
    """The config.json of a run. Raises ValueError if it is damaged or of something else."""

    def parse(entries: dict[str, Any]) -> dict[str, Any]:
        needs = {"method": entries["method"], "code_read": dict(entries.get("code_read", {}))}
        _, _ = entries["prompts_read"]  # two hashes
        return entries | needs

    remedy = "it is no run's, or damaged: write the run's flags into it again, or choose another --out"
    return parse_json(out / "config.json", parse, remedy)


def check_prompts(out: Path, prompts: list[str], eval_prompts: list[str], paths: Sequence[Path]) -> None:
    """Raise ValueError if a run was started with other prompts than these, which were read from `paths`."""
    hashes = [prompts_hash(prompts), prompts_hash(eval_prompts)]
    flags = ("--prompts", "--eval-prompts")
    for flag, path, value, recorded in zip(flags, paths, hashes, read_run_config(out)["prompts_read"], strict=True):
        if value != recorded:
            raise ValueError(f"--resume with {flag} {path}, which says something else than when {out} was started")


def tell_changes(out: Path, hashes: dict[str, str]) -> None:
    """Warn if a file of the user's code is not the one that the run was made with so far."""
    recorded = read_run_config(out)["code_read"]
    # A warning, not an error: the change may be a comment, or a fix that the user wants.
    for file, value in sorted(hashes.items()):
        if file in recorded and recorded[file] != value:
            text = f"warning: {file} has changed since {out} was started: numbers before and after may not be alike"
            print_on_first_rank(text)


def check_checkpoints(cfg: Config, out: Path) -> None:
    """Raise ValueError if a run has no such checkpoint as is asked for, or continues from one beyond --updates."""
    folders = checkpoint_folders(out)
    names = ", ".join(folder.name for folder in folders) or "no checkpoint yet"
    updates = [update_of(folder) for folder in folders]
    if (cfg.at is not None and cfg.at not in updates) or (cfg.export and not updates):
        raise ValueError(f"{out} has {names}: --at and --export take one of its checkpoints")
    mark = out / NEWEST
    if mark.exists() and not folders:
        raise ValueError(
            f"--resume: {out} was saved at {mark.read_text()}, and has no checkpoint any more: put one back, or choose "
            f"another --out. To train from the start again in this folder, remove {mark}"
        )
    # The checkpoint that the run will continue from, unless it turns out to be damaged.
    first = cfg.at if cfg.at is not None else max(updates, default=0)
    if first > cfg.updates and not cfg.export:
        raise ValueError(f"--updates {cfg.updates}, but the run in {out} is at {first}: --at takes an older checkpoint")
