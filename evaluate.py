"""Compare models side by side: the same prompts and noise, any rewards, with error bars.

    python evaluate.py --model shapes/tiny-flux runs/leapalign-seed0/final --reward judge tiny
    python evaluate.py --images my-pictures --prompts my-prompts.txt --num 1 --reward tiny     # drawn elsewhere
    torchrun --nproc-per-node 8 -- evaluate.py --model weights/FLUX.1-dev runs/flux/final --prompts F --reward hpsv2
    # the -- keeps torchrun from reading --num as one of its own flags

Prints means with 95% intervals, and the differences to the first model, paired by prompt.  Writes to --out:

    results.json                            all of the printed numbers, and the scores of every prompt
    index.html                              a page with the table, and the images that gained and lost most
    config.json                             the flags, but --model, --out, --batch, --device; others must stay alike
    MODEL/00000.json  00000.png             a prompt's scores and a thumbnail of its first image

The same command again goes on where the last one ended: prompts that have scores are not drawn again.

The interval is Student's over prompts: images of one prompt are averaged first, as they are not independent.  So the
judge's mean is over prompts, where a run's own evaluations average over tasks. The two agree if all tasks have equally
many prompts.
"""

import gc
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import sides
from formats.folders import Description, describe, load_pipeline
from formats.lora_files import read_lora
from formats.sampling import draw_as_trained
from formats.weights import weight_files
from infra.distributed import Process, all_gather_objects, join, on_first_rank
from infra.failures import is_out_of_memory
from infra.files import check_writable, content_hash, write_whole
from infra.flags import check_ranges, flag_of, flags
from infra.page import models_page
from infra.pictures import save_png, to_pil
from infra.prompts import printable, prompts_hash, read_entries, rows_of_rank
from infra.reading import parse_file, parse_json
from infra.summary import format_table, summarize
from infra.user_code import file_hashes
from rewards import Reward, check_rewards, open_reward, reward_hash, reward_name, score_all
from sample import DrawFlags, Pipeline, Reader, choose_guidance, sample, token_grid, truncation_warning

HERE = Path(__file__).parent
THUMBNAIL = 256  # pixels, the longest side
WEIGHTS_HASH = "weights.sha256"  # beside a model's scores: which weights they are of
Entry = dict[str, Any]  # a prompt, under "prompt", and all else that its file says of it


@flags
class EvaluateFlags(DrawFlags):
    """Score models on the same prompts and noise, and compare them with the first."""

    model: tuple[str, ...] = (str(HERE / "shapes" / "tiny-flux"),)
    """Model folders or hub ids, LoRAs, or files of a transformer as flux1-dev.safetensors; all are compared with the
    first."""
    images: tuple[Path, ...] = ()
    """Folders of pictures to score in place of models: --num of each prompt, in the order of their names. All pictures
    of a folder have one size."""
    prompts: Path = HERE / "shapes" / "eval-prompts.txt"
    """Prompts, one per line; or JSON lines, a JSON array, a .csv or .tsv table with a "prompt" in each."""
    reward: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--rewards",))] = ("judge", "tiny")
    """NAME[=PATH] or my_file.py:function: tiny, clip, pickscore, hpsv2, hpsv3, imagereward, or judge, the rules of the
    shapes world."""
    rollout_steps: Annotated[int | None, tyro.conf.arg(aliases=("--steps",))] = None
    """Euler steps. Default: those of the training of the first model that has any, or 50; so of guidance and size."""
    size: tuple[str, ...] = ()
    """Pixels: one number for a square, or HEIGHTxWIDTH; none: the VAE's own. Of several, a prompt's images take turns.
    """
    seed: int = 0
    """Another seed is other noise for every image; the same seed is the same noise for every model."""
    out: Path = Path("runs/evaluation")
    """Folder to write; give it again to go on where it stopped, or to add a model."""
    geneval: Path | None = None
    """Write the images to GENEVAL/MODEL as GenEval's evaluator reads them: INDEX/metadata.jsonl and
    INDEX/samples/0000.png. Needs prompts with its tags, such as tools/prompts.py writes."""
    keep_images: bool = False
    """Keep every image at its size, in OUT/MODEL/images."""


