"""Methods as a user meets them: a name or a file of one's own, flags that belong to it, and what is refused at once."""

import inspect
import json
import re
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import leaps
import train
from baselines import direct, policy
from baselines.direct import Log
from config import PRESETS, Config, Experiment, Machine, Method, Run, parse
from infra.checks import check_folder, check_log_names, check_prompts, tell_changes
from infra.distributed import join, stop_signals
from infra.meter import Meter
from infra.methods import (
    find_method,
    is_method,
    method_keywords,
    method_options,
    recorded_flags,
    resume_flags,
    try_method,
)
from infra.prompts import prompts_hash
from infra.user_code import file_hashes
from rewards import Reward
from tests.test_baselines import FROM_BASE, FROM_SCORES, METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LEVELS = torch.linspace(1, 0, 6)


def blocks(language: str, word: str) -> str:
    """The one code block of the README in a language that has a word in it."""
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in b]
    return block


def test_the_methods_are_those_that_the_help_names():
    found = {
        name
        for m in (leaps, direct, policy)
        for name, f in vars(m).items()
        if inspect.isfunction(f) and is_method(inspect.signature(f))
    }
    assert found == set(METHODS)
    assert all(name in inspect.getsource(Method) for name in METHODS)


def test_every_keyword_of_a_method_is_a_flag_or_an_option_whose_help_tells_its_default():
    flags = {f.name for f in fields(Method)}
    text = " ".join(inspect.getsource(Method).split())
    for name in METHODS:
        for keyword, default in method_keywords(find_method(name)).items():
            flag = keyword if keyword in flags else "option"
            told = text.split(f" {flag}: ")[1].split('"""')[1]
            assert name in told, (name, keyword)
            assert flag == keyword or keyword in told, (name, keyword)
            if default not in (None, False):
                assert f"{default:g}" in told if isinstance(default, float | int) else default in told, (name, keyword)


def test_groups_hold_every_flag_once_and_defaults_are_the_methods_own():
    names = [f.name for group in (Experiment, Method, Run, Machine) for f in fields(group)]
    assert sorted(names) == sorted(f.name for f in fields(Config)) and len(set(names)) == len(names)
    assert recorded_flags(Config())["alpha"] == 0.3 and recorded_flags(Config(method="flowbp_bridge"))["alpha"] == 0.1
    assert recorded_flags(Config(method="flowbp_bridge", alpha=0.7))["alpha"] == 0.7
    assert recorded_flags(parse(["shapes"])[0])["reward_input"] == "xhat_0"
    assert recorded_flags(parse(["shapes", "--method", "full"])[0])["reward_input"] is None  # it has no such keyword
    assert recorded_flags(parse(["shapes", "--method", "refl"])[0])["reward_input"] == "xhat_0"


def test_help_shows_the_groups_as_boxes(capsys):
    with pytest.raises(SystemExit):
        parse(["shapes", "--help"])
    shown = capsys.readouterr().out
    assert all(f"{group} options" in shown for group in ("experiment", "method", "run", "machine"))


def test_a_preset_may_hold_what_another_method_does_not_have():
    cfg, preset = parse(["flux-dev-pickscore", "--method", "refl"])
    assert preset is PRESETS["flux-dev-pickscore"][1] and cfg.alpha == 0.1 and method_options(cfg, preset) == {}
    assert method_options(*parse(["shapes", "--method", "refl", "--reward-input", "None"])) == {}
    cfg, preset = parse(["flux-dev-pickscore", "--method", "refl", "--alpha", "0.2"])
    with pytest.raises(ValueError, match="--alpha means nothing with --method refl"):
        method_options(cfg, preset)


@pytest.mark.parametrize("name", [*METHODS])
def test_every_method_is_tried_on_zeros_in_a_moment(name):
    group = method_keywords(find_method(name)).get("group", 1)
    trial = try_method(find_method(name), LEVELS, group)
    assert trial.needs_gradient == (name not in FROM_SCORES)
    assert trial.needs_base == (name in FROM_BASE)


