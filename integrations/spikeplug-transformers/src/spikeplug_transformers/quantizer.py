"""Spiking checkpoints in transformers' quantizer registry: `from_pretrained`, `save_pretrained`, device maps.

The registry rebuilds the spiking modules before weights are placed, so that everything transformers does afterwards
(offload, tensor parallel, FSDP) sees them. Converting later, after accelerate has dispatched a model, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikeplug.coding.layers import CodedEmbedding
from spikeplug.coding.site import Coder, sites
from spikeplug.coding.types import Recipe
from spikeplug.config import ConversionConfig
from spikeplug.conversion.bundle import MANIFEST, read_manifest, verify
from spikeplug.conversion.record import conversion_of, refuse_replaced
from spikeplug.conversion.verbs import set_execution
from spikeplug.errors import CalibrationError, ConversionError

from .attention import IMPLEMENTATION, PREFIX
from .family import make_model_spiking, needs_our_attention

METHOD = "spikeplug"


@register_quantization_config(METHOD)
class SpikeConfig(QuantizationConfigMixin):
    """A conversion as transformers' `quantization_config`: `SpikeConfig("bse", steps=16)`.

    On a dense checkpoint, `from_pretrained(path, quantization_config=SpikeConfig(...))` gives a model whose sites
    wait for `spikeplug.calibrate(model, batches)`. A spiking checkpoint carries its own and needs none.

    Args:
        recipe: a recipe's name, or a Recipe.
        options: as in `spikeplug.convert`.

    Raises:
        UnknownNameError, OptionError: the recipe or an option is not known or out of range.
    """

    def __init__(self, recipe: str | Recipe | ConversionConfig = "bse", **options: Any) -> None:
        options.pop("quant_method", None)
        self.quant_method = METHOD
        # A stored configuration names every field, its version among them; a user's names only what differs.
        if "version" in options:
            self.conversion = ConversionConfig.parse({"recipe": recipe, **options})
        else:
            self.conversion = ConversionConfig.resolve(recipe, options)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as `config.json` stores it."""
        return {"quant_method": METHOD, **self.conversion.model_dump(mode="json")}


@register_quantizer(METHOD)
class SpikeQuantizer(HfQuantizer):
    """Puts spiking modules into the skeleton of a model before its weights are loaded."""

    quantization_config: SpikeConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Attention goes through our implementation where the conversion needs it."""
        if needs_our_attention(self.quantization_config.conversion):
            config._attn_implementation = IMPLEMENTATION
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config.conversion
        if config.passes and not self.pre_quantized:
            raise ConversionError(
                f"passes {list(config.passes)} need the weights, which are not loaded yet: use spikeplug.convert"
            )
        for each in config.build_passes():
            each.skeleton(model)
        make_model_spiking(model, config)
        if self.pre_quantized and checkpoint_files:
            _verify_files([Path(file) for file in checkpoint_files])
            _declare_params(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return set_execution(model, self.quantization_config.conversion.execution)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Tensor parallel: a coded embedding is whole on every rank, as its output is coded before ranks meet."""
        super().update_parallel_plan(model, plan)
        for name, module in model.named_modules():
            if isinstance(module, CodedEmbedding):
                plan.pop(name, None)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained`: refuses a model that could not be used once it is read again."""
        refuse_replaced(model)
        for site in sites(model).values():
            if not site.calibrated:
                raise CalibrationError(f"site '{site.name}' is not calibrated: calibrate the model before saving it")
        # save_pretrained writes config.json after this; it shall name the execution that the model has now.
        self.quantization_config.conversion = conversion_of(model).config
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _verify_files(files: list[Path]) -> None:
    """Check the files that are about to be read against the manifest beside them, where there is one."""
    folder = files[0].parent
    if (folder / MANIFEST).is_file():
        verify(folder, read_manifest(folder)["files"], {"config.json", *(file.name for file in files)})


def _declare_params(model: nn.Module, files: list[str]) -> None:
    """Give every site buffers of the shapes and dtypes in the checkpoint, for transformers to fill."""
    modules = dict(model.named_modules())
    prefixes = {f"{path}.": module for path, module in modules.items() if isinstance(module, Coder)}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                path, _, name = key.rpartition(".")
                owner = prefixes.get(f"{path}.") or (modules.get(path) if name in PREFIX else None)
                if owner is not None:
                    stored: Tensor = tensors.get_tensor(key)
                    owner.register_buffer(name, torch.empty_like(stored, device="meta"))
    for site in prefixes.values():
        if not site.calibrated:
            raise CalibrationError(f"site '{site.name}' has no parameters in the checkpoint: it was never calibrated")
