"""tools/publish.py: what a model card says, and what would be sent. Nothing is: the hub's client is a stand-in."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from tools.publish import PublishFlags, publish

FLAGS = dict(
    base=None,
    model="weights/FLUX.1-dev",
    method="leapalign",
    reward=["hpsv2"],
    command="python train.py flux-dev-lora --lr 1e-5",
)


@pytest.fixture
def run(tmp_path) -> Path:
    """The files of a LoRA's run that a card is made of."""
    for folder, updates in (("best", 50), ("final", 100)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lora.json").write_text("{}")
        (tmp_path / folder / "sampling.json").write_text(json.dumps({"updates": updates}))
    (tmp_path / "config.json").write_text(json.dumps(FLAGS))
    (tmp_path / "before_after.png").write_bytes(b"picture")
    entries = [
        {"step": 0, "hpsv2": 0.307, "by_prompt": {"hpsv2": [0.3]}, "seconds": 1.0, "saved_to": "best/"},
        {"step": 50, "hpsv2": 0.391, "by_prompt": {"hpsv2": [0.4]}, "seconds": 9.0, "saved_to": "best/"},
        {"step": 100, "hpsv2": 0.2, "by_prompt": {"hpsv2": [0.2]}, "seconds": 19.0},
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def test_a_card_has_the_licence_of_the_base_the_numbers_of_best_how_to_load_and_the_command(run):
    publish(PublishFlags(run))
    assert (run / "best" / "before_after.png").read_bytes() == b"picture"
    card = (run / "best" / "README.md").read_text()
    header = card.split("---\n")[1]
    assert "license_name: flux-1-dev-non-commercial-license" in header
    assert "base_model: black-forest-labs/FLUX.1-dev" in header
    assert "| hpsv2 | 0.307 | 0.391 |" in card and "seconds" not in card and "50 updates" in card
    assert 'load_lora_weights("NAME/MODEL")' in card
    assert "    python train.py flux-dev-lora --lr 1e-5" in card.splitlines()


def test_nothing_is_sent_without_repo_and_with_it_the_folder_is(run, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options["private"]))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    publish(PublishFlags(run))
    assert calls == []
    publish(PublishFlags(run, repo="me/tuned"))
    assert calls == [("me/tuned", True), ("me/tuned", ["README.md", "before_after.png", "lora.json", "sampling.json"])]
    assert 'load_lora_weights("me/tuned")' in (run / "best" / "README.md").read_text()


def test_all_weights_are_loaded_as_they_are_and_an_unknown_base_has_no_licence(run):
    (run / "best" / "lora.json").rename(run / "best" / "model_index.json")
    (run / "config.json").write_text(json.dumps(FLAGS | {"model": "mine/flux"}))
    publish(PublishFlags(run))
    card = (run / "best" / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("NAME/MODEL")' in card and "load_lora" not in card
    assert "license: unknown" in card


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no model with an eval"):
        publish(PublishFlags(tmp_path))


def test_the_numbers_are_those_of_the_weights_whatever_the_run_did_later(run):
    with (run / "eval.jsonl").open("a") as log:  # the run was made longer, and killed
        log.write('{"step": 150, "hpsv2": 0.9, "by_prompt": {}, "seconds": 1.0}\n')
    publish(PublishFlags(run, folder="final"))
    card = (run / "final" / "README.md").read_text()
    assert "| hpsv2 | 0.307 | 0.200 |" in card and "for 100 updates" in card
    (run / "final" / "sampling.json").write_text('{"updates": 120}')
    with pytest.raises(ValueError, match=r"eval\.jsonl has no evaluation after 120 updates"):
        publish(PublishFlags(run, folder="final"))


@pytest.mark.parametrize("name", ["before_after.png", "best/README.md", "best/before_after.png", "best/vae", "best"])
def test_a_link_in_the_run_is_neither_sent_nor_written_through(name, run, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    (run / name).rename(secret) if (run / name).is_dir() else secret.write_text("precious")
    before = sorted(secret.iterdir()) if secret.is_dir() else secret.read_text()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{run / name} is a link"):
        publish(PublishFlags(run))
    assert before == (sorted(secret.iterdir()) if secret.is_dir() else secret.read_text())


def test_an_empty_folder_is_no_model(run):
    (run / "best" / "lora.json").unlink()
    with pytest.raises(ValueError, match="best is no model"):
        publish(PublishFlags(run, repo="me/tuned"))


@pytest.mark.parametrize("text", [None, "{", "{}", "[]", '{"step": "x"}\n', "[]\n", "3\n", "null\n"])
@pytest.mark.parametrize("name", ["config.json", "eval.jsonl", "best/sampling.json"])
def test_what_is_missing_or_no_runs_is_named(name, text, run):
    (run / name).unlink()
    if text is not None:
        (run / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        publish(PublishFlags(run))
    assert not (run / "best" / "README.md").exists()


def test_a_hub_that_cannot_be_reached_is_one_error(run, monkeypatch):
    class Hub:
        def create_repo(self, name, **options):
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(ValueError, match="--repo me/tuned: ConnectionError: Name or service not known"):
        publish(PublishFlags(run, repo="me/tuned"))
