"""Language models of the LLaMA family in Spikeplug. This module is the plugin; it imports nothing heavy.

`import spikeplug_transformers` before `AutoModelForCausalLM.from_pretrained` of a spiking checkpoint, so that
transformers knows its kind; naming `spikeplug_transformers.SpikeConfig` does the same.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from spikeplug import hookimpl

if TYPE_CHECKING:
    import torch

    from spikeplug_transformers.quantizer import SpikeConfig

__all__ = ["SpikeConfig"]

spikeplug_api = 1


@hookimpl
def spikeplug_architectures() -> dict[str, str]:
    return {"transformers": "spikeplug_transformers.architecture:Transformers"}


FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `config.model_type` whose layers are known to be those of LLaMA."""


@hookimpl
def spikeplug_architecture_of(model: torch.nn.Module) -> str | None:
    causal = any(
        cls.__module__.startswith("transformers.") and cls.__name__.endswith("ForCausalLM")
        for cls in type(model).__mro__
    )
    return "transformers" if causal and getattr(model.config, "model_type", None) in FAMILY else None


@hookimpl
def spikeplug_passes() -> dict[str, str]:
    return {
        "rotate": "spikeplug_transformers.rotate:Rotate",
        "prefix": "spikeplug_transformers.prefix:Prefix",
        "defer-softmax": "spikeplug_transformers.defer:DeferSoftmax",
        "quantize-weights": "spikeplug_transformers.weights:QuantizeWeights",
    }


@hookimpl
def spikeplug_commands() -> dict[str, str]:
    return {"demo": "spikeplug_transformers.demo:demo"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("spikeplug_transformers.quantizer"), name)
    raise AttributeError(f"module 'spikeplug_transformers' has no attribute '{name}'")


# Where transformers is in use already, its registry is told of our checkpoints at once.
if "transformers" in sys.modules:
    importlib.import_module("spikeplug_transformers.quantizer")
