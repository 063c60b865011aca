"""What a run prints and writes down: lines on the screen, metrics and evaluations, pictures, trackers."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from infra.checkpoints import what_is_saved
from infra.distributed import Process, Stop
from infra.files import unlock_folder
from infra.jsonl import Entry, append_line
from infra.page import SIDE, runs_page
from infra.pictures import before_after, contact_sheet, read_png, save_png, to_pil
from infra.prompts import printable
from infra.trackers import open_trackers
from infra.watch import folder_advice, preview_indices


class UpdateLog(TypedDict):
    """What the run itself logs of an update. Methods and rewards add values under other names."""

    step: int  # the number of the update, from 0
    reward: float
    loss: NotRequired[float]  # a policy gradient has none
    satisfied: float  # share of samples with no loss left: each reward has reached its lambda
    grad_norm: float
    forwards: int  # evaluations of the network, those with a backward among them
    backwards: int
    seconds: float
    memory: float  # GB, the peak
    tflops: float  # per rank
    mfu: NotRequired[float]  # on GPUs whose peak is known


class EvaluationLog(TypedDict):
    """What the run itself logs of an evaluation. Rewards and the judge's tasks add values under other names."""

    step: int  # updates made
    reward: float
    by_prompt: dict[str, list[float]]
    seconds: float
    saved_to: NotRequired[str]  # "best/" if the weights were kept there


