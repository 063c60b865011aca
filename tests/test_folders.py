"""What of a model folder is missing, damaged or another model's is named: the file, what was found and what to do."""

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
from formats import locations
from formats.folders import load_pipeline
from formats.locations import PARTS, locate
from formats.weights import INDEX, WEIGHTS
from infra.distributed import join
from tests.tiny_folders import edit_json, shard

TINY_FLUX = Path(evaluate.__file__).parent / "shapes" / "tiny-flux"


@pytest.fixture
def no_network(monkeypatch) -> list[str]:
    """The hub ids that would have been asked for."""
    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(locations, "snapshot_download", download)
    return asked


def test_a_path_never_goes_to_the_network(tmp_path, monkeypatch, no_network):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    paths = ["nowhere", "runs/nowhere", "./a/b", "~/flux", "a/b/c", str(tmp_path / "x"), tmp_path / "runs" / "x"]
    for path in paths:
        with pytest.raises(ValueError, match=f"no model folder at '{path}'.*or a hub id owner/name"):
            locate(path)
    for path in ("flux1-dev.safetensors", "weights/flux1-dev.safetensors"):
        with pytest.raises(ValueError, match=f"no file at '{path}'.*or a hub id owner/name"):
            locate(path)
    assert not no_network


def test_a_hub_id_that_fails_is_named(no_network):
    with pytest.raises(ValueError, match=r"someone/some-flux.*no network"):
        locate("someone/some-flux")
    assert no_network == ["someone/some-flux"]


def test_a_hub_id_loads_what_was_downloaded(dev, monkeypatch):
    monkeypatch.setattr(locations, "snapshot_download", lambda name, allow_patterns: str(dev))
    assert load_pipeline("someone/some-flux").location == (dev, dev / "transformer", None)


def test_a_file_in_place_of_a_folder_is_named(dev):
    file = dev / "transformer" / WEIGHTS
    with pytest.raises(
        ValueError,
        match=f"{file} is a FLUX.1 transformer under diffusers' names, a part of a folder: give a FLUX.1 model",
    ):
        load_pipeline(file)


@pytest.mark.parametrize("part", ["model_index.json", *PARTS])
def test_a_missing_part_is_named_and_what_is_there(broken, part):
    path = broken / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    present = "vae" if part != "vae" else "transformer"
    with pytest.raises(ValueError, match=rf"{broken}.* lacks {part}; it holds .*{present}"):
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
@pytest.mark.parametrize("part", SAFETENSORS)
def test_weights_that_are_damaged_are_named(broken, part, damage):
    DAMAGE[damage](broken / part / SAFETENSORS[part])
    with pytest.raises(ValueError, match=f"{broken / part}.*"):
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


@pytest.mark.parametrize("part", ["scheduler", "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer"])
def test_an_empty_part_is_named(broken, part):
    shutil.rmtree(broken / part)
    (broken / part).mkdir()
    with pytest.raises(ValueError, match=str(broken / part)):
        load_pipeline(broken)


def test_missing_shards_are_named(broken):
    first, second, *_ = shard(broken)
    for name in (first, second):
        (broken / "transformer" / name).unlink()
    with pytest.raises(ValueError, match=f"{broken / 'transformer'} is incomplete.*{first}, {second}"):
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
    with pytest.raises(ValueError, match=rf"{broken} mixes models.*\(16, 20, 32\).*\(16, 20, 24\)"):
        load_pipeline(broken)


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Nothing here may read weights."""
    for name in (
        "formats.folders.parse_model",
        "formats.folders.load_flux",
        "start.load_pipeline",
        "evaluate.load_pipeline",
    ):
        monkeypatch.setattr(name, None)


SWAPPED = [
    ("tokenizer_2", "tokenizer", "CLIP", "T5"),
    ("tokenizer", "tokenizer_2", "T5", "CLIP"),
]


@pytest.mark.parametrize("part, source, found, wanted", SWAPPED)
def test_the_other_encoders_tokenizer_is_named_before_any_weights_are_read(
    part, source, found, wanted, broken, tmp_path, no_weights
):
    """By load, before training starts, and of evaluate's last model before the first is drawn."""
    shutil.rmtree(broken / part)
    shutil.copytree(broken / source, broken / part)
    message = rf"{broken / part} holds a tokenizer of {found}, .* where {wanted}'s belongs: copy or download .* {part}/"
    with pytest.raises(ValueError, match=message):
        load_pipeline(broken)
    with join("cpu") as world:
        with pytest.raises(ValueError, match=message):
            train.set_up(Config(model=str(broken), guidance=3.5, out=tmp_path / "run"), world)
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate_models(
                evaluate.EvaluateFlags(model=(str(TINY_FLUX), str(broken)), out=tmp_path / "evaluation"), world
            )
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_with_more_tokens_than_its_encoder_is_named_before_any_weights_are_read(part, broken, no_weights):
    tokenizer = AutoTokenizer.from_pretrained(broken / part)
    known = len(tokenizer)
    tokenizer.add_tokens(["onemore"])
    tokenizer.save_pretrained(broken / part)
    with pytest.raises(
        ValueError, match=f"{broken / part} holds {known + 1} tokens, and its text encoder knows {known}"
    ):
        load_pipeline(broken)


