"""A transformer in a file of its own, as flux1-dev.safetensors and ComfyUI's: read like a folder's, and written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import evaluate
import train
from config import Config
from formats.folders import Pipeline, describe, load_pipeline
from formats.locations import locate
from formats.saving import save_single_file, write_model
from formats.weights import WEIGHTS
from infra.checks import check_flags, check_folder
from infra.distributed import join
from sample import sample
from start import describe_model
from tests.processes import spread

ROOT = Path(train.__file__).parent
PROMPTS = ["a photo of a red circle"]
FILE = "flux1-dev.safetensors"


@pytest.fixture(scope="module")
def whole(dev) -> Pipeline:
    return load_pipeline(dev)


@pytest.fixture(scope="module")
def file(whole, tmp_path_factory) -> Path:
    """The folder's transformer under black-forest-labs' names, with other values."""
    state = {k: v + 0.01 for k, v in whole.flux.state_dict().items()}
    save_file(state, file := tmp_path_factory.mktemp("file") / FILE)
    return file


@pytest.fixture(scope="module")
def base(dev, tmp_path_factory) -> Path:
    """A folder of all components but the transformer, whose small file it has."""
    folder = shutil.copytree(dev, tmp_path_factory.mktemp("base") / "base")
    (folder / "transformer" / WEIGHTS).unlink()
    return folder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_file_with_a_base_is_the_files_transformer_in_the_bases_folder(prefix, file, dev, base, tmp_path):
    """With the prefixes of ComfyUI, too, and the VAE that its checkpoints hold."""
    state = {prefix + k: v for k, v in load_file(file).items()}
    if prefix:
        state["vae.decoder.conv_in.weight"] = torch.zeros(1)
    comfy = tmp_path / "comfy.safetensors"
    save_file(state, comfy)
    for folder in (dev, base):
        pipe = load_pipeline(comfy, base=str(folder))
        assert same(pipe.flux.state_dict(), load_file(file)) and pipe.location.folder == folder
    description = describe(comfy, str(dev))
    assert description.weights.config == describe(dev).weights.config and description.cell == describe(dev).cell
    dev_images = sample(load_pipeline(dev), PROMPTS, [0], 2, 16, 16, 3.5)
    assert (sample(pipe, PROMPTS, [0], 2, 16, 16, 3.5) - dev_images).abs().max() > 1e-4


def test_without_a_config_file_the_network_is_flux_devs(file, base, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(folder / "transformer")
    with pytest.raises(ValueError, match=r"img_in\.weight is .* instead of \(3072, 64\)"):
        load_pipeline(file, base=str(folder))
    monkeypatch.setattr("families.flux1.DEFAULT", whole.flux.config)
    assert same(load_pipeline(file, base=str(folder)).flux.state_dict(), load_file(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whether_guidance_is_embedded_shows_in_the_file(dtype, schnell, dev, tmp_path, capsys):
    """A note says that the base has another network."""
    state = load_pipeline(schnell, dtype=dtype).flux.state_dict()
    save_file(state, tmp_path / "flux1-schnell.safetensors")
    pipe = load_pipeline(tmp_path / "flux1-schnell.safetensors", dtype=dtype, base=str(dev))
    assert not pipe.flux.config.guidance_embed and same(pipe.flux.state_dict(), state)
    assert capsys.readouterr().err.count("guidance_embed False instead of True") == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_fp8_weights_are_read_up_cast_and_a_note_says_so_once(form, dtype, dev, whole, tmp_path, capsys):
    if form == "file":
        model, base = tmp_path / "fp8.safetensors", str(dev)
        save_file({k: v.to(dtype) for k, v in whole.flux.state_dict().items()}, model)
    else:
        model, base = shutil.copytree(dev, tmp_path / "model"), None
        transformer = FluxTransformer2DModel.from_pretrained(dev / "transformer")
        transformer.to(dtype).save_pretrained(model / "transformer")
    capsys.readouterr()
    state = load_pipeline(model, dtype=torch.bfloat16, base=base).flux.state_dict()
    err = capsys.readouterr().err
    assert err.count(f"holds {dtype}") == err.count("read up-cast: what fp8 rounded off stays lost") == 1
    assert same(state, {k: v.to(dtype).bfloat16() for k, v in whole.flux.state_dict().items()})
    assert not same(state, {k: v.bfloat16() for k, v in whole.flux.state_dict().items()})


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Reading weights fails."""
    for name in ("formats.folders.build_flux", "formats.folders.load_frozen"):
        monkeypatch.setattr(name, None)


