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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

import evaluate
from evaluate import EvaluateFlags, evaluate_models, model_label, tags_of, without_nonfinite
from formats.folders import load_pipeline
from formats.saving import save_pipeline
from infra.distributed import join
from infra.summary import MAX_TAGS, confidence_interval, format_table, summarize
from model import FLUX_DEV
from rewards import open_reward, score_all
from sample import sample
from tests.processes import script, start
from tools.prompts import generate

ROOT = Path(evaluate.__file__).parent
TINY = ROOT / "shapes" / "tiny-flux"
FLAGS = ["--num", "2", "--rollout-steps", "3", "--batch", "8"]
ONE_STEP = ["--num", "1", "--rollout-steps", "1"]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    """Twelve prompts, of every task."""
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(lines[5::30]) + "\n")
    return file


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> Path:
    """A second model: the shipped one, disturbed."""
    folder = tmp_path_factory.mktemp("models") / "disturbed" / "final"
    save_disturbed(folder, seed=0)
    return folder


def save_disturbed(folder: Path, seed: int) -> None:
    pipe = load_pipeline(TINY)
    torch.manual_seed(seed)
    state = {name: weight + 0.02 * torch.randn_like(weight) for name, weight in pipe.flux.state_dict().items()}
    save_pipeline(folder, TINY, pipe.flux.config, state.items())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, prompt_file, disturbed) -> tuple[Path, str]:
    """An evaluation of two models: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    process = script(
        "evaluate.py", "--model", TINY, disturbed, "--prompts", prompt_file, "--out", out, "--keep-images", *FLAGS
    )
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def scores_in(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["scores"]


def output_of(monkeypatch, capsys, *arguments: str | Path) -> str:
    """What evaluate.py writes to stderr; its exit code is 0, or 2 after a line that says what is wrong."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        evaluate.main()
    except SystemExit as error:
        assert error.code == 2
    output = capsys.readouterr().err
    assert "Traceback" not in output
    return output


def refusal_of(monkeypatch, capsys, *arguments: str | Path) -> str:
    """What evaluate.py writes to stderr where it ends before any weights are read."""
    with monkeypatch.context() as without_weights:
        without_weights.chdir(ROOT)
        without_weights.setattr(evaluate, "load_pipeline", None)
        output = output_of(without_weights, capsys, *arguments)
    assert "error: " in output
    return output


# --------------------------------------------------------------------------------------- the command


def test_the_tables_show_both_models_and_the_paired_change(evaluated, disturbed):
    out, printed = evaluated
    label = model_label(str(disturbed))
    for word in ("judge", "tiny", model_label(str(TINY)), label, str(out)):
        assert word in printed
    rows = [line for line in printed.splitlines() if line.startswith(label)]
    assert len(rows) == 2
    assert all(row.count("±") == 2 for row in rows)


def test_each_reward_has_a_column_for_every_task(evaluated):
    _, printed = evaluated
    headers = [line.split() for line in printed.splitlines() if " change " in line]
    tasks = ["single", "two", "count", "color", "position", "attr"]
    assert [header[0] for header in headers] == ["judge", "tiny"]
    assert all(sorted(header[3:]) == sorted(tasks) for header in headers)


def test_the_scores_are_those_of_the_same_images_drawn_by_hand(evaluated, prompt_file):
    out, _ = evaluated
    prompts = np.repeat(prompt_file.read_text().splitlines(), 2).tolist()
    images = sample(load_pipeline(TINY), prompts, range(24), 3, 64, 64)  # seeds count on over prompts and images
    scores = scores_in(out)["shapes_tiny-flux"]
    for name in ("judge", "tiny"):
        expected = score_all(open_reward(name), images, prompts, "cpu").view(-1, 2)
        torch.testing.assert_close(torch.tensor(scores[name]), expected, atol=1e-4, rtol=0)
    picture = np.array(Image.open(out / "shapes_tiny-flux" / "images" / "00003_1.png"))
    np.testing.assert_allclose(picture / 255, images[7].permute(1, 2, 0).numpy(), atol=0.6 / 255)


