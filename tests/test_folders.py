"""A model folder that is incomplete, damaged or of another model: the error names the file, its fault and a remedy."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import evaluate
import train
from config import Config
from families import flux1
from formats import locations
from formats.folders import load_pipeline
from formats.locations import locate
from formats.saving import save_pipeline
from formats.weights import INDEX, WEIGHTS
from infra.distributed import join
from start import describe_model
from tests.tiny_folders import edit_json, shard

COMPONENTS = (*flux1.FROZEN, "transformer")
TINY_FLUX = Path(evaluate.__file__).parent / "shapes" / "tiny-flux"


@pytest.fixture
def no_network(monkeypatch) -> list[str]:
    """The hub ids of downloads, each of which fails."""
    hub_ids = []

    def download(hub_id: str, **_: object) -> str:
        hub_ids.append(hub_id)
        raise ConnectionError("no network")

    monkeypatch.setattr(locations, "snapshot_download", download)
    return hub_ids


def test_a_path_never_goes_to_the_network(tmp_path, monkeypatch, no_network):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    paths = ["nowhere", "runs/nowhere", "./a/b", "~/flux", "a/b/c", str(tmp_path / "x"), tmp_path / "runs" / "x"]
    paths += ["flux1-dev.safetensors", "weights/flux1-dev.safetensors"]
    for path in paths:
        with pytest.raises(ValueError, match=f"no model at '{path}': .*or a hub id owner/name"):
            locate(path)
    assert not no_network


def test_a_hub_id_that_fails_is_named(no_network):
    with pytest.raises(ValueError, match=r"someone/some-flux.*no network"):
        locate("someone/some-flux")
    assert no_network == ["someone/some-flux"]


def test_a_hub_id_loads_what_was_downloaded(dev, monkeypatch):
    monkeypatch.setattr(locations, "snapshot_download", lambda name, allow_patterns: str(dev))
    assert load_pipeline("someone/some-flux").location == (dev, dev / "transformer", None)


def test_a_file_that_is_no_model_is_named_with_its_first_tensors(dev, tmp_path):
    """The transformer's file of a folder has diffusers' names; a .gguf is no safetensors file."""
    file = dev / "transformer" / WEIGHTS
    first_names = ", ".join(list(load_file(file))[:3])
    with pytest.raises(ValueError, match=f"{file} is no FLUX model, its tensors are {first_names}.*give a FLUX folder"):
        load_pipeline(file)
    (tmp_path / "flux1-dev.gguf").write_bytes(b"GGUF" * 100)
    with pytest.raises(ValueError, match=r"cannot read .*flux1-dev\.gguf.*: give a FLUX folder"):
        load_pipeline(tmp_path / "flux1-dev.gguf")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_component_is_named_with_what_the_folder_holds(broken, component):
    shutil.rmtree(broken / component)
    present = "vae" if component != "vae" else "transformer"
    with pytest.raises(ValueError, match=rf"{broken}.* lacks {component}; it holds .*{present}"):
        load_pipeline(broken)


def test_a_folder_without_an_index_is_named(broken):
    (broken / "model_index.json").unlink()
    with pytest.raises(ValueError, match=f"cannot read {broken / 'model_index.json'}.*: give a folder of FluxPipeline"):
        load_pipeline(broken)


SAFETENSORS = {
    "transformer": WEIGHTS,
    "vae": WEIGHTS,
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def pickle_instead(file: Path) -> None:
    """The same weights, as both libraries would find them in a pickle."""
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        torch.save(load_file(file), file.with_name(name))
    file.unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "foreign": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "a pickle": pickle_instead,
    "of wrong names": lambda file: save_file({f"x.{k}": v for k, v in load_file(file).items()}, file, {"format": "pt"}),
    "lacking a tensor": lambda file: save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"}),
    "of wrong shapes": lambda file: save_file(
        {k: torch.cat([v, v]) for k, v in load_file(file).items()}, file, {"format": "pt"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("component", SAFETENSORS)
def test_damaged_weights_are_named(broken, component, damage):
    DAMAGE[damage](broken / component / SAFETENSORS[component])
    with pytest.raises(ValueError, match=f"{broken / component}.*"):
        load_pipeline(broken)


CONFIGS = [
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer_config.json",
]


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained")  # diffusers, of an empty list
@pytest.mark.parametrize("text", ['{"a": 1', "[]", ""])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_that_does_not_parse_is_named(broken, config, text):
    (broken / config).write_text(text)
    with pytest.raises(ValueError, match=str(broken / config.split("/")[0])):
        load_pipeline(broken)


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_empty_component_is_named(broken, component):
    shutil.rmtree(broken / component)
    (broken / component).mkdir()
    with pytest.raises(ValueError, match=str(broken / component)):
        load_pipeline(broken)


def test_a_missing_shard_is_named(broken):
    _, shard_name, *_ = shard(broken)
    (broken / "transformer" / shard_name).unlink()
    with pytest.raises(ValueError, match=f"cannot read {broken / 'transformer' / shard_name}.*: copy or download it"):
        load_pipeline(broken)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_followed_is_named(broken, text):
    (broken / "transformer" / INDEX).write_text(text)
    with pytest.raises(ValueError, match=str(broken / "transformer" / INDEX)):
        load_pipeline(broken)


def test_a_folder_mixed_from_different_models_is_named(broken):
    config = T5Config.from_pretrained(broken / "text_encoder_2")
    config.d_model = 32
    T5EncoderModel(config).save_pretrained(broken / "text_encoder_2")
    with pytest.raises(ValueError, match=f"{broken} mixes models: 32 channels for .* context_in_dim of 24"):
        load_pipeline(broken)


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Reading weights fails."""
    for name in (
        "formats.folders.build_flux",
        "formats.folders.load_frozen",
        "train.build_network",
        "start.load_parts",
    ):
        monkeypatch.setattr(name, None)
    monkeypatch.setattr("evaluate.load_pipeline", None)


