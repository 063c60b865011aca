"""The commands as a user runs them: a short real run, its files, and what bad input is told."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import evaluate
import sample
import train
from config import PRESETS, Config
from formats.folders import load_pipeline
from formats.sampling import draw_as_trained, saved_sampling
from infra.distributed import join
from infra.jsonl import read_log
from infra.meter import Meter
from infra.methods import recorded_flags
from infra.prompts import printable
from infra.seeds import generator_of
from infra.watch import change_of, folder_advice, hacking_warnings, preview_indices
from rewards import LAMBDA, WEIGHTS
from shapes.world import TASKS
from start import Setup
from tests.processes import script
from tests.tiny_folders import copy_tokenizers
from tests.tiny_rewards import write_hpsv2, write_hpsv3

ROOT = Path(train.__file__).parent
SHORT = ["--steps", "8", "--batch", "24", "--eval-every", "4", "--lr", "1e-4", "--no-decay", "--ema", "0.5"]


def trained(cfg: Config) -> Setup:
    """Train in this process, and return what was trained."""
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        train.run(cfg, setup, process)
    return setup


@pytest.fixture(scope="module")
def few_prompts(tmp_path_factory) -> Path:
    """A handful of evaluation prompts, all tasks among them, so that a test need not draw 360 images."""
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    path = tmp_path_factory.mktemp("prompts") / "few.txt"
    path.write_text("# a comment, and a blank line\n\n" + "\n".join(lines[::12]) + "\n")
    return path


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, few_prompts) -> Path:
    out = tmp_path_factory.mktemp("runs") / "short"
    done = script("train.py", "shapes", *SHORT, "--eval-prompts", few_prompts, "--out", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    return out


# ---------------------------------------------------------------------------------------- a real run


def test_a_short_run_writes_all_its_files(short_run):
    names = {p.name for p in short_run.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "eval.jsonl", "index.html", "before_after.png", "samples", "best", "final",
        "checkpoints", "newest_checkpoint",
    }  # fmt: skip
    assert [f.name for f in (short_run / "checkpoints").iterdir()] == ["step_000008"]  # the last, --save-every or not
    assert {p.name for p in (short_run / "samples").glob("*.png")} == {f"step_{i:04d}.png" for i in (0, 4, 8)}
    for picture in [*short_run.glob("*.png"), *short_run.glob("samples/*.png")]:
        assert Image.open(picture).size[0] > 300
    assert json.loads((short_run / "config.json").read_text())["lr"] == 1e-4


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(reward=("hpsv2",), watch=()), "weights/HPS_v2.1_compressed.pt: the reward hpsv2"),
        (dict(reward=("tiny", "mine.py:f")), "no file 'mine.py'"),
        (dict(watch=("nonsense",)), "no reward 'nonsense'"),
        (dict(watch=("tiny",)), "two are named 'tiny'"),
        (dict(reward=("hpsv2=/nope",)), "no reward file at '/nope'"),
        (dict(lr=-1.0), "--lr -1.0 is out of range"),
        (dict(lora_alpha=2.0), "--lora-alpha means nothing without --lora"),
        (dict(out=Path(__file__) / "run"), "nothing can be written in"),
        (dict(size=("63",), watch=()), "image size 63x63"),
        (dict(low=0.9, high=0.1), "--low 0.9 is above --high 0.1"),
        (dict(low=0.99), "cannot pick 2 leaps from 1 steps"),
        (dict(method="refl", leaps=3), "--leaps means nothing with --method refl"),
        (dict(method="full", weight="none"), "--weight means nothing with --method full"),
        (dict(model="no/such/folder"), "no model at 'no/such/folder'"),
    ],
)
def test_what_cannot_be_is_told_before_any_weights_are_read(flags, words, monkeypatch):
    monkeypatch.setattr(train, "build_network", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=words), join("cpu") as process:
        train.set_up(Config(**{"out": Path("nonexistent")} | flags), process)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")


@pytest.mark.parametrize(
    "flags", [pytest.param(dict(device="cuda"), marks=NO_GPU), dict(device="foo"), dict(device="cpu", shard=0)]
)
def test_a_device_or_a_group_that_cannot_be_is_an_error(flags):
    with pytest.raises(ValueError, match=f"--{list(flags)[-1]} {list(flags.values())[-1]}"), join(**flags):
        pass


@pytest.mark.parametrize(
    ("rank", "ranks", "device", "asked"),
    [(0, 1, "cuda", "cuda:0"), (0, 1, "cuda:2", "cuda:2"), (3, 8, "cuda", "cuda:3"), (3, 8, "cuda:2", None),
     (0, 1, "mps", "mps"), (0, 2, "mps", None)],
)  # fmt: skip
def test_a_rank_touches_no_gpu_but_its_own(rank, ranks, device, asked, monkeypatch):
    """Asking a GPU whether it is there takes some of its memory for the life of the process."""
    touched = []

    def device_of(name):
        touched.append(name)
        raise ValueError("--device: seen")

    monkeypatch.setattr("infra.distributed.device_of", device_of)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match="--device"), join(device):
        pass
    assert touched == ([asked] if asked else [])


def test_an_error_of_ones_own_code_in_a_run_shows_where_it_was(few_prompts, tmp_path):
    (tmp_path / "helper.py").write_text("calls = []\n")
    (tmp_path / "mine.py").write_text(
        "from helper import calls\n"
        "def f(images, prompts):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 5: raise ValueError('deep inside')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    done = script("train.py", "--reward", f"{tmp_path / 'mine.py'}:f", "--steps", "3", "--batch", "4", "--out",
                  tmp_path / "run", "--eval-prompts", few_prompts)  # fmt: skip
    assert done.returncode == 1 and "ValueError: deep inside" in done.stderr, done.stderr
    assert f"{tmp_path / 'mine.py'}, line 4)" in done.stderr and "Traceback" not in done.stderr


def test_every_update_logs_what_the_method_predicts(short_run):
    updates = read_log(short_run / "metrics.jsonl")
    assert [u["step"] for u in updates] == list(range(8))
    for u in updates:
        assert u.keys() >= {"step", "reward", "loss", "grad_norm", "k", "j", "d_j", "d_0", "w", "seconds"}
        assert 1 >= u["k"] > u["j"] > 0 and u["grad_norm"] > 0
        assert u["d_j"] >= 0 and u["d_0"] >= 0  # 0 where a leap is a single step of the rollout
        assert 0 < u["w"] <= 1 / 0.2 + 1e-6  # both distances are at least tau


def test_the_first_evaluation_precedes_the_first_update_and_the_last_follows_the_last(short_run):
    evals = read_log(short_run / "eval.jsonl")
    assert [e["step"] for e in evals] == [0, 4, 8]
    for e in evals:
        assert e.keys() - {"saved_to"} == {"step", "judge", *TASKS, "reward", "tiny", "seconds", "by_prompt"}
        assert e["judge"] == pytest.approx(sum(e[t] for t in TASKS) / 6)
        assert e["reward"] == e["tiny"]


def test_a_short_run_raises_the_reward_of_held_out_prompts(short_run):
    evals = read_log(short_run / "eval.jsonl")
    assert evals[-1]["reward"] > evals[0]["reward"] + 0.1


def test_the_final_folder_is_a_checkpoint_that_was_trained(short_run):
    before, after = load_pipeline(ROOT / "shapes" / "tiny-flux"), load_pipeline(short_run / "final")
    moved = [(a - b).abs().max().item() for a, b in zip(after.flux.parameters(), before.flux.parameters(), strict=True)]
    assert max(moved) < 8 * 1e-4 * 1.2 and sum(m > 0 for m in moved) > 0.9 * len(moved)


def test_sample_draws_from_the_final_folder(short_run, tmp_path):
    out = tmp_path / "deep" / "grid.png"
    done = script(
        "sample.py", "--model", short_run / "final", "--prompt", "a photo of two circles", "--out", out,
        "--num", "3", "--steps", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and Image.open(out).size[0] > 3 * 128


def gradient_of_a_step(cfg: Config) -> torch.Tensor:
    cfg = replace(cfg, out=Path("nonexistent"), batch=4)
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        train.accumulate_batch_gradient(
            cfg, setup, process, 4, Meter(process.device)
        )  # two long leaps, from steps 0 and 2 of 5
    return torch.cat([p.grad.flatten() for p in setup.pipe.flux.parameters()])


def test_randomness_is_a_function_of_seed_and_step():
    draws = {key: torch.randn(3, generator=generator_of(*key)).tolist() for key in [(0, 1), (1, 0), (0, 0), (1, 1)]}
    assert draws[0, 1] == torch.randn(3, generator=generator_of(0, 1)).tolist()
    assert len({tuple(d) for d in draws.values()}) == 4


def test_the_same_step_has_the_same_gradient():
    torch.testing.assert_close(gradient_of_a_step(Config()), gradient_of_a_step(Config()), rtol=0, atol=0)


def test_a_method_that_asks_for_the_reward_several_times_logs_one_value_a_sample():
    cfg = Config(out=Path("nonexistent"), batch=4, rollout_steps=2, method="draft_lv", micro_batch=2)
    with join("cpu") as process:
        values = train.accumulate_batch_gradient(cfg, train.set_up(cfg, process), process, 0, Meter(process.device))
    assert {len(value) for value in values.values()} == {4}


def test_updates_are_adamws_of_the_clipped_gradient_at_a_rate_that_falls_to_zero():
    """Two of four updates against AdamW written out in float64."""
    cfg = Config(batch=4, rollout_steps=2, updates=4, lr=1e-3, weight_decay=0.1, clip=0.5, ema=0.75)
    b1, b2 = 0.9, 0.999
    with join("cpu") as process:
        setup = train.set_up(replace(cfg, out=Path("nonexistent")), process)
        run = train.make_state(cfg, setup.pipe.flux)

        def flat(tensors) -> torch.Tensor:
            return torch.cat([t.detach().flatten() for t in tensors]).double()

        weights = averages = flat(run.params.values())
        first = second = torch.zeros_like(weights)
        for step in range(2):
            train.accumulate_batch_gradient(cfg, setup, process, step, Meter(process.device))
            g = flat(p.grad for p in run.params.values())
            train.zero_gradients(run)
            assert g.norm() > 2 * cfg.clip
            g, lr = g * cfg.clip / g.norm(), cfg.lr * (1 - step / 4)
            first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
            scaled = first / (1 - b1 ** (step + 1)) / ((second / (1 - b2 ** (step + 1))).sqrt() + 1e-8)
            weights = weights - lr * cfg.weight_decay * weights - lr * scaled
            averages = 0.75 * averages + 0.25 * weights
            train.one_update(cfg, setup, run, process, step)
            moved = (flat(run.params.values()) - weights).abs() / lr  # where a gradient is tiny, its sign is rounding's
            assert moved.median() < 1e-3 and moved.mean() < 1e-2
            assert ((flat(run.averages.values()) - averages).abs() / lr).mean() < 1e-2


def test_what_has_reached_its_lambda_has_no_gradient_and_is_satisfied_where_all_rewards_have():
    assert gradient_of_a_step(Config(lam=(-2.0,))).norm() == 0
    vivid = f"{ROOT / 'shapes' / 'vivid.py'}:vivid"
    for lam, satisfied in (((-2.0, -2.0), 1.0), ((-2.0, 2.0), 0.0)):
        cfg = Config(out=Path("nonexistent"), batch=4, rollout_steps=2, reward=("tiny", vivid), lam=lam)
        with join("cpu") as process:
            values = train.accumulate_batch_gradient(cfg, train.set_up(cfg, process), process, 0, Meter(process.device))
        assert values["satisfied"].mean() == satisfied


def test_a_policy_gradient_raises_the_weighted_sum_of_the_rewards():
    def gradient(*rewards: str) -> torch.Tensor:
        cfg = Config(method="flow_grpo", reward=rewards, out=Path("nonexistent"), batch=8, rollout_steps=2)
        with join("cpu") as process:
            setup = train.set_up(cfg, process)
            train.accumulate_batch_gradient(cfg, setup, process, 0, Meter(process.device))
        return torch.cat([p.grad.flatten() for p in setup.pipe.flux.parameters()])

    vivid = f"{ROOT / 'shapes' / 'vivid.py'}:vivid"
    alone, nothing, half = gradient("tiny"), gradient("tiny", f"{vivid}:0"), gradient("tiny", f"{vivid}:0.5")
    torch.testing.assert_close(nothing, alone)
    assert (half - alone).norm() > 0.01 * alone.norm()


def test_one_gradient_differs_by_method_and_by_ablation():
    settings = [dict(), dict(method="refl"), dict(method="full"), dict(alpha=0.0), dict(weight="none"),
                dict(reward_input="xhat_0"), dict(leaps=1), dict(nested_only=True)]  # fmt: skip
    gradients = [gradient_of_a_step(replace(Config(), **s)) for s in settings]
    for i, a in enumerate(gradients):
        assert a.norm() > 0
        assert all((a - b).norm() > 1e-4 * a.norm() for b in gradients[i + 1 :])


def test_the_gradient_through_a_bf16_vae_is_nearly_that_of_fp32():
    exact, rounded = gradient_of_a_step(Config()).double(), gradient_of_a_step(Config(vae_bf16=True)).double()
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()


# ------------------------------------------------------------------------------------------- rewards


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The rewards of the paper, small and random, under their published names."""
    root = tmp_path_factory.mktemp("weights")
    copy_tokenizers(root)
    words = len(load_pipeline(ROOT / "shapes" / "tiny-flux").clip_tokenizer)
    write_hpsv2(root / "HPS_v2.1_compressed.pt", words)
    write_hpsv3(root / "HPSv3")
    shutil.copytree(ROOT / "shapes" / "tiny-reward", root / "PickScore_v1")
    return root