def test_fp8_weights_with_scales_are_refused_before_weights_are_read(dev, whole, tmp_path, no_weights):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in whole.flux.state_dict().items()}
    save_file(state | {"img_in.scale_weight": torch.ones(())}, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} .*is quantized.*: img_in\.scale_weight is unexpected"):
        load_pipeline(tmp_path / FILE, base=str(dev))


def test_strength_goes_from_the_bases_transformer_to_the_files(file, dev, whole):
    half = load_pipeline(file, base=str(dev), strength=0.5).flux.state_dict()
    for name, tensor in whole.flux.state_dict().items():
        torch.testing.assert_close(half[name], tensor + 0.005, atol=1e-6, rtol=0)


def test_strength_between_different_networks_is_refused(file, schnell, dev, tmp_path):
    save_file(load_pipeline(schnell).flux.state_dict(), tmp_path / "flux1-schnell.safetensors")
    with pytest.raises(ValueError, match="--strength is for a model that was tuned from --base"):
        load_pipeline(tmp_path / "flux1-schnell.safetensors", base=str(dev), strength=0.5)


def test_a_base_is_needed_by_a_file_and_refused_for_a_folder(file, dev, base):
    for no_folder in (None, str(file)):
        with pytest.raises(ValueError, match=f"{FILE} is a transformer alone: give --base FOLDER"):
            load_pipeline(file, base=no_folder)
    with pytest.raises(ValueError, match=r"--base .* is for a LoRA or a transformer's file, and --model .* is neither"):
        describe_model(Config(model=str(dev), base=str(dev), guidance=3.5))
    with pytest.raises(ValueError, match=f"cannot read {base / 'transformer' / WEIGHTS}.*: copy or download it"):
        load_pipeline(base)


@pytest.mark.parametrize("name", ["final_layer.linear.weight", "single_blocks.0.linear2.bias"])
def test_a_tensor_that_a_file_lacks_is_named_before_weights_are_read(name, file, dev, tmp_path, no_weights):
    save_file({k: v for k, v in load_file(file).items() if k != name}, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"{FILE}.*: {name} is missing"):
        load_pipeline(tmp_path / FILE, base=str(dev))


def test_of_a_hub_id_that_is_the_base_of_a_file_no_transformer_is_downloaded(file, dev, monkeypatch):
    patterns = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(dev)

    monkeypatch.setattr("formats.locations.snapshot_download", download)
    assert locate(file, "someone/some-flux").folder == dev
    assert "vae/*" in patterns and "transformer/*" not in patterns and "transformer/config.json" in patterns
    locate("someone/some-flux")
    assert "transformer/*" in patterns


