"""Make everything the shapes world ships, from nothing:  python -m shapes.prepare

Each stage writes its result to --work and is skipped when that is there; an interrupted one goes on from its last
checkpoint.  The whole takes about an hour and a half on two cores; `--scale 0.002` tries all of it in a minute.

    vae      AutoencoderKL on rendered scenes
    clean    tiny Flux and text encoders on right captions: what the base knows
    finish   a light finish on captions that are often wrong in a detail: it knows, but does not always obey
    reflow   straightened on its own samples, so that few steps come close to many and leaps are nearly exact
    read     the reward on rendered scenes: what the words mean
    labels   images of the models above, labelled by the judge
    reward   the reward on those, adversarially
    ship     shapes/tiny-flux, shapes/tiny-reward and the prompt files

`python -m shapes.report` then measures what was made.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.files import replacing
from infra.pictures import contact_sheet
from infra.saving import save_flux
from leaps import rollout
from sample import Text, pack, sigmas, unpack, velocity_of
from shapes.models import TINY, make_model, make_reward, make_tokenizers, make_vae, token_table
from shapes.reward import NUMBER, PROMPTS, rendered, reward_loss, truth
from shapes.world import (
    COLORS,
    SHAPES,
    TASKS,
    Prompt,
    accuracy,
    by_task,
    distort,
    is_held_out,
    judge,
    objects_in,
    render,
    scenes,
)

HERE = Path(__file__).parent
OF_TASK = by_task(PROMPTS)
TEACH = dict(single=0.5, two=1, count=1, color=0.7, position=1.5, attr=2)  # more of what is harder to learn
EVEN = dict.fromkeys(TASKS, 1) | dict(single=1.5)  # `single` has the fewest prompts, and must stay clean
ALIGN = dict(single=2, two=3, count=3, color=2, position=1, attr=3)  # shares of the tasks in train-prompts.txt
SCHEDULE = dict(use_dynamic_shifting=False, shift=3.0)  # of the noise levels, in training and in sampling
GRID = 4  # tokens each way


@dataclass
class Config:
    """Make the models of the shapes world."""

    work: Path = Path("runs/prepare")
    """Folder for the stages' results and checkpoints."""
    stages: tuple[str, ...] = ("vae", "clean", "finish", "reflow", "read", "labels", "reward", "ship")
    """Stages to run, in this order; each runs those that it needs."""
    out: Path = HERE
    """Folder that receives what is shipped."""
    scale: float = 1.0
    """Multiplies all steps and numbers of images."""
    seed: int = 0
    """Seed of everything."""
    threads: int = 2
    """CPU threads."""

    def some(self, n: int, least: int = 2) -> int:
        return max(least, round(n * self.scale))


def draw_prompts(n: int, rng: np.random.Generator, weights: dict[str, float] = EVEN) -> list[Prompt]:
    """n prompts: a task by its weight, then one of the task's prompts, all alike."""
    p = np.array(list(weights.values())) / sum(weights.values())
    tasks = rng.choice(list(weights), size=n, p=p)
    return [OF_TASK[t][rng.integers(len(OF_TASK[t]))] for t in tasks]


