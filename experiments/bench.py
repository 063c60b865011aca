"""Time and memory of the network, of LeapAlign and of sampling, beside what people would use instead.

    python -m experiments.bench  # the tiny Flux, minutes on a CPU
    python -m experiments.bench --network flux-dev --size 720 --text-length 512 --rollout-steps 25 --batch 1 --bf16 \\
        --lora 64 --leaps 2 8 --repeats 2 --compile --attention FLASH_ATTENTION CUDNN_ATTENTION  # on a GPU of 141 GB

The network is compared with diffusers' transformer, `sample` with FluxPipeline, and an iteration of LeapAlign with its
published structure: one graph through all leaps, the VAE and the reward. Both sides have the same weights; all networks
but the tiny one have random weights. The VAE, the text encoders and the reward are the tiny ones.

Times are medians over runs that take turns: CPU seconds of the process, or seconds where there is a GPU. Memory is the
most that a run's tensors took at once, without the gradients of weights.
"""

import itertools
import json
import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import sides
from experiments.record import RESULTS, markdown_table, run_command, source_line, write_result
from formats.folders import SHIFTS, Pipeline, load_pipeline
from formats.lora import add_lora, first_values
from formats.names import config_to_diffusers, to_diffusers
from infra.distributed import device_of
from infra.flags import flags
from infra.meter import network_flops, peak_flops
from infra.pictures import line_chart, save_row
from infra.prompts import read_prompts
from leaps import Velocity, connect, discount, hinge, leapalign, one_step, pick_leaps
from model import Flux
from rewards import open_reward
from sample import HERE, decode, encode, sample, token_grid, velocity_of
from samples import Size, build_samples

NETWORKS = {
    "tiny": dict(),
    "30m": dict(hidden_size=384, num_heads=6, axes_dim=(16, 24, 24), depth=3, depth_single_blocks=6),
    "flux-dev": dict(hidden_size=3072, num_heads=24, axes_dim=(16, 56, 56), depth=19, depth_single_blocks=38),
}
LEVELS = ("none", "light", "blocks")
ALPHA = 0.3  # of Eq. 9, the paper's
Runs = dict[str, Callable[[], Any]]
Rows = dict[str, dict[str, float]]  # run -> column -> number
COLUMNS = ("ms", "ms / first", "MB", "MB / first", "TFLOP/s", "MFU", "difference")