def test_train_sample_and_evaluate_take_a_file_with_a_base(tmp_path, monkeypatch, capsys):
    """The note of a LoRA that is trained on them names both."""
    tiny = ROOT / "shapes" / "tiny-flux"
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "transformer" / WEIGHTS).unlink()
    save_file(load_pipeline(tiny).flux.state_dict(), tmp_path / FILE)
    (tmp_path / "few.txt").write_text("a photo of a circle\na photo of two squares\n")
    monkeypatch.chdir(tmp_path)
    model = ["--model", FILE, "--base", "base"]
    flags = ["--steps", "1", "--batch", "2", "--rollout-steps", "2", "--eval-prompts", "few.txt"]
    for out, lora_flags in (("full", []), ("lora", ["--lora", "2"])):
        monkeypatch.setattr("sys.argv", ["train.py", *model, *flags, "--out", out, *lora_flags])
        train.main()
    assert load_pipeline("full/final").flux.config == load_pipeline(tiny).flux.config
    note = json.loads((tmp_path / "lora" / "final" / "lora.json").read_text())
    assert note == {"base": str(base), "transformer": str(tmp_path / FILE)}
    assert locate("lora/final")[:2] == (base, tmp_path / FILE)
    monkeypatch.setattr("sys.argv", ["sample.py", *model, "--prompt", PROMPTS[0], "--num", "1", "--steps", "1"])
    __import__("sample").main()
    flags = ["--prompts", "few.txt", "--num", "1", "--steps", "1", "--rewards", "tiny", "--out", "eval"]
    models = [str(tiny), FILE, "lora/final"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", *models, "--base", str(tiny), *flags])
    evaluate.main()
    scores = json.loads((tmp_path / "eval" / "results.json").read_text())["scores"]
    tiny_score, file_score, _ = (s["tiny"] for s in scores.values())
    assert len(scores) == 3 and tiny_score == file_score


# ------------------------------------------------------------------------------------------- writing


def train_and_export(cfg: Config, folder: Path) -> None:
    """A run, then its final model exported twice: as a folder, and as a file."""
    exports = [replace(cfg, resume=True, export=folder / name) for name in ("folder", "one.safetensors")]
    with join("cpu") as process:
        for run_cfg in (cfg, *exports):
            train.run(run_cfg, train.set_up(run_cfg, process), process)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_exported_file_holds_the_exported_folders_values_bit_for_bit(bf16, tmp_path):
    """From two ranks; fused rows are split and halves swapped by hand here; and read back as --model."""
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    (tmp_path / "few.txt").write_text("\n".join(lines[::60]) + "\n")
    cfg = Config(out=tmp_path / "run", batch=2, rollout_steps=2, updates=1, ema=0.5, bf16=bf16,
                 eval_prompts=tmp_path / "few.txt")  # fmt: skip
    spread(2, train_and_export, cfg, tmp_path)
    dtype = torch.bfloat16 if bf16 else torch.float32
    bfl_state = load_file(tmp_path / "one.safetensors")
    diffusers_state = load_file(tmp_path / "folder" / "transformer" / WEIGHTS)
    assert {t.dtype for t in bfl_state.values()} == {dtype}
    for letter, rows in zip("qkv", bfl_state["double_blocks.0.img_attn.qkv.weight"].chunk(3)):
        assert torch.equal(rows, diffusers_state[f"transformer_blocks.0.attn.to_{letter}.weight"])
    shift, scale = bfl_state["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), diffusers_state["norm_out.linear.weight"])
    assert sum(t.numel() for t in bfl_state.values()) == sum(t.numel() for t in diffusers_state.values())

    from_file = load_pipeline(tmp_path / "one.safetensors", dtype=dtype, base=cfg.model).flux.state_dict()
    assert same(from_file, load_pipeline(tmp_path / "folder", dtype=dtype).flux.state_dict())
    assert not same(from_file, load_pipeline(cfg.model, dtype=dtype).flux.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_file_is_the_one_that_safetensors_writes(dtype, whole, tmp_path):
    state = {k: v.to(dtype) for k, v in whole.flux.state_dict().items()}
    save_single_file(tmp_path / "written.safetensors", whole.flux.config, dtype, state.items())
    save_file(state, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert same(load_file(tmp_path / "written.safetensors"), load_file(tmp_path / "expected.safetensors"))
    with safe_open(tmp_path / "written.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_an_export_that_cannot_be_one_file_is_refused_and_an_existing_file_is_spared(whole, tmp_path):
    cfg = Config(out=tmp_path / "run", resume=True, export=tmp_path / "one.safetensors")
    with join("cpu") as world:
        with pytest.raises(ValueError, match=r"--export .*one\.safetensors: a LoRA run has a LoRA's file"):
            check_flags(replace(cfg, lora=4), world)
        write_model(cfg.export, whole, world)
    contents = cfg.export.read_bytes()
    with pytest.raises(ValueError, match="exists: give a path that does not"):
        check_folder(cfg, cfg.out, {}, [])
    assert cfg.export.read_bytes() == contents and [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]