@pytest.mark.parametrize("folder, source", [("tokenizer_2", "tokenizer"), ("tokenizer", "tokenizer_2")])
def test_the_other_encoders_tokenizer_is_named_before_weights_are_read(folder, source, broken, tmp_path, no_weights):
    """By load_pipeline, before training starts, and of evaluate's last model before its first is drawn."""
    shutil.rmtree(broken / folder)
    shutil.copytree(broken / source, broken / folder)
    message = rf"{broken / folder} holds \d+ tokens.* for an encoder of \d+: copy or download .* {folder}/"
    with pytest.raises(ValueError, match=message):
        load_pipeline(broken)
    with join("cpu") as process:
        with pytest.raises(ValueError, match=message):
            train.set_up(Config(model=str(broken), guidance=3.5, out=tmp_path / "run"), process)
        with pytest.raises(ValueError, match=message):
            flags = evaluate.EvaluateFlags(model=(str(TINY_FLUX), str(broken)), out=tmp_path / "evaluation")
            evaluate.evaluate_models(flags, process)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_with_more_tokens_than_its_encoder_is_named_before_weights_are_read(folder, broken, no_weights):
    tokenizer = AutoTokenizer.from_pretrained(broken / folder)
    vocab_size = len(tokenizer)
    tokenizer.add_tokens(["onemore"])
    tokenizer.save_pretrained(broken / folder)
    with pytest.raises(ValueError, match=f"{broken / folder} holds {vocab_size + 1} .* encoder of {vocab_size}"):
        load_pipeline(broken)


SMALL_FILES = [  # each group is absent at once: transformers makes a tokenizer of either file
    ("scheduler", ["scheduler_config.json"]),
    ("transformer", ["config.json"]),
    ("vae", ["config.json"]),
    ("text_encoder", ["config.json"]),
    ("text_encoder_2", ["config.json"]),
    ("tokenizer", ["tokenizer.json", "vocab.json"]),
    ("tokenizer", ["tokenizer_config.json"]),
    ("tokenizer_2", ["tokenizer.json", "spiece.model"]),
    ("tokenizer_2", ["tokenizer_config.json"]),
]


@pytest.mark.parametrize("component, names", SMALL_FILES)
def test_the_component_that_lacks_a_small_file_is_named_before_weights_are_read(component, names, broken, no_weights):
    for name in names:
        (broken / component / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"{broken / component}.*: copy or download"):
        load_pipeline(broken)


