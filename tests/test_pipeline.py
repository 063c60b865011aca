"""The frozen parts are diffusers' FluxPipeline: same levels, same text, same pictures, same folders."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Block

from formats import weights
from formats.folders import Pipeline, load_pipeline
from formats.locations import PARTS
from formats.names import from_diffusers
from formats.saving import save_pipeline
from formats.weights import WEIGHTS, load_flux, open_flux
from model import Flux, FluxConfig
from sample import decode, draw_noise, encode, main, pack, sample, sigmas, token_grid, unpack, velocity_of
from tests.tiny_folders import FLUX_DEV_SCHEDULE, SCHNELL_LIKE, edit_json, shard

TINY_FLUX = Path(__file__).parent.parent / "shapes" / "tiny-flux"
PROMPTS = ["a photo of a red circle and a blue square", "two words"]
CELL = 8  # pixels a token: the VAE is f4


@pytest.fixture(scope="module")
def pipe(dev) -> Pipeline:
    return load_pipeline(dev)


@pytest.fixture(scope="module")
def reference(dev) -> FluxPipeline:
    return diffusers_pipeline(dev)


def diffusers_pipeline(folder: Path) -> FluxPipeline:
    theirs = FluxPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


# ---------------------------------------------------------------------------------- the sigma schedule


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("tokens", [16, 256, 1024, 2025, 4096])
@pytest.mark.parametrize(
    "schedule", [FLUX_DEV_SCHEDULE, SCHNELL_LIKE["schedule"], dict(use_dynamic_shifting=False, shift=1.0)]
)
def test_levels_equal_those_that_flux_pipeline_asks_of_its_scheduler(schedule, tokens, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in schedule.items() if not k.startswith("_")})
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    retrieve_timesteps(scheduler, steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels = sigmas(schedule, steps, tokens)
    assert levels.shape == (steps + 1,) and levels.dtype == torch.float32
    assert levels[0] == 1 and levels[-1] == 0
    torch.testing.assert_close(levels, scheduler.sigmas, rtol=0, atol=2e-7)


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (1024, 0.63), (2025, 0.7995), (4096, 1.15)])
def test_published_schedule_has_the_published_shifts(tokens, mu):
    """At sigma = 1/2 the shifted level is the logistic function of mu."""
    assert torch.logit(sigmas(FLUX_DEV_SCHEDULE, 2, tokens)[1]).item() == pytest.approx(mu, abs=1e-3)


# ---------------------------------------------------------------------------------------- the pictures


def diffusers_images(theirs: FluxPipeline, pipe: Pipeline, height: int, width: int, steps: int, **options) -> Tensor:
    """From seeds alone: the noise is FluxPipeline's own."""
    return theirs(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        height=height,
        width=width,
        num_inference_steps=steps,
        max_sequence_length=pipe.text_length,
        output_type="pt",
        **options,
    ).images


@pytest.mark.parametrize("height, width", [(32, 32), (24, 56)])
@pytest.mark.parametrize("guidance", [3.5, 1.0])
def test_images_of_a_guided_dynamically_shifted_model_equal_flux_pipeline(pipe, reference, height, width, guidance):
    theirs = diffusers_images(reference, pipe, height, width, 4, guidance_scale=guidance)
    ours = sample(pipe, PROMPTS, [0, 1], 4, height, width, guidance)
    assert ours.shape == (2, 3, height, width) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 56)])
def test_images_of_an_unguided_model_of_fixed_shift_equal_flux_pipeline(schnell, height, width):
    """Neither pipeline shows such a model its guidance, which is 3.5 by default in FluxPipeline."""
    pipe = load_pipeline(schnell)
    theirs = diffusers_images(diffusers_pipeline(schnell), pipe, height, width, 4)
    ours = sample(pipe, PROMPTS, [0, 1], 4, height, width)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert torch.equal(ours, sample(pipe, PROMPTS, [0, 1], 4, height, width, guidance=9.0))


