"""Post-train a flow model so that its images score higher.

    python train.py                                   # the tiny Flux of the shapes world, minutes on a laptop
    python train.py shapes --lr 3e-5 --seed 1         # a preset, and what to change of it
    python train.py --method refl                     # a baseline through the same loop
    python train.py --method my_file.py:my_gradient   # your own method
    torchrun --nproc-per-node 8 train.py flux-dev-hpsv2 --resume

Read from top to bottom: main and the set-up; the network and FSDP2; optimizers; the loop; one update; one evaluation.
The gradient itself is a method's: a function of leaps.py, of baselines/, or yours. Beside what FSDP2 sends, ranks
exchange: the run's history, checks of agreement, signals, the values of an update, the images of an evaluation,
whether a checkpoint is whole, and the tensors of a model that is saved.
A run writes, to --out:

    index.html  config.json  metrics.jsonl  eval.jsonl  before_after.png  samples/step_NNNN.png  samples/step_NNNN/
    checkpoints/step_NNNNNN/  newest_checkpoint  best/  final/  warnings.txt and nonfinite.jsonl, if there were any

The shapes preset is shorter than the paper's runs, and differs in learning rate, decay, T, EMA, lambda and the image
that is rewarded: shapes/README.md has the reasons.
"""

import itertools
import os
import sys
import time
import warnings
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from config import Config, parse
from families import Network, empty_network
from formats.saving import write_model
from infra import checkpoints, distributed, failures, logs, seeds, watch
from infra.distributed import Process, Stop
from infra.meter import Meter
from rewards import mean_scores, reported_means, score_all
from sample import sample
from samples import branch_counts, build_samples, draw_x_1, metered, noise_of
from start import (
    History,
    Setup,
    announce,
    batch_prompts,
    empty_flux,
    initial_tensors,
    load_networks,
    open_folder,
    prepare,
    shared_inputs,
)

REQUEUE = 75  # exit code after SIGTERM or SIGUSR1: a scheduler may start the command again, with --resume
NONFINITE = 3  # exit code of a run that stopped before an update with a number that is not finite


def main() -> None:
    # torchrun starts one process per GPU and sets RANK, LOCAL_RANK and WORLD_SIZE. Without these there is one rank, by
    # the same path. RANK is read before the ranks are joined, because --help must print once.
    rank = int(os.environ.get("RANK", 0))
    cfg, preset = parse(sys.argv[1:], console_outputs=rank == 0)
    with ExitStack() as stack:
        try:
            # The process group, this rank's GPU, and the mesh. All ranks wait while rank 0 writes a large model, so the
            # timeout is long.
            process = stack.enter_context(distributed.join(cfg.device, cfg.shard, timeout=timedelta(hours=1)))
            setup = set_up(cfg, process, preset)
        except (ValueError, OSError) as error:  # a flag or a file cannot be used
            # Once the ranks are joined, every rank raises the error, and its text names the rank where it happened.
            if rank == 0 or not dist.is_initialized():
                failures.print_error(f"\nerror: {error}")
            raise SystemExit(2) from None
        if rank == 0 and not cfg.export:
            print(announce(cfg, setup, process))
        try:
            run(cfg, setup, process)
        except Stop as stop:
            if rank == 0:
                failures.print_error(f"\n{stop.message}")
            raise SystemExit(stop.code) from None


def set_up(cfg: Config, process: Process, preset: Config | None = None) -> Setup:
    """The inputs and networks of a run, in the order of cost: what can be refused is refused before weights are read.

    `preset` holds the values that the flags started from.
    Raises ValueError naming the flag or the file, what was found and what to do.
    """
    # Check flags, prompts, the model's headers and the user's code: on every rank, as other nodes may have other files.
    setup = distributed.on_every_rank(partial(prepare, cfg, process, preset))
    # Ranks that differ would train a mixture, and nothing would report it.
    distributed.check_alike(shared_inputs(cfg, setup))

    def load() -> Setup:
        flux = build_network(cfg, setup, process)
        load_networks(cfg, setup, flux, process)  # VAE, text encoders, rewards
        # Before a checkpoint is read: the copy must hold the weights that training starts from.
        if setup.needs_base and not cfg.export:
            setup.base = flux if cfg.lora else frozen_copy(flux, setup, process)
        return setup

    return distributed.on_every_rank(load)