def fit(
    name: str,
    modules: nn.ModuleDict,
    loss_fn: Callable[[np.random.Generator, int], dict[str, Tensor]],
    cfg: Config,
    steps: int,
    lr: float,
    save_every: int = 250,
) -> bool:
    """AdamW with a one-cycle schedule on `loss_fn(rng, step)["loss"]`; True if there was anything left to do.

    Resumable: what is random in a step depends on (seed, stage, step) alone.
    """
    done, partial = cfg.work / f"{name}.pt", cfg.work / f"{name}.partial.pt"
    if done.exists():
        modules.load_state_dict(torch.load(done, weights_only=True))
        return False
    steps = cfg.some(steps)
    params = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    first = 0
    if partial.exists():
        saved = torch.load(partial, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    mean, start = {}, time.time()
    for step in range(first, steps):
        rng = np.random.default_rng((cfg.seed, sum(map(ord, name)), step))
        torch.manual_seed(int(rng.integers(2**31)))
        parts = loss_fn(rng, step)
        parts["loss"].backward()
        parts["grad"] = nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean = {k: 0.98 * mean.get(k, v.item()) + 0.02 * v.item() for k, v in parts.items()}
        if (step + 1) % 50 == 0:
            pace = f"{(time.time() - start) / (step + 1 - first):.2f} s/step"
            print(f"{name} {step + 1}/{steps}", *(f"{k} {v:.4f}" for k, v in mean.items()), pace, flush=True)
        if (step + 1) % save_every == 0 and step + 1 < steps:
            state = dict(modules=modules.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            with replacing(partial) as part:
                torch.save(state | dict(schedule=schedule.state_dict()), part)
    torch.save(modules.state_dict(), done)
    partial.unlink(missing_ok=True)
    return True


# ------------------------------------------------------------------------------- vae and its latents


def stage_vae(cfg: Config) -> AutoencoderKL:
    vae = make_vae()

    def loss_fn(rng, step):
        shape = rng.integers(-1, len(SHAPES), (40, 4))  # fuller than prompts ask for: more to learn an image
        images = render(shape, rng.integers(len(COLORS), size=shape.shape), rng) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        mse, l1 = error.square().mean(), error.abs().mean()
        return dict(loss=mse + 0.5 * l1 + 3e-5 * kl, mse=mse / 4, kl=kl)

    fit("vae", nn.ModuleDict({"vae": vae}), loss_fn, cfg, steps=1700, lr=3e-3)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def latents(cfg: Config) -> dict[str, Tensor]:
    """Encoded scenes, so that training the base need not: x (n, 16, 32), and the prompt of each, (n,).

    Shifted and scaled to mean 0 and standard deviation 1, by the numbers that go into the VAE's config.
    """
    done = cfg.work / "latents.pt"
    if done.exists():
        return torch.load(done, weights_only=True)
    vae, rng = stage_vae(cfg), np.random.default_rng((cfg.seed, 1))
    each = dict(single=250, two=300, count=300, color=250, position=200, attr=80)  # scenes a prompt
    index = torch.tensor([NUMBER[p] for p in PROMPTS for _ in range(cfg.some(each[p.task]))])
    z = torch.cat(
        [vae.encode(scenes([PROMPTS[i] for i in part], rng)[0] * 2 - 1).latent_dist.mean for part in index.split(200)]
    )
    shift, scale = z.mean(), 1 / z.std()
    data = dict(x=pack((z - shift) * scale), prompt=index, shift_factor=shift, scaling_factor=scale)
    torch.save(data, done)
    print(f"latents: {len(z)} scenes, shift {shift.item():.4f}, scale {scale.item():.4f}", flush=True)
    return data


@torch.no_grad()
def pictures(cfg: Config, x: Tensor) -> Tensor:
    """Packed latents to images in [0, 1]."""
    data, vae = latents(cfg), stage_vae(cfg)
    z = unpack(x, GRID, GRID) / data["scaling_factor"] + data["shift_factor"]
    return torch.cat([vae.decode(part).sample / 2 + 0.5 for part in z.split(100)]).clamp(0, 1)


# -------------------------------------------------------------------------------------------- base


def tokens(cfg: Config) -> tuple[Tensor, Tensor]:
    """Every prompt's T5 and CLIP ids; makes the tokenizers the first time."""
    if not (cfg.work / "tokenizer" / "vocab.json").exists():
        make_tokenizers(cfg.work)
    return token_table(cfg.work / "tokenizer_2"), token_table(cfg.work / "tokenizer")


def velocity(model: nn.ModuleDict, table: tuple[Tensor, Tensor], caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's velocity for prompts by number, text encoders included."""
    text = Text(model["t5"](table[0][caption])[0], model["clip"](table[1][caption]).pooler_output)
    return velocity_of(model["flux"], text, GRID, GRID)


def flow_loss(v: Callable[[Tensor, Tensor], Tensor], x0: Tensor, x1: Tensor) -> dict[str, Tensor]:
    """Flow matching: the squared error of the velocity x_1 - x_0 at logit-normal times, shifted by 3."""
    t = torch.sigmoid(torch.randn(len(x0)))
    t = 3 * t / (1 + 2 * t)
    return dict(loss=F.mse_loss(v(torch.lerp(x0, x1, t[:, None, None]), t), x1 - x0))


def fit_captions(
    cfg: Config, name: str, model: nn.ModuleDict, weights: dict[str, float], wrong: float, steps: int, lr: float
) -> None:
    """Flow matching on scenes whose caption is wrong in a detail with probability `wrong`."""
    data, table = latents(cfg), tokens(cfg)
    rows = [torch.nonzero(data["prompt"] == i)[:, 0].numpy() for i in range(len(PROMPTS))]

    def loss_fn(rng, step):
        captions = draw_prompts(128, rng, weights)
        seen = [distort(p, rng) if rng.random() < wrong else p for p in captions]
        x0 = data["x"][[rng.choice(rows[NUMBER[p]]) for p in seen]]
        caption = torch.tensor([NUMBER[p] for p in captions])
        return flow_loss(velocity(model, table, caption), x0, torch.randn_like(x0))

    if fit(name, model, loss_fn, cfg, steps=steps, lr=lr):
        show(cfg, name, model, steps=25)


def stage_clean(cfg: Config) -> nn.ModuleDict:
    tokens(cfg)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg.work)
    fit_captions(cfg, "clean", model, TEACH, wrong=0.0, steps=4000, lr=2e-3)
    return model


def stage_finish(cfg: Config) -> nn.ModuleDict:
    model = stage_clean(cfg)
    fit_captions(cfg, "finish", model, EVEN, wrong=0.5, steps=500, lr=5e-4)
    return model


@torch.no_grad()
def generate(cfg: Config, model: nn.ModuleDict, caption: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise and the model's own sample for each caption, both (n, 16, 32)."""
    table, ends = tokens(cfg), []
    noise = torch.randn(len(caption), GRID**2, TINY.in_channels, generator=torch.Generator().manual_seed(seed))
    for ids, x1 in zip(caption.split(250), noise.split(250), strict=True):
        ends.append(rollout(velocity(model, table, ids), x1, sigmas(SCHEDULE, steps, GRID**2)).x[-1])
    return noise, torch.cat(ends)


def show(cfg: Config, name: str, model: nn.ModuleDict, steps: int) -> None:
    """Print the judge's accuracy, 100 images a task, and write a picture of some of them."""
    rng, each = np.random.default_rng(7), cfg.some(100, least=8)
    prompts = [OF_TASK[t][i] for t in TASKS for i in rng.integers(len(OF_TASK[t]), size=each)]
    _, x0 = generate(cfg, model, torch.tensor([NUMBER[p] for p in prompts]), steps, seed=7)
    images = pictures(cfg, x0)
    scores = accuracy(judge(images, prompts), prompts)
    print(f"{name}, {steps} steps:", *(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
    sheet = cfg.work / f"{name}-{steps}.png"
    contact_sheet(images[:: each // 8], [p.text for p in prompts[:: each // 8]], sheet, columns=8)


def stage_reflow(cfg: Config) -> nn.ModuleDict:
    """Learn the straight line between each noise and the model's own sample; text encoders are frozen from here.

    FLUX.1-dev is guidance-distilled and nearly straight, which is what leaps need. Samples with an object that is
    none, or of no color, are left out, right or wrong ones are not: the result draws as it binds, but cleanly.
    """
    model, table, done = stage_finish(cfg), tokens(cfg), cfg.work / "pairs.pt"
    if not done.exists():
        rng = np.random.default_rng((cfg.seed, 2))
        caption = torch.tensor([NUMBER[p] for p in draw_prompts(cfg.some(15_000, least=128), rng)])
        noise, end = generate(cfg, model, caption, steps=16, seed=2)
        clear = torch.tensor(
            [all("?" not in (o.shape, o.color) for o in seen) for seen in objects_in(pictures(cfg, end))]
        )
        clear |= not clear.any()  # a model barely trained draws nothing clear
        print(f"pairs: {len(clear)}, of which {clear.float().mean():.2f} show clear objects only", flush=True)
        torch.save(dict(caption=caption[clear], noise=noise[clear], end=end[clear]), done)
    pairs = torch.load(done, weights_only=True)
    model["t5"].requires_grad_(False)
    model["clip"].requires_grad_(False)

    def loss_fn(rng, step):
        i = torch.from_numpy(rng.integers(len(pairs["caption"]), size=128))
        return flow_loss(velocity(model, table, pairs["caption"][i]), pairs["end"][i], pairs["noise"][i])

    if fit("reflow", model, loss_fn, cfg, steps=1000, lr=8e-4):
        for steps in (4, 5, 8, 25):
            show(cfg, "reflow", model, steps)
    return model


# ------------------------------------------------------------------------------------------ reward


def fit_reward(
    cfg: Config, name: str, batch: Callable, modules: nn.ModuleDict, steps: int, lr: float, ramp: bool
) -> None:
    """Train the reward on batch(rng), attacked with radius 3, or with radii that grow to it."""
    ids = tokens(cfg)[1]

    def loss_fn(rng, step):
        grown = min(1, max(0, 2 * step / steps - 0.8)) if ramp else 1
        return reward_loss(modules, ids, batch(rng), 3 * grown, rng)

    fit(name, modules, loss_fn, cfg, steps=steps, lr=lr)


def stage_read(cfg: Config) -> nn.ModuleDict:
    tokens(cfg)
    torch.manual_seed(cfg.seed)
    modules = nn.ModuleDict(dict(clip=make_reward(cfg.work / "tokenizer"), cells=nn.Linear(96, 40)))
    modules["clip"].logit_scale.requires_grad_(False)
    fit_reward(cfg, "read", lambda rng: rendered(draw_prompts(96, rng, TEACH), rng), modules, 1500, 1e-3, ramp=True)
    return modules


def stage_labels(cfg: Config) -> dict[str, Tensor]:
    """Decoded scenes and images of the models so far: images (n, 3, 64, 64) uint8, caption (n,), fits (n, p)."""
    done = cfg.work / "labels.pt"
    if done.exists():
        return torch.load(done, weights_only=True)
    rng, parts = np.random.default_rng((cfg.seed, 3)), []

    def label(captions: Sequence[Prompt], x: Tensor, source: str) -> None:
        images = pictures(cfg, x)
        fits = torch.stack([truth(o) for o in objects_in(images)])
        caption = torch.tensor([NUMBER[p] for p in captions])
        scores = accuracy(fits[range(len(x)), caption], captions)
        print("labelled", source, len(x), *(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)
        parts.append(dict(images=images.mul(255).round().byte(), caption=caption, fits=fits))

    data = latents(cfg)
    chosen = torch.from_numpy(rng.choice(len(data["x"]), cfg.some(3000, least=64)))
    label([PROMPTS[i] for i in data["prompt"][chosen]], data["x"][chosen], "scenes")
    models = ((stage_clean, 5, 2500), (stage_finish, 12, 3500), (stage_reflow, 5, 7000))
    for stage, steps, n in models:
        captions = draw_prompts(cfg.some(n, least=64), rng)
        ids = torch.tensor([NUMBER[p] for p in captions])
        _, x0 = generate(cfg, stage(cfg), ids, steps, seed=30 + steps)
        label(captions, x0, f"{stage.__name__}, {steps} steps")
    labels = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    torch.save(labels, done)
    return labels


def stage_reward(cfg: Config) -> nn.ModuleDict:
    modules, labels = stage_read(cfg), stage_labels(cfg)

    def batch(rng):
        i = torch.from_numpy(rng.integers(len(labels["caption"]), size=64))
        seen = {k: v[i] for k, v in labels.items()}
        made = rendered(draw_prompts(32, rng, TEACH), rng)
        seen |= dict(images=seen["images"] / 255, layout=torch.full((64, 2, 4), -2))
        return {k: torch.cat([made[k], seen[k]]) for k in made}

    fit_reward(cfg, "reward", batch, modules, 800, 5e-4, ramp=False)
    return modules


# -------------------------------------------------------------------------------------------- ship


def stage_ship(cfg: Config) -> None:
    """Write what the repository ships."""
    model, vae, data, folder = stage_reflow(cfg), stage_vae(cfg), latents(cfg), cfg.out / "tiny-flux"
    vae.register_to_config(shift_factor=data["shift_factor"].item(), scaling_factor=data["scaling_factor"].item())
    vae.save_pretrained(folder / "vae")
    # The published names of FLUX.1-dev's encoder, which every transformers reads; version 5 would drop the prefix.
    named = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in model["clip"].state_dict().items()}
    model["clip"].save_pretrained(folder / "text_encoder")
    save_file(named, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    model["t5"].save_pretrained(folder / "text_encoder_2")
    make_tokenizers(folder)
    FlowMatchEulerDiscreteScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    save_flux(folder / "transformer", TINY, model["flux"].state_dict())
    parts = dict(
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        text_encoder=("transformers", "CLIPTextModel"),
        text_encoder_2=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "T5TokenizerFast"),
        transformer=("diffusers", "FluxTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
    )
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.35.0", **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    stage_reward(cfg)["clip"].save_pretrained(cfg.out / "tiny-reward")
    for file in (folder / "tokenizer").iterdir():
        (cfg.out / "tiny-reward" / file.name).write_bytes(file.read_bytes())

    allowed = {t: [p for p in ps if not is_held_out(p)] for t, ps in OF_TASK.items()}
    lines = [allowed[t][i % len(allowed[t])].text for t, w in ALIGN.items() for i in range(144 * w)]
    (cfg.out / "train-prompts.txt").write_text("\n".join(lines) + "\n")
    asked = {t: [p for p in ps if is_held_out(p)] or ps for t, ps in OF_TASK.items()}
    lines = [asked[t][i % len(asked[t])].text for t in TASKS for i in range(60)]
    (cfg.out / "eval-prompts.txt").write_text("\n".join(lines) + "\n")


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    cfg.work.mkdir(parents=True, exist_ok=True)
    for stage in cfg.stages:
        if f"stage_{stage}" not in globals():
            raise SystemExit(f"error: --stages: there is no stage {stage!r}; they are listed in --help")
        globals()[f"stage_{stage}"](cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
