"""Post-train a flow model so that its images score higher.

    python train.py                                   # the tiny Flux of the shapes world, minutes on a laptop
    python train.py shapes --lr 3e-5 --seed 1         # a preset, and what to change of it
    python train.py --method refl                     # a baseline through the same loop
    python train.py --method my_file.py:my_gradient   # yours
    torchrun --nproc-per-node 8 train.py flux-dev-hpsv2 --resume

From the top: what a method is given (`gradient`), one update of the weights, an evaluation, the loop.  The method is
leapalign in leaps.py; all others are in baselines.py.  Writes, to --out:

    config.json  metrics.jsonl  eval.jsonl  curves.png  before_after.png  samples/step_NNNN.png
    checkpoints/step_NNNNNN/  best/  final/

The shapes preset differs from the paper in learning rate, decay, length, T, EMA and the image that is rewarded:
shapes/README.md says why.
"""

import os
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import Config, parse
from formats.saving import write_model
from infra.anchor import anchored, without_lora
from infra.checkpoints import State, load_checkpoint, save_checkpoint
from infra.distributed import (
    Process,
    Stop,
    all_gather_objects,
    check_agreement,
    full_tensor,
    join,
    on_first_rank,
    stop_signals,
    swapped,
    weights_hash,
)  # fmt: skip
from infra.jsonl import Entry
from infra.logs import Log, note_nonfinite
from infra.meter import Meter
from infra.prompts import prompts_of_update, rows_of_rank
from infra.seeds import generator_of
from infra.watch import folder_advice, hacking_warnings, preview_indices, watched_value
from leaps import VJP, Samples, Velocity, hinge, vjp_of
from model import Flux
from rewards import mean_scores, reported_means, score_all
from sample import Text, decode, encode, sample, velocity_of
from start import Setup, announce, open_folder, prepare

REQUEUE, NONFINITE = 75, 3  # exit codes: stopped by a signal and resumable; stopped before a bad update


# ------------------------------------------------------------------------------ what a method is given


