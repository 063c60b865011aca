"""Post-train a flow model so that its images score higher: LeapAlign, and the gradients it is measured against.

    python train.py                                  # the tiny Flux of the shapes world, minutes on a laptop
    python train.py shapes --lr 3e-5 --seed 1        # a preset and what to change of it
    python train.py --method refl                    # a baseline through the same loop
    torchrun --nproc-per-node 8 train.py flux-dev-hpsv2 --resume

One iteration, and nothing else, is `update_gradient` below; the mathematics is leaps.py.  Writes, to --out:

    config.json  metrics.jsonl  eval.jsonl  curves.png  before_after.png  samples/step_NNNN.png
    checkpoints/step_NNNNNN/  best/  final/

The shapes preset differs from the paper in its learning rate, T and EMA: shapes/README.md says why.
"""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from config import PRESETS, Config
from infra.checkpoints import Run, folders, load_newest, save_checkpoint
from infra.distributed import World, disagreement, fingerprint, gather, join, kept_gathered, swapped
from infra.folders import write_model
from infra.logs import append, open_trackers, peak_flops, peak_memory, stopwatch
from infra.pictures import before_after, curves
from infra.prompts import batch_of, shard
from infra.watch import shown, watch
from leaps import Rollout, Velocity, hinge, leap_backward, one_step, rollout, similarity_weight
from rewards import Reward, reported
from sample import Pipeline, Text, decode, encode, grid, velocity_of
from start import Setup, open_folder, pick, prepare
from tools.plan import forward_flops, passes_of

REQUEUE, NONFINITE = 75, 3  # exit codes: stopped by a signal and resumable; stopped before a bad update


# ------------------------------------------------------------------------------------- one update


def update_gradient(
    pipe: Pipeline,
    rewards: list[Reward],
    prompts: list[str],
    noise: Tensor,
    levels: Tensor,
    picks: tuple[int, ...],
    cfg: Config,
    share: float = 1.0,
) -> dict[str, float]:
    """Add one batch's gradient, times `share`, to `pipe.flux` and return what was measured.

    The baselines are the same lines: ReFL is a single leap with the reward on its prediction, the true gradient
    a leap over every step, whole (alpha = 1); neither weighs samples.
    """
    refl, full = cfg.method == "refl", cfg.method == "full"
    alpha, weight = (1.0, "none") if full else (cfg.alpha, "none" if refl else cfg.weight)
    lap = stopwatch(pipe.device)
    text, tokens = encode(pipe, prompts), grid(pipe, cfg.size, cfg.size)

    def velocity(part: slice = slice(None)) -> Velocity:  # of some samples of the batch
        return velocity_of(pipe.flux, Text(*(t[part] for t in text)), *tokens, cfg.guidance, pipe.compute)

    with kept_gathered(pipe.flux, cfg.keep_gathered):
        ro = rollout(velocity(), noise, levels)
    w, d = similarity_weight(ro, picks, cfg.tau, weight)
    lap("rollout")

    n, micro = len(prompts), cfg.micro_batch or len(prompts)
    parts = [slice(i, i + micro) for i in range(0, n, micro)]
    x0 = ro.x[-1]
    if refl or cfg.reward_input == "xhat_0":
        x0 = one_step(ro.x[picks[-1]], ro.v[picks[-1]], ro.sigmas[picks[-1]], ro.sigmas[-1])
    x0 = x0.detach().requires_grad_()
    loss, scores = 0.0, []
    for part in parts:
        images = decode(pipe, x0[part], cfg.size, cfg.size)
        scores.append(torch.stack([reward.score(images, prompts[part]) for reward in rewards]))
        wanted = sum(r.weight * hinge(score, r.lam) for r, score in zip(rewards, scores[-1]))  # Eq. 11
        part_loss = (w[part] * wanted).sum() / n  # Eq. 13
        (share * part_loss).backward()
        loss += part_loss.item()
    lap("reward")

    for part in parts:
        states = Rollout(ro.x[:, part], ro.v[:, part], ro.sigmas)
        leap_backward(velocity(part), states, picks, alpha, x0.grad[part], cfg.nested_only)  # Eq. 10
    score = torch.cat(scores, dim=1).detach()  # (rewards, b)
    satisfied = [r.lam is not None and (s >= r.lam).float().mean().item() for r, s in zip(rewards, score)]
    return dict(
        **reported(rewards, {r.name: r.scale * s.mean().item() for r, s in zip(rewards, score)}),
        loss=loss,
        satisfied=float(min(satisfied)),
        d_j=d[:-1].mean().item() if len(picks) > 1 else 0.0,
        d_0=d[-1].mean().item(),
        w=w.mean().item(),
        **lap("leaps"),
    )


