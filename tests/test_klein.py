"""FLUX.2 [klein], a random one of a few MB, through everything: read, drawn, guided, trained, and written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file
from torch import Tensor

import evaluate
import train
from config import Config, parse
from families import flux2
from formats.folders import Pipeline, describe, load_pipeline
from formats.lora import FILE
from formats.names import from_diffusers
from formats.weights import WEIGHTS
from infra.distributed import full_tensor, join
from infra.jsonl import read_log
from infra.meter import Meter
from sample import decode, draw_noise, encode, sample, truncation_warning
from start import describe_model
from tests.processes import spread
from tests.tiny_folders import edit_json
from tools import tiny_klein

PROMPTS = ["a photo of a red circle and a blue square", "two words"]
LENGTH = 48  # tokens; 512 by default


@pytest.fixture(scope="module")
def klein(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("klein") / "klein"
    tiny_klein.main(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(klein) -> Pipeline:
    return load_pipeline(klein, text_length=LENGTH)


@pytest.fixture(scope="module")
def reference(klein) -> Flux2KleinPipeline:
    return diffusers_pipeline(klein)


def diffusers_pipeline(folder: Path) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_images(reference: Flux2KleinPipeline, height: int, width: int, steps: int, **options) -> Tensor:
    """From seeds alone: the noise is the pipeline's own."""
    return reference(
        prompt=PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        height=height,
        width=width,
        num_inference_steps=steps,
        max_sequence_length=LENGTH,
        output_type="pt",
        **options,
    ).images


# ------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("height, width", [(64, 64), (48, 112)])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_images_equal_those_of_diffusers_with_guidance_and_without(pipe, reference, height, width, guidance):
    expected = diffusers_images(reference, height, width, 4, guidance_scale=guidance)
    images = sample(pipe, PROMPTS, [0, 1], 4, height, width, guidance)
    assert images.shape == (2, 3, height, width) and images.std() > 0.01
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_guidance_changes_a_picture_and_so_does_the_negative_prompt(pipe):
    plain, guided, other = (
        sample(pipe, PROMPTS, [0, 1], 2, 32, 32, guidance, negative_prompt=negative)
        for guidance, negative in [(1, ""), (4.0, ""), (4.0, "blurry")]
    )
    assert (plain - guided).abs().max() > 1e-3 and (guided - other).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
@pytest.mark.parametrize("tokens", [16, 1024, 2025, 4096, 5000])
def test_levels_equal_those_that_the_pipeline_asks_of_its_scheduler(klein, tokens, steps):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(klein / "scheduler")
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(tokens, steps))
    levels = flux2.sigmas(describe(klein).schedule, steps, tokens)
    torch.testing.assert_close(levels, scheduler.sigmas, rtol=0, atol=3e-7)


def test_features_are_those_of_27_layers_and_only_these_are_loaded(pipe, reference):
    prompts = [*PROMPTS, "", "a red circle and " * 20]  # the last is truncated
    with torch.no_grad():
        expected, ids = reference.encode_prompt(prompts, max_sequence_length=LENGTH)
    (txt,) = encode(pipe, prompts)
    torch.testing.assert_close(txt, expected, rtol=0, atol=1e-6)
    assert txt.shape == (4, LENGTH, 3 * tiny_klein.WIDTH)
    assert torch.equal(flux2.position_ids(2, 3, LENGTH)[1].expand_as(ids), ids)
    assert len(pipe.encoders[0].layers) == 27 < len(reference.text_encoder.model.layers)
    assert "Qwen3 (--text-length) reads 48 tokens, 2 of 4 have more" in truncation_warning(pipe, prompts)


