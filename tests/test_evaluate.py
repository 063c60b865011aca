"""evaluate.py as a user runs it, on what is shipped, and its numbers against closed forms."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

import evaluate
from formats.folders import load_pipeline
from infra.distributed import join
from infra.summary import confidence_interval, summarize
from rewards import open_reward, score_all
from sample import sample
from tests.processes import script, start
from tools.prompts import generate

ROOT = Path(evaluate.__file__).parent
TINY = ROOT / "shapes" / "tiny-flux"
FLAGS = ["--num", "2", "--steps", "3", "--batch", "8"]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    file = tmp_path_factory.mktemp("prompts") / "few.txt"
    file.write_text("\n".join(lines[5::30]) + "\n")
    return file


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A second model: the shipped one, disturbed."""
    from formats.saving import save_pipeline

    pipe = load_pipeline(TINY)
    torch.manual_seed(0)
    state = {k: v + 0.02 * torch.randn_like(v) for k, v in pipe.flux.state_dict().items()}
    folder = tmp_path_factory.mktemp("models") / "other" / "final"
    save_pipeline(folder, TINY, pipe.flux.config, state.items())
    return folder


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return script("evaluate.py", *arguments)


def run_on_two_ranks(*arguments: str | Path) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=localhost:0", "--"]
    return subprocess.run(
        [*launcher, "evaluate.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, few, other) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    done = run("--model", TINY, other, "--prompts", few, "--out", out, "--keep-images", *FLAGS)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


# --------------------------------------------------------------------------------------- the command


def test_the_table_shows_both_models_and_the_paired_change(evaluated, other):
    out, said = evaluated
    for word in (
        "judge",
        "tiny",
        "single",
        "attr",
        evaluate.label(str(TINY)),
        evaluate.label(str(other)),
        "±",
        str(out),
    ):
        assert word in said
    changes = [line for line in said.splitlines() if line.startswith(evaluate.label(str(other)))]
    assert len(changes) == 2 and all(line.count("±") == 2 for line in changes)


def test_the_scores_are_those_of_the_same_images_drawn_by_hand(evaluated, few):
    out, _ = evaluated
    prompts = few.read_text().splitlines()
    texts = [p for p in prompts for _ in range(2)]
    images = sample(load_pipeline(TINY), texts, range(24), 3, 64, 64)  # seeds count on over prompts and images
    results = json.loads((out / "results.json").read_text())
    for name in ("judge", "tiny"):
        expected = score_all(open_reward(name), images, texts, "cpu").view(-1, 2)
        torch.testing.assert_close(
            torch.tensor(results["scores"]["shapes_tiny-flux"][name]), expected, atol=1e-4, rtol=0
        )
    kept = np.array(Image.open(out / "shapes_tiny-flux" / "images" / "00003_1.png")) / 255
    np.testing.assert_allclose(kept, images[7].permute(1, 2, 0).numpy(), atol=0.6 / 255)


def test_seeds_count_on_over_seeds_prompts_and_images(tmp_path, monkeypatch):
    seen: list[int] = []

    def drawn(pipe, prompts, seeds, *_) -> torch.Tensor:
        seen.extend(seeds)
        return torch.zeros(len(seeds), 3, 16, 16)

    monkeypatch.setattr(evaluate, "sample", drawn)
    cfg = evaluate.Config(num=2, seed=3, size=("16",), batch=4)
    evaluate.evaluate(None, [], [{"prompt": "a cat"}] * 5, range(5), cfg, tmp_path)
    assert seen == list(range(30, 40))  # those of seeds 0, 1 and 2 lie before


def test_contact_sheets_are_written(evaluated):
    for name in ("best", "worst", "changed"):
        assert Image.open(evaluated[0] / f"{name}.png").size[0] > 500


def test_two_ranks_find_what_one_finds(evaluated, few, other, tmp_path):
    done = run_on_two_ranks("--model", TINY, other, "--prompts", few, "--out", tmp_path / "out", *FLAGS)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((f / "results.json").read_text()) for f in (evaluated[0], tmp_path / "out"))
    for model in one["scores"]:
        for name in ("judge", "tiny"):
            np.testing.assert_allclose(two["scores"][model][name], one["scores"][model][name], atol=1e-4)
    assert done.stdout.count("wrote") == 1


def killed_after(cfg: evaluate.Config, count: int) -> None:
    """Evaluate, and die by SIGKILL where the scores of one prompt more would be put in place."""
    written = itertools.count()

    def hook(event: str, args: tuple) -> None:
        scores = event == "os.rename" and re.fullmatch(r"\d+\.json", Path(args[1]).name)
        if scores and next(written) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with join("cpu") as world:
        evaluate.run(cfg, world)


def test_killed_it_goes_on_where_it_was(evaluated, few, other, tmp_path):
    out = tmp_path / "out"
    cfg = evaluate.Config(model=(str(TINY), str(other)), prompts=few, out=out, num=2, steps=3, batch=2)
    (process,) = start(1, killed_after, cfg, 5)
    process.join()
    before = {f: f.stat().st_mtime_ns for f in out.glob("*/*.json")}
    assert process.exitcode == -signal.SIGKILL and len(before) == 5 and not (out / "results.json").exists()
    assert run("--model", TINY, other, "--prompts", few, "--out", out, *FLAGS).returncode == 0
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())
    one, two = (json.loads((f / "results.json").read_text())["scores"] for f in (evaluated[0], out))
    for model in one:
        np.testing.assert_allclose(two[model]["tiny"], one[model]["tiny"], atol=1e-4)