class Model(NamedTuple):
    """A model to evaluate, before its weights are read."""

    label: str  # its name in files and tables
    source: str  # its path or hub id, as in --model
    description: Description
    sizes: list[tuple[int, int]]  # heights and widths, at which the images of a prompt take turns
    weights_hash: str
    pictures: Sequence[Path] = ()  # files, of --images


def main() -> None:
    rank = int(os.environ.get("RANK", 0))  # torchrun sets it
    cfg = tyro.cli(EvaluateFlags, console_outputs=rank == 0)
    try:
        # Ranks that are done wait for the slowest one, up to a day.
        with join(cfg.device, timeout=timedelta(days=1)) as process:
            evaluate_models(cfg, process)
    except (ValueError, OSError) as error:
        prefix = f"rank {rank}: " if rank else ""
        print(printable(f"error: {prefix}{error}"), file=sys.stderr)
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit("error: out of memory: take a smaller --batch; the same command goes on from here") from error


def evaluate_models(cfg: EvaluateFlags, process: Process) -> None:
    """Check everything, draw and score the images of each model, and report. Raises ValueError naming the flag."""
    if cfg.images:
        check_images_flags(cfg)
    # All models are drawn alike, as one of them was while it was trained.
    cfg = draw_as_trained(cfg, cfg.model, dict(rollout_steps=50))
    check_values(cfg)
    entries = read_entries(cfg.prompts)
    prompts = [entry["prompt"] for entry in entries]
    models = describe_pictures(cfg, prompts) if cfg.images else describe_models(cfg, prompts)
    tags = tags_of(cfg, entries)
    record = config_record(cfg, prompts)
    on_first_rank(partial(check_out, cfg, record, models, len(prompts)))
    # hpsv2 needs FLUX's CLIP tokenizer. A user's function is tried on random images of the first size.
    first = models[0]
    clip_tokenizer = first.description.clip_tokenizer
    rewards = []
    for spec in cfg.reward:
        rewards.append(open_reward(spec, process.device, clip_tokenizer, False, first.sizes[0], prompts))
    # Only now is the folder made: after a mistake above, the next try finds nothing in its way.
    on_first_rank(partial(claim_out, cfg, record, models))

    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    for model in models:
        pipe = None
        if not model.pictures:
            # Every rank holds the whole model and draws its own prompts: nothing is sharded.
            options = dict(base=cfg.base, strength=cfg.strength)
            pipe = load_pipeline(model.source, process.device, dtype, cfg.text_length, **options)
            readers = [Reader(reward.name, *reward.reads) for reward in rewards if reward.reads]
            warning = truncation_warning(pipe, prompts, readers)
            if warning and process.rank == 0:
                print(warning, file=sys.stderr)
        # Rank 0 decides for all ranks: on a network disk the others may not see every file yet.
        unscored = on_first_rank(partial(unscored_prompts, cfg, model.label, len(prompts)))
        indices = rows_of_rank(unscored, process.rank, process.world_size)
        draw_and_score(cfg, model, pipe, rewards, entries, indices, process.device)
        # The next model needs the memory.
        del pipe
        gc.collect()
        all_gather_objects(None)  # wait until the other ranks have written their scores
    if process.rank == 0:
        report_scores(cfg, prompts, tags, models)


# -------------------------------------------------------------------------------------------- check


def check_images_flags(cfg: EvaluateFlags) -> None:
    """Raise ValueError for a flag that says how to draw pictures which are there already."""
    for name in ("size", "seed", "strength", "rollout_steps", "guidance", "negative_prompt"):
        if getattr(cfg, name) != getattr(EvaluateFlags, name):
            raise ValueError(f"{flag_of(name)} means nothing with --images, whose pictures are drawn already")


def check_values(cfg: EvaluateFlags) -> None:
    """Raise ValueError for flags that are wrong whatever the files hold."""
    if not cfg.model or not cfg.reward:
        raise ValueError("give at least one --model and one --reward")
    check_ranges(cfg)
    if len(cfg.size) > cfg.num:
        raise ValueError(f"--num {cfg.num}: a prompt's images take turns at {len(cfg.size)} sizes, so give as many")


