"""How the recipe draws prompts: at random, task by task, and with one detail wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from shapes.world import COLORS, NUMBER, NUMBERS, PROMPTS, RELATIONS, TASKS, USUAL, Prompt, by_task

CAPTIONS = [prompt.text for prompt in PROMPTS]
OF_TASK = by_task(PROMPTS)
# Weights of the tasks. A model that learns what captions mean sees more of what is harder to learn ...
TEACH = {"single": 0.5, "two": 1, "count": 1, "color": 0.7, "position": 1.5, "attr": 2}
# ... and otherwise sees all tasks alike, but for `single`: it has the fewest prompts, and must stay clean.
EVEN = dict.fromkeys(TASKS, 1) | {"single": 1.5}


def random_prompts(n: int, rng: Generator, weights: dict[str, float] = TEACH) -> list[Prompt]:
    """n prompts: a task by its weight, then any of the task's prompts."""
    shares = np.array(list(weights.values()))
    # A task first, or `attr`, which has 144 of the 236 prompts, would crowd out the others.
    tasks = rng.choice(list(weights), size=n, p=shares / shares.sum())
    return [choice(OF_TASK[task], rng) for task in tasks]


def choice(options: Iterable, rng: Generator, excluded: Sequence = ()) -> object:
    """Any of the options but the excluded ones."""
    options = [option for option in options if option not in excluded]
    return options[rng.integers(len(options))]


def numbers_of(prompts: Sequence[Prompt]) -> Tensor:
    return torch.tensor([NUMBER[prompt] for prompt in prompts])


def distort(prompt: Prompt, rng: Generator) -> Prompt:
    """The prompt with one detail wrong, as a careless captioner would have it.

    count     another number                        position  another relation
    color     the usual color, or a random one      attr      the two colors swapped, or one of them replaced
    two       one of the two objects alone          single    unchanged
    """
    match prompt.task:
        case "count":
            return replace(prompt, count=choice(NUMBERS, rng, [prompt.count]))
        case "two":  # the task changes, as a scene of one object is no scene of two
            return Prompt("single", (choice(prompt.shapes, rng),))
        case "position":
            return replace(prompt, relation=choice(RELATIONS, rng, [prompt.relation]))
        case "color" | "attr":
            i = 0
            if prompt.task == "attr" and rng.random() >= 0.5:
                i = 1
            color = USUAL[prompt.shapes[i]]
            if color in prompt.colors:
                color = choice(COLORS, rng, prompt.colors)
            colors = list(prompt.colors)
            colors[i] = color
            if prompt.task == "attr" and rng.random() < 0.5:  # what a base model confuses most
                colors = prompt.colors[::-1]
            return replace(prompt, colors=tuple(colors))
    return prompt  # single: there is no detail to get wrong
