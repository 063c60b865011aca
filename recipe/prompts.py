"""How the recipe draws prompts: at random, task by task, and with one detail wrong."""

from collections.abc import Iterable

import numpy as np
from numpy.random import Generator

from shapes.world import COLORS, NUMBERS, PROMPTS, RELATIONS, TASKS, USUAL, Prompt, by_task

OF_TASK = by_task(PROMPTS)
# Weights of the tasks. A model that learns what captions mean sees more of what is harder to learn ...
TEACH = {"single": 0.5, "two": 1, "count": 1, "color": 0.7, "position": 1.5, "attr": 2}
# ... and otherwise sees all tasks alike, but for `single`: it has the fewest prompts, and must stay clean.
EVEN = dict.fromkeys(TASKS, 1) | {"single": 1.5}


def random_prompts(n: int, rng: Generator, weights: dict[str, float] = EVEN) -> list[Prompt]:
    """n prompts: a task by its weight, then any of the task's prompts."""
    shares = np.array(list(weights.values()))
    # A task first, or `attr`, which has 144 of the 236 prompts, would crowd out the others.
    tasks = rng.choice(list(weights), size=n, p=shares / shares.sum())
    prompts = []
    for task in tasks:
        candidates = OF_TASK[task]
        prompts.append(candidates[rng.integers(len(candidates))])
    return prompts


def distort(prompt: Prompt, rng: Generator) -> Prompt:
    """The prompt with one detail wrong, as a careless captioner would have it.

    count     another number                        position  another relation
    color     the usual color, or a random one      attr      the two colors swapped, or one of them replaced
    two       one of the two objects alone          single    unchanged
    """

    def draw_except(options: Iterable, *excluded: str | int) -> str:
        options = [option for option in options if option not in excluded]
        return str(rng.choice(options))

    def replace_color(i: int) -> tuple[str, ...]:
        """The colors with the usual one for object i, or a random one where the caption has the usual one."""
        color = USUAL[prompt.shapes[i]]
        if color in prompt.colors:
            color = draw_except(COLORS, *prompt.colors)
        colors = list(prompt.colors)
        colors[i] = color
        return tuple(colors)

    match prompt.task:
        case "count":
            count = draw_except(NUMBERS, prompt.count)
            return Prompt("count", prompt.shapes, count=int(count))  # draw_except returns a string
        case "color":
            return Prompt("color", prompt.shapes, replace_color(0))
        case "two":  # the task changes, as a scene of one object is no scene of two
            shape = rng.choice(prompt.shapes)
            return Prompt("single", (str(shape),))
        case "position":
            relation = draw_except(RELATIONS, prompt.relation)
            return Prompt("position", prompt.shapes, relation=relation)
        case "attr":
            colors = replace_color(0 if rng.random() < 0.5 else 1)
            if rng.random() < 0.5:  # swapped colors are what a base model confuses most
                colors = prompt.colors[::-1]
            return Prompt("attr", prompt.shapes, colors)
    return prompt  # single: there is no detail to get wrong
