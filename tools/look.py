"""One update, explained:  python -m tools.look [PRESET] [flags of train.py]

    python -m tools.look                                   # LeapAlign on four prompts of the shapes world
    python -m tools.look --method refl --seed 1
    python -m tools.look --method my_file.py:my_gradient --batch 8

Prints what the method drew, what each sample scored, and the gradient that each differentiated step of the rollout
adds. Writes runs/look.png: what a leap from each noise level predicts, decoded, a row per prompt. In a Python prompt,
an update's gradient takes three lines:

    from tools.look import open_run
    run = open_run("shapes --batch 4")
    print(run.add_gradient(update=0))
"""

import atexit
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import train
from config import Config, parse
from infra.distributed import Process, join
from infra.meter import Meter
from infra.methods import find_method, method_keywords
from infra.pictures import contact_sheet
from leaps import Rollout, Samples, prediction, rollout
from sample import decode
from samples import build_samples, draw_x_1, noise_of
from start import Setup, batch_prompts

PICTURE = Path("runs/look.png")
SAMPLES = 4  # of the batch, where --batch is not given: enough to see, seconds to compute


@dataclass
class OpenRun:
    """A run's inputs in this process: flags, networks, rewards, prompts."""

    cfg: Config
    setup: Setup
    process: Process
    stack: ExitStack  # closes the process group

    def add_gradient(self, update: int = 0) -> dict[str, Tensor]:
        """Add the gradient of an update's batch to the weights' `.grad`; returns what is logged, (batch,) each."""
        return train.accumulate_batch_gradient(self.cfg, self.setup, self.process, update, Meter(self.process.device))

    def samples(self, update: int = 0) -> Samples:
        """What a method is given of an update's batch."""
        size = self.setup.size(update)
        channels = self.setup.pipe.flux.config.in_channels
        x_1, generator = draw_x_1(self.cfg.seed, update, (self.cfg.batch, size.rows * size.columns, channels))
        all_rows = slice(0, self.cfg.batch)
        samples, _ = build_samples(
            self.setup.pipe,
            batch_prompts(self.cfg, self.setup, update),
            size,
            self.setup.rewards,
            noise=noise_of(x_1, all_rows, self.cfg.seed, update, like=size.sigmas),
            generator=generator,
            guidance=self.cfg.guidance,
            negative_prompt=self.cfg.negative_prompt,
            detach_negative=self.cfg.detach_negative,
            base=self.setup.base,
            update=update,
        )
        return samples


def open_run(flags: str = "") -> OpenRun:
    """The inputs of a run of train.py, given its flags as on the command line; no folder is made.

    --batch is 4 where it is not given, or a group of samples of one prompt if the method compares them.
    """
    words = shlex.split(flags)
    # The same flags as train.py's, so that an update looks here as it does in a run.
    cfg, preset = parse(words)
    cfg = replace(cfg, out=Path("runs/look"), resume=True)  # resume: nothing is refused because the folder exists
    if not any(word.startswith("--batch") for word in words):
        group = cfg.group or method_keywords(find_method(cfg.method)).get("group", 1)
        cfg = replace(cfg, batch=max(SAMPLES, group))
    stack = ExitStack()
    atexit.register(stack.close)  # the process group lives as long as the Python prompt
    process = stack.enter_context(join(cfg.device))
    return OpenRun(cfg, train.set_up(cfg, process, preset), process, stack)


# ----------------------------------------------------------------------------------- the explanation


def explain(run: OpenRun, update: int = 0) -> str:
    """An update in words and numbers."""
    setup = run.setup
    flux = setup.pipe.flux
    terms: list[str] = []
    samples = run.samples(update)

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        """The method's vjp, which notes how much each call adds to the gradient in the weights."""
        gradient_before = flat_gradient(flux)  # gradients of several calls add up in .grad
        through_network = samples.vjp(x, sigma, u, wrt_x)
        norm = (flat_gradient(flux) - gradient_before).norm().item()
        level = torch.as_tensor(sigma).mean().item()
        nested = f"{through_network.norm().item():12.3f}" if wrt_x else f"{'-':>12}"
        terms.append(f"{level:8.3f}{u.norm().item():12.4f}{norm:14.3f}{nested}")
        return through_network

    # The method runs as in a run; only its vjp is wrapped.
    flux.zero_grad()
    setup.method(samples._replace(vjp=vjp))
    total_norm = flat_gradient(flux).norm().item()

    b = run.cfg.batch
    sigmas = " ".join(f"{level:.2f}" for level in samples.sigmas.tolist())
    steps = len(samples.sigmas) - 1
    lines = [f"{run.cfg.method}, update {update}: {b} samples, {steps} steps at noise levels {sigmas}"]
    lines += ["", sample_table(run.add_gradient(update), batch_prompts(run.cfg, setup, update))]
    lines += ["", "Each differentiated call of the network (of the whole batch):"]
    lines += [f"{'sigma':>8}{'norm of u':>12}{'norm added':>14}{'|dv/dx^T u|':>12}", *terms]
    lines += ["", f"norm of the whole gradient {total_norm:.3f}; an update uses at most --clip {run.cfg.clip}"]
    return "\n".join(lines)


def flat_gradient(flux: torch.nn.Module) -> Tensor:
    """The gradient in all trained weights, one vector."""
    gradients = []
    for param in flux.parameters():
        if param.requires_grad:
            gradient = torch.zeros_like(param) if param.grad is None else param.grad
            gradients.append(gradient.flatten())
    return torch.cat(gradients)


def sample_table(values: dict[str, Tensor], prompts: list[str]) -> str:
    """A row per sample: what the method logs of it, its rewards and its loss."""
    names = [name for name in values if name != "satisfied"]  # the loss says it already
    rows = ["".join(f"{name:>10}" for name in names) + "  prompt"]
    for i, prompt in enumerate(prompts):
        numbers = [f"{values[name][i].item():10.3f}" for name in names]
        rows.append("".join(numbers) + f"  {prompt}")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------- the picture


@torch.no_grad()
def predictions(run: OpenRun, update: int = 0) -> tuple[Rollout, list[Tensor]]:
    """A rollout, and the decoded prediction of a leap to x_0 from each of its noise levels: T images per sample."""
    samples = run.samples(update)
    size = run.setup.size(update)
    ro = rollout(samples.velocity, samples.noise(0), samples.sigmas)
    steps = range(len(ro.v))
    return ro, [decode(run.setup.pipe, prediction(ro, step), size.height, size.width) for step in steps]


def draw(run: OpenRun, path: Path, update: int = 0) -> None:
    """A row per prompt: what a leap predicts from each noise level, from pure noise on the left to the image."""
    ro, images_of_steps = predictions(run, update)
    levels = ro.sigmas[:-1].tolist()
    images, captions = [], []
    for row in range(run.cfg.batch):
        for level, of_step in zip(levels, images_of_steps):
            images.append(of_step[row].cpu())
            captions.append(f"{level:.2f}")  # the noise level that the leap starts from
    contact_sheet(images, captions, path, columns=len(levels), side=64)


def main() -> None:
    try:
        run = open_run(shlex.join(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(explain(run))
    draw(run, PICTURE)
    print(f"wrote {PICTURE}: what a leap from each noise level predicts, a row per prompt")


if __name__ == "__main__":
    main()