def describe_models(cfg: EvaluateFlags, prompts: Sequence[str]) -> list[Model]:
    """Read the small files of all models, so that a fault of the last one is found before the first one is drawn."""
    check_rewards(cfg.reward)
    models = {}
    for source in cfg.model:
        label = model_label(source)
        if label in models:
            raise ValueError(f"--model {models[label].source} {source}: both would be called {label}")
        description = describe(source, cfg.base)
        location = description.location
        if location.lora:
            read_lora(location.lora, description.weights.config)  # raises ValueError where it does not fit
        elif cfg.strength != 1 and not cfg.base:
            # What tuning changed is its difference to the base.
            raise ValueError(f"--strength {cfg.strength} needs --base FOLDER: {source} is no LoRA")
        sizes = image_sizes(cfg, location.folder)
        for height, width in sizes:
            token_grid(description, height, width)
            check_rewards(cfg.reward, prompts, (height, width), f"--prompts {cfg.prompts}")
        models[label] = Model(label, source, description, sizes, content_hash(weight_files(location)))
    return list(models.values())


def describe_pictures(cfg: EvaluateFlags, prompts: Sequence[str]) -> list[Model]:
    """The folders of --images, as models that have drawn already. Raises ValueError naming one that does not fit."""
    check_rewards(cfg.reward)
    description = describe(cfg.model[0], cfg.base)  # of which hpsv2 takes the tokenizer
    models = []
    for folder in cfg.images:
        files = [file for file in folder.glob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
        files.sort(key=number_order)
        if len(files) != len(prompts) * cfg.num:
            count = f"{len(files)} pictures for {len(prompts)} prompts of --prompts"
            raise ValueError(f"--images {folder} holds {count}, and --num {cfg.num} of each are scored")
        sizes = {parse_file(file, read_picture).shape[1:] for file in files}
        if len(sizes) > 1:
            raise ValueError(f"--images {folder}: its pictures have {len(sizes)} sizes, give a folder for each")
        check_rewards(cfg.reward, prompts, *sizes, f"--prompts {cfg.prompts}")
        models.append(Model(model_label(str(folder)), str(folder), description, [*sizes], content_hash(files), files))
    return models


def number_order(file: Path) -> list[str | int]:
    """A key that sorts names as people count: 2.png before 10.png."""
    words = re.split(r"(\d+)", file.name)  # texts and numbers in turn
    return [int(word) if word.isdecimal() else word for word in words]


def read_picture(file: Path) -> Tensor:
    """A picture as a tensor (3, h, w) in [0, 1]. Raises ValueError for more than 8 bits a channel."""
    picture = Image.open(file)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"it has pixels of kind {picture.mode}: convert it to 8 bits a channel")
    pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def model_label(source: str) -> str:
    """A model's name in files and tables: runs/a/final is runs_a_final."""
    path = Path(source)
    if path.exists():  # else it is a hub id
        path = path.resolve()
        for home in (Path.cwd(), HERE, Path("/")):
            if home in path.parents:  # the model may be the current folder
                path = path.relative_to(home)
                break
    return str(path).replace("/", "_")


def image_sizes(cfg: EvaluateFlags, folder: Path) -> list[tuple[int, int]]:
    """Heights and widths of images: those of --size, or the size that the VAE in a model folder was trained at."""
    sizes = cfg.size
    if not sizes:
        sizes = [parse_json(folder / "vae" / "config.json", lambda entries: str(entries["sample_size"]))]
    return [sides(size) for size in sizes]


def tags_of(cfg: EvaluateFlags, entries: Sequence[Entry]) -> list[str] | None:
    """The group of each prompt, for means by group: the judge's task, or the "tag" of GenEval's files; else None.

    Raises ValueError if --geneval is given and a prompt has no tag.
    """
    tags = [entry.get("tag") for entry in entries]
    # A list of tags, which some files have, names no single group.
    is_tagged = all(isinstance(tag, str) and tag for tag in tags)
    if cfg.geneval and not is_tagged:
        raise ValueError(
            f"--geneval needs prompts with GenEval's tags, and {cfg.prompts} has some without: python -m tools.prompts"
        )
    if "judge" in map(reward_name, cfg.reward):
        task_of = open_reward("judge").task_of  # by the words of a prompt
        return [task_of(entry["prompt"]) for entry in entries]
    return tags if is_tagged else None


def config_record(cfg: EvaluateFlags, prompts: Sequence[str]) -> dict[str, Any]:
    """config.json: what the numbers depend on, by the names of the flags."""
    record = asdict(cfg)
    for name in ("model", "images", "out", "batch", "device"):
        del record[name]  # an evaluation may go on with more models, in a folder that was moved, on another machine
    record["prompts"] = prompts_hash(prompts)
    record["reward_files"] = file_hashes(cfg.reward) | {spec: reward_hash(spec) for spec in cfg.reward}
    # As it will be read back: tuples become lists, and paths strings.
    return json.loads(json.dumps(record, default=str))


