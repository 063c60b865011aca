"""A run can be killed, stopped, cut short or filled up at any moment, and goes on as if nothing had been."""

import contextlib
import io
import json
import re
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import train
from config import Config
from formats.folders import load_pipeline
from infra import checkpoints, logs
from infra.checkpoints import checkpoint_folders
from infra.distributed import Process, join
from infra.files import PART
from infra.jsonl import append_line, read_log, truncate_log
from infra.logs import note_nonfinite
from infra.trackers import open_trackers
from infra.user_code import UserCodeError
from start import batch_prompts, evaluation_of_best
from tests.processes import spread
from tests.runs import (
    completed,
    final,
    run,
    same_run,
    short_config,
    stopped_after,
    told,
    undisturbed_run,
    without_seconds,
)

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    return short_config(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Config:
    return undisturbed_run(base, tmp_path_factory.mktemp("runs") / "undisturbed")


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_bitwise_the_undisturbed_one_on_as_many_ranks(world, base, undisturbed, tmp_path):
    straight, resumed = replace(base, out=tmp_path / "a"), replace(base, out=tmp_path / "b", resume=True)
    if world == 1:
        straight = undisturbed
    else:
        assert completed(world, straight) == ""
    spread(world, stopped_after, resumed, 5)
    assert [f.name for f in checkpoint_folders(resumed.out)] == ["step_000002", "step_000004"]
    assert completed(world, resumed) == "" and same_run(straight, resumed)


def test_a_reward_that_draws_random_numbers_resumes_bitwise(base, tmp_path):
    (tmp_path / "random_reward.py").write_text(
        "import torch\ndef noisy(images, prompts):\n    return (images * torch.rand_like(images)).mean((1, 2, 3))\n"
    )
    cfg = replace(base, reward=(f"{tmp_path / 'random_reward.py'}:noisy",))
    straight, resumed = replace(cfg, out=tmp_path / "a"), replace(cfg, out=tmp_path / "b", resume=True)
    assert completed(1, straight) == ""
    spread(1, stopped_after, resumed, 5)
    assert completed(1, resumed) == "" and same_run(straight, resumed)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 4)])
def test_a_run_resumes_on_another_number_of_ranks(before, after, base, undisturbed, tmp_path):
    cfg = replace(base, out=tmp_path / "run", resume=True)
    spread(before, stopped_after, cfg, 4)
    assert completed(after, cfg) == ""
    for name, weight in final(undisturbed).items():
        assert (final(cfg)[name] - weight).norm() <= 1e-5 * weight.norm() + 1e-7, name
    assert len(read_log(cfg.out / "metrics.jsonl")) == 8


def test_other_flags_than_the_runs_are_refused_but_not_those_that_only_cost_time(base, undisturbed):
    again = replace(undisturbed, resume=True)
    assert completed(1, replace(again, lr=1.0)).startswith("2 --resume with --lr 1.0, but")
    assert completed(1, replace(again, updates=9)).startswith(
        "2 --resume with --updates 9"
    )  # lr falls over all of them
    assert completed(1, replace(again, at=3)) == (
        f"2 {again.out} has step_000006, step_000008: --at and --export take one of its checkpoints"
    )
    assert completed(1, replace(again, micro_batch=2, keep=3)) == ""


def test_a_run_goes_on_with_its_prompts_wherever_their_file_is_and_with_no_others(undisturbed, tmp_path):
    again = replace(undisturbed, resume=True)
    moved = shutil.copy(again.eval_prompts, tmp_path / "moved.txt")
    assert completed(1, replace(again, eval_prompts=moved)) == ""
    moved.write_text("a photo of a circle\n")
    assert completed(1, replace(again, eval_prompts=moved)) == (
        f"2 --resume with --eval-prompts {moved}, which says something else than when {again.out} was started"
    )


def test_a_run_resumed_from_an_older_checkpoint_forgets_the_newer_ones(undisturbed, tmp_path):
    cfg = replace(undisturbed, out=shutil.copytree(undisturbed.out, tmp_path / "run"), resume=True)
    spread(1, stopped_after, replace(cfg, at=6), 7)
    assert [f.name for f in checkpoint_folders(cfg.out)] == ["step_000006"]
    assert completed(1, cfg) == "" and same_run(undisturbed, cfg)