SMALL_FILES = [
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "tokenizer/tokenizer.json|vocab.json",
    "tokenizer_2/tokenizer.json|spiece.model",
    "tokenizer_2/tokenizer_config.json",
]


@pytest.mark.parametrize("names", SMALL_FILES)
def test_a_missing_small_file_is_named_alone(names, broken, no_weights):
    part, files = names.split("/")
    for name in files.split("|"):
        (broken / part / name).unlink(missing_ok=True)
    wanted = f"missing: {broken / part / files.replace('|', ' or ')}; copy or download it alone"
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        load_pipeline(broken)


def save_flux2(folder: Path) -> None:
    pytest.importorskip("diffusers", minversion="0.36")
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    narrow = dict(num_attention_heads=1, attention_head_dim=8, joint_attention_dim=8, axes_dims_rope=(2, 2, 2, 2))
    made = Flux2Transformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, **narrow)
    Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, made).save_pretrained(folder)


def save_sd3(folder: Path) -> None:
    narrow = dict(num_attention_heads=1, attention_head_dim=8, joint_attention_dim=8, caption_projection_dim=8)
    made = SD3Transformer2DModel(in_channels=4, num_layers=1, sample_size=8, pooled_projection_dim=8, **narrow)
    encoders = [None] * 7  # VAE, encoders and tokenizers
    StableDiffusion3Pipeline(made, FlowMatchEulerDiscreteScheduler(), *encoders).save_pretrained(folder)


@pytest.mark.parametrize(
    "save, family, pipeline",
    [
        (save_flux2, "FLUX.2", "Flux2Pipeline"),
        (save_sd3, "Stable Diffusion 3 or 3.5", "StableDiffusion3Pipeline"),
    ],
)
def test_a_folder_or_file_of_another_model_is_named_as_what_it_is(save, family, pipeline, broken, tmp_path, no_weights):
    """Its transformer within a FLUX.1 folder too; and no parts are asked for."""
    save(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"other is {family} \(model_index\.json says {pipeline}\): only FLUX\.1"):
        load_pipeline(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is a {family} transformer: give a FLUX\.1 model folder"):
        load_pipeline(tmp_path / "other" / "transformer" / WEIGHTS)
    shutil.rmtree(broken / "transformer")
    shutil.copytree(tmp_path / "other" / "transformer", broken / "transformer")
    with pytest.raises(ValueError, match=rf"broken is {family} \(config\.json says \w+2DModel\)"):
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
def test_a_schedule_that_is_not_fluxs_is_named(broken, entry):
    edit_json(broken / "scheduler" / "scheduler_config.json", **entry)
    (name,) = entry
    with pytest.raises(ValueError, match=f"scheduler_config.json.*{name}"):
        load_pipeline(broken)


def test_a_transformer_config_that_is_not_fluxs_is_named(broken):
    edit_json(broken / "transformer" / "config.json", patch_size=2)
    with pytest.raises(ValueError, match=r"transformer/config\.json.*patch_size=2"):
        load_pipeline(broken)