@flags
class BenchFlags:
    """Measure time and memory."""

    network: Literal[tuple(NETWORKS)] = "tiny"
    """Size of the network."""
    size: str = "64"
    """Pixels: one number for a square, or HEIGHTxWIDTH."""
    text_length: int = 16
    """T5 tokens of a prompt."""
    batch: int = 16
    """Samples at a time."""
    rollout_steps: int = 12
    """Euler steps of a rollout."""
    leaps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of leaps."""
    lora: int | None = None
    """Train a LoRA of this rank in iterations of LeapAlign."""
    attention: tuple[Literal["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"], ...] = ()
    """Backends of torch's attention, beside its own choice."""
    compile: bool = False
    """Measure the network with compiled blocks, too."""
    bf16: bool = False
    """Compute the networks in bfloat16."""
    repeats: int = 5
    """Runs whose median is a time."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    results: Path = RESULTS / "bench.json"
    """File to write; a table and a picture are written beside it."""


# ------------------------------------------------------------------------------------------ measuring


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make: `now` are alive, `peak` were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        result = operation(*args, **(options or {}))
        old = {id(storage) for storage in storages((args, options))}  # of views, and of what is changed in place
        for storage in storages(result):
            if id(storage) not in old:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that the tensors of a run take at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - allocated  # what torch's allocator gave out, not what it holds
    # The process's own peak would hold what earlier runs took.
    with LiveBytes() as live:
        run()
    return live.peak


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()  # on a busy machine the wall clock counts others, too
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def measure(cfg: BenchFlags, runs: Runs, flops: int = 0) -> Rows:
    """The numbers of each run, and their ratios to the first one's; `flops` are a run's, without what is recomputed."""
    device = torch.device(cfg.device)
    rows: Rows = {}
    for name, run in runs.items():
        try:
            run()  # compiles; and makes the gradients of weights, which later runs add to
            rows[name] = {"MB": peak_bytes(run, device) / 1e6}
        except torch.OutOfMemoryError:  # that a run does not fit is a result, too
            rows[name] = {}
    seconds: dict[str, list[float]] = {name: [] for name in rows if rows[name]}
    # In turns, so that what else the machine does slows all of them.
    for _ in range(cfg.repeats):
        for name in seconds:
            start = clock(device)
            runs[name]()
            seconds[name].append(clock(device) - start)
    first = rows[next(iter(runs))]
    for name in seconds:
        row, median = rows[name], statistics.median(seconds[name])
        row["ms"] = 1000 * median
        for unit in first.keys() & {"ms", "MB"}:
            row[f"{unit} / first"] = row[unit] / first[unit]
        if flops:
            row["TFLOP/s"] = flops / median / 1e12
            if peak_flops(device):  # which is known for some GPUs
                row["MFU"] = flops / median / peak_flops(device)
    return rows


# ------------------------------------------------------------------------------- what is measured


def bench(cfg: BenchFlags) -> None:
    """Measure all tables, and write the result, a table and a picture."""
    pipe, size, prompts = inputs(cfg)
    reference = as_diffusers(pipe.flux)
    tables = network_tables(cfg, pipe, reference, size, prompts)
    tables["sampling"] = sampling_rows(cfg, pipe, reference, size, prompts)
    # Compiling cannot be undone, so what is eager comes first.
    if cfg.compile:
        for block in (*pipe.flux.double_blocks, *pipe.flux.single_blocks):
            block.compile()
        compiled = network_tables(cfg, pipe, reference, size, prompts)
        tables |= {f"{name}, compiled": rows for name, rows in compiled.items()}
    # Gradients of all weights would count against iterations that train a LoRA.
    for network in (reference, pipe.flux):
        network.zero_grad()
    if cfg.lora:
        add_lora(pipe.flux, cfg.lora, 2 * cfg.lora)
        for name, value in first_values(pipe.flux, seed=0):
            pipe.flux.get_parameter(name).data = value.to(cfg.device)
    for leaps in cfg.leaps:
        tables[f"iteration, {leaps} leaps"] = iteration_rows(cfg, pipe, size, prompts, leaps)
    write_result(cfg.results, tables=tables)
    report(cfg.results)


def inputs(cfg: BenchFlags) -> tuple[Pipeline, Size, list[str]]:
    """The tiny model with a network of the size asked for, the size of images, and prompts."""
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    pipe = load_pipeline(HERE / "shapes" / "tiny-flux", device_of(cfg.device), dtype, cfg.text_length)
    config = replace(pipe.flux.config, **NETWORKS[cfg.network])
    # The tiny network keeps its trained weights.
    if config != pipe.flux.config:
        with torch.device(cfg.device):
            torch.set_default_dtype(dtype)  # 12 billion weights in fp32 would not leave room for others
            pipe.flux = Flux(config)
            torch.set_default_dtype(torch.float32)
    height, width = sides(cfg.size)
    rows, columns = token_grid(pipe, height, width)
    levels = pipe.family.sigmas(pipe.schedule, cfg.rollout_steps, rows * columns).to(cfg.device)
    flops = network_flops(pipe.flux, rows * columns, cfg.text_length)
    lines = read_prompts(HERE / "shapes" / "train-prompts.txt")
    return pipe, Size(height, width, rows, columns, levels, flops), lines[: cfg.batch]


def network_tables(
    cfg: BenchFlags, pipe: Pipeline, reference: FluxTransformer2DModel, size: Size, prompts: list[str]
) -> dict[str, Rows]:
    """A forward, and a forward and its backward in all weights, of the network and of diffusers'."""
    text = encode(pipe, prompts)
    flux_velocity = velocity_of(pipe.flux, text, size.rows, size.columns, dtype=pipe.compute)
    reference_velocity = velocity_of_diffusers(reference, text.txt, text.vec, size)
    x = torch.randn(cfg.batch, size.rows * size.columns, pipe.flux.config.in_channels, device=cfg.device)

    def backward(velocity: Velocity, recompute: str = "none", attention: str | None = None) -> None:
        pipe.flux.recompute = recompute
        with sdpa_kernel(SDPBackend.__members__[attention]) if attention else nullcontext():
            velocity(x, size.sigmas[0]).sum().backward()

    # The first of each kind is what others are compared with.
    forwards = {
        "diffusers": partial(reference_velocity, x, size.sigmas[0]),
        "model.py": partial(flux_velocity, x, size.sigmas[0]),
    }
    backwards = {"diffusers": partial(backward, reference_velocity)}
    for level in LEVELS:
        backwards[f"--recompute {level}"] = partial(backward, flux_velocity, level)
    for name in cfg.attention:
        backwards[name] = partial(backward, flux_velocity, attention=name)
    with torch.no_grad():
        tables = {"forward": measure(cfg, forwards, cfg.batch * size.flops.forward)}
    tables["forward and backward"] = measure(cfg, backwards, cfg.batch * size.flops.forward_backward)
    return tables