def generator_of(*key: int) -> torch.Generator:
    """A CPU generator for everything random in one step, of key (seed, step), independent of that of other keys."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Batch(NamedTuple):
    """What a step starts from: all of it, the same on every rank."""

    prompts: list[str]
    noise: Tensor  # (batch, n, c), on the CPU
    picks: tuple[int, ...]


def draw(cfg: Config, setup: Setup, step: int) -> Batch:
    """The batch of a step, a function of (seed, step)."""
    random, (rows, columns) = generator_of(cfg.seed, step), grid(setup.pipe, cfg.size, cfg.size)
    noise = torch.randn(cfg.batch, rows * columns, setup.pipe.flux.config.in_channels, generator=random)
    return Batch(batch_of(setup.prompts, step, cfg.batch, cfg.seed), noise, pick(cfg, setup.levels, random))


def gradient(cfg: Config, setup: Setup, world: World, batch: Batch) -> list[dict[str, Any]]:
    """Add the mean gradient over the whole batch to every rank's pieces; returns what each rank measured.

    FSDP averages over ranks, so a rank's own mean over its share is all there is to do.
    """
    mine = shard(range(cfg.batch), world.rank, world.size)
    at_once = cfg.rollout_batch or len(mine)
    measured: dict[str, Any] = {}
    for start in range(mine.start, mine.stop, at_once):
        part = slice(start, min(start + at_once, mine.stop))
        share = (part.stop - part.start) / len(mine)
        noise = batch.noise[part].to(world.device)
        args = setup.pipe, setup.rewards, batch.prompts[part], noise, setup.levels, batch.picks, cfg, share
        for key, value in update_gradient(*args).items():  # seconds add up, the rest are means
            measured[key] = measured.get(key, 0.0) + (value if key.startswith("seconds") else share * value)
    return gather(measured | {"prompts": batch.prompts[mine.start : mine.stop]})


# ------------------------------------------------------------------------------------------- loop


class Stop(Exception):
    """The run must end before it is done; the exit code says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def update(cfg: Config, setup: Setup, world: World, run: Run, step: int) -> dict[str, Any]:
    """One update of weights and averages. Raises Stop, with the weights as before, if a number is not finite."""
    batch, began = draw(cfg, setup, step), time.perf_counter()
    measured = gradient(cfg, setup, world, batch)
    lap = stopwatch(world.device)
    norm = nn.utils.clip_grad_norm_(run.params, cfg.clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not np.isfinite([norm, *(m["loss"] for m in measured)]).all():
        run.optimizer.zero_grad()
        raise Stop(NONFINITE, note_nonfinite(cfg, setup.out, step, measured, norm, batch.picks, world))
    if cfg.decay:
        run.set_lr(cfg.lr * (1 - step / cfg.steps))
    torch.manual_seed(generator_of(cfg.seed, step, 1).initial_seed())  # for --lean; all else has generators
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.average(cfg.ema)
    update_seconds = lap("update")["seconds_update"]

    for m in measured:
        del m["prompts"]
    forwards = cfg.batch * (cfg.rollout_steps + len(batch.picks))
    seconds = time.perf_counter() - began
    entry = {
        "step": step,
        **{key: sum(m[key] for m in measured) / len(measured) for key in measured[0]},
        "seconds_update": update_seconds,
        "seconds": seconds,
        "k": setup.levels[batch.picks[0]].item(),
        "j": setup.levels[batch.picks[-1]].item(),
        "grad_norm": norm,
        "forwards": forwards,
        "backwards": cfg.batch * len(batch.picks),
        "memory": peak_memory(world.device),
    }
    passes = cfg.batch * passes_of(cfg.rollout_steps, len(batch.picks), cfg.recompute)
    flops = passes * forward_flops(setup.pipe.flux.config, batch.noise.shape[1], setup.pipe.text_length)
    entry["tflops"] = flops / seconds / world.size / 1e12  # per rank, of the transformer alone
    if peak := peak_flops(world.device):
        entry["mfu"] = entry["tflops"] * 1e12 / peak
    return entry


def note_nonfinite(
    cfg: Config, out: Path, step: int, measured: list[dict], norm: float, picks: tuple[int, ...], world: World
) -> str:
    """Write down what the step was, for a replay; returns what to tell the user."""
    bad = [rank for rank, m in enumerate(measured) if not np.isfinite([m["loss"], m["reward"]]).all()]
    where = f"on rank {', '.join(map(str, bad))}" if bad else "in the gradient, though every loss is finite"
    if world.rank == 0:
        append(out / "nonfinite.jsonl", dict(step=step, seed=cfg.seed, picks=picks, grad_norm=norm, ranks=measured))
    return (
        f"step {step}: a number is not finite {where}; leaps start at steps {picks} of the rollout; prompts such as "
        f"{measured[(bad or [0])[0]]['prompts'][0]!r}. {out / 'nonfinite.jsonl'} has all of them. The step would "
        "be the same again: --skip-nonfinite 1 leaves it out"
    )


def finish(folder: Path, cfg: Config, setup: Setup, world: World) -> None:
    """Write the model that a run was for. Raises Stop if that cannot be."""
    if failed := write_model(folder, setup.pipe, world):
        raise Stop(1, f"{failed}; the weights are in {setup.out / 'checkpoints'}, --resume --export FOLDER writes them")


def train(cfg: Config, setup: Setup, world: World) -> None:
    """From the first update to final/. Raises Stop where it must end early, with everything saved that can be."""
    out, began = setup.out, time.time()
    run = Run(setup.pipe.flux, cfg.lr, cfg.weight_decay, cfg.lean)
    try:
        first = load_newest(out, run, cfg.at) if cfg.resume else 0
    except ValueError as error:
        raise Stop(2, f"error: {error}") from None
    if cfg.export and not folders(out):
        raise Stop(2, f"error: --export: there is no checkpoint in {out} yet")
    if first > cfg.steps and not cfg.export:
        raise Stop(2, f"error: --steps {cfg.steps}, but the run in {out} is at {first}: --at takes an older checkpoint")
    if not cfg.export:
        try:
            loop(cfg, setup, world, run, first)
        finally:
            run.wait()
    with swapped(run.params, run.averaged):
        finish(cfg.export or out / "final", cfg, setup, world)
    if world.rank == 0 and not cfg.export:
        pair = [torch.load(out / "samples" / f"{name}.pt") / 255 for name in ("first", "last")]
        before_after(*pair, [setup.eval_prompts[i] for i in shown(setup.eval_prompts)], out / "before_after.png")
        curves(out, out / "curves.png")
        print(f"{time.time() - began:.0f} s; wrote {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def loop(cfg: Config, setup: Setup, world: World, run: Run, first: int) -> None:
    """Updates, evaluations and checkpoints from step `first` on. Raises Stop where they must end early."""
    out, main = setup.out, world.rank == 0
    evals = gather(open_folder(cfg, out, first) if main else None)[0]
    track = open_trackers(cfg.log if main else (), out, asdict(cfg), first)
    bar = tqdm(total=cfg.steps, initial=first, unit="update", file=sys.stderr, disable=not main)
    say = bar.write if main else lambda text: None
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda n, _: signals.append(n))
    start, skipped, saved, satisfied = time.time(), 0, first, False

    for step in range(first, cfg.steps + 1):
        last = step == cfg.steps
        if step == first or step % cfg.check_every == 0:
            told = dict(step=step, flags=json.dumps(asdict(cfg), default=str), prompts=draw(cfg, setup, step).prompts)
            told["vae"] = fingerprint(setup.pipe.vae.parameters())
            if wrong := disagreement(world, told, run.params):
                raise Stop(1, wrong)
        if step % cfg.eval_every == 0 or last:
            with swapped(run.params, run.averaged):
                entry, warnings = watch(cfg, setup, world, evals, step, time.time() - start)
                if setup.watched and entry is max(evals, key=lambda e: e[setup.watched[0].name]):
                    warnings += filter(None, [write_model(out / "best", setup.pipe, world)])
            track(step, entry, [out / "samples" / f"step_{step:04d}.png"])
            means = {k: v for k, v in entry.items() if isinstance(v, float) and k != "seconds"}
            say(f"step {step:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()))
            for warning in warnings:
                say(warning)
            last |= cfg.stop_early and any("hacked" in warning for warning in warnings)
        if last:
            break

        try:
            entry = update(cfg, setup, world, run, step)
        except Stop as stop:
            skipped += 1
            if skipped > cfg.skip_nonfinite:
                save_checkpoint(out, run, step, cfg.keep)
                raise
            say(f"warning: {stop}; left out")
        else:
            if main:
                append(out / "metrics.jsonl", entry)
            track(step, entry, [])
            bar.set_postfix_str(f"reward {entry['reward']:.3f} grad {entry['grad_norm']:.2f}")
            if entry["satisfied"] > 1 - 1e-6 and not satisfied:
                satisfied, lam = True, " ".join(str(r.lam) for r in setup.rewards)
                say(f"warning: every reward is above --lam {lam}: the loss is zero and nothing is learned")
        bar.update()
        caught = [n for ns in gather(signals) for n in ns]
        if (step + 1) % cfg.save_every == 0 or caught:
            save_checkpoint(out, run, saved := step + 1, cfg.keep)
        if caught:
            code = 130 if signal.SIGINT in caught else REQUEUE
            raise Stop(code, f"stopped by signal {caught[0]}; {run.wait() or 'nothing new'} is saved, --resume goes on")
    if step != saved:
        save_checkpoint(out, run, step, cfg.keep)
    bar.close()


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["shapes", *arguments]
    cfg = tyro.extras.overridable_config_cli(PRESETS, args=arguments, console_outputs=rank == 0)
    with ExitStack() as stack:
        try:
            world = stack.enter_context(join(cfg.device, cfg.shard, timedelta(hours=1)))  # while one writes, all wait
            setup = prepare(cfg, world)
        except ValueError as error:  # perhaps of one node only
            print(f"\nerror: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
            raise SystemExit(2) from None
        try:
            train(cfg, setup, world)
        except Stop as stop:
            if rank == 0:
                print(f"\n{stop}", file=sys.stderr)
            raise SystemExit(stop.code) from None


if __name__ == "__main__":
    main()