@pytest.mark.parametrize(
    "code, words",
    [
        ("    return {}", "must call vjp, and reward or score"),
        (
            "    return dict(k=s.vjp(s.noise(0), s.sigmas[0], s.noise(0)).mean())",
            "has no attribute 'mean'",
        ),  # without wrt_x
        ("    s.vjp(s.noise(0), s.sigmas[0], s.noise(0))\n    return {}", "must call vjp, and reward or score"),
        ("    s.vjp(s.noise(0), s.sigmas[0], s.reward(s.noise(0)))\n    return 3", "must return a dict of tensors"),
        (
            "    s.vjp(s.noise(0), s.sigmas[0], s.reward(s.noise(0)))\n    return dict(a=s.noise(0))",
            "must return a dict of tensors",
        ),
        ("    return s.nothing", "AttributeError.*line 2"),
        ("    raise ValueError('an odd T')", "--method: .*ValueError: an odd T .*line 2"),
    ],
)
def test_a_method_that_cannot_be_is_told_before_anything_is_read(code, words, tmp_path):
    (tmp_path / "odd.py").write_text(f"def odd(s):\n{code}\n")
    with pytest.raises(ValueError, match=words):
        try_method(find_method(f"{tmp_path / 'odd.py'}:odd"), LEVELS, 1)


@pytest.mark.parametrize("name", ["sweep", "rollout", "late_step", "policy_gradient", "nonsense", "torch"])
def test_a_name_that_is_no_method_is_refused(name):
    with pytest.raises(ValueError, match=f"--method {name}"):
        find_method(name)