def test_pictures_of_a_folder_belong_to_prompts_in_the_order_of_their_numbers():
    names = ["10.png", "2.png", "b_3.png", "1.png", "a.png", "b_20.png"]
    order = sorted(map(Path, names), key=evaluate.number_order)
    assert [file.name for file in order] == ["1.png", "2.png", "10.png", "a.png", "b_3.png", "b_20.png"]


def test_a_picture_of_16_bits_is_refused(tmp_path):
    file = tmp_path / "0.png"
    Image.fromarray(np.full((8, 8), 20000, dtype=np.uint16)).save(file)
    with pytest.raises(ValueError, match="8 bits a channel"):
        evaluate.read_picture(file)


def test_seeds_count_on_over_seeds_prompts_and_images(tmp_path, monkeypatch):
    seeds_drawn: list[int] = []

    def fake_sample(pipe, prompts, seeds, *_) -> torch.Tensor:
        seeds_drawn.extend(seeds)
        return torch.zeros(len(seeds), 3, 16, 16)

    monkeypatch.setattr(evaluate, "sample", fake_sample)
    cfg = EvaluateFlags(num=2, seed=3, batch=4, guidance=1, out=tmp_path)
    model = evaluate.Model("model", "", None, [(16, 16)], "")
    pipe = SimpleNamespace(flux=SimpleNamespace(config=FLUX_DEV))
    evaluate.draw_and_score(cfg, model, pipe, [], [{"prompt": "a cat"}] * 5, range(5), "cpu")
    assert seeds_drawn == list(range(30, 40))  # those of seeds 0, 1 and 2 lie before


def test_a_page_has_the_pictures_and_the_table(evaluated):
    out, printed = evaluated
    text = (out / "index.html").read_text()
    assert text.count("data:image/png") == 2 * 12  # models, prompts
    assert json.dumps(printed.splitlines()[2]).strip('"') in text


def test_two_ranks_find_what_one_finds(evaluated, prompt_file, disturbed, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=localhost:0", "--"]
    command = ["evaluate.py", "--model", TINY, disturbed, "--prompts", prompt_file, "--out", tmp_path / "out", *FLAGS]
    process = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("wrote") == 1
    of_one, of_two = scores_in(evaluated[0]), scores_in(tmp_path / "out")
    for model in of_one:
        for name in ("judge", "tiny"):
            np.testing.assert_allclose(of_two[model][name], of_one[model][name], atol=1e-4)


def evaluate_and_die(cfg: EvaluateFlags, count: int) -> None:
    """Evaluate, and die by SIGKILL where the scores of one more than `count` prompts would be put in place."""
    score_files = itertools.count()

    def hook(event: str, args: tuple) -> None:
        is_scores = event == "os.rename" and re.fullmatch(r"\d+\.json", Path(args[1]).name)
        if is_scores and next(score_files) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with join("cpu") as process:
        evaluate_models(cfg, process)


def test_after_a_kill_it_goes_on_where_it_was(evaluated, prompt_file, disturbed, tmp_path):
    out = tmp_path / "out"
    cfg = EvaluateFlags(
        model=(str(TINY), str(disturbed)), prompts=prompt_file, out=out, num=2, rollout_steps=3, batch=2
    )
    (killed,) = start(1, evaluate_and_die, cfg, 5)
    killed.join()
    times = {file: file.stat().st_mtime_ns for file in out.glob("*/*.json")}
    assert killed.exitcode == -signal.SIGKILL
    assert len(times) == 5 and not (out / "results.json").exists()
    process = script("evaluate.py", "--model", TINY, disturbed, "--prompts", prompt_file, "--out", out, *FLAGS)
    assert process.returncode == 0, process.stderr
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    whole, resumed = scores_in(evaluated[0]), scores_in(out)
    for model in whole:
        np.testing.assert_allclose(resumed[model]["tiny"], whole[model]["tiny"], atol=1e-4)


def test_geneval_folders_are_what_its_evaluator_reads_and_hold_no_prompts_of_an_earlier_evaluation(
    tmp_path, monkeypatch, capsys
):
    entries = generate(6, (1, 1, 1, 1, 1, 1), seed=0)
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    flags = ["--prompts", file, "--reward", "tiny", "--geneval", tmp_path / "geneval"]
    assert "error" not in output_of(monkeypatch, capsys, *flags, "--out", tmp_path / "out", *FLAGS)
    folder = tmp_path / "geneval" / "shapes_tiny-flux"
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:05d}" for i in range(6)]
    for i, entry in enumerate(entries):
        assert json.loads((folder / f"{i:05d}" / "metadata.jsonl").read_text()) == entry
        samples = sorted((folder / f"{i:05d}" / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png"]
        assert all(Image.open(path).size == (64, 64) for path in samples)

    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries[:5]))
    refusal = refusal_of(monkeypatch, capsys, *flags, "--out", tmp_path / "new")
    assert "shapes_tiny-flux holds 00005 of other prompts" in refusal


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no/such/model"], ["no/such/model"]),
        (["--model", TINY, TINY], ["both would be called shapes_tiny-flux"]),
        (["--reward", "hpsv9"], ["hpsv9", "hpsv2"]),
        (["--rewards", "clip=./no/such"], ["./no/such"]),
        (["--prompts", "no-such.txt"], ["no-such.txt"]),
        (["--prompts", "prompts.txt"], ["--prompts prompts.txt", "fisherman", "judge"]),
        (["--num", "0"], ["--num", "0"]),
        (["--steps", "0"], ["--rollout-steps", "0"]),
        (["--geneval", "x"], ["--geneval", "tags"]),
        (["--size", "96"], ["--size 96", "64x64"]),
        (["--out", f"{__file__}/x"], ["--out", "nothing can be written in", "test_evaluate.py"]),
    ],
)
def test_a_bad_flag_is_named(arguments, words, tmp_path, monkeypatch, capsys):
    refusal = refusal_of(monkeypatch, capsys, "--out", tmp_path / "out", *arguments)
    assert all(word in refusal for word in words)
    assert not (tmp_path / "out").exists()


