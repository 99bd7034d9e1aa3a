"""Fine-tuning of a spiking model through straight-through gradients (LASER, section 3.3): the trainer `ste`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn

from spikeplug.coding.site import evaluating
from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.conversion.bundle import read_manifest, verify, write_folder
from spikeplug.conversion.record import conversion_of
from spikeplug.conversion.sharing import own
from spikeplug.conversion.verbs import architecture_of
from spikeplug.errors import BundleError, NonFiniteError, OptionError

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
STATE, PROGRESS = "state.safetensors", "progress.json"


@dataclasses.dataclass(frozen=True)
class STE:
    """AdamW on the weights of a converted model. Codes have the identity as gradient, codecs that of their function.

    The learning rate rises over the first `warmup` of the steps and falls along a cosine to `final` of its peak.
    Scales stay those of calibration. The model runs as in evaluation: no dropout, statistics of norms fixed.

    Args:
        steps: optimizer steps.
        lr: peak learning rate.
        weight_decay, beta1, beta2: of AdamW.
        clip: largest norm of the gradient; 0 leaves it.
        warmup, final: shares, see above.
        accumulate: batches per step.
        dtype: `float32`, or `bfloat16` by autocast over float32 weights.
        every: optimizer steps between two checkpoints.
        seed: of the order of the batches.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 100
    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    warmup: float = 0.1
    final: float = 0.1
    accumulate: int = 1
    dtype: str = "float32"
    every: int = 50
    seed: int = 0

    name: ClassVar[str] = "ste"

    def __post_init__(self) -> None:
        for option in ("steps", "accumulate", "every"):
            if getattr(self, option) < 1:
                raise OptionError(f"{option}={getattr(self, option)}: at least 1 is needed")
        for option in ("weight_decay", "clip"):
            if not 0 <= getattr(self, option) < math.inf:
                raise OptionError(f"{option}={getattr(self, option)}: a finite number of at least 0 is needed")
        for option in ("warmup", "final", "beta1", "beta2"):
            if not 0 <= getattr(self, option) <= 1:
                raise OptionError(f"{option}={getattr(self, option)}: a number from 0 to 1 is needed")
        if not 0 < self.lr < math.inf:
            raise OptionError(f"lr={self.lr}: a positive number is needed")
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype='{self.dtype}': choose one of {', '.join(DTYPES)}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))

    def train(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        watch: Watch = unwatched,
    ) -> list[float]:
        """Train in place and return the loss of every step.

        Args:
            batches: token ids `[B, S]` for a language model, `(inputs, targets)` for a classifier; taken in an order
                that is shuffled anew for every pass over them.
            checkpoint: folder to write the state to, now and then. If it is there already, training goes on from it.

        Raises:
            OptionError: no batch, or the checkpoint is of other options.
            BundleError: the checkpoint is of another conversion or model, or was changed.
            NonFiniteError: the loss or a gradient is NaN or infinite.
        """
        if not batches:
            raise OptionError("there is no batch to train on")
        architecture, config = architecture_of(model), conversion_of(model).config
        own(model)  # the dense model that it was made of keeps its weights
        weights = {name: each for name, each in model.named_parameters() if each.is_floating_point()}
        frozen = {each: each.requires_grad for each in weights.values()}
        betas = (self.beta1, self.beta2)
        optimizer = torch.optim.AdamW(list(weights.values()), lr=self.lr, betas=betas, weight_decay=self.weight_decay)
        trainer = {"name": self.name, **dataclasses.asdict(self), "batches": len(batches)}
        kind = type(architecture).__name__
        head = {"trainer": trainer, "architecture": kind, "config": config.model_dump(mode="json")}
        folder = None if checkpoint is None else Path(checkpoint)
        resumed = folder if folder is not None and folder.exists() else None
        losses: list[float] = [] if resumed is None else _restore(resumed, head, weights, optimizer)
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            with evaluating(model):
                for step in range(len(losses), self.steps):
                    watch("training" + (f", loss {losses[-1]:.3f}" if losses else ""), step, self.steps)
                    for group in optimizer.param_groups:
                        group["lr"] = self.rate(step)
                    losses.append(self._step(architecture, model, weights, optimizer, self._chosen(batches, step)))
                    if folder is not None and ((step + 1) % self.every == 0 or step + 1 == self.steps):
                        _store(folder, head, weights, optimizer, losses)
        finally:
            optimizer.zero_grad()
            for weight, required in frozen.items():
                weight.requires_grad_(required)
        return losses

    def _chosen(self, batches: Sequence[Any], step: int) -> Iterator[Any]:
        """The batches of a step; a function of seed and step alone, so that a resumed run sees the same."""
        for index in range(step * self.accumulate, (step + 1) * self.accumulate):
            turn, place = divmod(index, len(batches))
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            yield batches[int(torch.randperm(len(batches), generator=generator)[place])]

    def _step(
        self,
        architecture: Any,
        model: nn.Module,
        weights: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Any],
    ) -> float:
        device = next(iter(weights.values())).device
        half = DTYPES[self.dtype]
        total = 0.0
        optimizer.zero_grad()
        for batch in batches:
            with torch.autocast(device.type, half) if half else contextlib.nullcontext():
                loss: Tensor = architecture.loss(model, batch) / self.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(weights.values(), self.clip or math.inf)
        if not math.isfinite(total) or not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"loss {total}, gradient norm {float(norm)}: train with a smaller lr than {self.lr}")
        optimizer.step()
        return total


def _store(
    folder: Path,
    head: dict[str, Any],
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    tensors = {f"weight.{name}": weight.detach().contiguous() for name, weight in weights.items()}
    for name, weight in weights.items():
        state = optimizer.state[weight]
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in state.items() if key.startswith("exp_avg")}

    def fill(draft: Path) -> None:
        safetensors.torch.save_file(tensors, draft / STATE)
        (draft / PROGRESS).write_text(json.dumps({"losses": losses}))

    try:
        write_folder(folder, head, fill)
    except OSError as error:
        raise BundleError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error


def _restore(
    folder: Path, head: dict[str, Any], weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[float]:
    manifest = read_manifest(folder)
    verify(folder, manifest["files"])
    if manifest["config"] != head["config"] or manifest["architecture"] != head["architecture"]:
        differs = [key for key in head["config"] if manifest["config"].get(key) != head["config"][key]]
        raise BundleError(
            f"the checkpoint {folder} is of another conversion, recipe '{manifest['config'].get('recipe')}' (differs: "
            f"{', '.join(differs) or 'kind of model'}): choose another folder"
        )
    if manifest.get("trainer") != head["trainer"]:
        before = manifest.get("trainer", {})
        differs = [f"{key}={before.get(key)}" for key in head["trainer"] if before.get(key) != head["trainer"][key]]
        raise OptionError(f"the checkpoint {folder} was made with {', '.join(differs)}: use these, or another folder")
    tensors = safetensors.torch.load_file(folder / STATE)
    losses: list[float] = json.loads((folder / PROGRESS).read_text())["losses"]
    for name, weight in weights.items():
        found = tensors.get(f"weight.{name}")
        if found is None or found.shape != weight.shape:
            raise BundleError(f"the checkpoint {folder} is of another model: '{name}' does not fit")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            state = {key: tensors[f"{key}.{name}"].to(weight.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.tensor(float(len(losses))), **state}
    return losses