def test_the_chat_is_qwen3s(pipe):
    assert flux2.prompt_text(pipe.tokenizers[0], "a cat") == (
        "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_with_the_encoder_offloaded_its_features_are_the_same(klein, pipe):
    offloaded = load_pipeline(klein, text_length=LENGTH, offload=True)
    assert torch.equal(encode(offloaded, PROMPTS)[0], encode(pipe, PROMPTS)[0])


def test_positions_and_noise_are_the_pipelines(pipe, reference):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise, ids = reference.prepare_latents(2, 32, 32, 48, torch.float32, "cpu", generators)
    assert torch.equal(draw_noise(pipe, [3, 4], 2, 3), noise)
    assert torch.equal(flux2.position_ids(2, 3, 5)[0].expand_as(ids), ids)


def test_the_gradient_of_an_image_reaches_its_latents(pipe):
    x = draw_noise(pipe, [0], 2, 3).requires_grad_()
    decode(pipe, x, 32, 48).sum().backward()
    assert x.grad.flatten(0, 1).any(dim=1).all()


# ------------------------------------------------------------------------------------------- files


def test_a_file_of_the_transformer_alone_is_read_with_the_folder_as_its_base(klein, pipe, tmp_path):
    state = pipe.flux.state_dict()
    file = tmp_path / "flux-2-klein-base-4b.safetensors"
    save_file(state, file)
    again = load_pipeline(file, base=str(klein)).flux
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())
    from_folder = dict(from_diffusers(load_file(klein / "transformer" / WEIGHTS), pipe.flux.config))
    assert all(torch.equal(from_folder[name], tensor) for name, tensor in state.items())


def test_what_cannot_be_trained_is_refused_by_name(klein, dev, pipe, tmp_path):
    broken = shutil.copytree(klein, tmp_path / "broken")
    edit_json(broken / "model_index.json", is_distilled=True)
    with pytest.raises(ValueError, match=r"a few steps.*: take FLUX.2 \[klein\] base"):
        describe(broken)
    remedies = {
        "Flux2Pipeline": r"24 B parameters: take FLUX\.2 \[klein\] base",
        "FluxKontextPipeline": "edits pictures",
        "Flux3Pipeline": "another transformer",
        "ChromaPipeline": "give a folder of",
    }
    for pipeline, remedy in remedies.items():
        edit_json(broken / "model_index.json", is_distilled=False, _class_name=pipeline)
        with pytest.raises(ValueError, match=f"{broken} .*{pipeline}.*{remedy}"):
            describe(broken)
    for name in ("flux-2-klein-4b", "flux2-dev"):
        file = tmp_path / f"{name}.safetensors"
        save_file(pipe.flux.state_dict(), file)
        with pytest.raises(ValueError, match=rf"{name}.*: .* take FLUX\.2 \[klein\] base"):
            describe(file, str(klein))


def test_parts_of_two_families_are_named(klein, dev, pipe, tmp_path):
    mixed = shutil.copytree(klein, tmp_path / "mixed")
    shutil.rmtree(mixed / "transformer")
    shutil.copytree(dev / "transformer", mixed / "transformer")
    with pytest.raises(ValueError, match=rf"{mixed} is of FLUX\.2, and {mixed / 'transformer'} is not"):
        describe(mixed)
    save_file(pipe.flux.state_dict(), tmp_path / "klein.safetensors")
    with pytest.raises(ValueError, match=r"klein\.safetensors is a transformer of FLUX\.2, and .* of FLUX\.1"):
        describe(tmp_path / "klein.safetensors", str(dev))


def test_a_text_encoder_of_too_few_layers_is_named(klein, tmp_path):
    broken = shutil.copytree(klein, tmp_path / "broken")
    edit_json(broken / "text_encoder" / "config.json", num_hidden_layers=12, layer_types=["full_attention"] * 12)
    with pytest.raises(ValueError, match=r"text_encoder/config.json .*12 layers instead of 27"):
        describe(broken)


# ---------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "few.txt"
    file.write_text("a photo of a red circle\na photo of a blue square\n")
    return file


@pytest.fixture(scope="module")
def config(klein, prompts, tmp_path_factory) -> Config:
    """A short run, with a learning rate that changes pictures."""
    return Config(
        model=str(klein), prompts=prompts, eval_prompts=prompts, watch=(), guidance=4.0, text_length=LENGTH, batch=4,
        rollout_steps=3, updates=3, eval_every=3, lr=3e-2, decay=False, ema=0.5,
        out=tmp_path_factory.mktemp("train") / "run",
    )  # fmt: skip


def train_run(cfg: Config) -> None:
    with join("cpu") as process:
        train.run(cfg, train.set_up(cfg, process), process)


def gradient_of(cfg: Config) -> Tensor:
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        train.accumulate_batch_gradient(cfg, setup, process, 0, Meter(process.device))
        return torch.cat([full_tensor(p.grad).flatten() for p in setup.pipe.flux.parameters()])


def test_the_gradient_is_the_same_on_one_and_two_ranks_and_with_activations_recomputed(config):
    one = spread(1, gradient_of, config)[0]
    assert one.norm() > 0
    for gradient in spread(2, gradient_of, replace(config, recompute="blocks", micro_batch=1)):
        assert (gradient - one).norm() < 1e-4 * one.norm()


