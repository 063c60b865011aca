"""What a run tells and writes down: lines on the screen, metrics and evaluations, pictures, trackers."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from infra.jsonl import Entry, append_line
from infra.pictures import before_after, contact_sheet, curves
from infra.trackers import open_trackers
from infra.watch import preview_indices


class Log:
    """A run's voice, of rank 0 only: the others have one that is silent and writes nothing."""

    def __init__(self, cfg: Config, out: Path, first: int, speaks: bool) -> None:
        self.out, self.speaks = out, speaks
        self.track = open_trackers(cfg.log if speaks else (), out, asdict(cfg), first)
        self.bar = tqdm(total=cfg.updates, initial=first, unit="update", file=sys.stderr, disable=not speaks)

    def say(self, text: str) -> None:
        if self.speaks:
            self.bar.write(text)

    def update(self, entry: Entry) -> None:
        """An update, in metrics.jsonl."""
        if self.speaks:
            append_line(self.out / "metrics.jsonl", entry)
        self.track(entry["step"], entry, [])
        self.bar.set_postfix_str(f"reward {entry['reward']:.3f} grad {entry['grad_norm']:.2f}")

    def evaluation(self, entry: Entry, images: Tensor, captions: Sequence[str]) -> None:
        """An evaluation, in eval.jsonl, and its images (n, 3, h, w), uint8, in samples/."""
        samples = self.out / "samples"
        sheet = samples / f"step_{entry['step']:04d}.png"
        if self.speaks:
            with self.forgiving():
                contact_sheet(images / 255, captions, sheet, columns=8)
                if entry["step"] == 0:
                    torch.save(images, samples / "first.pt")
                torch.save(images, samples / "last.pt")
            append_line(self.out / "eval.jsonl", entry)
        self.track(entry["step"], entry, [sheet] if sheet.exists() else [])
        means = {k: v for k, v in entry.items() if isinstance(v, float) and k != "seconds"}
        self.say(f"step {entry['step']:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()))

    def pictures(self, prompts: Sequence[str], tasks: Sequence[str], evals: Sequence[Entry]) -> None:
        """before_after.png, of the images of the first and the last evaluation, and curves.png."""
        if self.speaks:
            with self.forgiving():
                curves(self.out, self.out / "curves.png", tasks)
                samples = self.out / "samples"
                pair = [torch.load(samples / f"{name}.pt", weights_only=True) / 255 for name in ("first", "last")]
                chosen = preview_indices(prompts)
                judged = [e.get("by_prompt", {}).get("judge") for e in (evals[0], evals[-1])]
                right = [tuple(of_image[i] > 0.5 for of_image in judged) for i in chosen] if all(judged) else None
                before_after(*pair, [prompts[i] for i in chosen], self.out / "before_after.png", correct=right)

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """A picture that cannot be written, as on a full disk, is no reason to lose a run."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # the latter is torch.save's
            self.say(f"warning: a picture is not written: {error}")


def note_nonfinite(out: Path, step: int, seed: int, norm: float, ranks: Sequence[tuple], speaks: bool) -> str:
    """Write down an update that came to a number that is not finite, for a replay; returns what to tell the user.

    ranks: of each rank what the method returned, a Tensor (b,) by name; what it took; and the prompts.
    """
    bad = [i for i, (values, *_) in enumerate(ranks) if not all(v.isfinite().all() for v in values.values())]
    names = dict.fromkeys(k for values, *_ in ranks for k, v in values.items() if not v.isfinite().all())
    where = f"on rank {', '.join(map(str, bad))}" if bad else "in the gradient, though every loss is finite"
    notes = [{"prompts": prompts, **{k: v.tolist() for k, v in values.items()}} for values, _, prompts in ranks]
    file = out / "nonfinite.jsonl"
    if speaks:
        append_line(file, dict(step=step, seed=seed, grad_norm=norm, ranks=notes))
    values, _, prompts = ranks[(bad or [0])[0]]
    sound = torch.stack([v.isfinite() for v in values.values()]).all(0)  # (b,)
    which = f"prompts such as {prompts[int(sound.int().argmin())]!r}"  # the first that is not, or of all
    return (
        f"step {step}: {', '.join(names) or 'a number'} is not finite {where}; {which}. {file} has all of them. The "
        "step would be the same again: --skip-nonfinite 1 leaves it out"
    )