def test_geneval_folders_are_what_its_evaluator_reads_and_hold_no_prompts_of_an_earlier_evaluation(
    tmp_path, monkeypatch, capsys
):
    entries = generate(6, (1, 1, 1, 1, 1, 1), seed=0)
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in entries))
    flags = ["--prompts", str(file), "--rewards", "tiny", "--geneval", str(tmp_path / "g")]
    done = run(*flags, "--out", tmp_path / "out", *FLAGS)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "g" / "shapes_tiny-flux"
    assert sorted(p.name for p in root.iterdir()) == [f"{i:05d}" for i in range(6)]
    for i, entry in enumerate(entries):
        with open(root / f"{i:05d}" / "metadata.jsonl") as fp:
            assert json.load(fp) == entry
        samples = sorted((root / f"{i:05d}" / "samples").iterdir())
        assert [s.name for s in samples] == ["0000.png", "0001.png"]
        assert all(Image.open(s).size == (64, 64) for s in samples)

    file.write_text("".join(json.dumps(e) + "\n" for e in entries[:5]))
    assert "shapes_tiny-flux holds 00005 of other prompts" in refused(
        monkeypatch, capsys, *flags, "--out", str(tmp_path / "new")
    )


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """What the command says where it ends before any weights are read."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "load", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        evaluate.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no/such/model"], ["no/such/model"]),
        (["--model", str(TINY), str(TINY)], ["would all be called shapes_tiny-flux"]),
        (["--rewards", "hpsv9"], ["hpsv9", "hpsv2"]),
        (["--rewards", "clip=./no/such"], ["./no/such"]),
        (["--prompts", "no-such.txt"], ["no-such.txt"]),
        (["--prompts", "prompts.txt"], ["fisherman", "judge"]),
        (["--num", "0"], ["--num", "0"]),
        (["--geneval", "x"], ["--geneval", "tags"]),
        (["--size", "96"], ["--size 96", "64x64"]),
        (["--out", f"{__file__}/x"], ["--out", "nothing can be written in", "test_evaluate.py"]),
    ],
)
def test_a_bad_flag_is_named(arguments, words, tmp_path, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, "--out", str(tmp_path / "out"), *arguments)
    assert all(word in said for word in words)


def test_a_lora_that_cannot_be_read_is_told_before_the_models_before_it_are_drawn(tmp_path, monkeypatch, capsys):
    save_file({"lora_te1_x.lora_down.weight": torch.ones(1, 1)}, lora := tmp_path / "kohya.safetensors")
    flags = ["--model", str(TINY), str(lora), "--base", str(TINY), "--out", str(tmp_path / "out")]
    assert "kohya.safetensors: this LoRA changes text encoders too" in refused(monkeypatch, capsys, *flags)


def test_a_folder_of_other_settings_or_of_a_model_since_rewritten_is_not_mixed_in(
    few, other, tmp_path, monkeypatch, capsys
):
    model, out = shutil.copytree(other, tmp_path / "model"), tmp_path / "out"

    def again(*changes: str) -> str:
        flags = [
            "--model",
            str(model),
            "--prompts",
            str(few),
            "--out",
            str(out),
            "--num",
            "1",
            "--steps",
            "1",
            *changes,
        ]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--rewards", "tiny", *flags])
        try:
            evaluate.main()
        except SystemExit:
            return capsys.readouterr().err
        return ""

    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--rewards", "tiny", "hpsv2", "--out", str(out)])
    with pytest.raises(SystemExit):  # a mistake leaves nothing behind that the next try would stumble over
        evaluate.main()
    assert again() == "" and again("--batch", "3") == ""
    with monkeypatch.context() as refusing:
        refusing.setattr(evaluate, "load", None)  # no weights are read before
        assert "another --steps" in again("--steps", "2") and "another --seed" in again("--seed", "1")
    (out / evaluate.label(str(model)) / "00001.json").write_text('{"prompt": "a ph')
    assert again() == "" and json.loads((out / "results.json").read_text())["summary"]["tiny"]
    (weights,) = (model / "transformer").glob("*.safetensors")
    os.utime(weights)
    assert "was written again" in again()


def test_nor_is_one_by_a_reward_file_that_was_changed_since(few, tmp_path, monkeypatch, capsys):
    (file := tmp_path / "mine.py").write_text("def f(images, prompts): return images.mean((1, 2, 3))")
    flags = [
        "--rewards",
        f"{file}:f",
        "--prompts",
        str(few),
        "--num",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    file.write_text("def f(images, prompts): return 100 * images.mean((1, 2, 3))")
    assert "mine.py as it was" in refused(monkeypatch, capsys, *flags)
    (tmp_path / "o" / "config.json").write_text("")
    assert "config.json is damaged" in refused(monkeypatch, capsys, *flags)


def test_nor_is_one_of_a_lora_whose_base_was_written_again(few, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(TINY, tmp_path / "base")
    (weights,) = (base / "transformer").glob("*.safetensors")
    width, channels = load_file(weights)["x_embedder.weight"].shape
    a, b = (f"transformer.x_embedder.lora_{x}.weight" for x in "AB")
    save_file({a: torch.zeros(1, channels), b: torch.zeros(width, 1)}, lora := tmp_path / "lora.safetensors")
    flags = ["--model", str(lora), "--base", str(base), "--rewards", "lattice", "--prompts", str(few), "--num", "1"]
    flags += ["--steps", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    os.utime(weights)
    assert "was written again" in refused(monkeypatch, capsys, *flags)


def test_tags_that_are_no_words_are_no_tasks(tmp_path):
    (file := tmp_path / "tags.json").write_text(json.dumps([{"prompt": "a cat", "tag": ["shape", "easy"]}]))
    assert evaluate.prepare(evaluate.Config(prompts=file, rewards=("tiny",))) == (
        [{"prompt": "a cat", "tag": ["shape", "easy"]}], None
    )  # fmt: skip


def test_scores_that_this_machine_does_not_see_yet_are_named_in_place_of_a_report(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "00000.json").write_text('{"prompt": "a", "lattice": [0.0]}\n')
    (tmp_path / "m" / "00000.png").touch()
    cfg, entries = evaluate.Config(out=tmp_path, num=1), [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(ValueError, match=r"lacks 1 of the prompts, such as m/00001: give the command again"):
        evaluate.report(cfg, entries, None, [open_reward("lattice")], ["m"])


# ----------------------------------------------------------------------------------------- numbers


def test_the_interval_is_students():
    values = np.array([1.0, 2.0, 4.0, 7.0])
    mean, half = confidence_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    mean, half = confidence_interval(np.array([3.0]))
    assert mean == 3.0 and math.isnan(half)


def test_the_interval_covers_the_truth_95_times_of_100():
    rng = np.random.default_rng(0)
    hits = [abs(mean) <= half for mean, half in (confidence_interval(rng.normal(size=12)) for _ in range(4000))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.011)  # 3 standard errors


def test_changes_are_paired_by_prompt_and_images_of_a_prompt_averaged_first():
    rng = np.random.default_rng(1)
    hard, noise = rng.normal(size=(50, 1)), rng.normal(scale=0.01, size=(2, 50, 4))
    scores = {"a": {"r": hard + noise[0]}, "b": {"r": hard + noise[1] + 0.1}}
    a, b = summarize(scores, None)["r"].values()
    assert b["change"] == pytest.approx(0.1, abs=0.01) and b["change_half"] < 0.01 < 0.1 < b["half"]
    assert (a["mean"], a["half"]) == confidence_interval(scores["a"]["r"].mean(1)) and "change" not in a