def drawn_alike(folder: Path, reference: Flux2KleinPipeline) -> Tensor:
    """Our pictures of a model, which are diffusers'."""
    images = sample(load_pipeline(folder, text_length=LENGTH), PROMPTS, [0, 1], 4, 64, 64, 4.0)
    expected = diffusers_images(reference, 64, 64, 4, guidance_scale=4.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-4)
    return images


def test_a_lora_trained_on_two_ranks_draws_the_same_in_diffusers(klein, config):
    cfg = replace(config, lora=4)
    spread(2, train_run, cfg)
    reference = diffusers_pipeline(klein)
    untuned = diffusers_images(reference, 64, 64, 4, guidance_scale=4.0)
    reference.load_lora_weights(cfg.out / "final")
    assert (drawn_alike(cfg.out / "final", reference) - untuned).abs().max() > 0.01
    layers = {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in load_file(cfg.out / "final" / FILE)}
    assert {"single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.1.ff_context.linear_in"} < layers
    entry = read_log(cfg.out / "metrics.jsonl")[-1]
    # Of each of 4 samples: 3 guided velocities of the rollout, then 2 leaps, of two branches each.
    assert (entry["forwards"], entry["backwards"]) == (4 * 2 * (3 + 2), 4 * 2 * 2)


def test_the_preset_of_a_lora_is_rehearsed_and_what_it_trains_draws_the_same_in_diffusers(klein, prompts, tmp_path):
    """All of the preset but its files, its size and its length: bf16, LoRA, recompute, encoder offloaded."""
    words = f"flux2-klein-4b-lora --model {klein} --prompts {prompts} --eval-prompts {prompts} --reward tiny --watch"
    words += f" --size 64 --text-length {LENGTH} --updates 2 --batch 4 --lr 0.03 --device cpu --out {tmp_path / 'run'}"
    cfg, preset = parse(words.split())
    assert (preset.guidance, preset.rollout_steps, preset.batch, preset.lora) == (4.0, 25, 16, 32)
    spread(1, train_run, cfg)
    reference = diffusers_pipeline(klein)
    untuned = diffusers_images(reference, 64, 64, 4, guidance_scale=4.0)
    reference.load_lora_weights(cfg.out / "final")
    assert (drawn_alike(cfg.out / "final", reference) - untuned).abs().max() > 0.003


def test_all_weights_are_written_for_diffusers_and_as_one_file(klein, config, prompts, tmp_path):
    cfg = replace(config, out=tmp_path / "run", detach_negative=True)
    spread(1, train_run, cfg)
    images = drawn_alike(cfg.out / "final", diffusers_pipeline(cfg.out / "final"))
    file = tmp_path / "tuned.safetensors"
    spread(1, train_run, replace(cfg, resume=True, export=file))
    alone = sample(load_pipeline(file, text_length=LENGTH, base=str(klein)), PROMPTS, [0, 1], 4, 64, 64, 4.0)
    torch.testing.assert_close(alone, images, rtol=0, atol=1e-6)
    entry = read_log(cfg.out / "metrics.jsonl")[-1]
    assert (entry["forwards"], entry["backwards"]) == (
        4 * (2 * 3 + 2),
        4 * 2,
    )  # one branch in the leaps

    flags = evaluate.EvaluateFlags(
        model=(str(klein), str(cfg.out / "final")), prompts=prompts, reward=("tiny",), rollout_steps=2, num=1,
        text_length=LENGTH, out=tmp_path / "evaluation",
    )  # fmt: skip
    with join("cpu") as process:
        evaluate.evaluate_models(flags, process)
    scores = json.loads((tmp_path / "evaluation" / "results.json").read_text())["scores"]
    before, after = (values["tiny"] for values in scores.values())
    assert before != after


def test_flags_of_guidance_that_would_do_nothing_are_refused(config, dev):
    with pytest.raises(ValueError, match=r"--guidance is needed, 4.0 is usual for FLUX.2"):
        describe_model(replace(config, guidance=None))
    for model, guidance in ((config.model, 1.0), (str(dev), 3.5)):
        with pytest.raises(ValueError, match="--negative-prompt and --detach-negative are for --guidance by a second"):
            describe_model(replace(config, model=model, guidance=guidance, negative_prompt="blurry"))
