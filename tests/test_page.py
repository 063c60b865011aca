"""The pages of runs: read in a browser as people do, and made again from what lies on disk."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import Config, command, parse
from infra.jsonl import append_line
from infra.logs import Log
from infra.page import SIDE, data_uri, models_page, runs_page
from infra.summary import confidence_interval, summarize
from tools import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
)  # fmt: skip
PROMPTS = ["a photo of a circle", "two </script> squares"]
JUDGED = {0: [0.0, 1.0, 0.0], 10: [1.0, 1.0, 0.5]}


def write_run(folder: Path, lr: float = 1e-4) -> Path:
    """A run that is under way: ten updates of twenty, two evaluations, and half a line of the next update."""
    for step, scores in JUDGED.items():
        evaluation = dict(step=step, reward=1.0 + step / 10, tiny=1.0 + step / 10, single=0.25 + step / 20)
        evaluation |= dict(judge=float(np.mean(scores)), by_prompt={"judge": scores}, seconds=1.0)
        (folder / "samples" / f"step_{step:04d}").mkdir(parents=True, exist_ok=True)
        for i in (0, 2):
            Image.new("RGB", (64, 48), (10 * step, 80, 80 * i)).save(
                folder / "samples" / f"step_{step:04d}" / f"{i}.png"
            )
        append_line(folder / "eval.jsonl", evaluation)
    (folder / "samples" / "prompts.json").write_text(json.dumps({0: PROMPTS[0], 2: PROMPTS[1]}))
    for step in range(10):
        update = dict(step=step, reward=1.0, tiny=1.0, k=0.9, j=0.4, d_j=0.125, seconds=2.0, memory=0.5)
        append_line(folder / "metrics.jsonl", update | dict(grad_norm=float("nan") if step == 5 else 1.5))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "rew')
    flags = dict(updates=20, lr=lr, prompts_read=["a", "b"], command="python train.py shapes", revision="abc1234")
    (folder / "config.json").write_text(json.dumps(flags))
    (folder / "warnings.txt").write_text("warning: judge fell\n")
    return folder


def opened(file: Path, script: str, tmp_path: Path) -> str:
    """The document as a browser has it after a script has used the page."""
    copy = tmp_path / "opened.html"
    copy.write_text(f"{file.read_text()}<script>{script}</script>")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run(
        [CHROMIUM, *FLAGS, profile, copy.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout


def content(file: Path) -> dict:
    """What the page is given to draw."""
    text = re.search(r"<script>const content = (.*);</script>", file.read_text())[1]
    return json.loads(text)


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
def test_in_a_browser_the_verdict_is_read_the_slider_moves_and_another_prompt_is_chosen(tmp_path):
    runs_page([write_run(tmp_path / "run")], tmp_path / "run" / "index.html")
    script = """
        document.querySelectorAll(".thumbs button")[1].click();
        wipe.value = 80;
        wipe.dispatchEvent(new Event("input"));
    """
    document = opened(tmp_path / "run" / "index.html", script, tmp_path)
    mean, half = confidence_interval(np.subtract(JUDGED[10], JUDGED[0]))
    assert "<strong>0.833</strong>" in document and f"+{mean:.3f} ±{half:.3f}" in document
    assert "--at: 80%" in document
    assert '<p class="prompt" id="prompt">two &lt;/script&gt; squares</p><p id="scores">judge 0 → 0.500</p>' in document
    assert "warning: judge fell" in document and "python train.py shapes" in document and "abc1234" in document
    titles = re.findall("<figcaption>(.*?)</figcaption>", document)
    assert titles == [
        "reward",
        "by task",
        "judge",
        "d_j",
        "seconds of an update",
        "grad_norm",
        "where leaps start and meet",
    ]


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
def test_several_runs_lie_over_each_other(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=1e-3)]
    runs_page(runs, tmp_path / "both.html")
    document = opened(tmp_path / "both.html", "", tmp_path)
    judge = re.search("<figcaption>judge</figcaption>.*?</figure>", document)[0]
    assert judge.count('class="line"') == 2 and ">a <b>" in judge and ">b <b>" in judge
    assert [table["rows"] for table in content(tmp_path / "both.html")["tables"]][1] == [["lr", "0.0001", "0.001"]]
    names = [column["name"] for column in content(tmp_path / "both.html")["pictures"]["columns"]]
    assert names == ["a, step 0", "a, step 10", "b, step 0", "b, step 10"]


def test_runs_of_one_name_are_told_apart_and_may_watch_other_rewards(tmp_path):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")]
    evaluations = (runs[1] / "eval.jsonl").read_text()
    (runs[1] / "eval.jsonl").write_text(evaluations.replace('"judge"', '"clip"'))
    runs_page(runs, tmp_path / "both.html")
    drawn = content(tmp_path / "both.html")
    assert {curve["run"] for curve in drawn["series"]} == set(map(str, runs))
    assert [column["scores"] for column in drawn["pictures"]["columns"]] == [[0, 0], [1, 0.5], [], []]


def test_a_page_needs_nothing_else(tmp_path):
    runs_page([write_run(tmp_path / "run")], tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which is not loaded
    assert not re.search(r"<link|@import|src=|url\(", text)
    assert text.count("data:image/png") == 4  # two prompts, two evaluations


def test_large_pictures_become_small_jpegs_and_small_ones_stay_as_they_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (720, 960, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:64, :64]).save(tmp_path / "small.png")
    large, small = data_uri(tmp_path / "large.png"), data_uri(tmp_path / "small.png")
    assert large.startswith("data:image/jpeg;base64,") and len(large) < SIDE * SIDE
    assert small.startswith("data:image/png;base64,")


def test_a_picture_or_a_run_that_is_missing(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "samples" / "step_0010" / "2.png").unlink()
    runs_page([run], tmp_path / "index.html")
    assert [column["name"] for column in content(tmp_path / "index.html")["pictures"]["columns"]] == ["step 0"]
    with pytest.raises(ValueError, match="nothing holds no evaluation of a run"):
        runs_page([tmp_path / "nothing"], tmp_path / "none.html")


@pytest.mark.parametrize("text", [None, "{", "{}", "3", '{"9": "a"}', '{"x": "a"}', '{"step": 1}\n', "[]\n", "\x89"])
@pytest.mark.parametrize("name", ["config.json", "eval.jsonl", "samples/prompts.json", "metrics.jsonl", "warnings.txt"])
def test_a_file_that_no_run_has_written_is_named_or_left_out(name, text, tmp_path):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    if text is not None:
        (run / name).write_bytes(text.encode("latin1"))
    try:
        runs_page([run], tmp_path / "index.html")
    except ValueError as error:
        assert name in str(error) or (name == "eval.jsonl" and "run holds no evaluation" in str(error))
    else:
        # Without them a run has no pictures, curves or warnings yet.
        assert name not in ("config.json", "eval.jsonl")


def test_a_number_that_a_later_evaluation_lacks_and_a_damaged_picture_are_named(tmp_path):
    run = write_run(tmp_path / "run")
    picture = run / "samples" / "step_0010" / "2.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ValueError, match=str(picture)):
        runs_page([run], tmp_path / "index.html")
    append_line(run / "eval.jsonl", dict(step=20, reward=1.0, judge=1.0, by_prompt={"clip": [1.0]}))
    with pytest.raises(ValueError, match=r"eval\.jsonl .*'judge'"):
        runs_page([run], tmp_path / "index.html")


def test_a_page_of_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the folder of a run"):
        runs_page([], tmp_path / "index.html")


def test_the_command_writes_one_page_and_tells_what_is_no_run(tmp_path, monkeypatch, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["page", str(run), "--out", str(out)])
    page.main()
    assert content(out)["title"] == "run"
    monkeypatch.setattr("sys.argv", ["page", str(tmp_path), "--out", str(out)])
    with pytest.raises(SystemExit):
        page.main()
    assert "holds no evaluation" in capsys.readouterr().err


def test_models_side_by_side_show_what_gained_and_what_lost_most(tmp_path):
    scores = {"base": {"judge": np.zeros((60, 1))}, "tuned": {"judge": np.linspace(-1, 1, 60)[:, None]}}
    for model in scores:
        (tmp_path / model).mkdir()
        for i in range(60):
            Image.new("RGB", (8, 8)).save(tmp_path / model / f"{i:05d}.png")
    models_page(summarize(scores, None), scores, [f"prompt {i}" for i in range(60)], tmp_path)
    drawn = content(tmp_path / "index.html")
    assert drawn["pictures"]["prompts"][:2] == ["prompt 59", "prompt 58"]
    assert len(drawn["pictures"]["prompts"]) == 48 and "prompt 30" not in drawn["pictures"]["prompts"]
    assert drawn["cards"][0]["change"] == pytest.approx(0)


@pytest.mark.parametrize(
    "cfg",
    [
        Config(reward_input="xhat_0", updates=3, watch=("judge", "shapes/vivid.py:vivid"), decay=False, bf16=True),
        Config(method="refl", reward=("a b.py:f:0.5", "tiny"), lam=(None, 0.5), watch=(), size=("64", "32x64")),
        replace(parse(["flux-dev-lora"])[0], guidance=None, out=Path("a folder"), log=("trackio",)),
    ],
)
def test_the_command_of_a_run_makes_the_same_flags(cfg):
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command(cfg)}"], capture_output=True, text=True).stdout
    python, script, *flags = words.rstrip("\0").split("\0")
    assert (python, script) == ("python", "train.py")
    assert parse(flags)[0] == cfg


def test_what_a_method_logs_is_on_the_bar_and_a_warning_is_kept(tmp_path):
    log = Log(Config(), tmp_path, 0, is_first_rank=True)
    log.update(dict(step=0, reward=0.5, tiny=0.5, d_j=0.125, grad_norm=2.0, seconds=1.0, seconds_rollout=0.5))
    assert log.bar.postfix == "reward 0.500 grad 2.00 d_j 0.125"
    log.say("warning: it rains")
    log.say("step 1")
    log.page()  # there is no evaluation yet: one warning, and the run goes on
    log.close()
    lines = (tmp_path / "warnings.txt").read_text().splitlines()
    assert lines[0] == "warning: it rains" and len(lines) == 2 and "holds no evaluation" in lines[1]