FILES = {"hpsv2": "HPS_v2.1_compressed.pt", "pickscore": "PickScore_v1", "hpsv3": "HPSv3"}
QUICK = dict(updates=6, batch=8, rollout_steps=3, eval_every=6, lr=1e-4, decay=False, ema=0.0, watch=())


@pytest.mark.parametrize("name", FILES)
def test_each_reward_of_the_paper_is_raised_end_to_end(name, weights, few_prompts, tmp_path):
    cfg = Config(out=tmp_path / "run", reward=(f"{name}={weights / FILES[name]}",), lam=(None,),
                       eval_prompts=few_prompts, **QUICK)  # fmt: skip
    trained(cfg)
    first, last = read_log(tmp_path / "run" / "eval.jsonl")
    spread = {"hpsv2": 1e-3, "pickscore": 1e-2, "hpsv3": 1e-4}[name]  # what 6 updates do to these random networks
    assert last[name] > first[name] + spread and last["reward"] == last[name]


def test_several_rewards_are_weighed_and_logged_separately(weights, few_prompts, tmp_path):
    specs = tuple(f"{name}={weights / file}:{weight}" for (name, file), weight in zip(FILES.items(), (0.5, 2, 0.25)))
    cfg = Config(out=tmp_path / "run", reward=specs, eval_prompts=few_prompts, **QUICK | dict(updates=2))
    assert [r.lam for r in trained(cfg).rewards] == [0.55, 0.4, 13.5]  # the paper's
    for entry in [*read_log(cfg.out / "metrics.jsonl"), *read_log(cfg.out / "eval.jsonl")]:
        pickscore = entry["pickscore"] / 10  # reported times its logit scale, and as a cosine in the loss
        assert entry["reward"] == pytest.approx(0.5 * entry["hpsv2"] + 2 * pickscore + 0.25 * entry["hpsv3"])
    assert all(entry[f"{name}_grad"] > 0 for name in FILES for entry in read_log(cfg.out / "metrics.jsonl"))


