"""Compare checkpoints side by side: the same prompts and noise, any rewards, with error bars.

    python evaluate.py --model shapes/tiny-flux runs/leapalign-seed0/final --rewards judge tiny
    torchrun --nproc-per-node 8 -- evaluate.py --model weights/FLUX.1-dev runs/flux/final --prompts F --rewards hpsv2
    # the -- keeps torchrun from reading --num as one of its own flags

Prints means with 95% intervals, and the differences to the first model, paired by prompt.  Writes to --out:

    results.json                            all of the printed numbers, and the scores of every prompt
    best.png  worst.png  changed.png        by the first reward: of the last model, and its change from the first
    MODEL/00000.json  00000.png             a prompt's scores and its first image, small; what is there is kept

The interval is Student's over prompts: images of one prompt are averaged first, as they are not independent.  So the
judge's mean is over prompts, where a run's own evaluations have the mean over tasks: the same with as many of each.
"""

import gc
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from config import sides
from formats.folders import describe, load_pipeline
from formats.lora_files import lora_file, read_lora
from infra.distributed import Process, all_gather_objects, join, on_first_rank
from infra.files import check_writable, replacing
from infra.pictures import save_png, to_pil
from infra.prompts import read_entries, rows_of_rank
from infra.summary import format_table, summarize, write_sheets
from infra.user_code import file_hashes
from rewards import Reward, check_rewards, open_reward, reward_name, score_all
from sample import Pipeline, sample, token_grid, truncation_warning

HERE = Path(__file__).parent
THUMB = 256  # pixels, the longest side of the images that are always kept


@dataclass(frozen=True)
class Config:
    """Score models on the same prompts and noise."""

    model: tuple[str, ...] = (str(HERE / "shapes" / "tiny-flux"),)
    """Model folders or hub ids, LoRAs, or files of a transformer as flux1-dev.safetensors; the others are compared with
    the first."""
    base: str | None = None
    """Model folder or hub id that LoRAs and tuned weights were trained from; our LoRAs name their own. A transformer's
    file takes all else from it."""
    strength: float = 1.0
    """How much of the tuning to apply: 1 is all of it, 0 the base. Of a LoRA, or with --base of tuned weights."""
    prompts: Path = HERE / "shapes" / "eval-prompts.txt"
    """Prompts, one per line; or JSON lines, a JSON array, a .csv or .tsv table with a "prompt" in each."""
    rewards: tuple[str, ...] = ("judge", "tiny")
    """NAME[=PATH] or my_file.py:function: tiny, clip, pickscore, hpsv2, hpsv3, imagereward, or judge, the rules of the
    shapes world."""
    num: int = 4
    """Images per prompt."""
    steps: int = 50
    """Euler steps."""
    guidance: float = 3.5
    """Guidance scale, for models that were distilled with guidance; others ignore it."""
    size: tuple[str, ...] = ()
    """Pixels: one number for a square, or HEIGHTxWIDTH; none: the VAE's own. Of several, a prompt's images take turns.
    """
    text_length: int | None = None
    """T5 tokens a prompt is padded or cut to; the default is the tokenizer's own, 512 for FLUX.1-dev."""
    seed: int = 0
    """Another seed is other noise for every image; the same seed is the same noise for every model."""
    out: Path = Path("runs/evaluation")
    """Folder to write; give it again to go on where it stopped, or to add a model."""
    geneval: Path | None = None
    """Write the images to GENEVAL/MODEL as GenEval's evaluator reads them: INDEX/metadata.jsonl and
    INDEX/samples/0000.png. Needs prompts with its tags, such as tools/prompts.py writes."""
    keep_images: bool = False
    """Keep every image at its size, in OUT/MODEL/images."""
    batch: int = 8
    """Images at a time."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, cuda, or mps."""
    bf16: bool = False
    """Run the transformer and the text encoders in bfloat16, as FLUX.1-dev was published."""


RUNTIME = {"model", "out", "batch", "device"}  # flags that an evaluation may go on with changed


def label(model: str) -> str:
    """A model's name in files and tables: runs/a/final is runs_a_final."""
    path = Path(model)
    if path.exists():  # and is no hub id
        home = next((h for h in (Path.cwd(), HERE) if path.resolve().is_relative_to(h)), Path("/"))
        path = path.resolve().relative_to(home)
    return str(path).replace("/", "_")