@pytest.mark.skipif(not TINY_FLUX.exists(), reason="shapes/tiny-flux is not there: python -m recipe.prepare makes it")
def test_images_of_the_shipped_model_equal_flux_pipeline():
    pipe = load_pipeline(TINY_FLUX)
    size = pipe.vae.config.sample_size
    theirs = diffusers_images(diffusers_pipeline(TINY_FLUX), pipe, size, size, 4, guidance_scale=3.5)
    ours = sample(pipe, PROMPTS, [0, 1], 4, size, size, 3.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_seed_is_one_picture_in_any_batch(pipe):
    prompts, seeds = [*PROMPTS, *PROMPTS, PROMPTS[0]], [7, 8, 9, 7, 7]
    together = sample(pipe, prompts, seeds, 3, 32, 24, 3.5)
    for batch in (1, 2, 3):
        torch.testing.assert_close(sample(pipe, prompts, seeds, 3, 32, 24, 3.5, batch), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(together[0], together[4], rtol=0, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-3  # another seed
    assert (together[0] - together[3]).abs().max() > 1e-5  # another prompt


def test_sampling_leaves_no_graph(pipe):
    assert not sample(pipe, PROMPTS[:1], [0], 2, 16, 16, 3.5).requires_grad


def test_a_guided_network_demands_its_guidance(pipe):
    with pytest.raises(ValueError, match="guidance is missing"):
        sample(pipe, PROMPTS[:1], [0], 1, 16, 16)


@pytest.mark.parametrize("height, width", [(32, 20), (12, 32), (0, 32), (32, -8)])
def test_a_size_of_broken_tokens_is_named(pipe, height, width):
    assert token_grid(pipe, 24, 56) == (3, 7)
    with pytest.raises(ValueError, match=f"{height}x{width} is not a positive multiple of {CELL}"):
        token_grid(pipe, height, width)


def test_network_runs_in_bf16_on_fp32_latents(dev):
    pipe = load_pipeline(dev, dtype=torch.bfloat16)
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    frozen = [*pipe.flux.parameters(), *pipe.clip.parameters(), *pipe.t5.parameters()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    text = encode(pipe, PROMPTS)
    assert text.txt.dtype == text.vec.dtype == torch.bfloat16
    seen = []
    pipe.flux.register_forward_pre_hook(lambda _, inputs: seen.extend(x.dtype for x in inputs))
    velocity = velocity_of(pipe.flux, text, 2, 3, 3.5)
    assert velocity(draw_noise(pipe, [0, 1], 2, 3), torch.tensor(0.7)).dtype == torch.float32
    bf16, ids = torch.bfloat16, torch.int64
    assert seen == [bf16, ids, bf16, ids, torch.float32, bf16, torch.float32]  # time and guidance stay fp32
    low, high = (sample(p, PROMPTS, [0, 1], 2, 16, 24, 3.5) for p in (pipe, load_pipeline(dev)))
    assert low.dtype == torch.float32 and (low - high).abs().max() < 0.05


# -------------------------------------------------------------------------------------- text and latents


def test_text_equals_flux_pipelines(pipe, reference):
    """Long prompts are cut; an empty one is all padding, which no mask hides."""
    prompts = [*PROMPTS, "", "a red circle and " * 20]
    with torch.no_grad():
        txt, vec, ids = reference.encode_prompt(prompts, max_sequence_length=pipe.text_length)
    ours = encode(pipe, prompts)
    assert torch.equal(ours.txt, txt) and torch.equal(ours.vec, vec)
    assert ours.txt.shape[1] == len(ids) == pipe.text_length == 12
    assert not ours.txt.requires_grad


def test_text_length_may_be_chosen_and_is_512_for_a_tokenizer_without_limit(dev, broken, reference):
    edit_json(broken / "tokenizer_2" / "tokenizer_config.json", model_max_length=int(1e30))
    assert load_pipeline(broken).text_length == 512
    with torch.no_grad():
        txt, _, _ = reference.encode_prompt(PROMPTS, max_sequence_length=20)
    assert torch.equal(encode(load_pipeline(dev, text_length=20), PROMPTS).txt, txt)


def test_with_encoders_offloaded_a_layer_of_t5_at_a_time_is_on_the_device(dev, pipe, monkeypatch):
    there, most, move = set(), [], T5Block.to

    def note(layer: T5Block, device: str) -> T5Block:
        (there.discard if device == "cpu" and layer in there else there.add)(layer)
        most.append(len(there))
        return move(layer, device)

    monkeypatch.setattr(T5Block, "to", note)
    lent = load_pipeline(dev, offload=True)
    assert not most  # none is moved as it is read
    for ours, whole in zip(encode(lent, PROMPTS), encode(pipe, PROMPTS), strict=True):
        assert torch.equal(ours, whole)
    assert max(most) == 1 and not there and len(most) == 2 * len(lent.t5.encoder.block)


def test_packing_round_trips_and_equals_flux_pipelines():
    b, c, h, w = 2, 4, 6, 10
    z = torch.arange(b * c * h * w, dtype=torch.float64).view(b, c, h, w)
    x = pack(z)
    assert torch.equal(x, FluxPipeline._pack_latents(z, b, c, h, w))
    assert torch.equal(unpack(x, h // 2, w // 2), z)
    assert torch.equal(unpack(x, h // 2, w // 2), FluxPipeline._unpack_latents(x, 8 * h, 8 * w, 8))


def test_decoding_equals_flux_pipelines(pipe, reference):
    x = 2 * draw_noise(pipe, [0, 1], 3, 5)
    z = FluxPipeline._unpack_latents(x, 3 * CELL, 5 * CELL, reference.vae_scale_factor)
    z = z / reference.vae.config.scaling_factor + reference.vae.config.shift_factor
    with torch.no_grad():
        theirs = reference.image_processor.postprocess(reference.vae.decode(z).sample, output_type="pt")
        ours = decode(pipe, x, 3 * CELL, 5 * CELL)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_gradient_of_an_image_reaches_its_latents(dev):
    """Against central differences in float64, along random directions; the frozen VAE collects nothing."""
    pipe = load_pipeline(dev)
    pipe.vae.double()
    x = draw_noise(pipe, [0], 2, 3).double().requires_grad_()
    weights = torch.randn(1, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor) -> Tensor:
        return (weights * decode(pipe, x, 16, 24)).sum()

    loss(x).backward()
    assert x.grad.flatten(0, 1).any(dim=1).all()  # every token counts
    for seed in range(3):
        direction, step = draw_noise(pipe, [100 + seed], 2, 3).double(), 1e-5
        with torch.no_grad():
            difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        assert (x.grad * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in pipe.vae.parameters())


def test_images_stay_in_range(pipe):
    images = decode(pipe, 100 * draw_noise(pipe, [0], 2, 2), 16, 16)
    assert images.min() >= 0 and images.max() <= 1


# ----------------------------------------------------------------------------------------------- folders


def test_only_the_transformer_learns(pipe):
    assert all(p.requires_grad for p in pipe.flux.parameters())
    for part in (pipe.vae, pipe.clip, pipe.t5):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_loads_bit_for_bit_here_and_in_diffusers(dev, tmp_path, dtype):
    pipe = load_pipeline(dev)
    with torch.no_grad():
        for p in pipe.flux.parameters():
            p.add_(torch.randn_like(p) / 10)
    pipe.flux.to(dtype)
    save_pipeline(tmp_path / "new" / "final", dev, pipe.flux.config, pipe.flux.state_dict())

    back = load_pipeline(tmp_path / "new" / "final", dtype=dtype)
    assert back.flux.config == pipe.flux.config and back.schedule == pipe.schedule
    assert_same_weights(back.flux, pipe.flux)
    assert_same_weights(back.vae, pipe.vae)
    assert_same_weights(back.t5.float(), pipe.t5.to(dtype).float())
    assert {p.name for p in (tmp_path / "new" / "final").iterdir()} == {"model_index.json", *PARTS}

    theirs = diffusers_pipeline(tmp_path / "new" / "final")
    converted = dict(from_diffusers(theirs.transformer.state_dict(), pipe.flux.config))
    assert all(torch.equal(converted[k].to(dtype), v) for k, v in pipe.flux.state_dict().items())
    images = diffusers_images(theirs, pipe, 16, 24, 2, guidance_scale=3.5)
    ours = sample(load_pipeline(tmp_path / "new" / "final"), PROMPTS, [0, 1], 2, 16, 24, 3.5)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-4)


def test_training_on_the_loaded_weights_leaves_their_file_alone(broken):
    before = (broken / "transformer" / WEIGHTS).read_bytes()
    flux = load_flux(open_flux(broken / "transformer"))
    with torch.no_grad():
        for p in flux.parameters():
            p.zero_()
    assert (broken / "transformer" / WEIGHTS).read_bytes() == before


def test_a_folder_can_be_saved_onto_itself(broken):
    shard(broken)
    pipe = load_pipeline(broken)
    wanted = {k: v + 1 for k, v in pipe.flux.state_dict().items()}
    for _ in range(2):  # over shards, then over the file that the weights are mapped from
        save_pipeline(broken, broken, pipe.flux.config, wanted)
        flux = load_flux(open_flux(broken / "transformer"))
        assert all(torch.equal(v, wanted[k]) for k, v in flux.state_dict().items())
        wanted = flux.state_dict()
    assert diffusers_pipeline(broken).transformer.x_embedder.bias.equal(wanted["img_in.bias"])


def test_a_model_in_use_survives_a_save_over_its_folder(broken, pipe):
    """Loaded weights are mapped from their file."""
    flux = load_flux(open_flux(broken / "transformer"))
    save_pipeline(broken, broken, flux.config, {k: torch.zeros_like(v) for k, v in flux.state_dict().items()})
    assert_same_weights(flux, pipe.flux)
    assert not load_flux(open_flux(broken / "transformer")).img_in.bias.any()


def test_a_sharded_transformer_is_the_same_transformer(broken, pipe):
    assert len(shard(broken)) > 2
    assert_same_weights(load_pipeline(broken).flux, pipe.flux)


def test_a_single_file_with_published_names_is_the_same_transformer(dev, schnell, tmp_path, monkeypatch):
    """As flux1-dev.safetensors; whether guidance is embedded shows in the file."""
    for folder in (dev, schnell):
        flux = load_flux(open_flux(folder / "transformer"))
        monkeypatch.setattr(weights, "FLUX_DEV", replace(flux.config, guidance_embed=True))
        save_file(flux.state_dict(), tmp_path / "flux1.safetensors")
        single = load_flux(open_flux(tmp_path / "flux1.safetensors"), dtype=torch.bfloat16)
        assert single.config == flux.config
        assert_same_weights(single, flux.bfloat16())
    save_file(load_file(dev / "transformer" / WEIGHTS), tmp_path / "flux1.safetensors")
    with pytest.raises(ValueError, match=r"flux1\.safetensors is a FLUX\.1 transformer under diffusers' names"):
        load_flux(open_flux(tmp_path / "flux1.safetensors"))


def test_flux_dev_fits_in_memory_once_without_initial_values(dev, monkeypatch):
    """Weights are taken from the file, never drawn first: drawing 12B normal numbers takes minutes."""

    def build(config: FluxConfig) -> Flux:
        flux = Flux(config)
        assert all(p.is_meta for p in flux.parameters())
        return flux

    monkeypatch.setattr(weights, "Flux", build)
    assert not any(p.is_meta for p in load_flux(open_flux(dev / "transformer")).parameters())


# ------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_one_line_before_anything_is_read(device, monkeypatch, capsys):
    flags = ["sample.py", "--device", device, "--model", "/nowhere", "--prompt", "a circle"]
    monkeypatch.setattr("sys.argv", flags)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: --device {device}: torch has no such device here; cpu works everywhere\n"
