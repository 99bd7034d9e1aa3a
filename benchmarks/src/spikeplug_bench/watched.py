"""The language model that lm-eval asks. This module needs lm-eval."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from .networks import Context, split


class Watched(HFLM):  # type: ignore[misc]
    """HFLM that says how far it is, keeps answers by whole batches, and under `torchrun` takes its share of the items.

    Batches follow the order of lengths. With a part of a batch on disk a killed cell would go on in other batches, and
    give other figures: sums are rounded otherwise, and some scales are those of a batch. Given a model and not a name,
    lm-eval's own would let every rank take all items. Its bars would run through ours, so none is shown.
    """

    def __init__(self, context: Context, **given: Any) -> None:
        self.watch = context.watch
        self.kept: Any = None  # what answers are kept in
        self.waiting: dict[str, Any] = {}  # those of the batch that runs
        self.answered = 0  # of the requests that run
        self.requests: int | None = None
        shares = context.cell.ranks > 1 and not split(context.cell)
        if shares and not torch.cuda.is_available():
            # Without it accelerate takes a CPU rank of torchrun for the only process.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        super().__init__(**given)
        if shares:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def set_cache_hook(self, hook: Any) -> None:
        super().set_cache_hook(hook)
        self.kept, self.waiting = hook.dbdict, {}
        hook.dbdict = self.waiting

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
        self.answered, self.requests = 0, len(requests)
        found = super()._loglikelihood_tokens(requests, True, override_bs)
        self._end_batch()  # lm-eval itself would write the answers of the last one singly
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self.answered, self.requests = 0, len(requests)
        found = super().generate_until(requests, True)
        self._end_batch()
        return found

    def _model_call(self, *given: Any, **named: Any) -> Any:
        self._end_batch()
        return super()._model_call(*given, **named)

    def _model_generate(self, *given: Any, **named: Any) -> Any:
        self._end_batch()
        return super()._model_generate(*given, **named)

    def _end_batch(self) -> None:
        """Of the batch before: write its answers by one statement, which is on disk as a whole or not at all."""
        self.answered += len(self.waiting)
        if self.waiting:
            marks = ", ".join(["(?, ?)"] * len(self.waiting))
            # An SqliteDict of lm-eval's.
            pairs = ((self.kept.encode_key(key), self.kept.encode(value)) for key, value in self.waiting.items())
            statement = f"REPLACE INTO {self.kept.tablename} (key, value) VALUES {marks}"
            self.kept.conn.execute(statement, [*itertools.chain.from_iterable(pairs)])
            self.waiting.clear()
        self.watch("requests", self.answered, self.requests)