def as_diffusers(flux: Flux) -> FluxTransformer2DModel:
    """diffusers' network, which shares the weights of `flux`."""
    with torch.device("meta"):
        reference = FluxTransformer2DModel.from_config(config_to_diffusers(flux.config))
    # On a GPU there is room for the weights of FLUX.1-dev once.
    reference.load_state_dict(to_diffusers(flux.state_dict(), flux.config), assign=True)
    return reference.requires_grad_()


def velocity_of_diffusers(reference: FluxTransformer2DModel, txt: Tensor, vec: Tensor, size: Size) -> Velocity:
    # The ids of FluxPipeline, which are in the network's dtype.
    img_ids = FluxPipeline._prepare_latent_image_ids(1, size.rows, size.columns, txt.device, txt.dtype)
    txt_ids = torch.zeros(txt.shape[1], 3, device=txt.device, dtype=txt.dtype)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        t = sigma.to(txt.dtype).expand(len(x))
        (v,) = reference(x.to(txt.dtype), txt, vec, t, img_ids, txt_ids, return_dict=False)
        return v.to(x.dtype)

    return velocity


def sampling_rows(
    cfg: BenchFlags, pipe: Pipeline, reference: FluxTransformer2DModel, size: Size, prompts: list[str]
) -> Rows:
    """`sample` and FluxPipeline, whose images are the same."""
    shifts = {name: pipe.schedule[name] for name in SHIFTS}
    scheduler = FlowMatchEulerDiscreteScheduler(**shifts)
    encoders = itertools.chain(*zip(pipe.encoders, pipe.tokenizers, strict=True))
    pipeline = FluxPipeline(scheduler, pipe.vae, *encoders, reference)
    pipeline.set_progress_bar_config(disable=True)
    seeds = range(cfg.batch)

    def draw_by_diffusers() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # FluxPipeline would decode in the network's dtype.
        latents = pipeline(
            prompts, generator=generators, height=size.height, width=size.width, output_type="latent",
            num_inference_steps=cfg.rollout_steps, max_sequence_length=cfg.text_length,
        ).images  # fmt: skip
        with torch.no_grad():
            return decode(pipe, latents.float(), size.height, size.width).cpu()

    draw = partial(sample, pipe, prompts, seeds, cfg.rollout_steps, size.height, size.width, batch=cfg.batch)
    rows = measure(cfg, {"FluxPipeline": draw_by_diffusers, "sample.py": draw})
    rows["sample.py"]["difference"] = (draw() - draw_by_diffusers()).abs().max().item()
    return rows