def test_the_pull_of_each_reward_is_its_own_gradient_in_the_image_and_grows_with_its_weight(tmp_path, few_prompts):
    """vivid's is 1 / pixels in the highest channel of each pixel and minus that in the lowest."""
    vivid = f"{ROOT / 'shapes' / 'vivid.py'}:vivid"
    for weight in (1, 3):
        cfg = Config(out=tmp_path / f"{weight}", reward=("tiny", f"{vivid}:{weight}"), lam=(None, None), alpha=0.3,
                     weight="none", eval_prompts=few_prompts, **QUICK | dict(updates=1))  # fmt: skip
        trained(cfg)
        (entry,) = read_log(cfg.out / "metrics.jsonl")
        assert entry["vivid_grad"] == pytest.approx(weight * (2 * 64 * 64) ** 0.5 / 64**2, rel=1e-3)
        assert entry["tiny_grad"] > 0


def test_the_gradient_of_several_rewards_is_the_weighted_sum_of_theirs():
    tiny, vivid = "tiny", f"{ROOT / 'shapes' / 'vivid.py'}:vivid"
    alone = [gradient_of_a_step(Config(reward=(spec,), lam=(None,))) for spec in (tiny, vivid)]
    expected = 0.5 * alone[0] + 2 * alone[1]
    together = gradient_of_a_step(Config(reward=(f"{tiny}:0.5", f"{vivid}:2"), lam=(None, None)))
    torch.testing.assert_close(together, expected, atol=1e-6, rtol=1e-4)