def test_a_best_model_of_after_an_older_checkpoint_is_kept_beside_what_is_made_again(undisturbed, tmp_path):
    cfg = replace(undisturbed, out=shutil.copytree(undisturbed.out, tmp_path / "run"), resume=True, at=6)
    evals = read_log(cfg.out / "eval.jsonl")
    evals[-1] |= dict(judge=2.0, saved_to="best/")  # of step 8
    (cfg.out / "eval.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evals))
    (cfg.out / "best" / "mine.txt").write_text("of step 8")
    assert completed(1, cfg) == ""
    assert (cfg.out / "best.step_000008" / "mine.txt").exists()
    assert (cfg.out / "best").exists() and not (cfg.out / "best" / "mine.txt").exists()


def failing_once(cfg: Config) -> tuple[str, list[int]]:
    """Nothing can be written to best/ the first time; why it stopped, and how many updates best/ had each time."""
    real, steps = train.write_model, []

    def write(target: Path, pipe, world) -> None:
        if target.name == "best":
            steps.append(len(read_log(cfg.out / "metrics.jsonl")))
            if len(steps) == 1:
                raise OSError("no room")
        real(target, pipe, world)

    train.write_model = write
    return run(cfg), steps


def test_a_best_model_that_could_not_be_written_gives_way_to_the_next_that_can(base, tmp_path):
    ((message, steps),) = spread(1, failing_once, replace(base, out=tmp_path / "run"))
    assert message == "" and steps[:2] == [0, 4] and (tmp_path / "run" / "best").exists()
    assert ["saved_to" in entry for entry in read_log(tmp_path / "run" / "eval.jsonl")][:2] == [False, True]


def test_best_is_of_the_evaluation_that_the_log_says(tmp_path):
    log = tmp_path / "eval.jsonl"
    (tmp_path / "best").mkdir()
    append_line(log, dict(step=3, judge=0.3, saved_to="best/"))
    append_line(log, dict(step=4, judge=0.95))  # the disk was full
    assert evaluation_of_best(tmp_path, ["judge"])["judge"] == 0.3


def test_a_run_that_is_made_longer_keeps_what_its_end_was_evaluated_as(base, tmp_path):
    cfg = replace(base, out=tmp_path / "run", updates=3, eval_every=2, decay=False)
    assert completed(1, cfg) == ""
    before = without_seconds(cfg.out / "eval.jsonl")
    assert completed(1, replace(cfg, updates=4, resume=True)) == ""
    after = without_seconds(cfg.out / "eval.jsonl")
    assert [e["step"] for e in after] == [0, 2, 3, 4] and after[:3] == before


def not_a_number_at_first(cfg: Config) -> str:
    """The judge has no number at the first evaluation."""
    real, made = train.evaluate, []

    def evaluate(*args):
        entry, images = real(*args)
        made.append(entry)
        return (entry | dict(judge=float("nan")) if len(made) == 1 else entry), images

    train.evaluate = evaluate
    return run(cfg)


def test_a_first_evaluation_that_is_no_number_gives_way_to_the_next(base, tmp_path):
    assert spread(1, not_a_number_at_first, replace(base, out=tmp_path / "run")) == [""]
    assert ["saved_to" in entry for entry in read_log(tmp_path / "run" / "eval.jsonl")][:2] == [True, True]


def test_export_writes_the_averaged_weights_of_any_checkpoint(undisturbed, tmp_path):
    for at in (None, 6):
        assert completed(1, replace(undisturbed, resume=True, export=tmp_path / f"at{at}", at=at)) == ""
    newest, before = (load_pipeline(tmp_path / f"at{at}").flux.state_dict() for at in (None, 6))
    last = load_pipeline(undisturbed.out / "final").flux.state_dict()
    assert all(torch.equal(newest[k], last[k]) for k in last)
    assert any(not torch.equal(before[k], last[k]) for k in last)


def test_export_spares_what_is_there_and_needs_a_checkpoint(undisturbed, tmp_path):
    (tmp_path / "mine").mkdir()
    again = replace(undisturbed, resume=True)
    assert "exists: give a path" in completed(1, replace(again, export=tmp_path / "mine"))
    cfg = replace(again, out=shutil.copytree(undisturbed.out, tmp_path / "run"), export=tmp_path / "new")
    shutil.rmtree(cfg.out / "checkpoints")
    assert "has no checkpoint yet" in completed(1, cfg) and not (tmp_path / "new").exists()


def test_fewer_steps_than_a_run_has_made_are_refused(base, tmp_path):
    cfg = replace(base, out=tmp_path / "run", decay=False, updates=4, resume=True)
    assert completed(1, cfg) == ""
    assert completed(1, replace(cfg, updates=3)).startswith("2 --updates 3, but the run in")
    assert completed(1, replace(cfg, updates=3, export=tmp_path / "new")) == ""
    assert completed(1, replace(cfg, updates=5)) == "" and len(read_log(cfg.out / "metrics.jsonl")) == 5


def test_a_run_whose_checkpoints_are_gone_is_refused_and_loses_nothing(undisturbed, tmp_path):
    cfg = replace(undisturbed, out=shutil.copytree(undisturbed.out, tmp_path / "run"), resume=True)
    shutil.rmtree(cfg.out / "checkpoints")
    message = completed(1, cfg)
    assert message.startswith(f"2 --resume: {cfg.out} was saved at step_000008, and has no checkpoint any more")
    assert len(read_log(cfg.out / "metrics.jsonl")) == 8
    (cfg.out / "newest_checkpoint").unlink()
    assert completed(1, cfg) == "" and same_run(undisturbed, cfg)


def test_checkpoints_that_a_killed_save_had_no_time_to_remove_are_removed(undisturbed, tmp_path):
    cfg = replace(undisturbed, out=tmp_path / "run", resume=True)
    shutil.copytree(undisturbed.out, cfg.out)
    shutil.copytree(cfg.out / "checkpoints" / "step_000006", cfg.out / "checkpoints" / "step_000004")
    assert completed(1, cfg) == ""
    assert [folder.name for folder in checkpoint_folders(cfg.out)] == ["step_000006", "step_000008"]


def test_a_best_model_whose_evaluation_is_lost_is_kept(undisturbed, tmp_path):
    cfg = replace(undisturbed, out=shutil.copytree(undisturbed.out, tmp_path / "run"), resume=True, at=6)
    (cfg.out / "eval.jsonl").unlink()
    (cfg.out / "best" / "mine.txt").write_text("of an unknown step")
    assert completed(1, cfg) == ""
    assert (cfg.out / "best.unknown" / "mine.txt").exists() and not (cfg.out / "best" / "mine.txt").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_weights_are_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1e6))
    monkeypatch.setattr("train.build_network", None)
    with pytest.raises(ValueError, match="too little for a checkpoint of"), join("cpu") as process:
        train.set_up(replace(base, out=tmp_path / "run"), process)