def iteration_rows(cfg: BenchFlags, pipe: Pipeline, size: Size, prompts: list[str], leaps: int) -> Rows:
    """An iteration of LeapAlign, leap by leap and in its published structure, from the same picks."""
    # Without --reward: what a reward costs is the same on both sides.
    reward = open_reward("tiny", cfg.device, pipe.clip_tokenizer)
    noise = torch.randn(cfg.batch, size.rows * size.columns, pipe.flux.config.in_channels, device=cfg.device)

    def leap_by_leap(recompute: str) -> None:
        pipe.flux.recompute = recompute
        generator = torch.Generator().manual_seed(leaps)
        # Without the weight of Eq. 12, which does not depend on how the gradient is made.
        samples, _ = build_samples(pipe, prompts, size, [reward], lambda i: noise, generator)
        leapalign(samples, alpha=ALPHA, leaps=leaps, weight="none")

    def one_graph(recompute: str) -> None:
        pipe.flux.recompute = recompute
        velocity = velocity_of(pipe.flux, encode(pipe, prompts), size.rows, size.columns, dtype=pipe.compute)
        picks = pick_leaps(size.sigmas, torch.Generator().manual_seed(leaps), leaps)
        x_0 = published(velocity, noise, size.sigmas, picks)
        images = decode(pipe, x_0, size.height, size.width)
        hinge(reward.score(images, prompts), reward.lam).mean().backward()

    runs = {}
    for level in LEVELS:
        runs[f"published, {level}"] = partial(one_graph, level)
        runs[f"leap by leap, {level}"] = partial(leap_by_leap, level)
    rows = measure(cfg, runs)
    for row in rows.values():
        row["leaps"] = leaps
    # Two gradients of FLUX.1-dev fit beside the least activations.
    a, b = gradient(pipe.flux, partial(leap_by_leap, "blocks")), gradient(pipe.flux, partial(one_graph, "blocks"))
    rows["leap by leap, none"]["difference"] = ((a - b).norm() / b.norm()).item()
    return rows


def published(velocity: Velocity, x: Tensor, levels: Tensor, picks: tuple[int, ...]) -> Tensor:
    """x_0 of a rollout from x, with the graph of leaps from `picks`, where the rollout's own velocities have one."""
    leap = None  # the arguments of Eq. 3 at the last pick
    for step, (k, j) in enumerate(itertools.pairwise(levels)):
        # A later leap starts where the one before ended, so that gradient flows through both.
        if step in picks and leap:
            x = connect(x, one_step(*leap, k))
        with torch.set_grad_enabled(step in picks):
            v = velocity(discount(x, ALPHA), k)
        if step in picks:
            leap = x, v, k
        x = one_step(x, v, k, j).detach()
    return connect(x, one_step(*leap, levels[-1]))


def gradient(flux: Flux, run: Callable[[], Any]) -> Tensor:
    flux.zero_grad()
    run()
    return torch.cat([p.grad.flatten() for p in flux.parameters() if p.grad is not None])


# --------------------------------------------------------------------------------------- the report


def report(path: Path) -> None:
    """Write the table and the picture of a result beside it, and print the table."""
    result = json.loads(path.read_text())
    lines, memory = [], {}
    for table, rows in result["tables"].items():
        for name, row in rows.items():
            cells = [f"{row[column]:.3g}" if column in row else "" for column in COLUMNS]
            lines.append([f"{table}: {name}", *cells])
            if "leaps" in row and "MB" in row:
                across, up = memory.setdefault(name, ([], []))
                across.append(row["leaps"])
                up.append(row["MB"] / 1000)
    path.with_suffix(".md").write_text(f"{source_line(result)}\n\n{markdown_table(['', *COLUMNS], lines)}")
    print(path.with_suffix(".md").read_text())
    chart = partial(line_chart, lines=memory, title="memory of an iteration, GB", across="leaps")
    save_row([chart], path.with_suffix(".png"), right_margin=2.2)


if __name__ == "__main__":
    run_command(bench, BenchFlags, __doc__)