def test_a_watched_reward_catches_a_hackable_one(tmp_path, few_prompts, capfd):
    cfg = Config(out=tmp_path / "run", reward=("shapes/vivid.py:vivid",), watch=("judge", "tiny"), updates=60,
                       batch=16, eval_every=5, eval_prompts=few_prompts, lr=2e-4, decay=False, ema=0.5, patience=2,
                       stop_early=True)  # fmt: skip
    trained(cfg)
    evals, said = read_log(cfg.out / "eval.jsonl"), capfd.readouterr()
    assert "it is being hacked" in said.out + said.err
    assert len(evals) < 13 and evals[-1]["vivid"] > evals[0]["vivid"]  # it stopped before 60
    best = max(evals, key=lambda e: e["judge"])
    assert best["judge"] > evals[-1]["judge"] and best["step"] < evals[-1]["step"]
    assert "use best/, not final/" in said.out + said.err
    again = replace(cfg, model=str(cfg.out / "best"), out=tmp_path / "again")
    with join("cpu") as process:
        after, _ = train.evaluate(again, train.set_up(again, process), process)
    assert after["tiny"] == pytest.approx(best["tiny"], abs=1e-4)


@pytest.mark.parametrize(
    "judge, reward, noise, hacked",
    [
        ([5, 4, 3, 2], [1, 2, 3, 4], 1.0, True),
        ([4, 5, 4, 3, 2], [1, 2, 3, 4, 5], 1.0, True),
        ([5, 4, 3, 6], [1, 2, 3, 4], 1.0, False),  # it came back
        ([2, 5, 4, 3], [1, 2, 3, 4], 1.0, False),  # only two evaluations ago
        ([5, 4, 3, 2], [2, 3, 4, 1], 1.0, False),  # the reward fell too
        ([5, 4, 3, 2], [2, 3, 4, 2], 1.0, False),  # or is where it was
        ([5, 4.9, 4.9, 4.9], [1, 2, 3, 4], 1.0, False),  # a change that noise explains
        ([5, 4.79, 4.79, 4.79], [1, 2, 3, 4], 1.0, False),  # of one and a half standard errors
        ([5, 4.9, 4.9, 4.9], [1, 2, 3, 4], 0.1, True),  # images differ as much, but all changed alike
        ([5], [1], 1.0, False),
    ],
)
def test_hacking_is_a_watched_reward_clearly_below_its_best_while_the_trained_one_is_above(
    judge, reward, noise, hacked
):
    rng = np.random.default_rng(0)
    images, own = rng.normal(size=100), noise * rng.normal(size=(len(judge), 100))
    own -= own.mean(1, keepdims=True)
    by_prompt = [{"judge": j + images - images.mean() + row} for j, row in zip(judge, own, strict=True)]
    evals = [{"judge": j, "reward": r, "by_prompt": b} for j, r, b in zip(judge, reward, by_prompt, strict=True)]
    assert (change_of(evals, "judge", patience=3) == "rose") == hacked