# ---------------------------------------------------------------------- errors in the middle of a run


def failing_at(cfg: Config, at: int, error: Exception) -> str:
    """The method raises an error in an update, within the leaps."""
    real = train.accumulate_gradient

    def gradient(c, setup, process, update, rows, x_1, generator, meter):
        values = real(c, setup, process, update, rows, x_1, generator, meter)
        if update == at:
            with meter("leaps"):
                raise error
        return values

    train.accumulate_gradient = gradient
    return run(cfg)


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("no room"), "out of memory in the leaps: take a smaller --micro-batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "out of memory in the leaps"),
        (UserCodeError("reward mine.py:f fails: SystemExit: 0"), "reward mine.py:f fails: SystemExit"),
    ],
)
def test_an_error_of_memory_or_of_the_users_code_saves_and_the_run_goes_on(error, words, base, undisturbed, tmp_path):
    cfg = replace(base, out=tmp_path / "run", resume=True)
    (message,) = spread(1, failing_at, cfg, 5, error)
    assert message.startswith(f"1 error: {words}") and "step_000005 is saved, --resume goes on" in message
    assert completed(1, cfg) == "" and same_run(undisturbed, cfg)


def test_an_error_of_a_reward_on_one_of_two_ranks_stops_both_after_a_checkpoint(base, undisturbed, tmp_path):
    code = """
import os

calls = 0

def fails_later(images, prompts):
    global calls
    calls += 1
    if calls > 12 and os.environ["RANK"] == "1":
        raise SystemExit("enough")
    return images.mean((1, 2, 3))
"""
    (tmp_path / "mine.py").write_text(code)
    cfg = replace(base, out=tmp_path / "run", reward=(f"{tmp_path / 'mine.py'}:fails_later",), lam=())
    first, second = spread(2, told, cfg)
    for message, _ in (first, second):
        assert message.startswith("3 step ") and "fails_later" in message and "not finite on rank 1" in message
    assert "SystemExit: enough" in second[1] and "line 10" in second[1]
    update = int(re.search(r"step (\d+)", first[0])[1])
    assert checkpoint_folders(cfg.out)[-1].name == f"step_{update:06d}"


