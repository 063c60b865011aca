"""Bad inputs made systematically: flags by their types, files by damage. Each must be one line that names it.

    python -m tests.bad_inputs              # all of them, some minutes; a table of kinds, and each that was not held
    python -m tests.bad_inputs flags lora   # some kinds

A case is held if the command ends before it trains or draws, with an exit code that is not 0, without a traceback, and
with an error that names the flag or the file.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from config import Config
from infra.flags import RANGES

ROOT = Path(train.__file__).parent
TINY = ROOT / "shapes" / "tiny-flux"
SHORT = ["--batch", "4", "--rollout-steps", "2", "--updates", "2", "--eval-every", "2"]
DRAWN = ["--num", "1", "--rollout-steps", "1", "--reward", "tiny"]
WORDS = ("x", "1.5.2", "1,5", "", "None ", "0x10", "true", "--", "½", "[]")  # that are no number


class Case(NamedTuple):
    """A command with a bad input."""

    kind: str
    command: Any  # train, sample or evaluate
    arguments: list[str]
    word: str  # which the error must hold: the flag or the file
    prepare: Callable[[Path], None] = lambda folder: None  # makes the files in the folder that stands for {}
    damage: str = ""  # what is wrong with a file


class Reached(Exception):
    """The command began to train or to draw."""


# ------------------------------------------------------------------------------------------------- flags


def number_flags(flags: type) -> Iterator[tuple[str, type]]:
    """The flags of a command that are numbers, with their type."""
    for name, annotation in typing.get_type_hints(flags).items():
        kinds = {annotation, *typing.get_args(annotation)}
        for kind in (float, int):
            if kind in kinds:
                yield name, kind


def bad_numbers(name: str, kind: type) -> Iterator[str]:
    """Words that are no number of the type, numbers that are not finite, and numbers outside of the flag's range."""
    yield from WORDS
    yield from ("nan", "-inf", "-1e999") if kind is float else ("nan", "inf", "1.5", "1e3", "-" + "9" * 30)
    for interval, names in RANGES.items():
        if name in names:
            low, high = map(float, interval[1:-1].split(","))
            yield from ("inf", "1e999") if kind is float and interval[-1] == ")" else ()
            yield repr(kind(low - 1))
            yield from [repr(kind(low))] if interval[0] == "(" else []
            yield from [repr(kind(high + 1))] if high < 1e9 else []


def flag_cases() -> Iterator[Case]:
    commands = ((train, Config), (sample, sample.SampleFlags), (evaluate, evaluate.EvaluateFlags))
    for command, flags in commands:
        needs = ["--prompt", "a"] if command is sample else []
        for name, kind in number_flags(flags):
            flag = f"--{name.replace('_', '-')}"
            for value in bad_numbers(name, kind):
                yield Case("flags", command, [*needs, f"{flag}={value}"], flag)
    for field in fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name in ("weight", "reward_input", "draw", "log"):
            yield Case("flags", train, [f"{flag}=x"], flag)
    names = dict(model="no/such/model", base="x", reward="nope", watch="nope", size="9*9", method="nope", option="x=1")
    names |= dict(prompts="no-such.txt", eval_prompts="no-such.txt", device="nope", out="/proc/x")
    for name, value in names.items():
        flag = f"--{name.replace('_', '-')}"
        for word in (value, "", "x" * 300, "/dev/null/x", "a\x1b[2Jb", "\ud800"):
            if not word:
                word = {"size": "-5", "option": "x"}.get(name, word)
            if not (name == "out" and word not in (value, "x" * 300, "/dev/null/x")):
                shown = word[:40] if word.isascii() and word.isprintable() else ""
                yield Case("names", train, [f"{flag}={word}"], flag if name == "out" else shown)
    for flag in ("--active", "--last", "--window", "--leaps"):
        method = {"--active": "drtune", "--last": "full", "--window": "mix_grpo"}.get(flag, "leapalign")
        yield Case("flags", train, ["--method", method, flag, "99"], flag.strip("-"))
    for arguments in (["--lora", "100000"], ["--size", "100000"], ["--reward", "tiny:0"], ["--reward", "tiny:1e999"]):
        yield Case("flags", train, arguments, "weight" if arguments[0] == "--reward" else arguments[0])
    for command in (sample, evaluate):
        needs = ["--prompt", "a"] if command is sample else []
        for arguments in (
            ["--model", "nope"],
            ["--base", "nope"],
            ["--size", "0"],
            ["--strength", "2"],
            ["--device", "x"],
        ):
            word = "nope" if "nope" in arguments else arguments[0]
            yield Case("flags", command, [*needs, *arguments], word)