def test_training_diverges_where_the_trained_reward_falls_with_the_watched_one():
    values = [(5, 4), (4, 3), (3, 2), (2, 1)]
    evals = [{"step": i, "judge": j, "reward": r, "by_prompt": {"judge": [j, j]}} for i, (j, r) in enumerate(values)]
    assert hacking_warnings(evals[:3], ["judge"], patience=3) == []
    (warning,) = hacking_warnings(evals, ["judge"], patience=3)
    assert "while the trained reward fell from 4.000 to 1.000: training diverges" in warning
    assert hacking_warnings([*evals, evals[-1]], ["judge"], patience=3) == []  # said once


def test_a_watched_reward_that_is_no_number_is_told_once_and_decides_nothing():
    values = [5.0, math.nan, math.nan]
    evals = [{"step": i, "judge": j, "reward": i, "by_prompt": {"judge": [j, j]}} for i, j in enumerate(values)]
    assert hacking_warnings(evals[:1], ["judge"], patience=1) == []
    (warning,) = hacking_warnings(evals[:2], ["judge"], patience=1)
    assert "judge is no number at step 1" in warning
    assert hacking_warnings(evals, ["judge"], patience=1) == []
    assert folder_advice(evals[0], evals[2], "judge").startswith("look at both: judge is no number after 2 updates")