# ------------------------------------------------------------------------------------- damaged, full


def damage(file: Path, how: str) -> None:
    whole = bytearray(file.read_bytes())
    if how == "missing":
        return file.unlink()
    if how == "flipped":
        for i in range(len(whole) // 8, len(whole), len(whole) // 8):
            whole[i] ^= 0xFF
    file.write_bytes(bytes(whole) if how == "flipped" else b"" if how == "empty" else bytes(whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    "file, how",
    [("__0_0.distcp", how) for how in ("cut", "missing", "flipped")]
    + [(".metadata", how) for how in ("empty", "flipped")],
)
def test_a_damaged_newest_checkpoint_is_passed_over(how, file, base, undisturbed, tmp_path):
    cfg = replace(undisturbed, out=shutil.copytree(undisturbed.out, tmp_path / "run"), resume=True)
    damage(checkpoint_folders(cfg.out)[-1] / file, how)
    ((message, said),) = spread(1, told, cfg)
    assert message == "" and "step_000008 cannot be read" in said and "trying an older one" in said
    assert "kept as step_000008.unreadable" in said
    assert same_run(undisturbed, cfg) and (cfg.out / "checkpoints" / "step_000008.unreadable").exists()


def full_disk(cfg: Config) -> tuple[str, str]:
    """A file may not grow beyond 20 MB: checkpoints need twice that."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = checkpoints.save_checkpoint

    def save(out, run_, step, keep):
        limit = 20_000_000 if step >= 4 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        real(out, run_, step, keep)
        run_.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoints.save_checkpoint = save
    return told(cfg)


def test_a_full_disk_leaves_the_checkpoint_before_and_is_told(base, tmp_path):
    cfg = replace(base, out=tmp_path / "run")
    ((message, said),) = spread(1, full_disk, cfg)
    assert message == "" and said.count("warning: no checkpoint could be written (") == 3 and "GB free" in said
    assert f"{checkpoint_folders(cfg.out)[0]} is saved" in said
    assert [f.name for f in checkpoint_folders(cfg.out)] == ["step_000002"] and not list(
        cfg.out.glob(f"checkpoints/*{PART}")
    )


def never_renamed(cfg: Config) -> tuple[str, str]:
    """Something goes wrong on rank 0 alone, once all have written."""

    def fail(part: Path, target: Path) -> None:
        raise OSError("no such luck")

    checkpoints.put_in_place = fail
    return told(cfg)


def test_a_save_that_fails_at_the_very_end_is_told_and_training_goes_on_on_all_ranks(base, tmp_path):
    (message, said), (other, _) = spread(2, never_renamed, replace(base, out=tmp_path / "run"))
    assert message == other == "" and said.count("no checkpoint could be written (OSError: no such luck;") == 4
    assert (tmp_path / "run" / "final").exists() and not list((tmp_path / "run" / "checkpoints").iterdir())


def without_room(cfg: Config, what: str) -> tuple[str, str]:
    """Pictures, or lines of a log, cannot be written; why the run stopped, and what was said on stdout."""
    real = logs.append_line

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fail_for_log(path: Path, entry: dict) -> None:
        fail() if path.name == what else real(path, entry)

    if what == "pictures":
        logs.contact_sheet = logs.before_after = logs.runs_page = fail
    logs.append_line = fail_for_log
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return run(cfg), said.getvalue()


def test_a_picture_that_cannot_be_written_does_not_end_a_run(base, tmp_path):
    cfg = replace(base, out=tmp_path / "pictures")
    ((message, said),) = spread(1, without_room, cfg, "pictures")
    assert (
        message == "" and said.count("warning: a picture is not written") == 8
    )  # and a page, of each evaluation, and at the end
    assert len(read_log(cfg.out / "eval.jsonl")) == 3 and (cfg.out / "final").exists()


@pytest.mark.parametrize("name", ["eval.jsonl", "metrics.jsonl"])
def test_a_log_that_cannot_be_written_stops_the_run_without_a_checkpoint_that_has_other_updates(name, base, tmp_path):
    cfg = replace(base, out=tmp_path / "logs", skip_nonfinite=1)
    ((message, said),) = spread(1, without_room, cfg, name)
    assert message.startswith("1 [Errno 28] No space left") and "no checkpoint is saved, --resume starts" in message
    assert "left out" not in said and not checkpoint_folders(cfg.out)


# ------------------------------------------------------------------------------------------ not finite


def poisoned(cfg: Config, at: int, rank: int) -> str:
    """The reward of one rank is NaN at one step."""
    real = train.accumulate_gradient

    def gradient(c, setup, process, update, *others):
        values = real(c, setup, process, update, *others)
        is_poisoned = update == at and process.rank == rank
        return values | {"loss": values["loss"] * float("nan")} if is_poisoned else values

    train.accumulate_gradient = gradient
    return run(cfg)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_says_where(base, undisturbed, tmp_path):
    cfg = replace(base, out=tmp_path / "run")
    for message in spread(2, poisoned, cfg, 5, 1):
        assert message.startswith("3 step 5: loss is not finite on rank 1; prompts such as")
    (entry,) = read_log(cfg.out / "nonfinite.jsonl")
    with join("cpu") as process:
        prompts = batch_prompts(cfg, train.set_up(replace(cfg, resume=True), process), 5)
    assert entry["step"] == 5 and entry["seed"] == 0 and entry["values"]["k"] == [1.0] * 4
    assert entry["prompts"] == prompts
    assert checkpoint_folders(cfg.out)[-1].name == "step_000005"  # the weights before the step, to replay it
    assert completed(1, replace(cfg, resume=True)) == ""
    assert [e["step"] for e in read_log(cfg.out / "metrics.jsonl")] == list(range(8))


def test_the_message_names_a_prompt_whose_number_is_not_finite(tmp_path):
    first, second = (Process(rank, 2, torch.device("cpu"), None) for rank in range(2))
    values = dict(loss=torch.tensor([0.1, 0.2, 0.3, float("inf")]), k=torch.ones(4))
    message = note_nonfinite(tmp_path, 3, 0, 1.0, values, ["a", "b", "c", "d"], second)
    assert "loss is not finite on rank 1; prompts such as 'd'" in message
    values = dict(k=torch.ones(2))
    message = note_nonfinite(tmp_path, 3, 0, float("nan"), values, ["a", "b"], first)
    assert "in the gradient, though every loss is finite; prompts such as 'a'" in message
    assert [entry["prompts"] for entry in read_log(tmp_path / "nonfinite.jsonl")] == [["a", "b"]]


def test_some_that_are_not_finite_can_be_left_out(base, tmp_path):
    cfg = replace(base, out=tmp_path / "run", skip_nonfinite=1)
    assert spread(1, poisoned, cfg, 5, 0) == [""]
    assert [e["step"] for e in read_log(cfg.out / "metrics.jsonl")] == [0, 1, 2, 3, 4, 6, 7]
    assert [f.name for f in checkpoint_folders(cfg.out)] == ["step_000006", "step_000008"]


# ------------------------------------------------------------------------------------------------ logs


def test_a_log_that_a_kill_cut_is_read_up_to_there_and_truncated_by_step(tmp_path):
    file = tmp_path / "log.jsonl"
    for step in range(4):
        append_line(file, {"step": step})
    file.write_text(file.read_text() + '{"step": 4, "re')
    assert [e["step"] for e in read_log(file)] == [0, 1, 2, 3]
    assert [e["step"] for e in truncate_log(file, 2)] == [0, 1]
    append_line(file, {"step": 2})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]
    assert read_log(tmp_path / "none.jsonl") == truncate_log(tmp_path / "none.jsonl", 3) == []
    file.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=f"cannot read {file}, line 2 .*: remove that line"):
        read_log(file)


def test_every_update_logs_where_its_time_went(undisturbed):
    for entry in read_log(undisturbed.out / "metrics.jsonl"):
        parts = [entry[f"seconds_{stage}"] for stage in ("rollout", "reward", "leaps", "update")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(entry["seconds"], rel=0.2)
        assert entry["forwards"] == 4 * (2 + 2) and entry["backwards"] == 4 * 2
        assert entry["memory"] > 0.1 and entry["tflops"] > 0


def test_numbers_and_pictures_go_to_the_trackers_that_were_asked_for(undisturbed, tmp_path, monkeypatch):
    seen: list = []
    writer = SimpleNamespace(
        add_scalar=lambda name, value, step: seen.append((name, value, step)),
        add_image=lambda name, image, step, dataformats: seen.append((name, image.shape[-1], step)),
    )
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder, **_: writer)
    )
    ids = []
    logged = SimpleNamespace(
        log=lambda entry: seen.append((sorted(entry), entry["step"])), define_metric=lambda *_, **__: 0
    )
    wandb = SimpleNamespace(init=lambda **options: ids.append(options["id"]) or logged, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    resumes = []
    trackio_run = SimpleNamespace(log=lambda entry, step: seen.append((sorted(entry), step)))
    trackio = SimpleNamespace(init=lambda **options: resumes.append(options["resume"]) or trackio_run, Image=str)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    track = open_trackers(("tensorboard", "wandb", "trackio"), tmp_path, {"lr": 1}, 0)
    track(4, {"step": 4, "reward": 0.5, "by_prompt": {"tiny": [1.0]}}, [undisturbed.out / "samples" / "step_0004.png"])
    assert seen == [
        ("reward", 0.5, 4),
        ("samples", 3, 4),
        (["reward", "samples", "step"], 4),
        (["reward", "samples"], 4),
    ]
    for first in (2, 0):
        open_trackers(("wandb", "trackio"), tmp_path, {"lr": 1}, first)
    assert ids[0] == ids[1] != ids[2]  # a run that goes on, and one that starts anew in a folder of that name
    open_trackers((), tmp_path, {}, 0)(4, {"reward": 0.5}, [])
    assert len(seen) == 4 and resumes == ["never", "allow", "never"]


# ------------------------------------------------------------------------------------ other optimizers


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675): it keeps one momentum per weight, and no count of its steps."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                param.sub_(group["lr"] * torch.lerp(momentum, param.grad, 0.1).sign())
                momentum.lerp_(param.grad, 0.01)


class Slowing(torch.optim.SGD):
    """SGD whose steps shrink with a count that is a Python number, which a checkpoint must bring back too."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["count"] = self.state[param].get("count", 0) + 1
                param.sub_(group["lr"] / self.state[param]["count"] * param.grad)


def four_optimizers(cfg: Config, params: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for matrices of double blocks, Lion for those of single blocks, and others for biases and all else."""
    groups = {"muon": [], "lion": [], "slowing": [], "adamw": []}
    for name, param in params.items():
        if param.ndim == 2 and "double_blocks" in name:
            groups["muon"].append(param)
        elif param.ndim == 2 and "single_blocks" in name:
            groups["lion"].append(param)
        else:
            groups["slowing" if "bias" in name else "adamw"].append(param)
    return [
        torch.optim.Muon(groups["muon"], lr=cfg.lr),
        Lion(groups["lion"], lr=cfg.lr),
        Slowing(groups["slowing"], lr=cfg.lr),
        torch.optim.AdamW(groups["adamw"], lr=cfg.lr),
    ]


def run_with_four(cfg: Config, stop_after: int | None = None) -> str:
    train.make_optimizers = four_optimizers
    if stop_after is None:
        return run(cfg)
    stopped_after(cfg, stop_after)
    return ""


def test_a_run_with_other_optimizers_resumes_bitwise(base, undisturbed, tmp_path):
    straight, resumed = replace(base, out=tmp_path / "a"), replace(base, out=tmp_path / "b", resume=True)
    assert spread(1, run_with_four, straight) == [""]
    assert not same_run(straight, undisturbed)  # that of AdamW alone
    spread(1, run_with_four, resumed, 5)
    assert spread(1, run_with_four, resumed) == [""]
    assert same_run(straight, resumed)