# ------------------------------------------------------------------------------------------------- files


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return prepare


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "binary": lambda content: bytes(range(256)),
    "a list": lambda content: b"[]",
    "a number": lambda content: b"3",
    "null": lambda content: b"null",
    "no entries": lambda content: b"{}",
    "a string": lambda content: b'"\\ud800"',
}


def prompt_cases() -> Iterator[Case]:
    texts = {
        "txt": (b"", b"\xff\xfe", b"# only\n\n", b"caf\xe9\n"),
        "jsonl": (b"", b"{", b"[1]", b"3", b'{"p": 1}', b'{"prompt": 3}', b'{"prompt": "\\ud800"}', b"\xff", b"null"),
        "json": (b"", b"[", b"{}", b"3", b"[3]", b'[{"prompt": ""}]', b"[[]]", b'["\\udfff"]', b"\xff", b"[null]"),
        "csv": (b"", b"a,b\n1,2\n", b"prompt\n\n", b'prompt\n"a\n', b"prompt\na,b\n", b"\xff", b"prompt\n \n"),
        "tsv": (b"", b"a\tb\n1\t2\n", b"prompt\n\n", b"prompt\na\tb\n", b"\xff", b"prompt\n \n"),
    }
    for suffix, contents in texts.items():
        name = f"p.{suffix}"
        for content in contents:
            for command in (train, sample, evaluate):
                yield Case("prompts", command, ["--prompts", f"{{}}/{name}"], name, write(name, content))
        folder_in_place = write(f"{name}/x", b"")
        yield Case("prompts", train, ["--eval-prompts", f"{{}}/{name}"], name, folder_in_place)


def model_copy(folder: Path) -> Path:
    """The tiny model, whose large files are links."""
    return Path(shutil.copytree(TINY, folder / "model", copy_function=os.symlink))