def check_out(cfg: EvaluateFlags, record: dict[str, Any], models: Sequence[Model], count: int) -> None:
    """Raise ValueError if --out or --geneval holds anything that is not of this evaluation of `count` prompts."""
    check_writable(f"--out {cfg.out}", cfg.out)
    file = cfg.out / "config.json"
    if file.exists():
        recorded = parse_json(file, dict, "it is no evaluation's: choose another --out")
        for name, value in record.items():
            if recorded.get(name) != value:
                change = f"another {name}, {recorded.get(name)} and not {value}"
                raise ValueError(f"--out {cfg.out} holds an evaluation with {change}: choose another --out")
    elif cfg.out.exists() and any(cfg.out.iterdir()):
        raise ValueError(f"--out {cfg.out} is occupied by something else")
    for model in models:
        file = cfg.out / model.label / WEIGHTS_HASH
        if file.exists() and file.read_text() != model.weights_hash:
            raise ValueError(f"{model.source} was written again since it was evaluated: remove {file.parent}")
    if cfg.geneval:
        check_writable(f"--geneval {cfg.geneval}", cfg.geneval)
        for model in models:
            # GenEval counts every folder that it finds, also those that an evaluation of more prompts has left.
            folder = cfg.geneval / model.label
            if (folder / f"{count:05d}").exists():
                raise ValueError(f"--geneval: {folder} holds {count:05d} of other prompts: remove it")


def claim_out(cfg: EvaluateFlags, record: dict[str, Any], models: Sequence[Model]) -> None:
    """Note in --out which flags and weights the scores will be of."""
    write_whole(cfg.out / "config.json", json.dumps(record, indent=2) + "\n")
    for model in models:
        # In the model's folder, so that who removes its scores removes the hash, too.
        write_whole(cfg.out / model.label / WEIGHTS_HASH, model.weights_hash)


# ---------------------------------------------------------------------------------- draw and score


def unscored_prompts(cfg: EvaluateFlags, label: str, count: int) -> list[int]:
    """Indices of the prompts that have no scores in a model's folder, or have lost a picture."""
    indices = []
    for i in range(count):
        files = [cfg.out / label / f"{i:05d}.json", cfg.out / label / f"{i:05d}.png"]
        if cfg.geneval:
            files += [cfg.geneval / label / f"{i:05d}" / "samples" / f"{n:04d}.png" for n in range(cfg.num)]
        if not all(file.exists() and file.stat().st_size for file in files):
            indices.append(i)
    return indices


