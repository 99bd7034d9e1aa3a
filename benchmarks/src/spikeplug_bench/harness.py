"""The task `lm-eval`: its own harness on the network of a cell, and what its samples say of it."""

from __future__ import annotations

import itertools
import logging
import math
import os
from typing import Any

import torch

from spikeplug.errors import OptionError

from .identity import code_digest, locate
from .networks import Context, conversion, described, dumped, split, text_model
from .spec import LmEval
from .store import Measured


def lm_eval_scores(context: Context, task: LmEval) -> Measured:
    """Scores of a cell's tasks. Raises OptionError where a package, a file or the tokenizer is missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise OptionError(
            f"the task 'lm-eval' needs a package ({error}): pip install spikeplug-bench[lm-eval]"
        ) from None
    from .zeroshot import local_task

    cell, config, opened = context.cell, conversion(context.cell), text_model(context)
    folder = locate(task.local, context.data) if task.local else None
    wanted: list[Any] = [local_task(name, folder) if folder else name for name in task.tasks]
    if opened.tokenizer is None:
        raise OptionError(f"model '{cell.name}' has no tokenizer, which lm-eval needs")
    context.cache.mkdir(parents=True, exist_ok=True)
    context.watch(", ".join(task.tasks), 0, None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = _watched(HFLM, context)(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=task.batch_size)
    # The key of lm-eval's cache of answers names no model, so every cell has a file of its own. Ranks that hold one
    # model must run the same batches, of which a kill may leave each of them others: they keep none.
    file = context.cache / f"answers-{context.id[:32]}-{code_digest()[:8]}-{task.batch_size}"
    answers = None if split(cell) else str(file)
    # Its bootstrap forks this process, which torch's threads do not survive; spreads are computed below.
    found: Any = lm_eval.simple_evaluate(
        model=model, tasks=wanted, num_fewshot=task.fewshot, limit=task.limit, use_cache=answers,
        random_seed=cell.seed, numpy_random_seed=cell.seed, torch_random_seed=cell.seed,
        fewshot_random_seed=cell.seed, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    if found is None:  # another rank than the first
        return Measured({}, {})
    metrics, detail = _scores(found)
    where = f"local files of {task.local}" if task.local else "hub"
    protocol = {
        "tasks": where, "items": detail["items"], "fewshot": task.fewshot, "batch_size": task.batch_size,
        "lm_eval": lm_eval.__version__, "task_versions": found["versions"], "bos": _starts_with_bos(opened.tokenizer),
        **described(context, config, opened.model),
    }  # fmt: skip
    return Measured(metrics, protocol, {}, detail, dumped(config))


def _scores(found: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and details of what lm-eval found."""
    metrics: dict[str, Any] = {}
    detail: dict[str, Any] = {"stderr": {}, "predictions": {}, "items": {}}
    for name, scores in sorted(found["results"].items()):
        for key, value in scores.items():
            metric, _, way = key.partition(",")
            if isinstance(value, (int, float)) and metric != "alias" and not metric.endswith("_stderr"):
                metrics[f"{name}.{metric}" + (f".{way}" if way not in ("", "none") else "")] = value
        if name not in found["samples"]:  # a group of tasks has none of its own
            continue
        # An item has a sample for each of its task's filters.
        items = list({sample["doc_id"]: sample for sample in found["samples"][name]}.values())
        detail["items"][name] = len(items)
        for metric in ("acc", "acc_norm"):
            if f"{name}.{metric}" in metrics:
                detail["stderr"][f"{name}.{metric}"] = _spread(metrics[f"{name}.{metric}"], len(items))
        choices = [_choice(sample) for sample in items]
        if None not in choices:
            detail["predictions"][name] = choices
    accuracies = [metrics[f"{name}.acc"] for name in detail["items"] if f"{name}.acc" in metrics]
    if accuracies:
        metrics["mean_acc"] = sum(accuracies) / len(accuracies)
    return metrics, detail


def _choice(sample: dict[str, Any]) -> int | None:
    """What the model chose; of a single continuation, whether it would have written it; None of what it generated."""
    answers = sample["filtered_resps"]
    if not all(isinstance(answer, (list, tuple)) and len(answer) == 2 for answer in answers):
        return None
    if len(answers) == 1:
        return int(answers[0][1])
    return max(range(len(answers)), key=lambda index: float(answers[index][0]))


def _starts_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _spread(share: float, items: int) -> float:
    """Standard error of a share."""
    return math.sqrt(share * (1 - share) / max(1, items - 1))


def _write_whole(kept: Any, answers: dict[str, Any]) -> None:
    """Move answers into lm-eval's SqliteDict by one statement, which is on disk as a whole or not at all."""
    if answers:
        marks = ", ".join(["(?, ?)"] * len(answers))
        pairs = ((kept.encode_key(key), kept.encode(value)) for key, value in answers.items())
        statement = f"REPLACE INTO {kept.tablename} (key, value) VALUES {marks}"
        kept.conn.execute(statement, [*itertools.chain.from_iterable(pairs)])
        answers.clear()


def _watched(base: Any, context: Context) -> Any:
    """HFLM that says how far it is, keeps answers by whole batches, and under `torchrun` takes its share of the items.

    Batches follow the order of lengths. With a part of a batch on disk a killed cell would go on in other batches, and
    give other figures: sums are rounded otherwise, and some scales are those of a batch. Given a model and not a name,
    lm-eval's own would let every rank take all items.
    """
    shares = context.cell.ranks > 1 and not split(context.cell)
    if shares and not torch.cuda.is_available():
        # Without it accelerate takes a CPU rank of torchrun for the only process.
        os.environ["ACCELERATE_USE_CPU"] = "true"

    class Watched(base):  # type: ignore[misc]
        answered = 0  # of the requests that run
        of: int | None = None

        def __init__(self, **given: Any) -> None:
            self.kept: Any = None  # what answers are kept in
            self.waiting: dict[str, Any] = {}  # those of the batch that runs
            super().__init__(**given)
            if shares:
                from accelerate import Accelerator

                self.accelerator = Accelerator()
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

        def set_cache_hook(self, hook: Any) -> None:
            super().set_cache_hook(hook)
            self.kept, self.waiting = hook.dbdict, {}
            hook.dbdict = self.waiting

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            self.answered, self.of = 0, len(requests)
            found = super()._loglikelihood_tokens(requests, True, override_bs)
            self._end_batch()  # lm-eval itself would write the answers of the last one singly
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.answered, self.of = 0, len(requests)
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
            """Of the batch before."""
            self.answered += len(self.waiting)
            _write_whole(self.kept, self.waiting)
            context.watch("requests", self.answered, self.of)

    return Watched