def gradient(
    cfg: Config, setup: Setup, prompts: list[str], step: int, first: int, total: int, meter: Meter
) -> dict[str, Tensor]:
    """Add the gradient of some samples to the weights' `.grad`, by the run's method; returns what to log, (b,) each.

    The samples are first, first + 1, ... of the batch of `step`, of which this rank has `total`.  What a method need
    not know is here: text, VAE, precision, and --micro-batch samples at a time where activations are kept.
    """
    pipe, b, size = setup.pipe, len(prompts), setup.size(step)
    with meter("rollout"):
        text = encode(pipe, prompts)
    micro = cfg.micro_batch or b
    parts = [slice(i, i + micro) for i in range(0, b, micro)]
    measured: dict[str, list[Tensor]] = {}
    distances: list[Tensor] = []  # of --anchor, at every state where the network is differentiated

    def network(part: slice, flux: Flux = pipe.flux) -> Velocity:
        return velocity_of(flux, Text(*(t[part] for t in text)), *size.tokens, cfg.guidance, pipe.compute)

    def noise(i: int) -> Tensor:
        return draw_noise(cfg, setup, step, i)[0][first : first + b].to(size.levels)

    @torch.no_grad()
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        with meter("rollout", forwards=b):
            return network(slice(None))(x, sigma)

    def vjp_part(part: slice) -> VJP:
        if setup.base is None:
            return vjp_of(network(part))
        base = without_lora(setup.base, network(part, setup.base))
        return anchored(network(part), base, cfg.anchor / total, distances.append)

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        apart = b if cfg.anchor else 0  # the base once, and the network again
        with meter("leaps", forwards=apart, backwards=b + wrt_x * apart):
            levels = torch.as_tensor(sigma).expand(b)  # a method may have one a sample
            into_x = [vjp_part(part)(x[part], levels[part], u[part], wrt_x) for part in parts]
        return torch.cat(into_x) if wrt_x else None

    def scores_of(images: Tensor, part: slice) -> list[Tensor]:
        scores = [r.score(images, prompts[part]) for r in setup.rewards]
        for r, score in zip(setup.rewards, scores):
            measured.setdefault(r.name, []).append(r.scale * score.detach())
        enough = [score >= (np.inf if r.lam is None else r.lam) for r, score in zip(setup.rewards, scores)]
        measured.setdefault("satisfied", []).append(torch.stack(enough).all(0).float())
        return scores

    def reward(x0: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = torch.ones_like(x0[:, 0, 0]) if weight is None else weight
        grads = []
        with meter("reward"):
            for part in parts:
                x = x0[part].detach().requires_grad_()
                images = decode(pipe, x, size.height, size.width)
                hinges = [r.weight * hinge(s, r.lam) for r, s in zip(setup.rewards, scores_of(images, part))]  # Eq. 11
                losses = [weight[part] * h for h in hinges]  # Eq. 12, 13: weighted, and below a mean over the batch
                pulls = [torch.autograd.grad(loss.sum(), images)[0] for loss in losses]  # of each reward apart
                images.backward(sum(pulls) / total)  # to the latent only: VAE and rewards are frozen
                measured.setdefault("loss", []).append(sum(losses).detach())
                for r, pull in zip(setup.rewards, pulls if len(pulls) > 1 else []):  # which one dominates?
                    measured.setdefault(f"{r.name}_grad", []).append(pull.float().flatten(1).norm(dim=1))
                grads.append(x.grad)
        return torch.cat(grads)

    @torch.no_grad()
    def score(x0: Tensor) -> Tensor:
        with meter("reward"):
            scores = [scores_of(decode(pipe, x0[part], size.height, size.width), part) for part in parts]
        return torch.cat([sum(r.weight * s for r, s in zip(setup.rewards, each)) for each in scores])

    # What all samples share is drawn after x_1, from the same generator, alike for all parts of a batch.
    shared = draw_noise(cfg, setup, step, 0)[1]
    log = setup.method(Samples(noise, size.levels, shared, velocity, vjp, reward, score, total, step))
    measured |= dict(anchor=distances) if distances else {}
    log = log | {name: torch.cat(v).view(-1, b).mean(0) for name, v in measured.items()}  # over the calls of reward
    return {name: watched_value.detach().float().cpu().expand(b) for name, watched_value in log.items()}


def draw_noise(cfg: Config, setup: Setup, step: int, i: int) -> tuple[Tensor, torch.Generator]:
    """The i-th Gaussian of each sample of a step's batch, (batch, n, c) on the CPU, and the generator that drew it.

    A function of (seed, step, i), whatever the ranks and the parts: so runs resume, and any step can be repeated.
    """
    random, size = generator_of(cfg.seed, step, *([2, i] if i else [])), setup.size(step)
    return torch.randn(cfg.batch, np.prod(size.tokens), setup.pipe.flux.config.in_channels, generator=random), random


def draw_prompts(cfg: Config, setup: Setup, step: int) -> list[str]:
    """The prompts of a step's batch: one after the other, each `setup.group` times where a method compares."""
    different = prompts_of_update(setup.prompts, step, cfg.batch // setup.group, cfg.seed)
    return [prompt for prompt in different for _ in range(setup.group)]


# ------------------------------------------------------------------------------------------ one update


def batch_gradient(
    cfg: Config, setup: Setup, process: Process, step: int, meter: Meter
) -> tuple[dict[str, Tensor], list[str]]:
    """Add the gradient of this rank's part of a batch, --rollout-batch samples at a time; its values and prompts."""
    prompts = draw_prompts(cfg, setup, step)
    my_range = rows_of_rank(range(cfg.batch), process.rank, process.world_size)
    together = cfg.rollout_batch or len(my_range)
    logs = []
    for first in range(my_range.start, my_range.stop, together):
        part = prompts[first : min(first + together, my_range.stop)]
        logs.append(gradient(cfg, setup, part, step, first, len(my_range), meter))
    return {name: torch.cat([log[name] for log in logs]) for name in logs[0]}, prompts[my_range.start : my_range.stop]


def update(cfg: Config, setup: Setup, process: Process, run: State, step: int) -> dict[str, Any]:
    """One update of weights and averages; returns what to log.

    Raises Stop, with the weights as before, if a number is not finite.
    """
    began, meter = time.perf_counter(), Meter(process.device)
    own, prompts = batch_gradient(cfg, setup, process, step, meter)

    # FSDP averages gradients over the ranks: a rank's own mean over its samples is all there is to do.
    with meter("update"):
        norm = full_tensor(nn.utils.clip_grad_norm_(run.params, cfg.clip)).item()

    # Every rank sees every value, so that all come to the same decisions below.
    ranks = all_gather_objects((own, meter, prompts))
    means = {name: torch.cat([values[name] for values, *_ in ranks]).mean().item() for name in own}
    if not np.isfinite([norm, *means.values()]).all():
        run.optimizer.zero_grad()
        raise Stop(NONFINITE, note_nonfinite(setup.out, step, cfg.seed, norm, ranks, speaks=process.rank == 0))

    with meter("update"):
        run.set_lr(cfg.lr * (1 - step / cfg.updates) if cfg.decay else cfg.lr)
        torch.manual_seed(generator_of(cfg.seed, step, 1).initial_seed())  # --lean rounds at random
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.average(cfg.ema)

    meters = [rank_meter for _, rank_meter, _ in ranks]
    entry = dict(step=step, **reported_means(setup.rewards, means), grad_norm=norm)
    return entry | meter.report(meters, setup.size(step).flops, seconds=time.perf_counter() - began)


# --------------------------------------------------------------------------------------- an evaluation


def evaluate(cfg: Config, setup: Setup, process: Process) -> tuple[dict[str, Any], Tensor]:
    """Mean rewards of the network as it is, on fixed prompts and noise; and the images, (n, 3, h, w) uint8.

    `by_prompt` holds the watched rewards of each image, so that evaluations can be compared pair by pair.
    """
    prompts, batch = setup.eval_prompts, cfg.rollout_batch or 64
    each = -(-len(prompts) // process.world_size)  # the same on every rank, padded: they gather weights together
    my_prompts = [min(i, len(prompts) - 1) for i in range(process.rank * each, (process.rank + 1) * each)]
    texts, seeds = [prompts[i] for i in my_prompts], [10**6 + i for i in my_prompts]
    size = setup.sizes[0]
    images = sample(setup.pipe, texts, seeds, cfg.rollout_steps, size.height, size.width, cfg.guidance, batch)
    rewards = [*setup.rewards, *setup.watched]
    own = {r.name: score_all(r, images, texts, process.device, batch) for r in rewards}
    ranks = all_gather_objects((images.mul(255).round().byte(), own))
    scores = {name: torch.cat([of_rank[name] for _, of_rank in ranks])[: len(prompts)] for name in own}
    means = {k: v for r in rewards for k, v in mean_scores(r, scores[r.name], prompts).items()}
    by_prompt = {r.name: [round(x, 5) for x in scores[r.name].tolist()] for r in setup.watched}
    images = torch.cat([images for images, _ in ranks])[: len(prompts)]
    return {**reported_means(setup.rewards, means), "by_prompt": by_prompt}, images


# -------------------------------------------------------------------------------------------- the loop


def train(cfg: Config, setup: Setup, process: Process) -> None:
    """From the first update to final/. Raises Stop where it must end early, with everything saved that can be."""
    out, began = setup.out, time.time()
    run = State(setup.pipe.flux, cfg.lr, cfg.weight_decay, cfg.lean)
    try:
        first = load_checkpoint(out, run, cfg.at) if cfg.resume else 0
    except ValueError as error:
        raise Stop(2, f"error: {error}") from None
    log = None
    if not cfg.export:
        evals, kept = on_first_rank(lambda: open_folder(cfg, setup, first))
        log = Log(cfg, out, first, speaks=process.rank == 0)
        if first:
            log.say(f"goes on from step {first}")
        try:
            kept = loop(cfg, setup, process, run, first, log, evals, kept)
        except OSError as error:  # a log cannot be written: the disk is full, say
            raise Stop(1, f"{error}; --resume goes on from the newest checkpoint in {out / 'checkpoints'}") from error
        finally:
            run.wait()  # for the checkpoint that is being written
            log.bar.close()

    try:
        with swapped(run.params, run.averaged):
            write_model(cfg.export or out / "final", setup.pipe, process)
    except OSError as error:
        kept = f"the weights are in {out / 'checkpoints'}, --resume --export PATH writes them"
        raise Stop(1, f"{error}; {kept}") from error
    if log:
        tasks = [k for r in setup.watched if r.task_of for k in dict.fromkeys(map(r.task_of, setup.eval_prompts))]
        log.pictures(setup.eval_prompts, tasks, evals)
        log.say(f"{time.time() - began:.0f} s; wrote {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
        if setup.watched:
            log.say(folder_advice(kept, evals[-1], setup.watched[0].name))
    elif process.rank == 0:
        print(f"wrote {cfg.export}, the averaged weights after {first} updates")


def loop(
    cfg: Config,
    setup: Setup,
    process: Process,
    run: State,
    first: int,
    log: Log,
    evals: list[Entry],
    kept: Entry | None,
) -> Entry | None:
    """Evaluate, save, update, from step `first` on. `evals` grows by an entry an evaluation.

    `kept` is the evaluation whose weights best/ holds; the one of which it is so in the end is returned.
    """
    out, start, watched = setup.out, time.time(), [r.name for r in setup.watched]
    skipped, saved, satisfied = 0, first, False
    captions = [setup.eval_prompts[i] for i in preview_indices(setup.eval_prompts)]
    with stop_signals() as signals:
        for step in range(first, cfg.updates + 1):
            last = step == cfg.updates

            # A rank that has gone its own way would train a model of its own without a word.
            if step == first or step % cfg.check_every == 0:
                same = dict(step=step, flags=repr(cfg), prompts=draw_prompts(cfg, setup, step))
                check_agreement(process, same | dict(vae=weights_hash(setup.pipe.vae.parameters())), run.params)

            # The averaged weights are what is evaluated and kept: they are better than the last ones, and steadier.
            if step % cfg.eval_every == 0 or last:
                with swapped(run.params, run.averaged):
                    entry, images = evaluate(cfg, setup, process)
                    evals.append(dict(step=step, **entry, seconds=time.time() - start))
                    if watched and (
                        kept is None or watched_value(evals[-1], watched[0]) > watched_value(kept, watched[0])
                    ):
                        try:
                            write_model(out / "best", setup.pipe, process)
                            kept = evals[-1]
                            kept["kept"] = "best/"  # for a run that goes on
                        except OSError as error:  # the disk is full, say: no reason to lose the run
                            log.say(f"warning: {error}")
                log.evaluation(evals[-1], images[preview_indices(setup.eval_prompts)], captions)
                warnings = hacking_warnings(evals, watched, cfg.patience)
                for warning in warnings:
                    log.say(warning)
                last |= cfg.stop_early and bool(warnings)
            if last:
                break

            try:
                entry = update(cfg, setup, process, run, step)
            except Stop as stop:
                skipped += 1
                if skipped > cfg.skip_nonfinite:
                    save_checkpoint(out, run, step, cfg.keep)
                    raise
                log.say(f"warning: {stop.message}; it is left out")
            else:
                log.update(entry)
                # Of a hinge only: a policy gradient has no loss, and goes on.
                if "loss" in entry and entry["satisfied"] > 1 - 1e-6 and not (satisfied or cfg.anchor):
                    satisfied, lam = True, " ".join(str(r.lam) for r in setup.rewards)
                    log.say(f"warning: every reward is above --lam {lam}: the loss is zero and nothing is learned")
            log.bar.update()

            # A signal reaches one rank first: all must agree that it came, and save the same step.
            caught = [number for of_rank in all_gather_objects(list(signals)) for number in of_rank]
            if (step + 1) % cfg.save_every == 0 or caught:
                save_checkpoint(out, run, saved := step + 1, cfg.keep)
            if caught:
                code = 130 if 2 in caught else REQUEUE  # 2 is Ctrl-C
                newest = run.wait() or "nothing new"
                raise Stop(code, f"stopped by signal {caught[0]}; {newest} is saved, --resume goes on")
        if step != saved:
            save_checkpoint(out, run, step, cfg.keep)
    return kept


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    cfg, preset = parse(sys.argv[1:], console_outputs=rank == 0)
    with ExitStack() as stack:
        try:
            # While one rank writes a large model, all others wait.
            process = stack.enter_context(join(cfg.device, cfg.shard, timedelta(hours=1)))
            setup = prepare(cfg, process, preset)
        except ValueError as error:  # a flag or a file, perhaps of one node only
            print(f"\nerror: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
            raise SystemExit(2) from None
        if rank == 0 and not cfg.export:
            print(announce(cfg, preset, setup, process))
        try:
            train(cfg, setup, process)
        except Stop as stop:
            if rank == 0:
                print(f"\n{stop.message}", file=sys.stderr)
            raise SystemExit(stop.code) from None


if __name__ == "__main__":
    main()