def test_pictures_of_fewer_than_24_prompts_are_drawn_once():
    assert preview_indices(["a"] * 3) == [0, 1, 2] and preview_indices(["a"]) == [0]
    assert len(set(preview_indices(["a"] * 100))) == 24


def test_the_last_lines_name_the_folder_to_use_and_why():
    def entry(step: int, judge: float) -> dict:
        return {"step": step, "judge": judge, "by_prompt": {"judge": [judge, judge + 0.1]}}

    last = entry(5, 0.6)
    assert folder_advice(last, last, "judge") == "use final/: judge is 0.600, and best/ is the same"
    fallen = folder_advice(last, entry(9, 0.2), "judge")
    assert fallen == "use best/, not final/: judge was 0.600 after 5 updates and is 0.200 after 9"
    noise = [
        {"step": i, "judge": j, "by_prompt": {"judge": by}}
        for i, (j, by) in enumerate([(0.5, [1, 0]), (0.49, [0, 0.98])])
    ]
    assert "may be chance" in folder_advice(*noise, "judge")
    assert folder_advice(None, last, "judge") == "use final/: judge is 0.600, and there is no best/"
    risen = folder_advice(entry(0, 0.4), last, "judge")  # where best/ could not be written again
    assert risen == "use final/: judge is 0.600; judge was 0.400 before training, in best/"


@pytest.mark.parametrize(
    "preset, alpha, lam, lr",
    [("flux-dev-hpsv2", 0.3, 0.55, 1e-5), ("flux-dev-pickscore", 0.1, 0.4, 1e-5), ("flux-dev-hpsv3", 0.1, 13.5, 8e-6)],
)
def test_the_flux_presets_are_the_papers_settings_and_name_what_they_need(preset, alpha, lam, lr):
    description, cfg = PRESETS[preset]
    method = recorded_flags(cfg)  # with the defaults of leapalign
    assert (method["alpha"], method["tau"], method["reward_input"]) == (alpha, 0.1, "x_0")
    assert (cfg.lr, cfg.ema, cfg.decay) == (lr, 0.995, False)
    assert (cfg.rollout_steps, cfg.size, cfg.guidance, cfg.batch, cfg.updates) == (25, ("720",), 3.5, 64, 300)
    assert LAMBDA[cfg.reward[0]] == lam and cfg.lam == () and set(cfg.watch).isdisjoint(cfg.reward)
    for needed in (cfg.model, cfg.prompts, *(WEIGHTS[name] for name in (*cfg.reward, *cfg.watch))):
        assert str(needed) in description


# ---------------------------------------------------------------------------------------- bad input


