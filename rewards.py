"""Rewards: frozen functions of images and prompts whose gradient in the images is worth following.

    score = reward.score(images, prompts)     # images (b, 3, h, w) in [0, 1], any size  ->  (b,)

A loss sees `score`; people report `reward.scale * score`.  On the command line a reward is NAME, NAME=PATH or
FILE.py:FUNCTION:

    tiny         the CLIP of the shapes world, shipped                   pickscore    a folder, or its hub id
    clip         any CLIPModel: a folder or a hub id                     hpsv2        HPS_v2.1_compressed.pt
    hpsv3        a folder, see scorers/hpsv3.py                          imagereward  see scorers/imagereward.py
    judge        the rules of the shapes world; no gradient: to watch, to evaluate, for policy gradients
    lattice      about 0 without a pattern of the tokens' period, lower the stronger the pattern; to watch, to evaluate

Without a path, weights are looked for in WEIGHTS.  A weight may follow: `pickscore:0.5 hpsv2:0.5`.  SRPO's relative
reward (arXiv 2509.06942) is NAME~GOOD~BAD, as in `hpsv2~Real~Painting`: how much better an image fits its prompt
with the good word in front than with the bad one.  A change that raises both scores alike gains nothing.

Legend: b or n images, h and w their height and width.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from infra.files import content_hash
from infra.prompts import print_on_first_rank
from infra.user_code import is_user_code, load_function
from scorers import clip, hpsv2, hpsv3, imagereward, judge, lattice
from scorers.common import Device, Score, Scorer

WEIGHTS = {  # where a name without a path looks, from the current folder
    "tiny": str(Path(__file__).parent / "shapes" / "tiny-reward"),
    "pickscore": "weights/PickScore_v1",
    "hpsv2": "weights/HPS_v2.1_compressed.pt",
    "hpsv3": "weights/HPSv3",
    "imagereward": "weights/ImageReward",
}
COSINES = ("tiny", "clip", "pickscore", "hpsv2")
RULES = ("judge", "lattice")  # have no weights
LAMBDA = {"tiny": 0.4, "hpsv2": 0.55, "pickscore": 0.4, "hpsv3": 13.5}  # the paper's, but for tiny's


@dataclass(frozen=True)
class Reward:
    """A scorer in a run: its name, its weight in the loss, and the score that satisfies it."""

    score: Score  # images (b, 3, h, w) in [0, 1], prompts -> (b,)
    scale: float = 1.0  # people report scale * score
    model: nn.Module | None = None  # the frozen network; rules and a user's function have none
    task_of: Callable[[str], str] | None = None  # a prompt's task, where means are reported for each task
    reads: tuple[PreTrainedTokenizerBase, int] | None = None  # the tokenizer of prompts, and how many tokens are read
    name: str = "reward"  # in logs
    weight: float = 1.0  # of this reward's loss in the sum of several
    lam: float | None = None  # lambda of Eq. 11, in units of the score; None: no hinge


# ----------------------------------------------------------------------------------------- open a reward


def open_reward(
    spec: str,
    device: Device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    recompute: bool = False,
    size: tuple[int, int] = (64, 64),
    prompts: Sequence[str] = ("a photo of a circle",),
) -> Reward:
    """The reward that `spec` names: NAME[=PATH][:WEIGHT] or FILE.py:FUNCTION[:WEIGHT].

    `tokenizer` is FLUX's CLIP tokenizer, which hpsv2 shares; `recompute` trades time for memory in the backward.
    A user's function is tried on images of `size`, height and width in pixels, with the first of `prompts`.
    Raises ValueError naming the spec and what is wrong with it.
    """
    name, path, weight = parse_reward(spec)
    if is_user_code(path):
        score = load_function(path, "reward")
        # An error of the user's code should show now, not after the weights of FLUX are read.
        try_score(score, path, device, size, prompts)
        reward = Reward(score, name=reward_name(spec), weight=weight)
    else:
        scorer = open_scorer(name, path, device, tokenizer, recompute)
        # Scorers without a published lambda have no hinge: all of their samples have a gradient.
        reward = Reward(*scorer, name=name, weight=weight, lam=LAMBDA.get(name))
    _, words = split_words(split_weight(spec)[0])
    if not words:
        return reward
    # A lambda is of scores, not of their differences.
    return replace(reward, score=relative_score(reward.score, *words), name=reward_name(spec), lam=None)


def parse_reward(spec: str) -> tuple[str, str, float]:
    """Name, path and weight of a reward.  For a user's function the name is empty, and the path is FILE.py:FUNCTION.

    Raises ValueError if the name is unknown or a file is missing; no weights are read.
    """
    scorer_spec, weight = split_weight(spec)
    if not math.isfinite(weight):
        raise ValueError(f"the weight of the reward {spec!r} must be finite")
    scorer_spec, words = split_words(scorer_spec)
    if is_user_code(scorer_spec):
        file = scorer_spec.rpartition(":")[0]
        if not Path(file).is_file():
            raise ValueError(f"no file {file!r} for the reward {spec!r}")
        return "", scorer_spec, weight
    name, _, path = scorer_spec.partition("=")
    if name in RULES and words:
        raise ValueError(f"no reward {spec!r}: {name} is a rule, which a word before the prompt does not change")
    if name in RULES and not path:
        return name, "", weight
    if not path and name in WEIGHTS:
        path = WEIGHTS[name]
        # Checked here, as a path such as weights/PickScore_v1 would pass for a hub id below.
        if not Path(path).exists():
            raise ValueError(f"no weights of the reward {name!r} at {path}: put them there, or say {name}=PATH")
    if not path or name not in (*WEIGHTS, "clip"):
        names = ", ".join([*WEIGHTS, "clip=PATH", *RULES])
        raise ValueError(
            f"no reward {spec!r}: it is one of {names}, NAME=PATH or FILE.py:FUNCTION, and a weight may follow, as in "
            "pickscore:0.5"
        )
    # Files are checked by name only: whether a tensor is missing shows when they are read.
    scorer_file = {"hpsv2": hpsv2, "hpsv3": hpsv3, "imagereward": imagereward}.get(name, clip)
    scorer_file.check_files(path)
    return name, path, weight


def reward_hash(spec: str) -> str:
    """A hash of the weights that a reward reads; rules and user code have none."""
    _, path, _ = parse_reward(spec)
    if not path:
        return ""
    files = [*Path(path).glob("*.safetensors"), *Path(path).glob("*.pt")] or [Path(path)]
    return content_hash(filter(Path.is_file, sorted(files)))


def split_weight(spec: str) -> tuple[str, float]:
    """`pickscore:0.5` as `pickscore` and 0.5; without a weight 1.

    What follows the last colon is a weight only if it is a number: paths and FILE.py:FUNCTION have colons, too.
    """
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
    match = re.fullmatch(rf"(.*?)(?::({number}))?", spec, re.DOTALL)
    scorer_spec, weight = match.groups(default="1")
    return scorer_spec, float(weight)


def split_words(scorer_spec: str) -> tuple[str, list[str]]:
    """`hpsv2~Real~Painting` as `hpsv2` and the good and the bad word; without words the spec and []."""
    scorer, *words = scorer_spec.rsplit("~", 2)  # from the right: a path may begin with ~
    if len(words) < 2:
        return scorer_spec, []
    return scorer, words


def reward_name(spec: str) -> str:
    """The name that a reward is logged by: the name in its spec, or of the user's function."""
    scorer_spec, words = split_words(split_weight(spec)[0])
    end = "_relative" if words else ""
    if is_user_code(scorer_spec):
        return scorer_spec.rpartition(":")[2] + end
    return scorer_spec.partition("=")[0] + end


