"""The function that --method names: it is looked up, gets its keywords from flags, and is tried before any loading."""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

import leaps
from baselines import direct, policy
from baselines.direct import Log
from config import Config, Experiment, Method
from infra.flags import flag_of
from infra.user_code import describe_error, file_hashes, is_user_code, load_function
from leaps import Samples
from samples import trial_samples

# The flags of the group Method that choose a method. Its other flags are keywords of methods.
NO_KEYWORDS = ("method", "option")


class Trial(NamedTuple):
    """What a method asked for and returned when it was tried."""

    needs_gradient: bool  # the gradient of the rewards; a policy gradient needs their scores alone
    needs_base: bool  # the velocity of the untuned network
    logged_names: set[str]


# ---------------------------------------------------------------------------------- finding a method


def find_method(name: str) -> Callable[..., Log]:
    """The function that --method names: of leaps.py or baselines/, or FILE.py:FUNCTION. Raises ValueError."""
    if is_user_code(name):
        return load_function(name, "method")
    # No registry: every function of these files that has the signature of a method is a method.
    for file in (leaps, direct, policy):
        function = getattr(file, name, None)
        if inspect.isfunction(function) and is_method(inspect.signature(function)):
            return function
    raise ValueError(f"--method {name}: it is a function of leaps.py or baselines/, or FILE.py:FUNCTION of yours")


def is_method(signature: inspect.Signature) -> bool:
    """Whether a signature is that of a method: (s: Samples, *, keyword=default, ...) -> dict[str, Tensor]."""
    if not signature.parameters or signature.return_annotation != Log:
        return False
    samples, *keywords = signature.parameters.values()
    return samples.annotation is Samples and all(p.kind is p.KEYWORD_ONLY for p in keywords)


def method_keywords(method: Callable) -> dict[str, Any]:
    """The keywords of a method and their defaults."""
    keywords = list(inspect.signature(method).parameters.values())[1:]  # the first parameter is the samples
    return {keyword.name: keyword.default for keyword in keywords}


# ---------------------------------------------------------------------------------- flags and keywords


def keyword_flags() -> dict[str, Any]:
    """The flags that are keywords of methods, with the value that leaves a keyword at the method's own default."""
    return {field.name: field.default for field in fields(Method) if field.name not in NO_KEYWORDS}


def method_options(cfg: Config, preset: Config) -> dict[str, Any]:
    """The keywords of the method that flags and --option set.

    A flag that the method does not have is refused, unless the preset has it. Raises ValueError naming the flag.
    """
    keywords = method_keywords(find_method(cfg.method))
    options = {}
    for name, unset in keyword_flags().items():
        value = getattr(cfg, name)
        if value == unset:
            continue
        if name in keywords:
            options[name] = value
        elif value != getattr(preset, name):  # the user set it; a preset may hold keywords of its usual method
            raise ValueError(f"{flag_of(name)} means nothing with --method {cfg.method}, which has no such keyword")
    for text in cfg.option:
        name, value = parse_option(text, cfg.method, keywords)
        options[name] = value
    return options


def parse_option(text: str, method: str, keywords: dict[str, Any]) -> tuple[str, Any]:
    """Name and value of an --option NAME=VALUE. Raises ValueError if the method has no such keyword of its own."""
    # A keyword of the user's method may have the name of a flag, and mean something else.
    names = list(keywords) if is_user_code(method) else [n for n in keywords if n not in keyword_flags()]
    name, equals, value = text.partition("=")
    if not equals or name not in names:
        known_names = ", ".join(names) or "none"
        raise ValueError(f"--option {text}: NAME=VALUE, of the keywords of {method} that are no flags: {known_names}")
    if isinstance(keywords[name], str):
        return name, value
    try:
        number = json.loads(value.lower())  # or true, false, null
        is_finite = math.isfinite(number or 0)
    # Also for a list, a number beyond floats, and brackets without end.
    except (ValueError, TypeError, OverflowError, RecursionError):
        is_finite = False
    if not is_finite:
        raise ValueError(f"--option {text:.80}: {value!r:.40} is no finite number, true, false or null")
    return name, number


def recorded_flags(cfg: Config) -> dict[str, Any]:
    """The flags as config.json has them: keywords of the method with the values it runs with, all others unset."""
    keywords = method_keywords(find_method(cfg.method))
    flags = asdict(cfg)
    for name, unset in keyword_flags().items():
        if name not in keywords:
            flags[name] = unset
        elif flags[name] == unset:
            flags[name] = keywords[name]
    for text in cfg.option:  # a keyword of the user's method may have the name of a flag
        name, value = parse_option(text, cfg.method, keywords)
        if name in keyword_flags():
            flags[name] = value
    return json.loads(json.dumps(flags, default=str))  # tuples become lists, as they are read back


def resume_flags(cfg: Config) -> list[str]:
    """The flags that --resume must find unchanged: the experiment's, and the method with its keywords."""
    # Prompts are compared by their content, because their files may have moved.
    names = [field.name for field in fields(Experiment) if field.name not in ("prompts", "eval_prompts")]
    names += NO_KEYWORDS
    names += [name for name in method_keywords(find_method(cfg.method)) if name in keyword_flags()]
    if cfg.decay:
        names.append("updates")  # the learning rate falls over all of them
    return names


def user_code_hashes(cfg: Config) -> dict[str, str]:
    """The user's files that a run takes functions from, each with a hash of its content."""
    return file_hashes([cfg.method, *cfg.reward, *cfg.watch])


# ----------------------------------------------------------------------------------------- the trial


def try_method(method: Callable, sigmas: Tensor, group: int) -> Trial:
    """Run a method once on random samples, without a network. Raises ValueError if it cannot be used in a run."""
    b = 2 * group  # two groups, so that a mistake in comparing samples across groups has a chance to show
    samples, calls = trial_samples(sigmas, b, torch.Generator())
    try:
        log = method(samples)
    except ValueError as error:  # the method refuses its keywords
        raise ValueError(f"--method: {error}") from error
    except Exception as error:
        raise ValueError(f"--method fails on random samples: {describe_error(error)}") from error
    if not calls["vjp"] or not (calls["reward"] or calls["score"]):
        raise ValueError(f"--method must call vjp, and reward or score, in a rollout of {len(sigmas) - 1} steps")
    is_log = isinstance(log, dict) and all(isinstance(name, str) for name in log)
    if not is_log or not all(isinstance(value, Tensor) and value.shape in ((), (b,)) for value in log.values()):
        raise ValueError("--method must return a dict of tensors to log, by name, (b,) or () each")
    return Trial(calls["reward"] > 0, calls["base"] > 0, set(log))
