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
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "lora.json").write_text("{}")
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
    assert calls == [("me/tuned", True), ("me/tuned", ["README.md", "before_after.png", "lora.json"])]
    assert 'load_lora_weights("me/tuned")' in (run / "best" / "README.md").read_text()


def test_all_weights_are_loaded_as_they_are_and_an_unknown_base_has_no_licence(run):
    (run / "best" / "lora.json").unlink()
    (run / "config.json").write_text(json.dumps(FLAGS | {"model": "mine/flux"}))
    publish(PublishFlags(run))
    card = (run / "best" / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("NAME/MODEL")' in card and "load_lora" not in card
    assert "license: unknown" in card


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no model with an eval"):
        publish(PublishFlags(tmp_path))