class Log:
    """The voice of a run. Rank 0 alone prints and writes."""

    def __init__(self, cfg: Config, out: Path, first: int, is_first_rank: bool) -> None:
        self.cfg = cfg
        self.out = out
        self.is_first_rank = is_first_rank
        self.began = time.time()
        self.warned_of_zero_gradient = False
        self.track = open_trackers(cfg.log if is_first_rank else (), out, asdict(cfg), first)
        self.bar = tqdm(total=cfg.updates, initial=first, unit="update", file=sys.stderr, disable=not is_first_rank)

    def seconds(self) -> float:
        """Since training started or was resumed, without the time of loading."""
        return time.time() - self.began

    def say(self, text: str) -> None:
        """Print a line above the progress bar; a warning is kept in warnings.txt, too, for the run's page."""
        if not self.is_first_rank:
            return
        text = printable(text)
        self.bar.write(text)
        if text.startswith("warning"):
            with suppress(OSError), (self.out / "warnings.txt").open("a") as file:  # the disk may be full
                file.write(text + "\n")

    def update(self, entry: Entry) -> None:
        """Log an update in metrics.jsonl."""
        self.write("metrics.jsonl", entry)
        self.track(entry["step"], entry, [])
        words = [f"reward {entry['reward']:.3f} grad {entry['grad_norm']:.2f}"]
        for name, value in entry.items():  # what the method logs; of several rewards, each
            is_of_run = name in UpdateLog.__annotations__ or name.startswith("seconds_")
            if not is_of_run and value != entry["reward"]:
                words.append(f"{name} {value:.3g}")
        self.bar.set_postfix_str(" ".join(words))
        # A loss of zero trains nothing. A policy gradient has no loss and may meet a batch without a gradient.
        if "loss" in entry and entry["grad_norm"] == 0 and not self.warned_of_zero_gradient:
            self.warned_of_zero_gradient = True
            self.say(self.zero_gradient_warning(entry))

    def zero_gradient_warning(self, entry: Entry) -> str:
        if entry["satisfied"] > 1 - 1e-6:
            lam = " ".join(str(value) for value in self.cfg.lam) or "its default"
            return f"warning: every reward is above --lam {lam}: the loss is zero and nothing is learned"
        return "warning: the gradient is zero though rewards could rise: does the reward ignore the images?"

    def evaluation(self, entry: Entry, images: Tensor, prompts: Sequence[str]) -> None:
        """Log an evaluation in eval.jsonl, and two dozen of its images (n, 3, h, w), uint8, in samples/."""
        samples = self.out / "samples"
        sheet = samples / f"step_{entry['step']:04d}.png"
        if self.is_first_rank:
            with self.pictures_may_fail():
                indices = preview_indices(prompts)
                contact_sheet(images[indices] / 255, [prompts[i] for i in indices], sheet, columns=8)
                # One by one as well, for the page and for the pictures at the end, also after a --resume in between.
                for i in indices:
                    picture = to_pil(images[i] / 255)
                    picture.thumbnail((SIDE, SIDE))
                    save_png(picture, sheet.with_suffix("") / f"{i}.png")
                (samples / "prompts.json").write_text(json.dumps({i: prompts[i] for i in indices}))
        self.write("eval.jsonl", entry)
        self.track(entry["step"], entry, [sheet] if sheet.exists() else [])
        numbers = []  # all means, but not the lists by prompt
        for name, value in entry.items():
            if isinstance(value, float) and name != "seconds":
                numbers.append(f"{name} {value:.3f}")
        self.say(f"step {entry['step']:4d}  {'  '.join(numbers)}")

    def page(self) -> None:
        """Write index.html, from what the run has written so far."""
        if self.is_first_rank:
            with self.pictures_may_fail():
                runs_page([self.out], self.out / "index.html")

    def finish(self, setup: Any, history: Any) -> None:
        """Draw before_after.png, and say what the run wrote and which of best/ and final/ to use."""
        last = history.evaluations[-1]
        if not math.isfinite(last["reward"]):
            raise Stop(3, f"the reward of final/ is {last['reward']}: take a lower --lr; best/ may be sound")
        if not self.is_first_rank:
            return
        with self.pictures_may_fail():
            self.draw(setup, history.evaluations[0], history.evaluations[-1])
        self.page()
        names = sorted(path.name for path in self.out.iterdir())
        self.say(f"{self.seconds():.0f} s; wrote {self.out}: {', '.join(names)}")
        if history.watched:
            self.say(folder_advice(history.best, last, history.watched[0]))

    def draw(self, setup: Any, first: Entry, last: Entry) -> None:
        """before_after.png, of the images of the first and the last evaluation."""
        prompts = setup.eval_prompts
        indices = preview_indices(prompts)
        titles = []
        for reward in setup.watched:
            if reward.task_of:
                titles = [reward.task_of(prompts[i]) for i in indices]
        pairs, correct = [], []
        for i in indices:
            folders = [self.out / "samples" / f"step_{entry['step']:04d}" for entry in (first, last)]
            pairs.append([read_png(folder / f"{i}.png") for folder in folders])
            scores = [entry["by_prompt"].get("judge") for entry in (first, last)]
            correct.append([bool(of_prompts) and of_prompts[i] > 0.5 for of_prompts in scores])
        captions = [prompts[i] for i in indices]
        names = ("base", f"after {last['step']} updates")
        before_after(pairs, captions, self.out / "before_after.png", names, titles, correct)

    def write(self, name: str, entry: Entry) -> None:
        """Add a line to a log. Raises Stop if that fails: a run without its log could not be resumed."""
        if not self.is_first_rank:
            return
        try:
            append_line(self.out / name, entry)
        except OSError as error:  # the disk is full, for instance
            raise Stop(1, f"{error}; {what_is_saved(self.out)}") from error

    def close(self) -> None:
        """Close the progress bar, and let other runs use the folder."""
        self.bar.close()
        unlock_folder(self.out)

    @contextmanager
    def pictures_may_fail(self) -> Iterator[None]:
        """A picture that cannot be written, as on a full disk, is no reason to lose a run."""
        try:
            yield
        except Exception as error:
            self.say(f"warning: a picture is not written: {type(error).__name__}: {error}")


def note_nonfinite(
    out: Path,
    update: int,
    seed: int,
    grad_norm: float,
    values: dict[str, Tensor],
    prompts: Sequence[str],
    process: Process,
) -> str:
    """Write down an update that met a number that is not finite, for a replay; returns the message for the user.

    `values` are what all ranks log, (batch,) each, and `prompts` those of the whole batch.
    """
    file = out / "nonfinite.jsonl"
    if process.rank == 0:
        lists = {name: value.tolist() for name, value in values.items()}
        append_line(file, dict(step=update, seed=seed, grad_norm=grad_norm, prompts=list(prompts), values=lists))
    names = [name for name, value in values.items() if not value.isfinite().all()]
    is_finite = torch.stack([value.isfinite() for value in values.values()]).all(0)  # (batch,)
    rows = is_finite.logical_not().nonzero().flatten().tolist()
    # Ranks have equal shares of the batch. Where one rank alone fails, its GPU may be broken.
    ranks = sorted({row * process.world_size // len(prompts) for row in rows})
    location = f"on rank {', '.join(map(str, ranks))}" if rows else "in the gradient, though every loss is finite"
    prompt = prompts[rows[0] if rows else 0]
    return (
        f"step {update}: {', '.join(names) or 'a number'} is not finite {location}; prompts such as {prompt!r}. "
        f"{file} has all of them"
    )