def test_options_are_for_keywords_of_ones_own_and_typed_by_their_value(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(s, *, count=3, name='a', on=False, alpha=0.5): ...\n")
    cfg = Config(method=f"{tmp_path / 'mine.py'}:mine", option=("count=5", "name=b", "on=True"), alpha=0.25)
    assert method_options(cfg, Config()) == dict(count=5, name="b", on=True, alpha=0.25)
    refused = {"other=1": "count, name, on", "count=many": "'many'", "count=[1]": "no finite number"}
    # A number beyond floats, and brackets deeper than Python's stack.
    refused |= {f"count={'9' * 400}": "no finite number", f"count={'[' * 10**5}": "no finite number"}
    for option, words in refused.items():
        with pytest.raises(ValueError, match=words):
            method_options(replace(cfg, option=(option,)), Config())
    with pytest.raises(ValueError, match="--option alpha=1"):  # of ours it is a flag
        method_options(Config(option=("alpha=1",)), Config())


def test_keywords_of_our_methods_that_are_no_flags_are_options():
    cfg, preset = parse(["shapes", "--method", "fdfo", "--option", "dsigma=true", "churn=0.05", "--group", "4"])
    assert method_options(cfg, preset) == dict(dsigma=True, churn=0.05, group=4)


def test_a_number_of_steps_may_be_random():
    cfg, preset = parse(["shapes", "--method", "full", "--last", "random"])
    assert method_options(cfg, preset) == dict(last="random")
    cfg, preset = parse(["shapes", "--method", "mix_grpo", "--shift-every", "random"])
    assert method_options(cfg, preset) == dict(shift_every="random")


def test_a_keyword_of_ones_own_may_be_called_as_a_flag_of_another_kind(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(s, *, weight=0.5): ...\n")
    cfg = Config(method=f"{tmp_path / 'mine.py'}:mine", option=("weight=0.7",))
    assert method_options(cfg, Config()) == dict(weight=0.7)


def test_keywords_of_ones_own_are_recorded_as_json_reads_them_and_are_no_flags_of_the_run(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(s, *, window=(0, 1), steps=2, nested_only=True): ...\n")
    cfg = Config(method=f"{tmp_path / 'mine.py'}:mine", decay=False)
    assert recorded_flags(cfg) == json.loads(json.dumps(recorded_flags(cfg))) and recorded_flags(cfg)["window"] == [
        0,
        1,
    ]
    assert "updates" not in resume_flags(cfg) and "window" in resume_flags(cfg)
    assert (
        method_options(cfg, Config()) == {} and recorded_flags(cfg)["nested_only"] is True
    )  # the flag's False is no wish


def test_a_resumed_run_tells_of_code_that_has_changed(tmp_path, capsys):
    recorded = dict(method="refl", prompts_read=["0", "0"], code_read={"a.py": "1", "b.py": "2"})
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    tell_changes(tmp_path, {"a.py": "1", "b.py": "3", "c.py": "4"})
    assert capsys.readouterr().err.startswith("warning: b.py has changed since")
    (file := tmp_path / "mine.py").write_text("def f(images, prompts): ...")
    before = file_hashes([f"{file}:f:0.5", "tiny", "leapalign"])
    file.write_text("def f(images, prompts): return 1")
    assert list(before) == [str(file)] and file_hashes([f"{file}:f"]) != before


def test_a_preset_of_the_paper_leaves_other_methods_their_own_defaults():
    _, preset = PRESETS["flux-dev-hpsv2"]
    assert "alpha" not in method_options(replace(preset, method="flowbp_bridge"), preset)  # 0.1 there, 0.3 in the paper


def test_a_method_may_have_a_noise_level_a_sample_however_the_batch_is_split():
    def levels(s: leaps.Samples) -> Log:
        sigma = torch.linspace(0.3, 0.9, s.total)
        v = s.velocity(s.noise(0), sigma)
        s.vjp(s.noise(0), sigma, v)
        return dict(k=s.reward(v).mean())

    def one_by_one(s: leaps.Samples) -> Log:
        sigma = torch.linspace(0.3, 0.9, s.total)
        v = s.velocity(s.noise(0), sigma)
        for level, own in zip(sigma, torch.eye(s.total)):
            s.vjp(s.noise(0), level, own[:, None, None] * v)
        return dict(k=s.reward(v).mean())

    cfg, gradients = Config(out=Path("nonexistent"), batch=4, rollout_steps=4), []
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        for method, micro in ((one_by_one, None), (levels, None), (levels, 3), (levels, 1)):
            flags, given = replace(cfg, micro_batch=micro), replace(setup, method=method)
            train.accumulate_batch_gradient(flags, given, process, 0, Meter(process.device))
            gradients.append(torch.cat([p.grad.flatten() for p in setup.pipe.flux.parameters()]))
            setup.pipe.flux.zero_grad()
    assert all((g - gradients[0]).norm() < 1e-5 * gradients[0].norm() for g in gradients)


# --------------------------------------------------------------------------------- older runs, and signals


def test_a_resumed_run_must_find_its_experiment_and_its_method_unchanged(tmp_path):
    cfg = Config(out=tmp_path, resume=True, updates=200, lr=7e-5, eval_every=50)
    hashes = dict(prompts_read=[prompts_hash(["a"]), prompts_hash(["b"])])
    (tmp_path / "config.json").write_text(json.dumps(recorded_flags(cfg) | hashes))

    def check(cfg: Config) -> None:
        check_folder(cfg, tmp_path, recorded_flags(cfg), resume_flags(cfg))

    check(cfg)
    check(replace(cfg, alpha=0.3, device="cuda", micro_batch=4))
    with pytest.raises(ValueError, match=r"--resume with --alpha 0\.1, but .* was started with 0\.3"):
        check(replace(cfg, alpha=0.1))
    with pytest.raises(ValueError, match=r"--resume with --method refl, but .* was started with leapalign"):
        check(replace(cfg, method="refl"))
    check_prompts(tmp_path, ["a"], ["b"], (cfg.prompts, cfg.eval_prompts))
    with pytest.raises(ValueError, match=r"--eval-prompts other\.txt, which says something else"):
        check_prompts(tmp_path, ["a"], ["c"], (cfg.prompts, Path("other.txt")))


def logs_step(s: leaps.Samples) -> Log:
    s.vjp(s.noise(0), s.sigmas[0], s.reward(s.noise(0)))
    return dict(step=s.sigmas[0])


def test_two_values_of_one_name_are_refused_before_anything_is_loaded():
    names = try_method(logs_step, LEVELS, 1).logged_names
    with pytest.raises(ValueError, match="--method logs 'step', and so does the run"):
        check_log_names(Config(), names, {}, [])
    with pytest.raises(ValueError, match="--reward or --watch logs 'k', and so does --method"):
        check_log_names(Config(reward=("mine.py:k",)), {"k"}, {}, [])
    tasks = {"judge": Reward(None, task_of=lambda prompt: prompt, name="judge")}
    with pytest.raises(ValueError, match="--reward or --watch logs 'color', and so does the judge"):
        check_log_names(Config(reward=("mine.py:color",)), set(), tasks, ["color"])


def test_signals_are_noted_within_and_handled_as_before_after():
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = signal.getsignal(signal.SIGTERM)
    try:
        with stop_signals() as numbers:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert sorted(numbers) == [signal.SIGINT, signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, outer)


@pytest.mark.parametrize(
    "words, level",
    [
        ("", "none"),
        ("--recompute", "blocks"),
        ("--recompute True --batch 8", "blocks"),
        ("--recompute --batch 8", "blocks"),
        ("--recompute light", "light"),
    ],
)
def test_recompute_without_a_level_means_blocks(words, level):
    assert parse(["shapes", *words.split()])[0].recompute == level
    assert parse(["flux-dev-lora", "--no-recompute"])[0].recompute == "none"