def told(module, capsys, monkeypatch, *arguments: str) -> str:
    """What a command prints on stderr when it refuses to start, always with exit code 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 2
    text = capsys.readouterr()
    assert "Traceback" not in text.err + text.out
    return text.err + text.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--no-such-flag", "1"], ["no-such-flag"]),
        (["flux-de"], ["flux-de"]),
        (["--lr", "fast"], ["lr"]),
        (["--model", "no/such/folder"], ["no/such/folder"]),
        (["--reward", "no/such/reward"], ["no/such/reward", "hpsv2", "NAME=PATH"]),
        (["--reward", "clip=./no/such"], ["./no/such"]),
        (["--reward", "hpsv2"], ["weights/HPS_v2.1_compressed.pt", "hpsv2=PATH"]),
        (["--reward", "tiny:heavy"], ["tiny:heavy"]),
        (["--reward", "tiny:1e"], ["weight", "tiny:1e"]),
        (["--reward"], ["--reward"]),
        (["--reward", "judge:2", "--watch", "tiny"], ["judge has no gradient", "flow_grpo"]),
        (["--reward", "{nograd}:nograd"], ["nograd has no gradient"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["--resume", "--export", "x", "--at", "3"], ["holds no run"]),
        (["--at", "3"], ["--at", "--resume"]),
        (["--smoke", "--resume"], ["--smoke", "--resume"]),
        (["--smoke", "--resume", "--export", "x"], ["--smoke", "--export"]),
        (["--resume", "--export", "x.pt"], ["--export x.pt", "FILE.safetensors"]),
        (["--resume", "--export", "x.SAFETENSORS"], ["--export x.SAFETENSORS", "FILE.safetensors"]),
        (["--resume", "--export", "/proc/x.safetensors"], ["--export /proc/x.safetensors", "nothing can be written"]),
        (["--lora", "0"], ["--lora", "0"]),
        (["--shard", "2"], ["--shard 2", "1 ranks"]),
        (["--reward", "tiny", "tiny"], ["two are named 'tiny'"]),
        (["--watch", "tiny"], ["two are named 'tiny'"]),
        (["--lam", "0.1", "0.2"], ["--lam", "2 values for 1"]),
        (["--stop-early", "--watch"], ["--stop-early", "--watch"]),
        (["--patience", "0"], ["--patience", "0"]),
        (["--prompts", "no-such.txt"], ["no-such.txt"]),
        (["--size", "40"], ["--size 40", "64x64"]),
        (["--size", "40", "--watch"], ["40", "16"]),
        (["--method", "full", "--nested-only"], ["--nested-only", "full"]),
        (["--steps", "0"], ["--updates", "0"]),
        (["--text-length", "0"], ["--text-length", "0"]),
        (["--tau", "0"], ["--tau"]),
        (["--method", "drtune", "--active", "0"], ["--active", "0"]),
        (["--method", "flow_grpo", "--batch", "12"], ["--group 8", "12"]),
        (["--method", "flow_grpo", "--noise", "0"], ["--noise", "0.0"]),
        (["--method", "flow_grpo", "--lam", "0.4"], ["--lam", "flow_grpo"]),
        (["--method", "draft_lv", "--copies", "-1"], ["--copies", "-1"]),
        (["--method", "nope"], ["--method nope", "baselines/"]),
        (["--leaps", "13"], ["13 leaps", "12 steps"]),
        (["--low", "0.99"], ["1 steps"]),
    ],
)
def test_train_names_the_bad_flag_before_weights_are_read(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "build_network", None)
    nograd = tmp_path.with_suffix(".py")
    nograd.write_text("def nograd(images, prompts): return images.detach().mean((1, 2, 3))\n")
    arguments = [a.format(nograd=nograd) for a in arguments]
    said = told(train, capsys, monkeypatch, *arguments, *([] if arguments == ["flux-de"] else ["--out", str(tmp_path)]))
    assert all(word in said for word in words), said


def test_the_final_folder_is_drawn_as_it_was_trained_unless_flags_say_otherwise(short_run, capsys):
    cfg = sample.SampleFlags(rollout_steps=3)
    drawn = draw_as_trained(cfg, (str(short_run / "final"),), dict(rollout_steps=25, guidance=3.5))
    assert (drawn.rollout_steps, drawn.size, drawn.text_length, drawn.guidance) == (3, "64", 12, 3.5)
    assert "was trained: --size 64 --text-length 12" in capsys.readouterr().err
    other = short_run.parent / "other"
    other.mkdir(exist_ok=True)
    (other / "sampling.json").write_text('{"rollout_steps": 9, "size": "64"}')
    draw_as_trained(cfg, (str(short_run / "final"), str(other)), {})
    assert f"warning: {other} was trained at --size 64, and is drawn as" in capsys.readouterr().err
    drawn = draw_as_trained(sample.SampleFlags(), (cfg.model,), dict(rollout_steps=25, guidance=3.5))
    assert (drawn.rollout_steps, drawn.size) == (25, None) and not capsys.readouterr().err


TRAINED = dict(rollout_steps=12, size="64", guidance=4, negative_prompt="ugly", text_length=12, bf16=True)


@pytest.mark.parametrize(
    "words, name, value",
    [
        ([], "bf16", True),
        (["--no-bf16"], "bf16", False),
        (["--bf16"], "bf16", True),
        (["--guidance", "0"], "guidance", 0.0),
        (["--negative-prompt", ""], "negative_prompt", ""),
        ([], "negative_prompt", "ugly"),
    ],
)
def test_a_flag_that_is_given_wins_whatever_its_value(words, name, value, tmp_path):
    (tmp_path / "sampling.json").write_text(json.dumps(TRAINED))
    for flags in (sample.SampleFlags, evaluate.EvaluateFlags):
        cfg = tyro.cli(flags, args=["--model", str(tmp_path), *words])
        assert getattr(draw_as_trained(cfg, (str(tmp_path),), {}), name) == value


def test_without_settings_of_a_model_there_is_no_negative_prompt_and_no_bf16(tmp_path):
    drawn = draw_as_trained(sample.SampleFlags(), (str(tmp_path),), {})
    assert (drawn.negative_prompt, drawn.bf16) == ("", False)


@pytest.mark.parametrize(
    "text",
    [
        '{"bf16": "false"}', '{"bf16": 1}', '{"rollout_steps": true}', '{"rollout_steps": 2.9}', '{"guidance": "4"}',
        '{"guidance": NaN}', '{"guidance": Infinity}', '{"size": 64}', '{"negative_prompt": ["a"]}', "[]", "{",
    ],
)  # fmt: skip
def test_a_setting_of_another_type_is_refused_and_its_file_named(text, tmp_path):
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(ValueError, match=r"sampling\.json"):
        saved_sampling(tmp_path)


def test_a_strangers_setting_is_printed_without_its_control_characters(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sampling.json").write_text(json.dumps(dict(negative_prompt=f"\x1b[2J{name}")))
    draw_as_trained(sample.SampleFlags(), (str(tmp_path / "a"), str(tmp_path / "b")), {})
    text = capsys.readouterr().err
    assert "\\x1b[2Ja" in text and "\\x1b[2Jb" in text and "\x1b" not in text


def test_control_characters_of_a_strangers_file_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\tb\nc\ud800") == "a\\x1b[2J\tb\nc\\ud800"


def test_an_occupied_run_folder_is_left_alone(capsys, monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    assert str(tmp_path) in told(train, capsys, monkeypatch, "--out", str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_a_partial_checkpoint_folder_names_what_is_missing(capsys, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "shapes" / "tiny-flux", tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux" / "vae")
    said = told(train, capsys, monkeypatch, "--model", str(tmp_path / "flux"), "--out", str(tmp_path / "run"))
    assert "lacks vae" in said


@pytest.mark.parametrize(
    "content, words", [(b"", "no prompt"), (b"# only a comment\n\n", "no prompt"), (b"caf\xe9\n", "UTF-8")]
)
def test_a_bad_prompt_file_is_named(content, words, capsys, monkeypatch, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    for module in (train, sample):
        said = told(module, capsys, monkeypatch, "--prompts", str(file), "--out", str(tmp_path / "new"))
        assert str(file) in said and words in said


@pytest.mark.parametrize(
    "flags", [["--eval-prompts"], ["--method", "flow_grpo", "--reward", "judge", "--watch", "tiny", "--prompts"]]
)
def test_a_prompt_that_the_judge_cannot_know_is_named(flags, capsys, monkeypatch, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a photo of a dragon\n")
    said = told(train, capsys, monkeypatch, *flags, str(file), "--out", str(tmp_path / "new"))
    assert "dragon" in said and f"{flags[-1]} {file}" in said and "without judge" in said


@pytest.mark.parametrize(
    "flags, word",
    [
        ([], "--prompt"),
        (["--prompt", "a", "--out", "grid.xyz"], "grid.png"),
        (["--prompt", "a", "--size", "9*9"], "--size 9*9"),
    ],
)
def test_sample_names_the_bad_flag_before_weights_are_read(flags, word, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load_pipeline", None)
    assert word in told(sample, capsys, monkeypatch, *flags)


def test_a_lambda_below_every_reward_is_pointed_out_once(few_prompts, tmp_path, capfd, monkeypatch):
    cfg = Config(out=tmp_path / "run", eval_prompts=few_prompts, updates=3, batch=4, eval_every=3, lam=(-2.0,))
    trained(cfg)
    text = capfd.readouterr()
    assert (text.out + text.err).count("warning: every reward is above --lam -2.0") == 1
