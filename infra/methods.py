"""The function that --method names, and its keywords: found, set by flags and options, and tried before a run."""

import inspect
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

import baselines
import leaps
from baselines import Log
from config import Config, Experiment, Method
from infra.user_code import describe_error, file_hashes, is_user_code, load_function
from leaps import Samples

UNSET = {f.name: f.default for f in fields(Method) if f.name not in ("method", "option")}  # then a method's own counts


def find_method(name: str) -> Callable[..., dict[str, Tensor]]:
    """The function that --method names: of leaps.py or baselines.py, or FILE.py:FUNCTION. Raises ValueError."""
    if is_user_code(name):
        return load_function(name, "method")
    function = {**vars(baselines), **vars(leaps)}.get(name)
    if not inspect.isfunction(function) or not is_method(inspect.signature(function)):
        raise ValueError(f"--method {name}: it is a function of leaps.py or baselines.py, or FILE.py:FUNCTION of yours")
    return function


def is_method(signature: inspect.Signature) -> bool:
    """Whether a function is one: (s: Samples, *, keyword=default, ...) -> dict[str, Tensor]."""
    first, *others = signature.parameters.values() or [None]
    keyword_only = all(p.kind is p.KEYWORD_ONLY for p in others)
    return first is not None and first.annotation is Samples and keyword_only and signature.return_annotation == Log


def method_keywords(method: Callable) -> dict[str, Any]:
    """The options of a method and their defaults."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {p.name: p.default for p in parameters}


def method_options(cfg: Config, preset: Config) -> dict[str, Any]:
    """What the flags say of the method's keywords. Raises ValueError for a flag that it does not have."""
    known = method_keywords(find_method(cfg.method))
    for name in UNSET:
        if name not in known and getattr(cfg, name) not in (UNSET[name], getattr(preset, name)):
            raise ValueError(
                f"--{name.replace('_', '-')} means nothing with --method {cfg.method}, which has no such keyword"
            )
    given = {name: getattr(cfg, name) for name, unset in UNSET.items() if getattr(cfg, name) != unset}
    options = {name: value for name, value in given.items() if name in known}
    for text in cfg.option:
        name, equals, value = text.partition("=")
        # A keyword of yours may be called as a flag is, and mean something else.
        own = [name for name in known if name not in UNSET or is_user_code(cfg.method)]
        if not equals or name not in own:
            raise ValueError(
                f"--option {text}: NAME=VALUE, of the keywords of {cfg.method} that are no flags: "
                f"{', '.join(own) or 'none'}"
            )
        try:
            options[name] = value if isinstance(known[name], str) else json.loads(value.lower())
        except ValueError:
            raise ValueError(f"--option {text}: {value!r} is no number, true, false or null") from None
    return options


def recorded_flags(cfg: Config) -> dict[str, Any]:
    """The flags as config.json has them: of keywords only the method's, with the values that count."""
    known = method_keywords(find_method(cfg.method))
    left = [name for name, unset in UNSET.items() if name not in known or getattr(cfg, name) == unset]
    return json.loads(json.dumps(asdict(cfg) | {name: known.get(name, UNSET[name]) for name in left}, default=str))


def user_code_hashes(cfg: Config) -> dict[str, str]:
    """The user's files that a run is made with, each with a hash."""
    return file_hashes([cfg.method, *cfg.reward, *cfg.watch])


def resume_flags(cfg: Config) -> list[str]:
    """What --resume must find unchanged: the experiment, and the method with its keywords."""
    names = [f.name for f in fields(Experiment) if f.name not in ("prompts", "eval_prompts")]  # see check_prompts
    names += ["method", "option", *(name for name in method_keywords(find_method(cfg.method)) if name in UNSET)]
    return names + ["updates"] * cfg.decay  # the learning rate falls over all of them


def on_zeros(
    method: Callable, levels: Tensor, b: int, generator: torch.Generator, update: int = 0
) -> tuple[Any, Counter[str]]:
    """Run a method on b samples of zeros, without a network: what it returns, and how often it called what.

    "nested" counts the vjp's that were asked for (dv/dx)^T u too.
    """
    calls, zeros = Counter(), torch.zeros(b, 1, 1)

    def note(name: str, value: Tensor) -> Tensor:
        calls[name] += 1
        return value

    def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
        calls["nested"] += wrt_x
        into_x = note("vjp", torch.zeros_like(x))
        return into_x if wrt_x else None

    samples = Samples(
        noise=lambda i: zeros,
        sigmas=levels,
        generator=generator,
        velocity=lambda x, sigma: note("velocity", torch.zeros_like(x)),
        vjp=vjp,
        reward=lambda x0, weight=None: note("reward", torch.zeros_like(x0)),
        score=lambda x0: note("score", zeros[:, 0, 0]),
        total=b,
        update=update,
    )
    return method(samples), calls


def try_method(method: Callable, levels: Tensor, group: int) -> bool:
    """Run a method once on zeros: whether it asks for the rewards' gradient. Raises ValueError if it cannot run."""
    b = 2 * group
    try:
        log, asked = on_zeros(method, levels, b, torch.Generator())
    except ValueError as error:
        raise ValueError(f"--method: {error}") from error
    except Exception as error:
        raise ValueError(f"--method fails on zeros: {describe_error(error)}") from error
    if "vjp" not in asked:
        raise ValueError(f"--method makes no gradient: it never calls vjp in a rollout of {len(levels) - 1} steps")
    if not asked.keys() & {"reward", "score"}:
        raise ValueError("--method asks for no reward: it never calls reward or score")
    if not isinstance(log, dict) or not all(isinstance(v, Tensor) and v.shape in ((), (b,)) for v in log.values()):
        raise ValueError("--method must return a dict of tensors to log, a value a sample (b,) or one for all ()")
    return "reward" in asked
