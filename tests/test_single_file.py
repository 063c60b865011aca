"""A transformer in a file of its own, as flux1-dev.safetensors and ComfyUI's: read as a folder's is, and written."""

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
from start import check_model
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
def others(dev, tmp_path_factory) -> Path:
    """A folder of all parts but the transformer, of which there is the small file."""
    folder = shutil.copytree(dev, tmp_path_factory.mktemp("others") / "base")
    (folder / "transformer" / WEIGHTS).unlink()
    return folder


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ---------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_file_with_a_base_is_the_bases_other_parts_and_the_files_transformer(prefix, file, dev, others, tmp_path):
    """With the prefixes of ComfyUI too."""
    save_file({prefix + k: v for k, v in load_file(file).items()}, tmp_path / "comfy.safetensors")
    for base in (dev, others):
        pipe = load_pipeline(tmp_path / "comfy.safetensors", base=str(base))
        assert same(pipe.flux.state_dict(), load_file(file)) and pipe.location.folder == base
    ours, theirs = describe(tmp_path / "comfy.safetensors", str(dev)), describe(dev)
    assert ours.weights.config == theirs.weights.config and ours.cell == theirs.cell
    before, after = (sample(p, PROMPTS, [0], 2, 16, 16, 3.5) for p in (load_pipeline(dev), pipe))
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("place", [FILE, f"transformer/{FILE}"])
@pytest.mark.parametrize("config", [True, False])
def test_a_file_in_place_of_the_transformers_folder_is_read(config, place, file, others, tmp_path, monkeypatch):
    """As a download of FLUX.1-dev without its transformer/; a VAE beside it is told apart."""
    folder = shutil.copytree(others, tmp_path / "model")
    if not config:  # then positions are encoded as FLUX.1's are
        monkeypatch.setattr("formats.weights.FLUX_DEV", load_pipeline(file, base=str(others)).flux.config)
        shutil.rmtree(folder / "transformer")
        (folder / "transformer").mkdir()
    shutil.copy(file, folder / place)
    save_file(load_file(folder / "vae" / WEIGHTS), folder / "ae.safetensors")
    assert same(load_pipeline(folder).flux.state_dict(), load_file(file))
    shutil.copy(file, folder / "second.safetensors")
    with pytest.raises(ValueError, match=r"has 2 transformers: give one, --model .* --base"):
        load_pipeline(folder)


def test_whether_guidance_is_embedded_shows_in_the_file(schnell, dev, tmp_path, capsys):
    """And that the base is not its own is said once."""
    save_file(load_pipeline(schnell).flux.state_dict(), tmp_path / "flux1-schnell.safetensors")
    pipe = load_pipeline(tmp_path / "flux1-schnell.safetensors", base=str(dev))
    assert not pipe.flux.config.guidance_embed
    assert capsys.readouterr().err.count("guidance_embed False instead of True") == 1


def test_parts_of_a_checkpoint_beside_its_transformer_are_said_not_to_be_read(file, dev, tmp_path, capsys):
    state = {f"model.diffusion_model.{k}": v for k, v in load_file(file).items()}
    state |= {"vae.decoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.x": torch.zeros(1)}
    save_file(state, tmp_path / "all.safetensors")
    assert same(load_pipeline(tmp_path / "all.safetensors", base=str(dev)).flux.state_dict(), load_file(file))
    assert "only the transformer is read, not text_encoders, vae" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_fp8_weights_are_read_up_cast_and_that_is_said_once(place, kind, dev, whole, tmp_path, capsys):
    if place == "file":
        save_file({k: v.to(kind) for k, v in whole.flux.state_dict().items()}, model := tmp_path / "fp8.safetensors")
    else:
        model = shutil.copytree(dev, tmp_path / "model")
        theirs = FluxTransformer2DModel.from_pretrained(dev / "transformer").to(kind)
        theirs.save_pretrained(model / "transformer")
    capsys.readouterr()
    ours = load_pipeline(model, dtype=torch.bfloat16, base=str(dev) if place == "file" else None).flux.state_dict()
    err = capsys.readouterr().err
    assert err.count("holds float8") == err.count("read up-cast: what fp8 rounded off stays lost") == 1
    assert same(ours, {k: v.to(kind).bfloat16() for k, v in whole.flux.state_dict().items()})
    assert not same(ours, {k: v.bfloat16() for k, v in whole.flux.state_dict().items()})


