"""Rewards: frozen functions of images and prompts whose gradient in the images is worth following.

    score = reward.score(images, prompts)     # images (b, 3, h, w) in [0, 1], any size  ->  (b,)

`score` is what a loss sees; `reward.scale * score` is what people report.  Preprocessing is done on tensors in
fp32, because a PIL image has no gradient.  On the command line a reward is NAME, NAME=PATH or FILE.py:FUNCTION:

    tiny         the CLIP of the shapes world, shipped                   pickscore    a folder, or its hub id
    clip         any CLIPModel: a folder or a hub id                     hpsv2        HPS_v2.1_compressed.pt
    hpsv3        a folder, see scorers/hpsv3.py                          imagereward  see scorers/imagereward.py
    judge        the rules of the shapes world; no gradient: to watch, to evaluate, for policy gradients
    lattice      0 without a pattern that repeats with every token, lower the stronger it is; to watch, to evaluate

Without a path, weights are looked for in WEIGHTS.  A weight may follow: `pickscore:0.5 hpsv2:0.5`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from infra.user_code import describe_error, is_user_code, load_function
from scorers.common import Device, Score, Scorer, check_tensors, file_in

TINY = Path(__file__).parent / "shapes" / "tiny-reward"
WEIGHTS = {  # where a name without a path looks, from the current folder
    "tiny": TINY,
    "pickscore": Path("weights/PickScore_v1"),
    "hpsv2": Path("weights/HPS_v2.1_compressed.pt"),
    "hpsv3": Path("weights/HPSv3"),
    "imagereward": Path("weights/ImageReward"),
}
RULES = ("judge", "lattice")  # have no weights
FILES = {"hpsv2": "HPS_v2.1_compressed.pt", "hpsv3": "HPSv3.safetensors", "imagereward": "ImageReward.pt"}
BESIDE = {  # in its folder; of two after | one is enough
    "hpsv3": ("config.json", "tokenizer.json|vocab.json"),
    "imagereward": ("vocab.txt|tokenizer.json",),
    "clip": ("config.json", "*.safetensors", "tokenizer.json|vocab.json"),
}
WEIGHT = r"[-+]?[\d.][-+.\de]*"  # of a reward among several, as it is written
LAMBDA = {"tiny": 0.4, "hpsv2": 0.55, "pickscore": 0.4, "hpsv3": 13.5}  # the paper's, but for ours
OF_METHODS = frozenset(("k", "j", "d_j", "d_0", "w"))  # what methods log
# All that is logged under names of its own, which a user's function may not have.
LOGGED = OF_METHODS | {"reward", "loss", "satisfied", "step", "seconds", "grad_norm", "prompt", "prompts", "by_prompt",
                       "memory", "tflops", "mfu", "forwards", "backwards", "tag", "single", "two", "count", "color",
                       "position", "attr", "anchor"}  # fmt: skip


@dataclass(frozen=True)
class Reward:
    """A scorer in a run: its name, its weight among several, and where it is satisfied."""

    score: Score  # images (b, 3, h, w) in [0, 1], prompts -> (b,)
    scale: float = 1.0  # times the score is what is reported
    model: nn.Module | None = None  # the frozen network, if that is what it is
    task_of: Callable[[str], str] | None = None  # a prompt's task, where scores are also told by task
    name: str = "reward"
    weight: float = 1.0  # in a sum of several, of the loss's scores
    lam: float | None = None  # lambda of Eq. 11, in units of the score; None: no hinge


# --------------------------------------------------------------------------------- from the command line


def parse_reward(spec: str) -> tuple[str, str, float]:
    """Name, path and weight of a reward; of a user's file the name is empty. ValueError if there can be no such."""
    what, weight = re.fullmatch(rf"(.*?)(?::({WEIGHT}))?", spec, re.DOTALL).groups()
    try:
        weight = float(weight or 1)
    except ValueError:
        raise ValueError(f"the weight of reward {spec!r} is no number") from None
    if is_user_code(what):
        if not Path(file := what.rpartition(":")[0]).is_file():
            raise ValueError(f"no file {file!r} for the reward {spec!r}")
        return "", what, weight
    name, _, path = what.partition("=")
    if not path and name in WEIGHTS:
        path = str(WEIGHTS[name])
        if not Path(path).exists():
            raise ValueError(f"no weights of the reward {name!r} at {path}: put them there, or say {name}=PATH")
    if name not in (*WEIGHTS, "clip", *RULES) or (name in RULES) == bool(path):
        known = ", ".join([*WEIGHTS, "clip=PATH", *RULES])
        raise ValueError(f"no reward {spec!r}: it is one of {known}, NAME=PATH or FILE.py:FUNCTION")
    hub_id = name in ("clip", "pickscore") and re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)
    if path and not hub_id and not Path(path).exists():
        raise ValueError(f"no reward file at {path!r}: download it, or give its path as NAME=PATH")
    return name, path if hub_id else checked(name, path), weight


def checked(name: str, path: str) -> str:
    """The path of a reward's weights. ValueError if one can see, without reading them, that they are not whole."""
    if not path:
        return path
    file = file_in(path, FILES[name]) if name in FILES else None
    folder = file.parent if file else Path(path).parent if Path(path).is_file() else Path(path)
    for tensors in [file] if file else folder.glob("*.safetensors"):
        check_tensors(tensors)
    for names in BESIDE.get(name if file else "clip", ()):
        if not any(list(folder.glob(other)) for other in names.split("|")):
            needed = names.replace("|", " or ")
            raise ValueError(f"{name}={path} needs {needed} in {folder}: see the README's table of rewards")
    return str(file or folder)