def save_flux2(folder: Path) -> None:
    pytest.importorskip("diffusers", minversion="0.36")
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    narrow = dict(num_attention_heads=1, attention_head_dim=8, joint_attention_dim=8, axes_dims_rope=(2, 2, 2, 2))
    transformer = Flux2Transformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, **narrow)
    Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer).save_pretrained(folder)


def save_sd3(folder: Path) -> None:
    narrow = dict(num_attention_heads=1, attention_head_dim=8, joint_attention_dim=8, caption_projection_dim=8)
    transformer = SD3Transformer2DModel(in_channels=4, num_layers=1, sample_size=8, pooled_projection_dim=8, **narrow)
    encoders = [None] * 7  # VAE, encoders and tokenizers
    StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), *encoders).save_pretrained(folder)


@pytest.mark.parametrize(
    "save, pipeline, transformer",
    [
        (save_flux2, "Flux2Pipeline", "Flux2Transformer2DModel"),
        (save_sd3, "StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    ],
)
def test_a_model_of_another_family_is_named_by_its_class_or_its_tensors(
    save, pipeline, transformer, broken, tmp_path, no_weights
):
    """A folder, although it lacks components; its transformer's file; and its transformer in a FLUX.1 folder."""
    folder = tmp_path / "foreign"
    save(folder)
    with pytest.raises(ValueError, match=rf"{folder} .*{pipeline}.*: (give|.* take)"):
        load_pipeline(folder)
    first_name = next(iter(load_file(folder / "transformer" / WEIGHTS)))
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is no FLUX model, its tensors are {first_name}"):
        load_pipeline(folder / "transformer" / WEIGHTS)
    shutil.rmtree(broken / "transformer")
    shutil.copytree(folder / "transformer", broken / "transformer")
    with pytest.raises(
        ValueError, match=rf"{broken / 'transformer' / 'config.json'} .* no _class_name='{transformer}'|{broken} is of "
    ):
        load_pipeline(broken)


@pytest.mark.parametrize(
    "entry",
    [
        {"_class_name": "DDIMScheduler"},
        {"use_karras_sigmas": True},
        {"shift_terminal": 0.02},
        {"time_shift_type": "linear"},
        {"num_train_timesteps": 100},
    ],
)
def test_an_entry_of_a_schedule_that_flux_lacks_is_named(broken, entry):
    edit_json(broken / "scheduler" / "scheduler_config.json", **entry)
    (name,) = entry
    with pytest.raises(ValueError, match=f"scheduler_config.json.*{name}"):
        load_pipeline(broken)


def test_an_entry_of_a_transformer_config_that_flux_lacks_is_named(broken):
    edit_json(broken / "transformer" / "config.json", patch_size=2)
    with pytest.raises(ValueError, match=r"transformer/config\.json.*patch_size=2"):
        load_pipeline(broken)


def test_only_known_files_of_a_model_leave_its_folder(tmp_path):
    source = shutil.copytree(TINY_FLUX, tmp_path / "model")
    (tmp_path / "secret.json").write_text("{}")
    (source / "vae" / "notes.txt").write_text("private")
    (source / "vae" / "code.py").write_text("print()")
    (source / "vae" / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "vae" / "x_config.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(source / "tokenizer" / "vocab.json.safetensors")
    pipe = load_pipeline(source)
    save_pipeline(tmp_path / "saved", source, pipe.flux.config, pipe.flux.state_dict().items())
    shipped = {file.relative_to(TINY_FLUX) for file in TINY_FLUX.rglob("*")}
    assert {file.relative_to(tmp_path / "saved") for file in (tmp_path / "saved").rglob("*")} == shipped


@pytest.mark.parametrize("linked", ["text_encoder_2", "vae/diffusion_pytorch_model.safetensors"])
def test_a_model_with_links_out_of_its_folder_is_refused_before_a_run_would_save_it_in_parts(linked, tmp_path):
    model = shutil.copytree(TINY_FLUX, tmp_path / "model")
    elsewhere = (model / linked).rename(tmp_path / "elsewhere")
    (model / linked).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{linked}.* is a link out of"):
        describe_model(Config(model=str(model)))
    describe_model(Config(model=str(model), lora=4))  # a LoRA is saved without the model
