"""LoRA: the file that a run writes is the one that diffusers reads, and both draw the same picture."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train
from config import Config
from families.flux1 import Text
from formats.folders import load_pipeline
from formats.lora import FILE, NOTE, Change, LoRA, add_lora, first_values, lora_layers, without_lora
from formats.sampling import saved_sampling
from infra.distributed import gathered_tensors, join
from model import Flux
from sample import sample, velocity_of
from start import prepare
from tests.processes import spread

ROOT = Path(train.__file__).parent
TINY = ROOT / "shapes" / "tiny-flux"
PROMPTS = ["a photo of a red circle", "a photo of three squares"]
NO_RUN = Path("nonexistent")  # --out of a run that writes nothing


# ------------------------------------------------------------------------------------------------- the layers


def tiny_flux_with_lora(rank: int, alpha: float) -> Flux:
    """The tiny Flux with a LoRA of random A and B."""
    flux = load_pipeline(TINY).flux
    add_lora(flux, rank, alpha)
    torch.manual_seed(0)
    for module in flux.modules():
        if isinstance(module, LoRA):
            for factor in (*module.a, *module.b):
                factor.data.normal_()
    return flux


def velocity_at(flux: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, txt, vec = (torch.randn(s, generator=generator) for s in ((2, 16, 32), (2, 12, 96), (2, 64)))
    return velocity_of(flux, Text(txt, vec), 4, 4)(x, torch.tensor([0.7, 0.2]))


def test_the_change_is_alpha_over_rank_times_B_A_in_each_block_of_rows_of_a_fused_layer():
    flux, plain_flux = tiny_flux_with_lora(rank=3, alpha=6.0), load_pipeline(TINY).flux
    for name, diffusers_names in lora_layers(flux.config):
        layer, linear = flux.get_submodule(name), plain_flux.get_submodule(name)
        change = torch.cat([b @ a for a, b in zip(layer.a, layer.b)])
        x = torch.randn(2, linear.in_features)
        torch.testing.assert_close(layer(x), linear(x) + 2 * x @ change.T, atol=1e-4, rtol=1e-4)
        assert len(layer.a) == len(diffusers_names)
        assert sum(len(b) for b in layer.b) == linear.out_features


@torch.no_grad()
def test_without_its_lora_a_network_is_the_untuned_one_also_after_an_error():
    flux = tiny_flux_with_lora(rank=2, alpha=0.1)
    tuned, untuned = velocity_at(flux), velocity_at(load_pipeline(TINY).flux)
    assert not torch.equal(tuned, untuned)
    with without_lora(flux):
        assert torch.equal(velocity_at(flux), untuned)
    assert torch.equal(velocity_at(flux), tuned)
    with pytest.raises(KeyError), without_lora(flux):
        raise KeyError
    assert torch.equal(velocity_at(flux), tuned)


def test_a_network_that_has_no_lora_is_itself_without_it():
    flux = load_pipeline(TINY).flux
    with torch.no_grad(), without_lora(flux):
        velocity = velocity_at(flux)
    assert torch.equal(velocity, velocity_at(flux))


def test_first_values_are_random_in_A_and_zero_in_B_and_continue_a_change_in_the_first_columns():
    flux = tiny_flux_with_lora(rank=3, alpha=6.0)
    fresh = dict(first_values(flux, seed=1))
    name = "double_blocks.0.img_attn.qkv"
    up, down = torch.randn(384, 2), torch.randn(2, 128)
    up[:256] = 0  # v alone
    continued = dict(first_values(flux, 1, {f"{name}.weight": Change(up, down)}))
    changed_names = {f"{name}.a.2", f"{name}.b.2"}
    for key, value in fresh.items():
        assert value.any() == (".a." in key)
        assert torch.equal(continued[key], value) == (key not in changed_names)
    a, b = continued[f"{name}.a.2"], continued[f"{name}.b.2"]
    assert torch.equal(a[2], fresh[f"{name}.a.2"][2]) and not b[:, 2].any()
    torch.testing.assert_close(6.0 / 3 * b @ a, up[256:] @ down, atol=1e-6, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- a run


def one_update(cfg: Config) -> tuple[bool, int, int]:
    """Whether an update's numbers are finite; how many numbers a save gathers, and how many the network has."""
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        flux = setup.pipe.flux
        entry = train.one_update(cfg, setup, train.make_state(cfg, flux), process, 0)
        gathered = sum(t.numel() for _, t in gathered_tensors(flux, torch.float32, process.rank))
        total = sum(p.numel() for p in flux.parameters())
        return entry["grad_norm"] > 0 and entry["loss"] == entry["loss"], gathered, total