def open_reward(
    spec: str,
    device: Device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    recompute: bool = False,
    size: tuple[int, int] = (64, 64),
    prompts: Sequence[str] = ("a photo of a circle",),
) -> Reward:
    """The reward that `spec` names: NAME[=PATH][:WEIGHT] or FILE.py:FUNCTION[:WEIGHT].

    `tokenizer` is FLUX's CLIP tokenizer, which hpsv2 shares; `recompute` trades time for memory in the backward;
    `size` is height and width of the images that a user's function is tried on, with the first of `prompts`.
    Raises ValueError naming the spec and what is wrong with it.
    """
    name, path, weight = parse_reward(spec)
    if not name:
        score = load_function(path, "reward")
        try_score(score, path, device, size, prompts)
        return Reward(score, name=reward_name(spec), weight=weight)
    scorer = open_scorer(name, path, device, tokenizer, recompute)
    return Reward(*scorer, name=name, weight=weight, lam=LAMBDA.get(name))


def open_scorer(
    name: str, path: str, device: Device, tokenizer: PreTrainedTokenizerBase | None, recompute: bool
) -> Scorer:
    """The scorer of a name; each file of them is read only by who asks for it."""
    if name == "judge":
        from scorers.judge import judge

        return judge()
    if name == "lattice":
        from scorers.lattice import lattice

        return lattice()
    if name == "hpsv2":
        from scorers.hpsv2 import hpsv2

        return hpsv2(path, tokenizer, device, recompute)
    if name == "hpsv3":
        from scorers.hpsv3 import hpsv3

        return hpsv3(path, device, recompute)
    if name == "imagereward":
        from scorers.imagereward import imagereward

        return imagereward(path, device, recompute)
    from scorers.clip import clip

    return clip(path, device, recompute)


def reward_name(spec: str) -> str:
    """The name that a spec begins with, or the function of a user's."""
    what = re.sub(f":{WEIGHT}$", "", spec)
    return what.rpartition(":")[2] if is_user_code(what) else what.partition("=")[0]


def check_rewards(
    specs: Sequence[str], prompts: Sequence[str] = (), size: tuple[int, int] | None = None, source: str = "the prompts"
) -> None:
    """Raise ValueError if one cannot be, two share a name, by which they are logged, or one has a log's own.

    The prompts, which come from `source`, and the size of the images: only the judge minds.
    """
    names = [reward_name(spec) for spec in specs]
    for spec, name in zip(specs, names, strict=True):
        parse_reward(spec)
        if name in LOGGED or (is_user_code(spec) and name == "judge"):
            raise ValueError(f"reward {spec!r}: call the function something else than {name}, which is logged")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"rewards are logged by name, and two are named {twice.pop()!r}")
    if "judge" in names and size is not None:
        from scorers.judge import check

        check(prompts, size, source)


@torch.no_grad()
def score_all(reward: Reward, images: Tensor, prompts: Sequence[str], device: Device, batch: int = 64) -> Tensor:
    """Reported scores of images that lie on the CPU, without a gradient: (n, 3, h, w) to (n,)."""
    parts = zip(images.split(batch), (prompts[i : i + batch] for i in range(0, len(prompts), batch)))
    return reward.scale * torch.cat([reward.score(part.to(device), list(text)).cpu() for part, text in parts])


def reported_means(rewards: list[Reward], means: dict[str, float]) -> dict[str, float]:
    """What is logged of the trained rewards: each by name as it is reported, and `reward`.

    That is the only one; or, of several, the weighted sum of their scores in the loss, which is what training raises.
    """
    several = len(rewards) > 1
    return {"reward": sum(r.weight * means[r.name] / (r.scale if several else 1) for r in rewards), **means}


def mean_scores(reward: Reward, scores: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """The mean of reported scores (n,), by name; where prompts have tasks, each task's, and the mean over the tasks."""
    if reward.task_of is None:
        return {reward.name: scores.mean().item()}
    tasks = [reward.task_of(prompt) for prompt in prompts]
    scores = scores.cpu().double()  # not all devices have float64
    by_task = {t: scores[torch.tensor([u == t for u in tasks])].mean().item() for t in dict.fromkeys(tasks)}
    overall = sum(by_task.values()) / len(by_task)
    return by_task | {reward.name: round(overall, 9)}  # equal where the same number of images is right


@torch.no_grad()
def try_score(score: Score, spec: str, device: Device, size: tuple[int, int], prompts: Sequence[str]) -> None:
    """Try a user's function (images, prompts) -> (b,) on random images. Raises ValueError saying what is wrong."""
    for n in (2, 1):
        images = torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            result = score(images, list(islice(cycle(prompts), n)))
        except Exception as error:
            raise ValueError(f"reward {spec} fails on images {tuple(images.shape)}: {describe_error(error)}") from error
        if not isinstance(result, Tensor) or result.shape != (n,):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"reward {spec} must return one score per image, ({n},) for {n}, and returned {got}")