def draw_and_score(
    cfg: EvaluateFlags,
    model: Model,
    pipe: Pipeline | None,
    rewards: Sequence[Reward],
    entries: Sequence[Entry],
    indices: Sequence[int],
    device: torch.device,
) -> None:
    """Draw and score the prompts at `indices`, a few at a time; each is written as soon as it has its scores."""
    # Whole prompts, so that all scores of a prompt are known, and written, at the same time.
    chunk_size = max(1, cfg.batch // cfg.num)
    starts = range(0, len(indices), chunk_size)
    for start in tqdm(starts, desc=model.label, file=sys.stderr, disable=not indices):
        chunk = indices[start : start + chunk_size]
        images = {}  # by (i, n): the n-th image of prompt i
        scores = {reward.name: {} for reward in rewards}
        for turn, (height, width) in enumerate(model.sizes):
            # The images of a prompt take turns at the sizes. Those of one size are drawn together.
            image_numbers = range(turn, cfg.num, len(model.sizes))
            keys = list(itertools.product(chunk, image_numbers))
            prompts = [entries[i]["prompt"] for i, _ in keys]
            # Seeds count on over images, prompts and --seed, so no two images start from the same noise.
            seeds = [(cfg.seed * len(entries) + i) * cfg.num + n for i, n in keys]
            if model.pictures:
                batch = torch.stack([read_picture(model.pictures[i * cfg.num + n]) for i, n in keys])
            else:
                guidance = choose_guidance(cfg.guidance, pipe.flux.config)
                batch = sample(
                    pipe, prompts, seeds, cfg.rollout_steps, height, width, guidance, cfg.batch, cfg.negative_prompt
                )
            images.update(zip(keys, batch))
            for reward in rewards:
                values = score_all(reward, batch, prompts, device, cfg.batch)
                scores[reward.name].update(zip(keys, values.float().tolist()))
        for i in chunk:
            prompt_images = [images[i, n] for n in range(cfg.num)]
            write_images(cfg, model, i, entries[i], prompt_images)
            line = {"prompt": entries[i]["prompt"]}
            for name in scores:
                line[name] = [scores[name][i, n] for n in range(cfg.num)]
            # Last, so that a prompt with scores is complete.
            write_whole(cfg.out / model.label / f"{i:05d}.json", json.dumps(line) + "\n")


def write_images(cfg: EvaluateFlags, model: Model, i: int, entry: Entry, images: Sequence[Tensor]) -> None:
    """Write the thumbnail of the i-th prompt, and all of its images where --keep-images and --geneval ask for them."""
    folder = cfg.out / model.label
    pictures = list(map(to_pil, images))
    if cfg.keep_images:
        for n, picture in enumerate(pictures):
            save_png(picture, folder / "images" / f"{i:05d}_{n}.png")
    if cfg.geneval:
        # As GenEval's evaluate_images.py reads it. GenEval counts every picture that it finds, also those of an earlier
        # evaluation with more images a prompt.
        geneval = cfg.geneval / model.label / f"{i:05d}"
        shutil.rmtree(geneval, ignore_errors=True)
        for n, picture in enumerate(pictures):
            save_png(picture, geneval / "samples" / f"{n:04d}.png")
        (geneval / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    # The page is made of these: a thousand FLUX images at full size would be 2 GB.
    thumbnail = pictures[0]
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    save_png(thumbnail, folder / f"{i:05d}.png")


# ------------------------------------------------------------------------------------------- report


def report_scores(
    cfg: EvaluateFlags, prompts: Sequence[str], tags: Sequence[str] | None, models: Sequence[Model]
) -> None:
    """Print the tables, and write results.json and index.html."""
    scores = {}
    for model in models:
        scores[model.label] = read_scores(cfg, model.label, prompts)
    summary = summarize(scores, tags, cfg.size)
    results = without_nonfinite({"summary": summary, "scores": scores})
    (cfg.out / "results.json").write_text(json.dumps(results) + "\n")
    models_page(summary, scores, prompts, cfg.out)
    # The tables come last, where people look.
    print(f"{len(prompts)} prompts, {cfg.num} images each, {cfg.rollout_steps} steps; ± is half of a 95% interval\n")
    print(format_table(summary))
    print(f"wrote {cfg.out}: results.json and index.html")
    if cfg.geneval:
        print(f"wrote {cfg.geneval}: {len(prompts) * cfg.num:,} pictures of each model")


def without_nonfinite(value: Any) -> Any:
    """The same as JSON can hold it: None for NaN, which is the interval of a single prompt, and for infinity."""
    if isinstance(value, dict):
        return {name: without_nonfinite(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [without_nonfinite(entry) for entry in value]
    is_nonfinite = isinstance(value, float) and not math.isfinite(value)
    return None if is_nonfinite else value


def read_scores(cfg: EvaluateFlags, label: str, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """A model's scores by each reward, (prompts, --num). Raises ValueError if prompts have none."""
    # Every rank has written its own, but a network disk may show them to rank 0 later.
    unscored = unscored_prompts(cfg, label, len(prompts))
    if unscored:
        example = f"{label}/{unscored[0]:05d}"
        raise ValueError(f"{cfg.out} lacks {len(unscored)} of the prompts, such as {example}: give the command again")
    names = list(map(reward_name, cfg.reward))
    rows = []
    for i, prompt in enumerate(prompts):

        def parse(entries: dict[str, Any], prompt: str = prompt) -> np.ndarray:
            if entries["prompt"] != prompt:
                raise ValueError("its scores are of another prompt")
            numbers = [float(score) for name in names for score in entries[name]]
            return np.array(numbers).reshape(len(names), cfg.num)

        rows.append(parse_json(cfg.out / label / f"{i:05d}.json", parse, "remove it, and give the command again"))
    return dict(zip(names, np.stack(rows, axis=1)))


if __name__ == "__main__":
    main()
