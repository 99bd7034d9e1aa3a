"""Language models for `spikeplug.convert`, `save`, `load` and the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spikeplug.architecture import LanguageArchitecture, Opened
from spikeplug.config import ConversionConfig
from spikeplug.coverage import ConversionReport
from spikeplug.errors import BundleError, ConversionError

from . import source, text
from .attention import IMPLEMENTATION
from .family import codes_attention, family_report, make_model_spiking
from .quantizer import SpikeConfig, SpikeQuantizer


class Transformers(LanguageArchitecture):
    """Causal language models of the LLaMA family."""

    target: ClassVar[str] = "lm"

    def prepare(self, model: nn.Module, config: ConversionConfig) -> nn.Module:
        _refuse_unfit(model)
        make_model_spiking(model, config)
        if codes_attention(config, model):
            model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        # From here on save_pretrained writes what from_pretrained needs to rebuild the model.
        wanted = SpikeConfig(config)
        model.hf_quantizer = SpikeQuantizer(wanted, pre_quantized=False)
        model.is_quantized = True  # type: ignore[assignment]
        model.quantization_method = wanted.quant_method  # type: ignore[assignment]
        model.config.quantization_config = wanted  # type: ignore[union-attr]
        return model.eval()

    def feed(self, model: Any, batch: Any) -> None:
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch.to(model.device)}
        model(**batch, use_cache=False)

    def report(self, model: Any) -> ConversionReport:
        return family_report(model, model.spikeplug_config.recipe)

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer = options.get("tokenizer")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        options.pop("config")
        try:
            model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise BundleError(f"cannot read {folder}: {source.first_line(error)}") from error
        return model

    def open(self, source_name: str, *, dtype: str, device: str) -> Opened:
        return source.open_model(source_name, dtype=dtype, device=device)

    def calibration(self, opened: Opened, path: Path, *, seqlen: int, tokens: int) -> Sequence[Tensor]:
        return text.calibration(text.tokenize(opened.tokenizer, path)[0], seqlen, tokens)

    def perplexity(
        self, opened: Opened, path: Path, *, seqlen: int, tokens: int | None, watch: Callable[[int, int], None]
    ) -> dict[str, Any]:
        return text.evaluate(opened, path, seqlen=seqlen, tokens=tokens, watch=watch)


def _refuse_unfit(model: nn.Module) -> None:
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    if method is not None:
        name = getattr(method, "quant_method", method)
        raise ConversionError(f"the model is quantized already ({name}): convert the one it was made from")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ConversionError(
            "the model was dispatched by accelerate (device_map): swapping its modules now would be silently wrong. "
            "Load it with from_pretrained(..., quantization_config=SpikeConfig(...), device_map=...) and calibrate it"
        )