def test_a_lora_trains_in_bf16_recomputing_on_two_ranks_and_saves_only_itself():
    cfg = Config(out=NO_RUN, lora=4, bf16=True, recompute="light", rollout_batch=2, micro_batch=1, batch=4)
    (is_finite, gathered, total), (is_finite_too, gathered_on_second_rank, _) = spread(2, one_update, cfg)
    assert is_finite and is_finite_too
    assert 0 < gathered < 0.2 * total
    assert gathered_on_second_rank == 0


def test_a_lora_starts_as_the_network_that_it_changes_and_trains_nothing_else():
    with join("cpu") as process:
        cfg = Config(out=NO_RUN, lora=4, bf16=True)
        for name, p in train.set_up(cfg, process).pipe.flux.named_parameters():
            is_factor = ".a." in name or ".b." in name
            assert p.requires_grad == is_factor
            assert p.dtype == (torch.float32 if is_factor else torch.bfloat16)
        images = sample(train.set_up(replace(cfg, bf16=False), process).pipe, PROMPTS, [0, 1], 2, 64, 64)
    torch.testing.assert_close(images, sample(load_pipeline(TINY), PROMPTS, [0, 1], 2, 64, 64), atol=1e-5, rtol=0)


def run(cfg: Config) -> None:
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        train.run(cfg, setup, process)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory) -> Config:
    """A short run, with a learning rate that changes pictures."""
    root = tmp_path_factory.mktemp("lora")
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    (root / "few.txt").write_text("\n".join(lines[::60]) + "\n")
    return Config(
        out=root / "run", lora=4, lr=1e-2, decay=False, batch=8, rollout_steps=3, updates=3, eval_every=3,
        ema=0.5, save_every=2, eval_prompts=root / "few.txt",
    )  # fmt: skip


@pytest.fixture(scope="module")
def final(run_config) -> Path:
    """The folder final/ of that run on two ranks."""
    spread(2, run, run_config)
    return run_config.out / "final"


def diffusers_images(pipeline: FluxPipeline) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        PROMPTS, height=64, width=64, num_inference_steps=4, guidance_scale=1.0, generator=generators,
        max_sequence_length=12, output_type="pt",
    )  # fmt: skip
    return out.images


def our_images(model: Path) -> Tensor:
    return sample(load_pipeline(model), PROMPTS, [0, 1], 4, 64, 64)


def test_diffusers_takes_the_file_as_it_is_and_draws_the_same_picture(final):
    pipeline = FluxPipeline.from_pretrained(TINY)
    untuned_images = diffusers_images(pipeline)
    pipeline.load_lora_weights(final)
    images = our_images(final)
    torch.testing.assert_close(diffusers_images(pipeline), images, atol=2e-4, rtol=0)
    assert (images - untuned_images).abs().mean() > 0.01


def test_the_file_names_what_published_loras_of_flux_do(final):
    state = load_file(final / FILE)
    layers = {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in state}
    double = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
              "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
              "ff_context.net.2"}  # fmt: skip
    single = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    expected = {f"transformer_blocks.{i}.{name}" for i in range(2) for name in double}
    expected |= {f"single_transformer_blocks.{i}.{name}" for i in range(4) for name in single}
    assert layers == expected
    assert {key.rsplit(".", 2)[1] for key in state} == {"lora_A", "lora_B"}
    assert all(len(a) == 4 for key, a in state.items() if "lora_A" in key)


def test_the_file_is_drawn_as_its_folder(final, run_config):
    settings = saved_sampling(final / FILE)
    assert settings == saved_sampling(final) and settings["rollout_steps"] == run_config.rollout_steps