# ------------------------------------------------------------------------------------------- images


def sizes_of(cfg: Config, pipe: Pipeline) -> list[tuple[int, int]]:
    """Heights and widths that --size names, or the VAE's own."""
    return [sides(size) for size in cfg.size or [str(pipe.vae.config.sample_size)]]


def evaluate(
    pipe: Pipeline, rewards: list[Reward], entries: list[dict], todo: Sequence[int], cfg: Config, folder: Path
):
    """Draw and score the prompts `todo`; what each has is written when it is whole, so nothing is lost."""
    sizes = sizes_of(cfg, pipe)
    name, together = folder.name, max(1, cfg.batch // cfg.num)
    for start in tqdm(range(0, len(todo), together), desc=name, file=sys.stderr, disable=not todo):
        chunk = [(i, n) for i in todo[start : start + together] for n in range(cfg.num)]
        texts = [entries[i]["prompt"] for i, _ in chunk]
        seeds = [(cfg.seed * len(entries) + i) * cfg.num + n for i, n in chunk]
        images, scores = [None] * len(chunk), {r.name: torch.empty(len(chunk)) for r in rewards}
        for turn, size in enumerate(sizes):
            own = [k for k, (_, n) in enumerate(chunk) if n % len(sizes) == turn]
            prompts = [texts[k] for k in own]
            drawn = sample(pipe, prompts, [seeds[k] for k in own], cfg.steps, *size, cfg.guidance, cfg.batch)
            for k, image in zip(own, drawn, strict=True):
                images[k] = image
            for r in rewards:
                scores[r.name][own] = score_all(r, drawn, prompts, pipe.device, cfg.batch).float()
        scores = {name: values.view(-1, cfg.num) for name, values in scores.items()}
        for row, i in enumerate(todo[start : start + together]):
            drawn = images[row * cfg.num : (row + 1) * cfg.num]
            if cfg.keep_images:
                for n, image in enumerate(drawn):
                    save_png(to_pil(image), folder / "images" / f"{i:05d}_{n}.png")
            if cfg.geneval:
                write_geneval(cfg.geneval / name / f"{i:05d}", entries[i], drawn)
            small = to_pil(drawn[0])
            small.thumbnail((THUMB, THUMB))
            save_png(small, folder / f"{i:05d}.png")
            entry = {"prompt": entries[i]["prompt"], **{k: s[row].tolist() for k, s in scores.items()}}
            with replacing(folder / f"{i:05d}.json") as part:
                part.write_text(json.dumps(entry) + "\n")


def read_scores(folder: Path, i: int, rewards: list[Reward], cfg: Config) -> dict[str, list[float]] | None:
    """What a prompt scored; None if it was not drawn yet, or what is there is not whole."""
    try:
        entry = json.loads((folder / f"{i:05d}.json").read_text())
        scores = {r.name: entry[r.name] for r in rewards}
    except (OSError, ValueError, KeyError):
        return None
    needed = [folder / f"{i:05d}.png"]
    if cfg.geneval:
        needed.append(cfg.geneval / folder.name / f"{i:05d}" / "metadata.jsonl")
    return scores if all(path.exists() for path in needed) else None


def missing(folder: Path, count: int, rewards: list[Reward], cfg: Config) -> list[int]:
    """Those of the prompts that have no scores yet."""
    return [i for i in range(count) if read_scores(folder, i, rewards, cfg) is None]


def write_geneval(folder: Path, entry: dict[str, Any], images: Sequence[Tensor]) -> None:
    """One prompt as GenEval's evaluate_images.py reads it: all of the pictures there count."""
    shutil.rmtree(folder, ignore_errors=True)
    for n, image in enumerate(images):
        save_png(to_pil(image), folder / "samples" / f"{n:04d}.png")
    (folder / "metadata.jsonl").write_text(json.dumps(entry) + "\n")


# --------------------------------------------------------------------------------------------- main


def prepare(cfg: Config) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Check all but the weights: the prompts' entries and their tags. Raises ValueError naming the flag."""
    if not cfg.model or not cfg.rewards:
        raise ValueError("give at least one --model and one of --rewards")
    if min(cfg.num, cfg.steps, cfg.batch) < 1:
        raise ValueError(f"--num {cfg.num}, --steps {cfg.steps} and --batch {cfg.batch} must be at least 1")
    if len([sides(size) for size in cfg.size]) > cfg.num:
        raise ValueError(f"--num {cfg.num}: a prompt's images take turns at {len(cfg.size)} sizes, so give as many")
    labels = [label(m) for m in cfg.model]
    if twice := [m for m in cfg.model if labels.count(label(m)) > 1]:
        raise ValueError(f"--model {' '.join(twice)}: these would all be called {label(twice[0])}")
    entries = read_entries(cfg.prompts)
    tags = [e["tag"] if isinstance(e.get("tag"), str) else None for e in entries]  # a list of them is no task
    if cfg.geneval and not all(tags):
        raise ValueError(
            f"--geneval needs prompts with GenEval's tags, and {cfg.prompts} has some without: python -m tools.prompts"
        )
    if "judge" in map(reward_name, cfg.rewards):
        task_of = open_reward("judge").task_of
        try:
            tags = [task_of(e["prompt"]) for e in entries]
        except ValueError as error:
            raise ValueError(f"--prompts {cfg.prompts}: {error}; --rewards without judge takes any") from error
    return entries, tags if all(tags) else None


def flags_of(cfg: Config, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What an evaluation's numbers depend on, as config.json has it."""
    flags = json.loads(json.dumps({k: v for k, v in asdict(cfg).items() if k not in RUNTIME}, default=str))
    return flags | dict(prompts=[e["prompt"] for e in entries], rewards_read=file_hashes(cfg.rewards))


def weights_of(source: Path) -> list[list[Any]]:
    """Names, sizes and times of a model's or a transformer's files, by which one sees that it was written again."""
    inner = sorted((source / "transformer").glob("*.safetensors"))
    files = [source] if source.is_file() else inner or sorted(source.glob("*.safetensors"))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def check_out(cfg: Config, flags: dict[str, Any], sources: dict[str, Path], weights: dict[str, list]) -> None:
    """Raise ValueError if the folder holds results of other flags or weights, or something else."""
    check_writable(f"--out {cfg.out}", cfg.out)
    file = cfg.out / "config.json"
    if file.exists():
        try:
            before = flags | asdict(Config()) | json.loads(file.read_text())  # what it did not know yet
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): remove {cfg.out}, or choose another --out") from None
        other = next((k for k in flags if flags[k] != before[k]), "").replace("_", "-")
        if other == "rewards-read":
            raise ValueError(f"--out {cfg.out} holds an evaluation by {', '.join(flags['rewards_read'])} as it was: "
                             "remove it, or choose another --out")  # fmt: skip
        if other:
            raise ValueError(f"--out {cfg.out} holds an evaluation with another --{other}")
    elif cfg.out.exists() and any(cfg.out.iterdir()):
        raise ValueError(f"--out {cfg.out} is occupied by something else")
    for name, source in sources.items():
        file = cfg.out / name / "weights"
        if file.exists() and json.loads(file.read_text()) != weights[name]:
            raise ValueError(f"{source} was written again since {cfg.out / name} was evaluated: remove that folder")
    if cfg.geneval:
        check_geneval(cfg.geneval, list(sources), len(flags["prompts"]))


def check_geneval(out: Path, models: list[str], count: int) -> None:
    """Raise ValueError if GenEval would count folders of an earlier evaluation, of more prompts, too."""
    check_writable(f"--geneval {out}", out)
    ours = {f"{i:05d}" for i in range(count)}
    for folder in (out / model for model in models):
        if others := {path.name for path in folder.glob("*")} - ours:
            raise ValueError(f"--geneval: {folder} holds {min(others)} of other prompts, which counts too: remove it")


def claim(cfg: Config, flags: dict[str, Any], weights: dict[str, list]) -> None:
    """Take the folder for these flags and weights."""
    with replacing(cfg.out / "config.json") as part:
        part.write_text(json.dumps(flags, indent=2) + "\n")
    for name, files in weights.items():
        with replacing(cfg.out / name / "weights") as part:
            part.write_text(json.dumps(files))


def run(cfg: Config, process: Process) -> None:
    entries, tags = prepare(cfg)
    rewards: list[Reward] = []
    check_rewards(cfg.rewards)
    found = {m: describe(m, cfg.base) for m in cfg.model}  # all are checked before one is read
    for location, weights, *_ in found.values():
        if location.lora:  # small beside its model: it is read to see that it fits
            read_lora(location.lora, weights.config)
    for size, description in itertools.product(map(sides, cfg.size), found.values()):
        token_grid(description, *size)
        check_rewards(cfg.rewards, [entry["prompt"] for entry in entries], size)
    if cfg.strength != 1 and not cfg.base and (whole := [m for m in cfg.model if not lora_file(m)]):
        raise ValueError(f"--strength {cfg.strength} needs --base FOLDER: {whole[0]} is no LoRA")
    places = {m: Path(m) if Path(m).exists() else d.location.folder for m, d in found.items()}  # the latter a hub id's
    sources, flags = {label(m): place for m, place in places.items()}, flags_of(cfg, entries)
    weights = {name: weights_of(place) for name, place in sources.items()}
    for m, (location, *_) in found.items():
        weights[label(m)] += weights_of(location.transformer) if location.lora else []
    on_first_rank(partial(check_out, cfg, flags, sources, weights))
    for name, source in sources.items():
        dtype = torch.bfloat16 if cfg.bf16 else torch.float32
        pipe = load_pipeline(source, process.device, dtype, cfg.text_length, base=cfg.base, strength=cfg.strength)
        sizes = sizes_of(cfg, pipe)
        for size in sizes:
            token_grid(pipe, *size)
            check_rewards(cfg.rewards, [entry["prompt"] for entry in entries], size)
        if not rewards:
            of = (pipe.device, pipe.clip_tokenizer, False, sizes[0], [entry["prompt"] for entry in entries])
            rewards = [open_reward(s, *of) for s in cfg.rewards]
            on_first_rank(partial(claim, cfg, flags, weights))
        if process.rank == 0 and (warning := truncation_warning(pipe, [entry["prompt"] for entry in entries])):
            print(warning, file=sys.stderr)
        folder = cfg.out / name
        todo = on_first_rank(partial(missing, folder, len(entries), rewards, cfg))  # others may not see all files yet
        evaluate(pipe, rewards, entries, rows_of_rank(todo, process.rank, process.world_size), cfg, folder)
        del pipe
        gc.collect()  # the next model needs the room
        all_gather_objects(None)
    if process.rank == 0:
        report(cfg, entries, tags, rewards, list(sources))


def report(
    cfg: Config, entries: list[dict[str, Any]], tags: list[str] | None, rewards: list[Reward], models: list[str]
) -> None:
    """Print the tables and write results.json and the contact sheets."""
    read = {m: [read_scores(cfg.out / m, i, rewards, cfg) for i in range(len(entries))] for m in models}
    if lacking := [f"{m}/{i:05d}" for m in models for i, scores in enumerate(read[m]) if scores is None]:
        raise ValueError(f"{cfg.out} lacks {len(lacking)} of the prompts, such as {lacking[0]}: give the command again")
    scores = {m: {r.name: np.array([e[r.name] for e in read[m]]) for r in rewards} for m in models}
    summary = summarize(scores, tags, cfg.size)
    results = {"summary": summary, "scores": {m: {k: v.tolist() for k, v in scores[m].items()} for m in scores}}
    (cfg.out / "results.json").write_text(json.dumps(results).replace("NaN", "null") + "\n")
    write_sheets(scores, [e["prompt"] for e in entries], cfg.out)
    print(f"{len(entries)} prompts, {cfg.num} images each, {cfg.steps} steps; ± is half of a 95% interval\n")
    print(format_table(summary))
    print(f"wrote {cfg.out}: results.json {' '.join(sorted(p.name for p in cfg.out.glob('*.png')))}")


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    cfg = tyro.cli(Config, description=__doc__, console_outputs=rank == 0)
    try:
        with join(cfg.device, patience=timedelta(days=1)) as process:  # ranks wait for the slowest
            run(cfg, process)
    except ValueError as error:
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