def test_fp8_weights_with_scales_are_refused_before_any_weights_are_read(dev, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("formats.folders.parse_model", None)
    state = {k: v.to(torch.float8_e4m3fn) for k, v in whole.flux.state_dict().items()}
    save_file(state | {"img_in.scale_weight": torch.ones(())}, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} holds quantized weights with scales \(img_in\.scale_weight\).*bf16"):
        load_pipeline(tmp_path / FILE, base=str(dev))


def test_strength_goes_from_the_bases_transformer_to_the_files(file, dev, whole):
    half = load_pipeline(file, base=str(dev), strength=0.5).flux.state_dict()
    for name, tensor in whole.flux.state_dict().items():
        torch.testing.assert_close(half[name], tensor + 0.005, atol=1e-6, rtol=0)


def test_a_file_without_a_base_names_the_flag_and_a_base_that_is_a_file_is_refused(file, dev, others):
    with pytest.raises(ValueError, match=f"{FILE} is a transformer alone: give --base FOLDER"):
        load_pipeline(file)
    with pytest.raises(ValueError, match=r"--base .* must be a model folder"):
        load_pipeline(file, base=str(file))
    with pytest.raises(ValueError, match=r"--base .* is for a LoRA or a transformer's file, and --model .* is neither"):
        check_model(Config(model=str(dev), base=str(dev), guidance=3.5))
    with pytest.raises(ValueError, match="transformer is incomplete: copy or download"):
        load_pipeline(others)


def test_a_file_that_lacks_tensors_is_named_before_any_weights_are_read(file, dev, tmp_path, monkeypatch):
    monkeypatch.setattr("formats.folders.parse_model", None)
    for name in ("final_layer.linear.weight", "single_blocks.0.linear2.bias"):
        save_file({k: v for k, v in load_file(file).items() if k != name}, tmp_path / FILE)
        with pytest.raises(ValueError, match=rf"{FILE}.*{name}"):
            load_pipeline(tmp_path / FILE, base=str(dev))


def test_of_a_hub_id_that_is_the_base_of_a_file_no_transformer_is_downloaded(file, dev, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "formats.locations.snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or str(dev)
    )
    assert locate(file, "someone/some-flux").folder == dev
    assert "vae/*" in asked and "transformer/*" not in asked and "transformer/config.json" in asked
    locate("someone/some-flux")
    assert "transformer/*" in asked


def test_train_sample_and_evaluate_take_a_file_with_a_base(tmp_path, monkeypatch, capsys):
    """And a LoRA trained on it is found again with both."""
    tiny = ROOT / "shapes" / "tiny-flux"
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "transformer" / WEIGHTS).unlink()
    save_file(load_pipeline(tiny).flux.state_dict(), tmp_path / FILE)
    (tmp_path / "few.txt").write_text("a photo of a circle\na photo of two squares\n")
    monkeypatch.chdir(tmp_path)
    model = ["--model", FILE, "--base", "base"]
    flags = ["--steps", "1", "--batch", "2", "--rollout-steps", "2", "--eval-prompts", "few.txt"]
    for out, more in (("full", []), ("lora", ["--lora", "2"])):
        monkeypatch.setattr("sys.argv", ["train.py", *model, *flags, "--out", out, *more])
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
    first, second, _ = (s["tiny"] for s in scores.values())
    assert len(scores) == 3 and first == second


# ------------------------------------------------------------------------------------------- written


def trained(cfg: Config) -> str:
    with join("cpu") as world:
        train.run(cfg, train.set_up(cfg, world), world)
    return ""


@pytest.mark.parametrize("bf16", [False, True])
def test_an_exported_file_holds_the_exported_folders_values_bit_for_bit(bf16, tmp_path):
    """From two ranks; by diffusers' names, cut and swapped here by hand, and read back as --model."""
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    (tmp_path / "few.txt").write_text("\n".join(lines[::60]) + "\n")
    cfg = Config(out=tmp_path / "run", batch=2, rollout_steps=2, updates=1, ema=0.5, bf16=bf16,
                 eval_prompts=tmp_path / "few.txt")  # fmt: skip
    assert spread(2, trained, cfg) == ["", ""]
    for name in ("folder", "one.safetensors"):
        assert spread(2, trained, replace(cfg, resume=True, export=tmp_path / name)) == ["", ""]
    ours = load_file(tmp_path / "one.safetensors")
    theirs = load_file(tmp_path / "folder" / "transformer" / WEIGHTS)
    assert {t.dtype for t in ours.values()} == {torch.bfloat16 if bf16 else torch.float32}
    fused = ours["double_blocks.0.img_attn.qkv.weight"].chunk(3)
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    assert all(torch.equal(a, theirs[name]) for a, name in zip(fused, names))
    shift, scale = ours["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), theirs["norm_out.linear.weight"])
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in theirs.values())
    dtype = torch.bfloat16 if bf16 else torch.float32
    file, folder = (
        load_pipeline(tmp_path / "one.safetensors", dtype=dtype, base=cfg.model),
        load_pipeline(tmp_path / "folder", dtype=dtype),
    )
    assert same(file.flux.state_dict(), folder.flux.state_dict())
    assert not same(file.flux.state_dict(), load_pipeline(cfg.model, dtype=dtype).flux.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_file_is_the_one_that_safetensors_writes(dtype, whole, tmp_path):
    state = {k: v.to(dtype) for k, v in whole.flux.state_dict().items()}
    save_single_file(tmp_path / "ours.safetensors", whole.flux.config, dtype, iter(state.items()))
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert same(load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors"))
    with safe_open(tmp_path / "ours.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_an_export_that_cannot_be_one_file_is_refused_and_what_is_there_is_spared(whole, tmp_path):
    cfg = Config(out=tmp_path / "run", resume=True, export=tmp_path / "one.safetensors")
    with join("cpu") as world:
        with pytest.raises(ValueError, match=r"--export .*one\.safetensors: a LoRA run has a LoRA's file"):
            check_flags(replace(cfg, lora=4), world)
        write_model(cfg.export, whole, world)
    before = cfg.export.read_bytes()
    with pytest.raises(ValueError, match="is there already: give a folder or file that is not"):
        check_folder(cfg, cfg.out, {}, {}, [])
    assert cfg.export.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]