def damaged(file: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = model_copy(folder) / file
        content = path.read_bytes()
        path.unlink()
        new = change(content)
        if new is not None:
            path.write_bytes(new)

    return prepare


def entry(key: str, value: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | {key: value}).encode()


def tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change the tensors of a safetensors file."""

    def damage(path: Path) -> None:
        state = load_file(path)
        change(state)
        path.unlink()
        save_file(state, path, metadata={"format": "pt"})

    return damage


def poison(state: dict) -> None:
    name = max(state, key=lambda key: state[key].numel())
    state[name] = state[name].clone()
    state[name].view(-1)[0] = torch.nan


def lose(state: dict) -> None:
    del state[max(state, key=lambda key: state[key].numel())]


def round_off(state: dict) -> None:
    for name in state:
        state[name] = state[name].to(torch.int8)


def reshape(state: dict) -> None:
    name = max(state, key=lambda key: state[key].numel())
    state[name] = state[name].flatten().contiguous()


def model_cases() -> Iterator[Case]:
    arguments = ["--model", "{}/model"]
    jsons = ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
             "text_encoder/config.json", "text_encoder_2/config.json"]  # fmt: skip
    for file in jsons:
        for name, damage in DAMAGES.items():
            yield Case("model folders", train, arguments, "model", damaged(file, damage), f"{file} {name}")
    values = (None, "two", -1, 0, [], {}, 1.5)
    keys = {
        "transformer/config.json": ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim",
                                    "in_channels", "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope"),
        "scheduler/scheduler_config.json": ("shift", "base_image_seq_len", "use_dynamic_shifting", "_class_name"),
        "vae/config.json": ("latent_channels", "block_out_channels"),
        "text_encoder/config.json": ("hidden_size", "vocab_size"),
        "text_encoder_2/config.json": ("d_model", "vocab_size"),
        "model_index.json": ("_class_name",),
    }  # fmt: skip
    harmless = {("shift", 1.5), ("base_image_seq_len", -1), ("base_image_seq_len", 0), ("base_image_seq_len", 1.5)}
    harmless |= {("use_dynamic_shifting", 0)}
    for file, names in keys.items():
        for name in names:
            for value in values:
                if isinstance(value, list | dict) or (name, value) not in harmless:
                    yield Case(
                        "model folders", train, arguments, "model", damaged(file, entry(name, value)), f"{name} {value}"
                    )
    yield Case("model folders", train, arguments, "model", damaged("scheduler/scheduler_config.json", entry("new", 1)))
    for folder in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (weights,) = (TINY / folder).glob("*.safetensors")
        file = f"{folder}/{weights.name}"
        for damage in ("missing", "empty", "truncated", "binary", "no entries"):
            for command in (train, sample):
                needs = ["--prompt", "a"] if command is sample else []
                yield Case("weights", command, [*needs, *arguments], "model", damaged(file, DAMAGES[damage]))
        changes = [poison, lose, reshape] + ([round_off] if folder == "transformer" else [])
        for change in changes:
            for command in (train, sample):
                needs = ["--prompt", "a"] if command is sample else []

                def prepare(into: Path, file: str = file, change: Callable = change) -> None:
                    tensors(change)(model_copy(into) / file)

                detail = f"{file} {change.__name__}"
                yield Case("weights", command, [*needs, *arguments], "model", prepare, detail)
    for folder in ("tokenizer", "tokenizer_2"):
        for file in sorted(path.name for path in (TINY / folder).iterdir()):
            if file in ("tokenizer.json",):
                for damage in ("empty", "truncated", "a list", "a number", "null"):
                    yield Case("model folders", train, arguments, "model", damaged(f"{folder}/{file}", DAMAGES[damage]))


def lora_cases() -> Iterator[Case]:
    layer = "transformer.x_embedder"
    width, channels = load_file(next((TINY / "transformer").glob("*.safetensors")))["x_embedder.weight"].shape
    a, b = torch.ones(2, channels), torch.ones(width, 2)

    def file(state: dict, metadata: dict | None = None) -> Callable[[Path], None]:
        return lambda folder: save_file(state, folder / "lora.safetensors", metadata=metadata)

    down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    pattern = {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {"(": 1}})}
    shape = {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": 3})}
    word = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "x"})}
    cases = [
        write("lora.safetensors", b""),
        write("lora.safetensors", bytes(range(256))),
        file({down: a}),
        file({down: a[:0], up: b[:, :0]}),
        file({down: a * torch.nan, up: b}),
        file({down: a, up: b * torch.inf}),
        file({down: a.T.contiguous(), up: b}),
        file({down: a, up: b[:3].contiguous()}),
        file({down.replace("x_embedder", "y_embedder"): a, up.replace("x_embedder", "y_embedder"): b}),
        file({down: a, up: b, "other": a.clone()}),
        file({down: a, up: b, f"{layer}.alpha": torch.ones(2)}),
        file({f"{layer}.lokr_w1": a, f"{layer}.lokr_w2": b}),
        file({f"{layer}.hada_w1_a": a}),
        file({down: a, up: b, f"{layer}.dora_scale": torch.ones(2)}),
        file({"lora_te1_x.lora_down.weight": a}),
        file({down: a, up: b}, {"lora_adapter_metadata": "{"}),
        file({down: a, up: b}, {"lora_adapter_metadata": "3"}),
        file({down: a, up: b}, pattern),
        file({down: a, up: b}, shape),
        file({down: a, up: b}, word),
    ]
    for prepare in cases:
        for command in (train, sample, evaluate):
            needs = ["--prompt", "a"] if command is sample else []
            arguments = [*needs, "--model", "{}/lora.safetensors", "--base", str(TINY)]
            yield Case("lora", command, arguments, "lora.safetensors", prepare)


# ------------------------------------------------------------------------------------------ users' code


def code_cases() -> Iterator[Case]:
    rewards = [
        "", "x = ", "1 / 0", "import sys; sys.exit()", "raise KeyboardInterrupt", "import no_such_module", "f = 3",
        "def f(images): return images", "def f(images, prompts): return images", "def f(images, prompts): return None",
        "def f(images, prompts): return [0.0] * len(images)", "def f(images, prompts): return images.mean()",
        "def f(images, prompts): return images.mean((1, 2, 3)).long()", "def f(images, prompts): raise SystemExit(0)",
        "def f(images, prompts): exit()", "def f(images, prompts): raise KeyboardInterrupt",
        "def f(images, prompts): return images.detach().mean((1, 2, 3))", "def f(images, prompts): return prompts[9]",
        "def f(images, prompts): return images.numpy().mean((1, 2, 3))", "def f(images, prompts): raise Exception",
        "import torch\ndef f(images, prompts): return torch.zeros(len(images), requires_grad=True)",
        "def f(images, prompts): return (0 * images).mean((1, 2, 3)).sqrt()", "\0",
        "class f:\n    def __init__(self, images, prompts): pass",
    ]  # fmt: skip
    for code in rewards:
        prepare = write("mine.py", code.encode())
        yield Case("rewards", train, ["--reward", "{}/mine.py:f"], "f", prepare, code)
    ro = "    ro = rollout(s.velocity, s.noise(0), s.sigmas)\n    g = s.reward(ro.x[-1])\n"
    sweep = "    sweep(s.vjp, ro, [Term(0, ro.sigmas[-1] - ro.sigmas[-2])], g)\n"
    methods = [
        "    pass", "    return {}", ro + "    return {}", ro + sweep, ro + sweep + "    return 3",
        ro + sweep + "    return {1: g.mean()}", ro + sweep + "    return dict(a=g)", "    raise SystemExit",
        "    raise KeyboardInterrupt", "    return s.nothing", ro + "    g = g[..., :1]\n" + sweep + "    return {}",
        ro + sweep + "    return dict(tiny=g.mean())", ro + sweep + "    return dict(reward=g.mean())",
        ro + sweep + "    return dict(k=1.0)", ro + sweep + "    exit()",
    ]  # fmt: skip
    for body in methods:
        prepare = write("mine.py", f"from leaps import Term, rollout, sweep\ndef f(s):\n{body}\n".encode())
        yield Case("methods", train, ["--method", "{}/mine.py:f"], "--method", prepare)
    for group in ("0", "None", "'x'", "-1", "1.5"):
        prepare = write("mine.py", f"def f(s, *, group={group}):\n    return {{}}\n".encode())
        yield Case("methods", train, ["--method", "{}/mine.py:f"], "group", prepare)
    prepare = write("mine.py", b"def f(s, *, big=1.0):\n    return {}\n")
    for option in ("big", "big=", "big=x", "big=nan", "big=1e999", "small=1", "=1"):
        yield Case("methods", train, ["--method", "{}/mine.py:f", "--option", option], "--option", prepare)


# ------------------------------------------------------------------------------------------- run folders


def run_cases(run: Path) -> Iterator[Case]:
    """`run` is the folder of a short run."""
    cfg = json.loads((run / "config.json").read_text())
    flags = ["--resume", "--out", "{}/run", "--eval-prompts", cfg["eval_prompts"], *SHORT]

    def changed(file: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            path = Path(shutil.copytree(run, folder / "run")) / file
            new = change(path.read_bytes())
            path.unlink()
            if new is not None:
                path.write_bytes(new)

        return prepare

    for name, damage in DAMAGES.items():
        if name != "missing":
            yield Case("run folders", train, flags, "config.json", changed("config.json", damage))
    for key in ("method", "prompts_read", "lr", "seed", "reward"):
        for value in (None, 3, "x", []):
            yield Case("run folders", train, flags, "run", changed("config.json", entry(key, value)))
    lines = (b"[]", b"3", b"null", b"{}", b'"x"', b'{"step": null}', b'{"step": "x"}', b'{"step": 0}', b"{", b"\xff",
             b'{"step": 0, "reward": "x"}', b'{"step": 0, "reward": null}', b'{"step": [], "reward": 1}')  # fmt: skip
    for file in ("metrics.jsonl", "eval.jsonl"):
        for line in lines:
            prepare = changed(file, lambda content, new=line: new + b"\n" + content)
            yield Case("run folders", train, flags, file, prepare)

        def folder_in_place(folder: Path, file: str = file) -> None:
            path = Path(shutil.copytree(run, folder / "run")) / file
            path.unlink()
            path.mkdir()

        yield Case("run folders", train, flags, file, folder_in_place)

    def without_checkpoints(folder: Path) -> None:
        shutil.rmtree(Path(shutil.copytree(run, folder / "run")) / "checkpoints")

    yield Case("run folders", train, flags, "--resume", without_checkpoints)
    (checkpoint,) = (run / "checkpoints").iterdir()
    for file in sorted(path.name for path in checkpoint.iterdir()):
        for damage in ("missing", "empty", "truncated", "binary", "a list", "no entries"):
            prepare = changed(f"checkpoints/{checkpoint.name}/{file}", DAMAGES[damage])
            yield Case("checkpoints", train, flags, checkpoint.name, prepare)


def evaluation_cases(evaluation: Path) -> Iterator[Case]:
    """`evaluation` is the folder of a short evaluation."""
    flags = ["--out", "{}/out", "--prompts", str(evaluation.parent / "p.txt"), *DRAWN]
    for file in ("config.json", "shapes_tiny-flux/00000.json"):
        for name, damage in DAMAGES.items():
            if name not in ("missing", "empty"):

                def prepare(folder: Path, file: str = file, damage: Callable = damage) -> None:
                    path = Path(shutil.copytree(evaluation, folder / "out")) / file
                    path.write_bytes(damage(path.read_bytes()))

                yield Case("evaluations", evaluate, flags, Path(file).stem if "0" in file else "out", prepare)
    for scores in ([], None, "x", [1.0, 2.0], [None], {"a": 1}):

        def replaced(folder: Path, scores: Any = scores) -> None:
            path = Path(shutil.copytree(evaluation, folder / "out")) / "shapes_tiny-flux" / "00000.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"tiny": scores}))

        yield Case("evaluations", evaluate, flags, "00000.json", replaced)


# ---------------------------------------------------------------------------------------------- the trial


def outcome(case: Case) -> str:
    """Empty if the case is held, else what happened."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        case.prepare(folder)
        arguments = [argument.replace("{}", name) for argument in case.arguments]
        if not any(argument.startswith("--out") for argument in arguments) and case.command is not sample:
            arguments += ["--out", f"{name}/new"]
        if case.command is sample and "--prompts" not in arguments and "--prompt" not in arguments:
            arguments += ["--prompt", "a"]
        stack.enter_context(mock.patch.object(sys, "argv", ["command.py", *arguments]))
        for module, function in ((train, "train"), (sample, "sample"), (evaluate, "sample")):
            stack.enter_context(mock.patch.object(module, function, side_effect=Reached))
        text = io.StringIO()
        stack.enter_context(contextlib.redirect_stderr(text))
        stack.enter_context(contextlib.redirect_stdout(text))
        try:
            case.command.main()
            code: int | str | None = 0
        except SystemExit as error:
            code = error.code
        except Reached:
            return "accepted"
        except BaseException as error:
            return f"raised {type(error).__name__}: {error}"[:200]
        said = text.getvalue()
        if code in (0, None):
            return "exit code 0"
        if "Traceback" in said:
            return "a traceback"
        joined = " ".join(said.replace("│", " ").split())
        return "" if case.word in joined else f"no word of {case.word}: {joined[-200:]}"


def all_cases(folder: Path) -> list[Case]:
    """All cases; a short run and a short evaluation are made in the folder first."""
    prompts = folder / "p.txt"
    prompts.write_text("a photo of a circle\na photo of a square\n")
    commands = [
        (train, ["--out", str(folder / "run"), "--eval-prompts", str(prompts), *SHORT]),
        (evaluate, ["--out", str(folder / "out"), "--prompts", str(prompts), *DRAWN]),
    ]
    for command, arguments in commands:
        argv = mock.patch.object(sys, "argv", ["command.py", *arguments])
        with argv, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command.main()
    cases = [*flag_cases(), *prompt_cases(), *model_cases(), *lora_cases(), *code_cases()]
    return [*cases, *run_cases(folder / "run"), *evaluation_cases(folder / "out")]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        tried: dict[str, int] = {}
        held: dict[str, int] = {}
        for case in all_cases(Path(name)):
            if len(sys.argv) > 1 and case.kind not in KINDS:
                continue
            result = outcome(case)
            tried[case.kind] = tried.get(case.kind, 0) + 1
            held[case.kind] = held.get(case.kind, 0) + (not result)
            if result:
                print(
                    f"{case.kind}: {case.command.__name__} {' '.join(case.arguments)!r:.120} {case.damage}: {result!r}",
                    flush=True,
                )
        for kind in tried:
            print(f"{kind:15} {tried[kind]:5} tried {held[kind]:5} held")
        print(f"{'all':15} {sum(tried.values()):5} tried {sum(held.values()):5} held")


KINDS = sys.argv[1:]
if __name__ == "__main__":
    main()
