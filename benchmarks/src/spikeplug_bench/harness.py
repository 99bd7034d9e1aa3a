"""The task `lm-eval`: its own harness on the network of a cell, and what its samples say of it."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

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

        from .watched import Watched
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
    model = Watched(context, pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=task.batch_size)
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