def run(cfg: Config, setup: Setup, process: Process) -> None:
    """Train from the newest checkpoint, or from the start, and write final/; or only write a checkpoint (--export)."""
    state = make_state(cfg, setup.pipe.flux)
    first = 0
    try:
        if cfg.resume:
            first = checkpoints.load_checkpoint(setup.out, state, cfg.at)
        if cfg.export:
            write_averages(cfg.export, setup, state, process)
            if process.rank == 0:
                print(f"wrote {cfg.export}, the averaged weights after {first} updates")
            return
        # Rank 0 alone prepares the folder and writes logs, and its History goes to all ranks. All ranks write
        # checkpoints, so on several nodes the folder must be on a disk that they share: all must see its lock.
        history = distributed.on_first_rank(partial(open_folder, cfg, setup, first))
        checkpoints.check_shared(setup.out)
    except ValueError as error:  # no checkpoint can be read, or another process trains in the folder
        raise Stop(2, f"error: {error}") from None

    log = logs.Log(cfg, setup.out, first, is_first_rank=process.rank == 0)
    if first:
        log.say(f"goes on from step {first}")
    try:
        train(cfg, setup, state, process, log, history)
        write_averages(setup.out / "final", setup, state, process)
        log.finish(setup, history)
    except Exception as error:
        explanation = failures.explain(error)
        if not explanation:
            raise
        # Save, so that no update is lost. Several ranks cannot: those without the error are within an update.
        updates = log.bar.n
        if process.world_size == 1 and updates > first and failures.stage_of(error) != "update":
            zero_gradients(state)
            checkpoints.save_checkpoint(setup.out, state, updates, cfg.keep)
            state.wait()
        message = f"error: {explanation}; {checkpoints.what_is_saved(setup.out)}"
        if process.rank:  # main prints on rank 0 alone, which does not know of this error
            failures.print_error(f"rank {process.rank}: {message}")
        raise Stop(1, message) from error
    finally:
        state.wait()  # for the checkpoint that is being written
        log.close()


# ------------------------------------------------------------------------- the network, and FSDP2


def build_network(cfg: Config, setup: Setup, process: Process) -> Network:
    """The network that is trained: shapes first, then sharded, then filled, so that no rank need hold all of it."""
    dtype = compute_dtype(cfg)
    flux = empty_flux(cfg, setup.model.weights.config)  # on the meta device: shapes without memory
    tensors = initial_tensors(cfg, flux, setup.model)  # names and tensors, read from disk as they are asked for
    flux.recompute = cfg.recompute
    if cfg.compile:
        # To torch all blocks of a kind are one function, which is compiled for each image size, with and without
        # gradients. Beyond 8 variants torch would run the function uncompiled.
        torch._dynamo.config.recompile_limit = 64
        for block in (*flux.double_blocks, *flux.single_blocks):
            block.compile()
    if not (cfg.lean or cfg.fp8):  # --lean and --fp8 run on one GPU, with dtypes of weights that FSDP2 would change
        shard(flux, process, dtype)
    distributed.fill(flux, tensors, process.device)
    return flux


def shard(flux: Network, process: Process, dtype: torch.dtype) -> None:
    """Make the network distributed: FSDP2 splits every parameter by rows over all ranks, or over groups of --shard N.

    A block's parameters are all-gathered just before it runs and freed after it, in the forward and again in the
    backward. After each backward of a block its gradients are reduce-scattered: a rank gets, for the rows that it
    holds, the mean over the ranks. Where groups are replicas of each other, an all-reduce completes the mean.
    """
    if process.device.type not in distributed.FSDP_DEVICES:
        return  # mps: there is one rank, and weights compute in their own dtype
    if process.world_size == 1 and dtype == torch.float32:
        return  # nothing to share and nothing to cast; FSDP2's hooks made steps of the tiny Flux 6 to 24% longer
    # Torch warns that blocks return views. Nothing here modifies an output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,  # what is all-gathered and computed with; the shards that AdamW updates stay fp32
        reduce_dtype=torch.float32,  # sums over many ranks in bf16 would lose small gradients
        cast_forward_inputs=False,  # position ids stay integers and noise levels fp32, which bf16 would round
    )
    for module in (*flux.double_blocks, *flux.single_blocks, flux):
        # The root, too: by default it keeps its gathered weights. Evaluation copies averages into the shards, so these
        # gathered weights would be out of date.
        fully_shard(module, mesh=process.mesh, mp_policy=policy, reshard_after_forward=True)


@torch.no_grad()
def frozen_copy(flux: Network, setup: Setup, process: Process) -> Network:
    """A frozen copy of the network as it is, for a method that compares the trained network with the untuned one."""
    copy = empty_network(flux.config).to(setup.pipe.compute).requires_grad_(False)
    shard(copy, process, setup.pipe.compute)
    copy.to_empty(device=process.device)
    for target, source in zip(copy.parameters(), flux.parameters(), strict=True):
        # Both are sharded alike, or one rank holds all of both.
        distributed.local_shard(target).copy_(distributed.local_shard(source))
    return copy