def test_the_current_folder_has_the_name_that_it_has_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(TINY)
    assert model_label(".") == model_label("../tiny-flux") == "shapes_tiny-flux"
    monkeypatch.chdir(tmp_path)
    assert model_label(".").endswith(tmp_path.name) and "/" not in model_label(".")


def test_a_lora_that_cannot_be_read_is_reported_before_the_models_before_it_are_drawn(tmp_path, monkeypatch, capsys):
    lora = tmp_path / "kohya.safetensors"
    save_file({"lora_te1_x.lora_down.weight": torch.ones(1, 1)}, lora)
    flags = ["--model", TINY, lora, "--base", TINY, "--out", tmp_path / "out"]
    assert "kohya.safetensors changes no layer of the transformer" in refusal_of(monkeypatch, capsys, *flags)


# ------------------------------------------------------------------------ what is in the folder already


def test_a_folder_of_other_flags_is_refused_and_one_that_ended_early_is_completed(
    prompt_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    flags = ["--reward", "tiny", "--prompts", prompt_file, "--out", out, *ONE_STEP]
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    assert "error" not in output_of(monkeypatch, capsys, *flags, "--batch", "3")
    refusal = refusal_of(monkeypatch, capsys, *flags, "--steps", "2")
    assert "another rollout_steps, 1 and not 2" in refusal
    assert "another seed, 0 and not 1" in refusal_of(monkeypatch, capsys, *flags, "--seed", "1")

    expected = scores_in(out)["shapes_tiny-flux"]["tiny"]
    for file in ("results.json", "shapes_tiny-flux/00001.json"):
        (out / file).unlink()
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    np.testing.assert_allclose(scores_in(out)["shapes_tiny-flux"]["tiny"], expected, atol=1e-4)


def test_a_model_that_was_trained_further_is_refused_until_its_folder_is_removed(
    prompt_file, disturbed, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(disturbed, tmp_path / "model")
    out = tmp_path / "out"
    flags = ["--model", model, "--reward", "lattice", "--prompts", prompt_file, "--out", out, *ONE_STEP]
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    shutil.rmtree(model)
    shutil.copytree(disturbed, model)  # the same weights
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    save_disturbed(model, seed=1)
    assert f"{model} was written again" in refusal_of(monkeypatch, capsys, *flags)
    shutil.rmtree(out / model_label(str(model)))
    assert "error" not in output_of(monkeypatch, capsys, *flags)


def test_a_lora_is_refused_when_its_base_was_trained_further(prompt_file, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(TINY, tmp_path / "base")
    (file,) = (base / "transformer").glob("*.safetensors")
    width, channels = load_file(file)["x_embedder.weight"].shape
    lora = tmp_path / "lora.safetensors"
    name = "transformer.x_embedder.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(1, channels), name.format("B"): torch.zeros(width, 1)}, lora)
    flags = ["--model", lora, "--base", base, "--reward", "lattice", "--prompts", prompt_file, *ONE_STEP]
    flags += ["--out", tmp_path / "out"]
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    save_disturbed(base, seed=0)
    assert "was written again" in refusal_of(monkeypatch, capsys, *flags)


def test_a_folder_by_a_reward_file_that_was_changed_since_is_refused(prompt_file, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def f(images, prompts): return images.mean((1, 2, 3))")
    flags = ["--reward", f"{file}:f", "--prompts", prompt_file, "--out", tmp_path / "out", *ONE_STEP]
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    file.write_text("def f(images, prompts): return 100 * images.mean((1, 2, 3))")
    refusal = refusal_of(monkeypatch, capsys, *flags)
    assert "another reward_files" in refusal and "mine.py" in refusal


def test_a_folder_by_a_reward_whose_weights_were_changed_since_is_refused(prompt_file, tmp_path, monkeypatch, capsys):
    reward = shutil.copytree(ROOT / "shapes" / "tiny-reward", tmp_path / "reward")
    flags = ["--reward", f"clip={reward}", "--prompts", prompt_file, "--out", tmp_path / "out", *ONE_STEP]
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    (file,) = reward.glob("*.safetensors")
    state = load_file(file)
    save_file({name: tensor * 2 for name, tensor in state.items()}, file, metadata={"format": "pt"})
    assert "another reward_files" in refusal_of(monkeypatch, capsys, *flags)


def test_a_folder_of_something_else_is_refused(prompt_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").touch()
    flags = ["--prompts", prompt_file, "--out", tmp_path]
    assert f"--out {tmp_path} is occupied by something else" in refusal_of(monkeypatch, capsys, *flags)


def test_scores_that_this_machine_does_not_see_yet_are_named_in_place_of_a_report(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "00000.json").write_text('{"prompt": "a", "lattice": [0.0]}\n')
    (tmp_path / "m" / "00000.png").write_bytes(b"a picture")
    cfg = EvaluateFlags(out=tmp_path, num=1, reward=("lattice",))
    with pytest.raises(ValueError, match=r"lacks 1 of the prompts, such as m/00001: give the command again"):
        evaluate.read_scores(cfg, "m", ["a", "b"])


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "tags, expected",
    [
        (["shape", "color"], ["shape", "color"]),
        (["shape", None], None),
        (["shape", ""], None),
        (["shape", ["shape", "easy"]], None),  # a list names no single group
    ],
)
def test_tags_are_used_where_every_prompt_has_a_word(tags, expected):
    entries = [{"prompt": "a cat", "tag": tag} for tag in tags]
    assert tags_of(EvaluateFlags(reward=("tiny",)), entries) == expected


@pytest.mark.parametrize("count", [2, MAX_TAGS, MAX_TAGS + 1])
def test_the_table_has_the_mean_of_each_tag_unless_there_are_too_many(count):
    tags = [f"tag{i % count}" for i in range(2 * count)]
    values = np.arange(2.0 * count)[:, None]
    summary = summarize({"a": {"mine": values}}, tags)
    assert summary["mine"]["a"]["tasks"] == {f"tag{i}": i + count / 2 for i in range(count)}
    header, row, *_ = format_table(summary).splitlines()
    columns = [f"tag{i}" for i in range(count)] if count <= MAX_TAGS else []
    assert header.split() == ["mine", "mean", "change", *columns]
    assert row.split()[3:] == [f"{i + count / 2:.3f}" for i in range(len(columns))]


def test_the_interval_is_students():
    values = np.array([1.0, 2.0, 4.0, 7.0])
    mean, half = confidence_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    mean, half = confidence_interval(np.array([3.0]))
    assert mean == 3.0 and math.isnan(half)


def test_the_interval_covers_the_truth_95_times_of_100():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(4000):
        mean, half = confidence_interval(generator.normal(size=12))
        hits += abs(mean) <= half
    assert hits / 4000 == pytest.approx(0.95, abs=0.011)  # 3 standard errors


def test_changes_are_paired_by_prompt_and_images_of_a_prompt_averaged_first():
    generator = np.random.default_rng(1)
    difficulty = generator.normal(size=(50, 1))
    noise = generator.normal(scale=0.01, size=(2, 50, 4))
    scores = {"a": {"r": difficulty + noise[0]}, "b": {"r": difficulty + noise[1] + 0.1}}
    first, second = summarize(scores, None)["r"].values()
    assert second["change"] == pytest.approx(0.1, abs=0.01)
    assert second["change_half"] < 0.01 < 0.1 < second["half"]
    assert (first["mean"], first["half"]) == confidence_interval(scores["a"]["r"].mean(1))
    assert "change" not in first


# ---------------------------------------------------------------------------------------- pictures of others


def test_a_folder_of_pictures_scores_as_the_model_that_drew_them(evaluated, prompt_file, tmp_path, monkeypatch, capsys):
    flags = ["--prompts", prompt_file, "--reward", "tiny", "--num", "2"]
    draw = ["--steps", "1", "--keep-images", "--out", tmp_path / "drawn"]
    assert "error" not in output_of(monkeypatch, capsys, *flags, *draw)
    folder = tmp_path / "drawn" / "shapes_tiny-flux" / "images"
    assert "error" not in output_of(monkeypatch, capsys, *flags, "--images", folder, "--out", tmp_path / "read")
    (drawn,), (read,) = scores_in(tmp_path / "drawn").values(), scores_in(tmp_path / "read").values()
    np.testing.assert_allclose(read["tiny"], drawn["tiny"], atol=0.02)  # pictures have 256 levels
    next(folder.iterdir()).unlink()
    refusal = refusal_of(monkeypatch, capsys, *flags, "--images", folder, "--out", tmp_path / "new")
    assert f"--images {folder} holds" in refusal and "--num 2" in refusal


@pytest.mark.parametrize("flag, value", [("--size", "64"), ("--seed", "1"), ("--strength", "0.5"), ("--steps", "4")])
def test_flags_of_drawing_are_refused_with_pictures(flag, value, tmp_path, monkeypatch, capsys):
    refusal = refusal_of(monkeypatch, capsys, flag, value, "--images", tmp_path, "--out", tmp_path / "out")
    name = flag.replace("--steps", "--rollout-steps")
    assert f"{name} means nothing with --images" in refusal


def test_results_are_json_whatever_the_numbers_are():
    scores = {"NaN": {"r": np.array([[1.0, math.inf]])}, "half": math.nan}
    assert without_nonfinite(scores) == {"NaN": {"r": [[1.0, None]]}, "half": None}


def test_a_picture_that_is_lost_is_drawn_again(prompt_file, tmp_path, monkeypatch, capsys):
    flags = ["--prompts", prompt_file, "--reward", "tiny", "--out", tmp_path / "out", *ONE_STEP]
    assert "error" not in output_of(monkeypatch, capsys, *flags)
    picture = tmp_path / "out" / "shapes_tiny-flux" / "00001.png"
    content = picture.read_bytes()
    picture.write_bytes(b"")
    assert "error" not in output_of(monkeypatch, capsys, *flags) and picture.read_bytes() == content
