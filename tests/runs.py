"""Short runs of train.py in the processes of a test, and what they leave behind."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import train
from config import Config
from infra.distributed import join
from infra.jsonl import read_log
from tests.processes import spread

ROOT = Path(train.__file__).parent


def short_config(folder: Path) -> Config:
    """Eight updates of the tiny model, evaluated three times and saved four times, in seconds."""
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    prompts = folder / "few.txt"
    prompts.write_text("\n".join(lines[::60]) + "\n")
    return Config(
        out=folder / "run",
        batch=4,
        rollout_steps=2,
        updates=8,
        eval_every=4,
        save_every=2,
        ema=0.9,
        eval_prompts=prompts,
    )


def undisturbed_run(cfg: Config, out: Path) -> Config:
    """A run from start to end, to compare others with."""
    cfg = replace(cfg, out=out)
    assert completed(1, cfg) == ""
    return cfg


@contextlib.contextmanager
def folder_with_undisturbed_run() -> Iterator[tuple[Path, Config, Config]]:
    """A temporary folder for runs, their settings, and a run there from start to end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = short_config(folder)
        yield folder, base, undisturbed_run(base, folder / "undisturbed")


def run(cfg: Config) -> str:
    """Train; returns "" or why it stopped."""
    try:
        with join("cpu", cfg.shard) as process:
            train.run(cfg, train.set_up(cfg, process), process)
    except (train.Stop, ValueError) as error:
        return f"{getattr(error, 'code', 2)} {getattr(error, 'message', error)}"
    return ""


def told(cfg: Config) -> tuple[str, str]:
    """Train; why it stopped, and what was said on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return run(cfg), said.getvalue()


def completed(world: int, cfg: Config) -> str:
    return spread(world, run, cfg)[0]


def final(cfg: Config) -> dict[str, Tensor]:
    return load_file(cfg.out / "final" / "transformer" / "diffusion_pytorch_model.safetensors")


def without_seconds(path: Path) -> list[dict]:
    return [{k: v for k, v in e.items() if not k.startswith(("seconds", "memory", "tflops"))} for e in read_log(path)]


def same_run(a: Config, b: Config) -> bool:
    """The same weights bit for bit, and the same logs."""
    x, y = final(a), final(b)
    equal = x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    return equal and all(
        without_seconds(a.out / f) == without_seconds(b.out / f) for f in ("metrics.jsonl", "eval.jsonl")
    )


def stopped_after(cfg: Config, step: int) -> None:
    """Leave a run as it is `step` updates on: what comes after is forgotten."""

    def stop(*args, **kwargs):
        raise ValueError("enough")

    real = train.one_update
    train.one_update = lambda *args: real(*args) if args[-1] < step else stop()
    run(cfg)
