"""Language models for `spikeplug.convert`, `save`, `load` and the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spikeplug.config import ConversionConfig
from spikeplug.conversion.architecture import WHOLE, LanguageArchitecture, Opened, Placement, Watch, unwatched
from spikeplug.conversion.plan import Plan, Problem, refuse
from spikeplug.conversion.sharing import shared_copy
from spikeplug.errors import BundleError, CalibrationError, OptionError

from . import source, text
from .attention import IMPLEMENTATION
from .family import check_options, fill, make_model_spiking, needs_our_attention, rewritten, strangers
from .quantizer import SpikeConfig, SpikeQuantizer


class Transformers(LanguageArchitecture):
    """Causal language models of the LLaMA family."""

    target: ClassVar[str] = "lm"
    computes: ClassVar[torch.dtype | None] = torch.float32  # the norms of transformers

    def plan(self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any]) -> Plan:
        """What a conversion would make of the model; every module of no known role is a problem."""
        check_options(model, config)
        skeleton = shared_copy(model)
        for each in config.build_passes():
            each.skeleton(skeleton)
        report = fill(skeleton, config).report
        problems = (*_unfit(model), *strangers(model))
        make = functools.partial(self.prepare, model, config, batches)
        return Plan(type(model).__name__, config, report, problems, make)

    def prepare(
        self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any] = (), *, inplace: bool = False
    ) -> nn.Module:
        # Everything is checked before a pass changes anything.
        refuse((*_unfit(model), *strangers(model)), f"{type(model).__name__} cannot be converted by '{config.recipe}'")
        check_options(model, config)
        model = model if inplace else shared_copy(model)
        config = config.apply_passes(model, batches)
        make_model_spiking(model, config)
        if needs_our_attention(config):
            model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        # From here on save_pretrained writes what from_pretrained needs to rebuild the model.
        wanted = SpikeConfig(config)
        model.hf_quantizer = SpikeQuantizer(wanted, pre_quantized=False)
        model.is_quantized = True  # type: ignore[assignment]
        model.quantization_method = wanted.quant_method  # type: ignore[assignment]
        model.config.quantization_config = wanted  # type: ignore[union-attr]
        return model.eval()

    def units(self, batch: Any) -> int:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return int((mask != 0).sum())
        return ids.numel() if isinstance(ids, Tensor) else 0

    def feed(self, model: Any, batch: Any) -> Any:
        given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            found = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise CalibrationError(f"a calibration batch is token ids [B, S], or a dict with input_ids; got {found}")
        mask, known = given.get("attention_mask"), model.config.vocab_size
        if ids.is_floating_point() or not ids.numel() or not 0 <= int(ids.min()) <= int(ids.max()) < known:
            what = "no tokens" if not ids.numel() else f"{ids.dtype} from {ids.min():g} to {ids.max():g}"
            raise CalibrationError(f"a calibration batch is whole token ids from 0 to {known - 1}; got {what}")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != ids.shape:
            raise CalibrationError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}")
        given = {name: value.to(model.device) for name, value in given.items() if isinstance(value, Tensor)}
        return model(**given, use_cache=False)

    def loss(self, model: Any, batch: Any) -> Tensor:
        """Mean negative log-likelihood of the next token, over a batch of token ids `[B, S]`."""
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.shape[1] < 2:
            found = f"shape {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise OptionError(f"a training batch is token ids [B, S], S at least 2; got {found}")
        batch = batch.to(model.device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        tokenizer = options.pop("tokenizer", None)
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of save: a language model takes tokenizer")
        model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        options.pop("config")
        try:
            model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise BundleError(f"cannot read {folder}: {source.first_line(error)}") from error
        return model

    def open(
        self,
        source_name: str,
        *,
        dtype: str,
        device: str,
        placement: Placement = WHOLE,
        config: ConversionConfig | None = None,
    ) -> Opened:
        return source.open_model(source_name, dtype=dtype, device=device, placement=placement, config=config)

    def calibration(
        self, opened: Opened, path: Path, *, seqlen: int, tokens: int, config: ConversionConfig | None = None
    ) -> Sequence[Tensor]:
        beginnings = config is None or "prefix" not in config.passes
        return text.calibration(text.tokenize(opened, path)[0], seqlen, tokens, beginnings)

    def windows(self, opened: Opened, path: Path, *, seqlen: int, tokens: int | None) -> Sequence[Tensor]:
        return text.windows(text.tokenize(opened, path)[0], seqlen, tokens)

    def perplexity(
        self, opened: Opened, path: Path, *, seqlen: int, tokens: int | None, watch: Watch = unwatched
    ) -> dict[str, Any]:
        return text.evaluate(opened, path, seqlen=seqlen, tokens=tokens, watch=watch)


def _unfit(model: nn.Module) -> Iterator[Problem]:
    """What speaks against a model as a whole."""
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    if method is not None:
        reason = f"it is quantized already ({getattr(method, 'quant_method', method)})"
        yield Problem("", "", "", reason, "convert the model it was made from")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        yield Problem(
            "",
            "",
            "",
            "it was dispatched by accelerate (device_map): swapping its modules now would be silently wrong",
            "load it with from_pretrained(..., quantization_config=SpikeConfig(...), device_map=...) and calibrate it",
        )
    for each in rewritten(model):
        reason = f"it was rewritten by the pass '{each}' already, which a saved conversion would not know"
        yield Problem("", "", "", reason, f"convert the model it was made from, with passes=['{each}']")
