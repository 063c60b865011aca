"""The flags of a training run, and the presets.

Each flag is a field; the string beneath the field is its help. `python train.py PRESET --help` prints the groups below
as boxes; infra/checks.py refuses values that cannot be. The presets, other values of a `Config`, end the file.
"""

import itertools
import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import OmitArgPrefixes

from infra.flags import flag_of, flags

HERE = Path(__file__).parent


def sides(size: str) -> tuple[int, int]:
    """Height and width in pixels of one --size: 720 is a square, 768x1344 is HEIGHTxWIDTH. Raises ValueError."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if not match:
        raise ValueError(f"--size {size}: give pixels, one number for a square or HEIGHTxWIDTH, such as 768x1344")
    height, width = int(match[1]), int(match[2] or match[1])
    if not 0 < min(height, width) <= max(height, width) <= 16384:
        raise ValueError(f"--size {size}: give 1 to 16384 pixels")
    return height, width


@flags
class Experiment:
    """What decides the result: --resume must find these flags unchanged."""

    model: str = str(HERE / "shapes" / "tiny-flux")
    """Model folder in the diffusers layout of FLUX, or a hub id; or a LoRA (a folder or a .safetensors file); or a file
    with the transformer alone, such as flux1-dev.safetensors or ComfyUI's."""
    base: str | None = None
    """Model folder or hub id that --model belongs to, if --model is a LoRA (those written here name their base
    themselves) or a file with the transformer alone."""
    reward: tuple[str, ...] = ("tiny",)
    """Rewards to raise, NAME[=PATH][:WEIGHT] or my_file.py:function[:WEIGHT]. Names: tiny, clip, pickscore, hpsv2,
    hpsv3, imagereward, and judge for methods that need no gradient; weights multiply what the loss sees (cosines for
    CLIP rewards, about 13 for hpsv3). NAME~GOOD~BAD is relative: by how much the prompt fits better with a good word in
    front than with a bad one, as in hpsv2~Real~Painting (SRPO)."""
    watch: tuple[str, ...] = ("judge",)
    """Rewards that are evaluated but never trained on. The run keeps the weights that the first of them scores highest,
    and warns when one of them has fallen while the trained reward rose. judge applies the rules of the shapes world;
    lattice falls where a pattern of the tokens' period appears."""
    prompts: Path = HERE / "shapes" / "train-prompts.txt"
    """Prompts to train on: a .txt file with one per line, or .jsonl, .json, .csv or .tsv with a "prompt" in each entry.
    A prompt that occurs twice is seen twice as often."""
    eval_prompts: Path = HERE / "shapes" / "eval-prompts.txt"
    """Prompts to evaluate on, one image per line, always from the same noise."""
    size: tuple[str, ...] = ("64",)
    """Pixels: one number for a square, or HEIGHTxWIDTH. Several sizes take turns, one per update; the first size is
    evaluated."""
    guidance: float | None = None
    """Guidance scale: 3.5 is usual for FLUX.1-dev, whose network reads it, and 4 for FLUX.2 [klein] base, whose network
    is evaluated twice for it; None for a model that takes none."""
    negative_prompt: str = ""
    """Prompt that a second evaluation leads away from: v = v_negative + guidance (v_prompt - v_negative)."""
    detach_negative: bool = False
    """Leave out the gradient of v_negative, as FlowBP does: a backward takes half the time, the gradient is biased."""
    text_length: int | None = None
    """Tokens of T5 or Qwen3 that a prompt is padded or truncated to; the default is the tokenizer's, at most 512."""
    seed: int = 0
    """Seed of the order of prompts, the noise, k and j, and a LoRA's first values. The noise of evaluations does not
    depend on it."""
    lam: tuple[float | None, ...] = ()
    """Score above which a sample has no loss (lambda of Eq. 11), one per reward, in the loss's units; None switches the
    hinge off. Default: the paper's (hpsv2 0.55, pickscore 0.4, hpsv3 13.5; tiny 0.4), no hinge for other rewards."""
    batch: int = 64
    """Rollouts per update."""
    rollout_steps: int = 12
    """Euler steps of a rollout (T), in training and in evaluation."""
    lr: float = 1.4e-4
    """Learning rate of AdamW, betas 0.9 and 0.999."""
    decay: bool = True
    """Let the learning rate fall linearly to zero over the run. The paper keeps it constant."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    anchor: float = 0.0
    """Weight of an anchor in the loss: the squared distance of the trained velocity from the untuned network's, a mean
    over the latent, at each state where the network is differentiated (two of leapalign's). The untuned network is the
    one without its LoRA, or a frozen copy."""
    anchor_on: Literal["velocity", "norm"] | None = None
    """What --anchor holds: the velocity, or its length alone, where that exceeds the untuned network's (NormGuard).
    Default: the velocity."""
    clip: float = 1.0
    """Largest norm of the whole gradient; inf does not clip."""
    ema: float = 0.98
    """Decay of the averaged weights, which are evaluated and saved. They average about 1 / (1 - decay) updates."""
    eval_every: int = 25
    """Updates between evaluations. There is always one before the first update and one after the last."""
    bf16: bool = False
    """Compute the transformer and the text encoders in bfloat16. Trained weights, gradients and optimizer stay fp32,
    unless --lean is given."""
    vae_bf16: bool = False
    """Decode in bfloat16, images of evaluations too: half of the memory, and faster on GPUs and on CPUs with AMX."""
    lean: bool = False
    """Train all weights on one GPU in less memory: bfloat16 weights with stochastic rounding, 8-bit optimizer states,
    averages in the host's memory. Needs torchao, and --bf16."""
    lora: int | None = None
    """Train a LoRA of this rank instead of all weights. The weights under it are frozen, in bfloat16 with --bf16. If
    --model is a LoRA of this rank or less, training continues that LoRA."""
    fp8: bool = False
    """Keep the frozen weights under a LoRA in fp8, half of bf16's memory, and up-cast one layer at a time: for small
    GPUs. Needs --lora and one GPU."""
    lora_alpha: float | None = None
    """Alpha of the LoRA; None means twice its rank."""


@flags
class Method:
    """How the gradient is made. None means the method's own default, in brackets below. A flag that the method does not
    have is refused, unless it comes from the preset."""

    method: str = "leapalign"
    """leapalign, the paper's; refl, draft_lv, drtune, full, direct_align, vgg_flow, flowbp_sparse, flowbp_bridge,
    flowbp_lagrange, and from scores alone flow_grpo, dance_grpo, mix_grpo, awm, nft, dpo, fdfo, all of baselines/; or
    your own, my_file.py:FUNCTION."""
    option: tuple[str, ...] = ()
    """NAME=VALUE: keywords that are no flags here: those of your own method, direct_align's ahead (1 step), vgg_flow's
    scale (1000), dpo's beta (2000), fdfo's churn (0.1) and dsigma (false, true weighs steps by their length)."""
    alpha: float | None = None
    """leapalign (0.3), flowbp_bridge, flowbp_lagrange (0.1): discount of the nested gradient (Eq. 9): 0 drops it, 1
    keeps it whole."""
    tau: float | None = None
    """leapalign (0.1), flowbp_lagrange (0.2): distances below tau count as tau in the similarity weight (Eq. 12), in
    latent units."""
    leaps: int | None = None
    """leapalign (2): leaps through the trajectory."""
    weight: Literal["both", "d_j", "d_0", "none"] | None = None
    """leapalign (both): distances that the similarity weight uses (Eq. 12)."""
    reward_input: Literal["x_0", "xhat_0"] | None = None
    """leapalign (x_0, the paper's; xhat_0 in the preset shapes), refl, drtune (xhat_0): reward the image of the
    rollout, or the prediction of it by the last leap, or at the step where refl and drtune stop."""
    low: float | None = None
    """leapalign (0), direct_align (0.75): leaps and steps start at noise levels of at least this."""
    high: float | None = None
    """leapalign (1), direct_align (0.97): leaps and steps start at noise levels of at most this."""
    distance: float | None = None
    """leapalign: fixed k - j instead of a random pair."""
    by_level: bool = False
    """leapalign: draw k and j by noise level: a step has odds in proportion to its length; else all have equal odds.
    Worth a try where the reward stalls, and on FLUX.2, whose steps crowd at high noise."""
    nested_only: bool = False
    """leapalign: drop the first leap's own term (Eq. 14), a diagnostic."""
    draw: Literal["uniform", "midpoint", "midpoint_j", "dirichlet"] | None = None
    """flowbp_lagrange (dirichlet): how k and j are drawn."""
    nodes: int | None = None
    """flowbp_lagrange (3): velocities that a leap's polynomial goes through."""
    active: int | None = None
    """drtune (2), flowbp_sparse, vgg_flow (3), flowbp_bridge (5), awm, nft, dpo (6): steps, or noise levels, that carry
    gradient."""
    bias: float | None = None
    """flowbp_sparse, flowbp_bridge (2): steps are drawn with odds (i + 1)^bias, so 0 is uniform."""
    rho: float | None = None
    """flowbp_sparse, flowbp_bridge (1), flowbp_lagrange (0.5): 1 scales the weights of the active steps up to the sum
    over the trajectory, or over a leap; 0 leaves them as they are."""
    copies: int | None = None
    """draft_lv (2): copies of x_0 with fresh noise, whose last step is differentiated too."""
    last: int | Literal["random"] | None = None
    """full: only the last K steps, which is DRaFT-K, or a random K, which is AlignProp; refl: one of the last K, by
    default 11 of 25."""
    group: int | None = None
    """flow_grpo, dance_grpo, mix_grpo, awm, nft, dpo (8), fdfo (2): samples of one prompt, which are compared with each
    other."""
    ranks: bool = False
    """flow_grpo, dance_grpo, mix_grpo, awm, nft: compare samples by their ranks in the group, not by their scores."""
    noise: float | None = None
    """flow_grpo (a = 0.7), dance_grpo, mix_grpo (eta = 0.3): noise of the random walk."""
    cps: bool = False
    """flow_grpo, mix_grpo: coefficient-preserving noise in the random steps (Flow-CPS); --noise is then below 1."""
    window: int | None = None
    """mix_grpo (4): random steps in a row, all others are the ODE's; flow_grpo (all steps): the same, drawn at each
    update from the first half (Flow-GRPO-Fast)."""
    shift_every: Annotated[int | Literal["random"] | None, tyro.conf.arg(aliases=("--every",))] = None
    """mix_grpo (25): updates until the window moves on by a step; random: the window is drawn as flow_grpo's."""


@flags
class Run:
    """How long the run is, what it writes where, and when it ends."""

    updates: Annotated[int, tyro.conf.arg(aliases=("--steps",))] = 100
    """Updates of the weights."""
    smoke: bool = False
    """Try the other flags in seconds: 2 updates of 8 rollouts, and 6 of the evaluation prompts. Writes to runs/smoke,
    which is emptied first, whatever --updates, --batch and --out say."""
    out: Path | None = None
    """Folder of the run; the default is runs/METHOD-seedN. It must not hold a run yet, unless --resume is given."""
    patience: int = 2
    """Evaluations that a watched reward may stay below its best, while the trained one rises, before a warning."""
    stop_early: bool = False
    """Stop at that warning instead of going on."""
    save_every: int = 50
    """Updates between checkpoints, from which --resume continues."""
    keep: int = 2
    """How many of the newest checkpoints are kept. best/ is kept beside them."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, given the same flags; from the start if there is none yet."""
    export: Path | None = None
    """Write the averaged weights of a checkpoint to this folder, in the form of final/, and stop; needs --resume. To
    FILE.safetensors: the transformer alone, with black-forest-labs' names."""
    at: int | None = None
    """Resume or export the checkpoint of this update instead of the newest. Resuming removes later checkpoints and log
    lines; a best/ of a later update is kept as best.step_NNNNNN."""
    skip_nonfinite: int = 0
    """How many updates with a loss or gradient that is not finite are left out before the run stops at the next."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where to log beside metrics.jsonl and eval.jsonl. Needs that package."""


@flags
class Machine:
    """What changes memory and time, not the result."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, cuda, or mps."""
    rollout_batch: int | None = None
    """Rollouts at a time on a rank; None means all of the rank's share of --batch."""
    micro_batch: int | None = None
    """Samples at a time in the backward of reward and leaps; None means as many as in a rollout."""
    recompute: Literal["none", "light", "blocks"] = "none"
    """What a backward computes again instead of keeping it from the forward. light: what is elementwise in the
    transformer, norms and activations among it; blocks: all of transformer, VAE and rewards, for a third of a backward
    more."""
    compile: bool = False
    """Compile the transformer's blocks."""
    shard: int | None = None
    """Ranks that share one copy of the weights, such as the 8 of a node (HSDP); None means all ranks (FSDP)."""
    offload_encoders: bool = False
    """Keep T5 or Qwen3 on the CPU, and move each of its layers to the GPU only while it computes: for a small GPU."""
    check_every: int = 50
    """Updates between checks that replicas (--shard) have the same weights."""


GROUPS = (Experiment, Method, Run, Machine)


@dataclass(frozen=True)
class Config(Experiment, Method, Run, Machine):
    """Post-train a flow model with reward gradients."""


@dataclass(frozen=True)
class Flags:
    """Post-train a flow model with reward gradients."""

    experiment: OmitArgPrefixes[Experiment]
    method: OmitArgPrefixes[Method]
    run: OmitArgPrefixes[Run]
    machine: OmitArgPrefixes[Machine]


def parse(arguments: list[str], console_outputs: bool = True) -> tuple[Config, Config]:
    """The flags of a run, from PRESET and the arguments after it, and the preset unchanged."""
    names_preset = arguments and (arguments[0] in ("-h", "--help") or not arguments[0].startswith("-"))
    if not names_preset:
        arguments = ["shapes", *arguments]
    presets = {name: (text, grouped(cfg)) for name, (text, cfg) in PRESETS.items()}
    arguments = with_recompute_levels(arguments)
    flags = tyro.extras.overridable_config_cli(presets, args=arguments, console_outputs=console_outputs)
    cfg = flat(flags)
    if cfg.smoke:
        cfg = replace(cfg, **SMOKE)
    return cfg, PRESETS[arguments[0]][1]


def command(cfg: Config) -> str:
    """The shortest command of a run: a preset, and the flags that differ from it."""
    commands = []
    for name, (_, preset) in PRESETS.items():
        words = ["python", "train.py", name]
        for field in fields(Config):
            value = getattr(cfg, field.name)
            if field.name in ("resume", "export", "at") or value == getattr(preset, field.name):
                continue
            flag = flag_of(field.name)
            if isinstance(value, bool):
                words.append(flag if value else f"--no{flag[1:]}")
            else:
                values = value if isinstance(value, tuple) else [value]
                words += [flag, *map(str, values)]
        commands.append(words)
    return shlex.join(min(commands, key=len))


def with_recompute_levels(arguments: list[str]) -> list[str]:
    """The arguments, with a level after a --recompute that has none: in older scripts the flag was on or off."""
    words = []
    for word, following in itertools.pairwise([*arguments, "--"]):
        if word == "--no-recompute":
            words += ["--recompute", "none"]
        elif word == "--recompute" and following.startswith("--"):
            words += ["--recompute", "blocks"]
        elif words[-1:] == ["--recompute"] and word == "True":
            words.append("blocks")
        else:
            words.append(word)
    return words


def grouped(cfg: Config) -> Flags:
    """The same values in groups, which tyro prints as boxes."""
    groups = []
    for group in GROUPS:
        groups.append(group(**{f.name: getattr(cfg, f.name) for f in fields(group)}))
    return Flags(*groups)


def flat(flags: Flags) -> Config:
    """The same values without groups, as the program reads them."""
    values: dict[str, Any] = {}
    for group in fields(flags):
        values |= vars(getattr(flags, group.name))
    return Config(**values)


# What --smoke sets in any preset. A smoke run empties its folder, so the folder is fixed: no other may be emptied.
SMOKE = dict(updates=2, batch=8, out=Path("runs/smoke"))
# The defaults of the flags are those of the shapes world. With x_0, which the paper rewards, this world gains less, and
# longer runs lose the gain again: see shapes/README.md.
SHAPES = Config(reward_input="xhat_0")
# The paper's settings for FLUX.1-dev. The paper found x_0 better there, which is leapalign's default.
PAPER = Config(
    updates=300,
    model="weights/FLUX.1-dev",
    prompts=Path("weights/train-prompts.txt"),
    eval_prompts=HERE / "prompts.txt",
    size=("720",),
    guidance=3.5,
    rollout_steps=25,
    lr=1e-5,
    decay=False,
    ema=0.995,
    eval_every=50,
    save_every=25,
    bf16=True,
    rollout_batch=4,
    micro_batch=1,
    recompute="blocks",
)
# As FlowBP (arXiv 2606.11075) trains FLUX.2 [klein] base with LeapAlign. On FLUX.2's schedule, in the shapes world,
# --by-level does better (experiments/README.md); nobody has tried it on FLUX.2 itself.
KLEIN = replace(
    PAPER,
    model="weights/FLUX.2-klein-base-4B",
    size=("512",),
    guidance=4.0,
    detach_negative=True,
    reward=("hpsv2",),
    watch=("pickscore",),
)
NEEDS = "Needs weights/FLUX.1-dev, weights/train-prompts.txt"  # the files of the rewards follow
KLEIN_NEEDS = (
    "Needs weights/FLUX.2-klein-base-4B, weights/train-prompts.txt, weights/HPS_v2.1_compressed.pt and "
    "weights/PickScore_v1"
)
PRESETS = {
    "shapes": ("The tiny Flux and reward that the repository ships: minutes on two CPU cores.", SHAPES),
    "flux-dev-hpsv2": (
        f"FLUX.1-dev and HPSv2.1 as in the paper. {NEEDS}, weights/HPS_v2.1_compressed.pt, and weights/PickScore_v1 to "
        "watch.",
        replace(PAPER, out=Path("runs/flux-dev-hpsv2"), reward=("hpsv2",), watch=("pickscore",)),
    ),
    "flux-dev-pickscore": (
        f"FLUX.1-dev and PickScore as in the paper. {NEEDS}, weights/PickScore_v1, and weights/HPS_v2.1_compressed.pt "
        "to watch.",
        replace(PAPER, out=Path("runs/flux-dev-pickscore"), reward=("pickscore",), watch=("hpsv2",), alpha=0.1),
    ),
    "flux-dev-hpsv3": (
        "FLUX.1-dev and HPSv3 as in the paper. Needs weights/FLUX.1-dev, weights/mjhq-train-prompts.txt, "
        "weights/HPSv3, and weights/HPS_v2.1_compressed.pt to watch.",
        replace(
            PAPER,
            out=Path("runs/flux-dev-hpsv3"),
            prompts=Path("weights/mjhq-train-prompts.txt"),
            reward=("hpsv3",),
            watch=("hpsv2",),
            alpha=0.1,
            lr=8e-6,
        ),
    ),
    "flux-dev-lora": (
        f"A LoRA of FLUX.1-dev on HPSv2.1, for one 80 GB GPU. {NEEDS}, weights/HPS_v2.1_compressed.pt, and "
        "weights/PickScore_v1 to watch.",
        replace(
            PAPER,
            out=Path("runs/flux-dev-lora"),
            reward=("hpsv2",),
            watch=("pickscore",),
            lora=64,
            lr=1e-4,
            batch=16,
        ),
    ),
    "flux2-klein-4b": (
        f"FLUX.2 [klein] base 4B and HPSv2.1, as FlowBP trains the 9B: one GPU of 141 GB, or 8 of 40. {KLEIN_NEEDS}.",
        replace(KLEIN, out=Path("runs/flux2-klein-4b"), lr=1e-5, batch=32),
    ),
    "flux2-klein-4b-lora": (
        f"A LoRA of FLUX.2 [klein] base 4B on HPSv2.1, for one GPU of 24 GB. {KLEIN_NEEDS}.",
        replace(KLEIN, out=Path("runs/flux2-klein-4b-lora"), lora=32, lr=1e-4, batch=16, offload_encoders=True),
    ),
}