def compute_dtype(cfg: Config) -> torch.dtype:
    """The dtype of the network's activations. Latents, noise levels, distances and rewards are always fp32."""
    return torch.bfloat16 if cfg.bf16 else torch.float32


# ------------------------------------------------------------------------ optimizers and averages


def make_state(cfg: Config, flux: Network) -> checkpoints.State:
    """What training changes: the trained parameters, the optimizers, and the averaged parameters."""
    params = {name: p for name, p in flux.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(cfg, params)
    averages_device = "cpu" if cfg.lean else None  # --lean has no room for fp32 averages on the GPU
    return checkpoints.State(flux, optimizers, averages_device)


def make_optimizers(cfg: Config, params: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """AdamW over all trained parameters: the place to try another optimizer, or two.

    Return several if each takes some of the parameters, such as Muon for matrices and AdamW for all others. Learning
    rates follow the run's schedule in proportion. Checkpoints and --resume need no change.
    """
    if cfg.lean:
        from infra import lean  # torchao is not needed otherwise

        options = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, bf16_stochastic_round=True)
        return [lean.LeanAdamW(params.values(), **options)]
    # Built after sharding, so that its moments are sharded as the parameters are.
    return [torch.optim.AdamW(params.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)]


def set_learning_rates(cfg: Config, state: checkpoints.State, update: int) -> None:
    """The learning rate is constant, as in the paper, or falls linearly to zero over the run (--decay)."""
    factor = 1 - update / cfg.updates if cfg.decay else 1.0
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            lr = group["initial_lr"] * factor  # set by State: optimizers with other learning rates keep their ratio
            group["lr"] = torch.tensor(lr) if isinstance(group["lr"], Tensor) else lr  # torchao keeps a tensor


@torch.no_grad()
def update_averages(state: checkpoints.State, decay: float) -> None:
    """EMA: averages <- decay x averages + (1 - decay) x parameters. Evaluations, best/ and final/ use the averages."""
    for name, average in state.averages.items():
        param = state.params[name].to(average.device, average.dtype)
        average.lerp_(param, 1 - decay)


def write_averages(path: Path, setup: Setup, state: checkpoints.State, process: Process) -> None:
    """Write the averaged weights as a model folder or file. Raises Stop if they cannot be written."""
    try:
        with distributed.swapped(state.params.values(), state.averages.values()):
            write_model(path, setup.pipe, process)
    except OSError as error:
        state.wait()
        raise Stop(1, f"{error}; {checkpoints.what_is_saved(setup.out)}") from error


# ---------------------------------------------------------------------------------------- the loop


def train(
    cfg: Config, setup: Setup, state: checkpoints.State, process: Process, log: logs.Log, history: History
) -> None:
    """Agree, evaluate, update, save, until the end of the run. `history` grows by an entry per evaluation.

    Raises Stop, after saving, if a signal came or a number was not finite; and without saving if ranks
    disagree or a log cannot be written.
    """
    skipped = 0
    last_saved = history.first
    with distributed.stop_signals() as signals:
        for update in range(history.first, cfg.updates + 1):
            is_last = update == cfg.updates

            # Replicas must have the same weights. Otherwise the mean gradient is wrong, and nothing reports it.
            if update == history.first or update % cfg.check_every == 0:
                distributed.check_replicas(process, state.params.values())

            # The averaged weights are evaluated and kept in best/: they vary less from update to update.
            if update % cfg.eval_every == 0 or is_last:
                with distributed.swapped(state.params.values(), state.averages.values()):
                    evaluation, images = evaluate(cfg, setup, process)
                    evaluation = dict(step=update, **evaluation, seconds=log.seconds())
                    setup.pipe.sampling["updates"] = update  # of best/ and final/, for their model card
                    if history.is_better(evaluation):
                        try:
                            write_model(setup.out / "best", setup.pipe, process)
                            # A resumed run reads from the log which evaluation best/ belongs to.
                            evaluation["saved_to"] = "best/"
                            history.best = evaluation
                        except OSError as error:  # a full disk is no reason to lose the run
                            log.say(f"warning: {error}")
                history.evaluations.append(evaluation)
                log.evaluation(evaluation, images, setup.eval_prompts)
                hacked = watch.hacking_warnings(history.evaluations, history.watched, cfg.patience)
                for warning in hacked:
                    log.say(warning)
                log.page()
                if cfg.stop_early and hacked:
                    is_last = True
            if is_last:
                break

            try:
                entry = one_update(cfg, setup, state, process, update)
            except Stop as stop:  # a number was not finite: the weights did not change
                skipped += 1
                if skipped > cfg.skip_nonfinite:
                    checkpoints.save_checkpoint(setup.out, state, update, cfg.keep)  # to look at this very update
                    raise Stop(stop.code, f"{stop.message}. --resume --skip-nonfinite 1 leaves it out") from None
                log.say(f"warning: {stop.message}. The update is left out")
            else:
                log.update(entry)
            log.bar.update()

            # A signal reaches one rank first: all ranks must agree that it came, and save the same update.
            signals_of_ranks = distributed.all_gather_objects(list(signals))
            received = list(itertools.chain(*signals_of_ranks))
            if (update + 1) % cfg.save_every == 0 or received:
                last_saved = update + 1
                checkpoints.save_checkpoint(setup.out, state, last_saved, cfg.keep)
            if received:
                code = 130 if 2 in received else REQUEUE  # 2 is Ctrl-C
                state.wait()
                raise Stop(code, f"stopped by signal {received[0]}; {checkpoints.what_is_saved(setup.out)}")
        if update != last_saved:
            checkpoints.save_checkpoint(setup.out, state, update, cfg.keep)


# -------------------------------------------------------------------------------------- one update


def one_update(cfg: Config, setup: Setup, state: checkpoints.State, process: Process, update: int) -> dict[str, Any]:
    """One update of weights and averages; returns what to log.

    Raises Stop, with the weights as before, if a number is not finite.
    """
    began = time.perf_counter()
    meter = Meter(process.device)  # seconds by stage, and evaluations of the network
    # Stochastic rounding (--lean) and a user's reward may draw from torch's own generator. Each update seeds it, so
    # that a resumed run draws what an undisturbed run draws, however often either was evaluated.
    torch.manual_seed(seeds.generator_of(cfg.seed, update, 1, process.rank).initial_seed())
    values = accumulate_batch_gradient(cfg, setup, process, update, meter)
    with meter("update"):
        # Clip by the norm over all parameters and ranks. The norm of sharded gradients is a DTensor of partial norms,
        # which full_tensor reduces to one number, the same on all ranks.
        grad_norm = nn.utils.clip_grad_norm_(state.params.values(), cfg.clip)
        grad_norm = distributed.full_tensor(grad_norm).item()

    # Every rank sees every rank's values, so that all come to the same decision below.
    ranks = distributed.all_gather_objects((values, meter))
    values_of_ranks, meters = zip(*ranks)
    means = {}
    for name in values:
        values[name] = torch.cat([rank_values[name] for rank_values in values_of_ranks])  # (batch,)
        means[name] = values[name].mean().item()
    if not np.isfinite([grad_norm, *means.values()]).all():
        zero_gradients(state)
        prompts = batch_prompts(cfg, setup, update)
        message = logs.note_nonfinite(setup.out, update, cfg.seed, grad_norm, values, prompts, process)
        raise Stop(NONFINITE, message)

    with meter("update"):
        set_learning_rates(cfg, state, update)
        for optimizer in state.optimizers:
            optimizer.step()
        zero_gradients(state)
        update_averages(state, cfg.ema)

    rewards = reported_means(setup.rewards, means)
    cost = meter.report(meters, setup.size(update).flops, seconds=time.perf_counter() - began)
    return dict(step=update, **rewards, grad_norm=grad_norm, **cost)


def accumulate_batch_gradient(
    cfg: Config, setup: Setup, process: Process, update: int, meter: Meter
) -> dict[str, Tensor]:
    """Add the gradient of this rank's samples to the weights' `.grad`; returns values to log, one per sample."""
    # Every rank draws the noise of the whole batch and takes its own rows, so the noise does not depend on the ranks.
    size = setup.size(update)
    channels = setup.pipe.flux.config.in_channels
    x_1, generator = draw_x_1(cfg.seed, update, (cfg.batch, size.rows * size.columns, channels))
    samples_per_rank = cfg.batch // process.world_size
    first_sample = process.rank * samples_per_rank
    end_sample = first_sample + samples_per_rank
    rollout_batch = cfg.rollout_batch or samples_per_rank

    # Gradient accumulation: every backward, of each leap and micro-batch, adds its mean over the ranks to `.grad`. A
    # loss is a sum over samples divided by `total`, the samples of one rank. So `.grad` becomes the gradient of the
    # mean over the batch.
    values_of_rows = []
    for start in range(first_sample, end_sample, rollout_batch):
        rows = slice(start, min(start + rollout_batch, end_sample))
        values = accumulate_gradient(cfg, setup, process, update, rows, x_1, generator, meter)
        values_of_rows.append(values)
    values_of_rank = {}
    for name in values:
        values_of_rank[name] = torch.cat([row_values[name] for row_values in values_of_rows])
    return values_of_rank


def accumulate_gradient(
    cfg: Config,
    setup: Setup,
    process: Process,
    update: int,
    rows: slice,
    x_1: Tensor,
    generator: torch.Generator,
    meter: Meter,
) -> dict[str, Tensor]:
    """Add the gradient of some rows of the batch, by the run's method; returns values to log, (rows,) each."""
    size = setup.size(update)
    prompts = batch_prompts(cfg, setup, update)[rows]
    with meter("rollout"):  # the prompts are encoded now; all else in `samples` is a function that the method calls
        samples, reward_log = build_samples(
            setup.pipe,
            prompts,
            size,
            setup.rewards,
            noise=noise_of(x_1, rows, cfg.seed, update, like=size.sigmas),
            generator=generator.clone_state(),  # all rows and ranks draw alike what samples share: the steps k and j
            guidance=cfg.guidance,
            negative_prompt=cfg.negative_prompt,
            detach_negative=cfg.detach_negative,
            base=setup.base,
            total=cfg.batch // process.world_size,
            update=update,
            micro_batch=cfg.micro_batch,
        )
    # The method runs here: rollout, reward, backward. Its `vjp` calls .backward(), so FSDP2 gathers weights and reduces
    # gradients inside of this call (vjp_of in leaps.py).
    branches = branch_counts(setup.pipe.flux.config, cfg.guidance, cfg.detach_negative)
    method_log = setup.method(metered(samples, meter, len(prompts), *branches))
    values = method_log | reward_log.means(len(prompts))
    # A method may log one number for all samples, such as the noise level k: it becomes one per sample.
    return {name: value.detach().float().cpu().expand(len(prompts)) for name, value in values.items()}


def zero_gradients(state: checkpoints.State) -> None:
    for optimizer in state.optimizers:
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------- one evaluation


def evaluate(cfg: Config, setup: Setup, process: Process) -> tuple[dict[str, Any], Tensor]:
    """Mean rewards of the network as it is, on fixed prompts and noise; and the images, (n, 3, h, w) uint8.

    `by_prompt` holds the watched rewards of each image, so that evaluations can be compared pair by pair.
    """
    prompts = setup.eval_prompts
    batch = cfg.rollout_batch or 64
    # Every rank draws the same number of images; the last prompt is repeated to fill up, and the repeats are removed
    # below. Each call of the network all-gathers its weights, so ranks must make the same number of calls.
    images_per_rank = -(-len(prompts) // process.world_size)  # rounded up
    first_image = process.rank * images_per_rank
    indices = [min(i, len(prompts) - 1) for i in range(first_image, first_image + images_per_rank)]
    rank_prompts = [prompts[i] for i in indices]
    noise_seeds = [10**6 + i for i in indices]  # the same noise at every evaluation
    size = setup.sizes[0]
    # A user's reward may draw random numbers: the same ones at every evaluation.
    torch.manual_seed(seeds.generator_of(cfg.seed, 10**6, process.rank).initial_seed())
    images = sample(
        setup.pipe,
        rank_prompts,
        noise_seeds,
        cfg.rollout_steps,
        size.height,
        size.width,
        guidance=cfg.guidance,
        negative_prompt=cfg.negative_prompt,
        batch=batch,
    )
    rewards = [*setup.rewards, *setup.watched]
    rank_scores = {r.name: score_all(r, images, rank_prompts, process.device, batch) for r in rewards}

    ranks = distributed.all_gather_objects((images.mul(255).round().byte(), rank_scores))
    images_of_ranks, scores_of_ranks = zip(*ranks)
    all_images = torch.cat(images_of_ranks)[: len(prompts)]
    means: dict[str, float] = {}
    by_prompt: dict[str, list[float]] = {}
    for reward in rewards:
        reward_scores = [rank_scores[reward.name] for rank_scores in scores_of_ranks]
        scores = torch.cat(reward_scores)[: len(prompts)]
        means |= mean_scores(reward, scores, prompts)
        if reward in setup.watched:
            by_prompt[reward.name] = [round(score, 5) for score in scores.tolist()]
    return {**reported_means(setup.rewards, means), "by_prompt": by_prompt}, all_images


if __name__ == "__main__":
    main()