@torch.no_grad()
def try_score(score: Score, spec: str, device: Device, size: tuple[int, int], prompts: Sequence[str]) -> None:
    """Try a user's function (images, prompts) -> (b,) on random images; warn if a score depends on anything else.

    Raises ValueError saying what is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator).to(device)
    scores = []
    for b in (2, 2, 1):  # the same pair twice; then one image, of which a squeeze() in the function drops an axis
        texts = [prompts[i % len(prompts)] for i in range(b)]
        result = score(images[:b], texts)
        if not isinstance(result, Tensor) or result.shape != (b,) or not result.is_floating_point():
            kind = f"{result.dtype} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result)
            raise ValueError(f"reward {spec} must return {b} scores for {b} images, floats of shape ({b},), not {kind}")
        scores.append(result[0].item())
    first, second, single = scores
    if not math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-6):
        print_on_first_rank(f"note: reward {spec} draws random numbers: the same image has scored {first} and {second}")
    elif not math.isclose(first, single, rel_tol=1e-2, abs_tol=1e-4):
        print_on_first_rank(
            f"warning: reward {spec} gives an image {first} beside another one and {single} without: its scores will "
            "depend on --micro-batch. Is a network of it not in eval() mode?"
        )


def open_scorer(
    name: str, path: str, device: Device, tokenizer: PreTrainedTokenizerBase | None, recompute: bool
) -> Scorer:
    """The scorer of a name and a path, with its network on the device.  Raises ValueError if the files do not fit."""
    if name == "judge":
        return judge.judge_scorer()
    if name == "lattice":
        return lattice.lattice()
    if name == "hpsv2":
        return hpsv2.hpsv2(path, tokenizer, device, recompute)
    if name == "hpsv3":
        return hpsv3.hpsv3(path, device, recompute)
    if name == "imagereward":
        return imagereward.imagereward(path, device, recompute)
    return clip.clip(path, device, recompute)  # tiny and pickscore, too


def relative_score(score: Score, good: str, bad: str) -> Score:
    """SRPO's relative reward, as in the authors' code: the score for "GOOD. prompt" less that for "BAD. prompt"."""

    def difference(images: Tensor, prompts: Sequence[str]) -> Tensor:
        good_prompts = [f"{good}. {prompt}" for prompt in prompts]
        bad_prompts = [f"{bad}. {prompt}" for prompt in prompts]
        return score(images, good_prompts) - score(images, bad_prompts)

    return difference


def check_rewards(
    specs: Sequence[str], prompts: Sequence[str] = (), size: tuple[int, int] | None = None, source: str = "the prompts"
) -> None:
    """Raise ValueError if a reward cannot be opened, or two share a name. No weights are read.

    The judge reads only some prompts, which come from `source`, and only one `size` of images.
    """
    names = []
    for spec in specs:
        parse_reward(spec)
        name = reward_name(spec)
        if name in names:
            raise ValueError(f"rewards are logged by name, and two are named {name!r}")
        names.append(name)
    if "judge" in names and size is not None:
        judge.check_judge(prompts, size, source)


# ----------------------------------------------------------------------------------------- scores and means


@torch.no_grad()
def score_all(reward: Reward, images: Tensor, prompts: Sequence[str], device: Device, batch: int = 64) -> Tensor:
    """Reported scores, without a gradient, of images that lie on the CPU.  (n, 3, h, w) -> (n,)"""
    scores = []
    # One batch at a time is on the device: a benchmark has thousands of images.
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        scores.append(reward.score(images[rows].to(device), list(prompts[rows])).cpu())
    return reward.scale * torch.cat(scores)


def mean_scores(reward: Reward, scores: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """The mean of reported scores (n,), by name; where prompts have tasks, each task's mean, and the mean of these."""
    if reward.task_of is None:
        return {reward.name: scores.mean().item()}
    tasks = [reward.task_of(prompt) for prompt in prompts]
    scores = scores.cpu().double()  # not all devices have float64
    means = {}
    for task in dict.fromkeys(tasks):  # each task once, in the order of the prompts
        is_task = torch.tensor([name == task for name in tasks])
        means[task] = scores[is_task].mean().item()
    overall = sum(means.values()) / len(means)
    # Rounded, so that two evaluations with equally many right images tie, whatever the order of the sum.
    return means | {reward.name: round(overall, 9)}


def reported_means(rewards: list[Reward], means: dict[str, float]) -> dict[str, float]:
    """What is logged of the trained rewards: each by its name as it is reported, and `reward`.

    With one reward, `reward` is its reported mean; with several, the sum of weight x score, which the loss raises.
    """
    if len(rewards) == 1:
        return {"reward": means[rewards[0].name], **means}
    # The loss sums unscaled scores: reports differ a hundredfold in scale.
    total = sum(r.weight * means[r.name] / r.scale for r in rewards)
    return {"reward": total, **means}