def test_a_lora_resumes(final, run_config):
    state = load_file(final / FILE)
    spread(2, run, replace(run_config, resume=True))  # from the checkpoint after update 2
    resumed = load_file(final / FILE)
    assert all(torch.equal(resumed[key], state[key]) for key in state)


# ----------------------------------------------------------------------------------------- training goes on


def first_weights(cfg: Config) -> dict[str, Tensor]:
    with join("cpu") as process:
        flux = train.set_up(cfg, process).pipe.flux
        return dict(gathered_tensors(flux, torch.float32, process.rank))


def test_a_run_of_all_weights_goes_on_from_a_lora(final):
    merged, base = load_pipeline(final).flux.state_dict(), load_pipeline(TINY).flux.state_dict()
    assert any(not torch.equal(merged[key], base[key]) for key in base)
    weights = spread(2, first_weights, Config(out=NO_RUN, model=str(final)))[0]  # gathered on rank 0
    assert all(torch.equal(weights[key], merged[key]) for key in merged)


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (6, 3.0)])
@torch.no_grad()
def test_a_lora_goes_on_from_a_lora_of_its_rank_or_less(final, rank, alpha):
    cfg = Config(out=NO_RUN, model=str(final), lora=rank, lora_alpha=alpha)
    with join("cpu") as process:
        first_velocity = velocity_at(train.set_up(cfg, process).pipe.flux)
    last_velocity, untuned_velocity = velocity_at(load_pipeline(final).flux), velocity_at(load_pipeline(TINY).flux)
    torch.testing.assert_close(first_velocity, last_velocity, atol=1e-4, rtol=1e-4)
    assert (last_velocity - untuned_velocity).abs().mean() > 0.01


def test_a_lora_that_cannot_be_continued_is_refused_before_weights_are_read(final, tmp_path):
    layer = "transformer.single_transformer_blocks.1.norm.linear"
    outer = tmp_path / "outer.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 128), f"{layer}.lora_B.weight": torch.ones(384, 2)}, outer)
    with join("cpu") as process:
        with pytest.raises(ValueError, match="--lora 2 is too low to go on with a LoRA of rank 4"):
            prepare(Config(out=NO_RUN, model=str(final), lora=2), process)
        with pytest.raises(ValueError, match=r"single_blocks\.1\.modulation\.lin\.weight too, .* without --lora"):
            prepare(Config(out=NO_RUN, model=str(outer), base=str(TINY), lora=2), process)


def test_a_lora_continued_by_a_run_is_read_by_diffusers_over_the_first_ones_base(final, run_config, tmp_path):
    cfg = replace(run_config, out=tmp_path / "run", model=str(final), lora=6, batch=4, updates=2, eval_every=2)
    run(cfg)
    pipeline = FluxPipeline.from_pretrained(TINY)
    pipeline.load_lora_weights(cfg.out / "final")
    images = our_images(cfg.out / "final")
    torch.testing.assert_close(diffusers_images(pipeline), images, atol=2e-4, rtol=0)
    assert (images - our_images(final)).abs().mean() > 0.001


# ----------------------------------------------------------------------------------------- folders and files


def test_a_lora_whose_base_has_moved_says_where_to_write_the_new_place(final, tmp_path):
    folder = shutil.copytree(final, tmp_path / "lora")
    (folder / NOTE).write_text('{"base": "/gone/FLUX"}')
    with pytest.raises(ValueError, match=r"its base at /gone/FLUX, as .*lora.json says"):
        load_pipeline(folder)


def test_a_lora_folder_can_be_moved_with_its_base_and_broken_files_are_named(final, tmp_path):
    folder = shutil.copytree(final, tmp_path / "lora")
    (tmp_path / "base").symlink_to(TINY)
    (folder / NOTE).write_text('{"base": "../base"}')
    assert load_pipeline(folder).location.folder.resolve() == Path(TINY).resolve()
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cannot read .*{FILE}"):
        load_pipeline(folder)
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=f"needs its {FILE}"):
        load_pipeline(folder)
    (folder / NOTE).write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read .*lora\.json"):
        load_pipeline(folder)
