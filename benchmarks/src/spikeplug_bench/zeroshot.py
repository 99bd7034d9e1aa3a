"""Tasks of lm-eval on local files: the prompts are lm-eval's own, the items come from NAME.jsonl and not from a hub.

An item has `query`, `choices` and `gold`, the index of the right choice. winogrande's has `context_options`, a
`continuation` that is scored behind each of them, and `gold`; lambada's has `context` and `continuation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikeplug.errors import OptionError, listed, nearest

_QUESTION = "{{query}}\nAnswer:"
PROMPTS = {
    "hellaswag": "{{query}}",
    "piqa": "Question: {{query}}\nAnswer:",
    "arc_easy": _QUESTION,
    "arc_challenge": _QUESTION,
    "boolq": _QUESTION,
    "commonsense_qa": "{{query}}",
    "openbook_qa": "{{query}}",
    "copa": "{{query}}",
}
"""Multiple-choice task -> its prompt."""

NAMES = (*PROMPTS, "winogrande", "lambada_openai")
_ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_NORM = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}


def local_task(name: str, folder: Path) -> dict[str, Any]:
    """Configuration of a task whose items are in `folder/name.jsonl`.

    Raises:
        OptionError: there is no such task, or no such file.
    """
    if name not in NAMES:
        raise OptionError(f"no local task '{name}'{nearest(name, NAMES)} Local tasks: {listed(NAMES)}")
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        raise OptionError(f"there is no {file}, the items of the local task '{name}'")
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "fewshot_split": "test",  # said, so that lm-eval keeps the item itself out of its examples
        "metadata": {"version": 1.0},
    }
    if name == "lambada_openai":
        how = {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}"}
        return {**common, **how, "metric_list": [_PERPLEXITY, _ACC]}
    if name == "winogrande":
        # A text that is an index makes lm-eval score one continuation behind several contexts.
        how = {"doc_to_text": "{{gold}}", "doc_to_choice": "context_options", "doc_to_target": "{{continuation}}"}
    else:
        how = {"doc_to_text": PROMPTS[name], "doc_to_choice": "choices", "doc_to_target": "gold"}
    metrics = [_ACC] if name in ("winogrande", "boolq", "copa", "commonsense_qa") else [_ACC, _NORM]
    return {**common, **how, "output_type": "multiple_choice", "metric_list": metrics}
