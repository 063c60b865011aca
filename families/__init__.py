"""Families of models: what differs between FLUX.1 and FLUX.2 outside of their transformers, a file each.

A family is a module, and all code outside of this folder asks a family for what it needs. A third one is a file with
the same names:

    NAME PIPELINE FROZEN      in messages; its class in model_index.json; its folders beside transformer/
    Network Config DEFAULT    the transformer, its shape, and the shape where no config.json says another
    TRANSFORMER CONFIG_NAMES CONFIG_DEFAULTS    class and entries of transformer/config.json
    OUTER DOUBLE SINGLE       modules by black-forest-labs' name and by diffusers'. Several names share the rows of one
                              tensor, in that order: hidden_size rows each, and the last has the remaining rows
    SIGN                      a tensor that only its transformer has, by black-forest-labs' name
    VAE                       the class of its autoencoder
    GUIDANCE                  the usual scale, by whether the transformer reads it; None if it was made for none
    describe_encoders load_encoders    tokenizers and text encoders of a folder: small files first, weights later
    token_limits prompt_text encode    prompts to what the transformer reads of them
    HAS_CLIP                  whether its first tokenizer is CLIP's, which the reward hpsv2 shares
    sigmas position_ids draw_noise     noise levels; rotary positions; x_1
    vae_latents               tokens to the latents that the VAE decodes
"""

from types import ModuleType

import torch

from families import flux1, flux2
from flux2 import Flux2, Flux2Config
from model import Flux, FluxConfig

Network = Flux | Flux2
NetworkConfig = FluxConfig | Flux2Config
FAMILIES = (flux1, flux2)


def family_of(config: NetworkConfig) -> ModuleType:
    """The family of a transformer's configuration."""
    return flux2 if isinstance(config, Flux2Config) else flux1


def empty_network(config: NetworkConfig) -> Network:
    """The transformer of a configuration on the meta device: names, shapes and dtypes without memory."""
    with torch.device("meta"):
        return family_of(config).Network(config)
