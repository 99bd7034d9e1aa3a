"""How one kind of model is converted, calibrated, saved and loaded: the border between core and the model libraries."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeplug.config import ConversionConfig
from spikeplug.errors import OptionError

if TYPE_CHECKING:
    from .plan import Plan

Watch = Callable[[str, int, int | None], None]
"""Follows long work: the stage, how much of it is done, and of how much, where that is known."""


def unwatched(stage: str, done: int, of: int | None) -> None:
    """A Watch that shows nothing."""


class Architecture(ABC):
    """How one kind of model is converted, calibrated, saved and loaded."""

    target: ClassVar[str]
    """The kind of network, as in `Recipe.targets`."""
    computes: ClassVar[torch.dtype | None] = None
    """What parts of its models compute in, whatever the dtype of the model; None: in that."""

    @abstractmethod
    def plan(self, model: torch.nn.Module, config: ConversionConfig, batches: Sequence[Any]) -> Plan:
        """What a conversion would make of a model, of which nothing is changed.

        Args:
            batches: as of `prepare`; a network that is captured needs the first one.

        Raises:
            OptionError: the configuration names what is not there.
            CalibrationError: an example is missing.
            ConversionError: the model cannot be planned at all.
        """

    @abstractmethod
    def prepare(
        self, model: torch.nn.Module, config: ConversionConfig, batches: Sequence[Any] = (), *, inplace: bool = False
    ) -> torch.nn.Module:
        """A new model with spiking modules, not yet calibrated, in the places of dense ones, after the passes.

        The given model stays as it is; tensors that no pass changes are shared with it.

        Args:
            batches: calibration data, for passes that look for something in it; the first is the example of a network
                that is captured.
            inplace: change the given model, for one that does not fit twice.

        Raises:
            ConversionError: a part of the model is not understood; the message names it.
        """

    @abstractmethod
    def feed(self, model: torch.nn.Module, batch: Any) -> Any:
        """Run one calibration batch, dense or converted; return what the model returns."""

    @abstractmethod
    def units(self, batch: Any) -> int:
        """How many of what the report counts MACs for are in a batch: samples, tokens."""

    def loss(self, model: torch.nn.Module, batch: Any) -> Tensor:
        """What a trainer lowers, `[]`: the cross-entropy of a batch `(inputs, targets)` of a classifier."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise OptionError(f"a training batch is (inputs, targets); got {type(batch).__name__}")
        return F.cross_entropy(model(batch[0]), batch[1])

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path, **options: Any) -> None:
        """Write the model's files into an existing empty folder."""

    @abstractmethod
    def load(self, folder: Path, **options: Any) -> torch.nn.Module:
        """Read what `save` wrote."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A language model and its tokenizer, as a command line named them."""

    model: torch.nn.Module
    tokenizer: Any
    name: str


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a language model that is too large for one device is laid over several as it is opened.

    Attributes:
        device_map: what accelerate takes: `auto`, `balanced`, a device.
        tensor, pipeline: processes of `torchrun` that share every layer, or the layers.
    """

    device_map: str | None = None
    tensor: int = 1
    pipeline: int = 1

    def __bool__(self) -> bool:
        return self != WHOLE


WHOLE = Placement()
"""On one device."""


class LanguageArchitecture(Architecture):
    """An architecture whose models the command line can open, calibrate on text and score."""

    @abstractmethod
    def open(
        self,
        source: str,
        *,
        dtype: str,
        device: str,
        placement: Placement = WHOLE,
        config: ConversionConfig | None = None,
    ) -> Opened:
        """The model that a command line names: a folder, a hub id, a file, or a name of the architecture's own.

        Args:
            placement: over several devices; `device` is not used then.
            config: of a conversion that is put in place before the weights are, to be calibrated by the caller: a model
                that lies on several devices cannot be converted afterwards.

        Raises:
            SpikeplugError: there is no model, or it cannot be read.
        """

    @abstractmethod
    def calibration(
        self, opened: Opened, path: Path, *, seqlen: int, tokens: int, config: ConversionConfig | None = None
    ) -> Sequence[Tensor]:
        """Calibration batches, token ids `[B, S]`, made of the first `tokens` tokens of a text.

        Args:
            config: the conversion that they are for, where that makes a difference.

        Raises:
            SpikeplugError: the text cannot be read or is too short.
        """

    @abstractmethod
    def windows(self, opened: Opened, path: Path, *, seqlen: int, tokens: int | None) -> Sequence[Tensor]:
        """Training batches, token ids `[1, seqlen]`: consecutive windows of a text. Raises as `calibration`."""

    @abstractmethod
    def perplexity(
        self, opened: Opened, path: Path, *, seqlen: int, tokens: int | None, watch: Watch = unwatched
    ) -> dict[str, Any]:
        """Perplexity of a text with its protocol, speed and spikes."""
