"""Cells of the benchmark runner on real networks: what they measure is what the rest of the project measures."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from spikeplug.errors import OptionError
from spikeplug_bench import embedded, runner
from spikeplug_bench.cell import run_cell, spec_of
from spikeplug_bench.harness import _scores
from spikeplug_bench.spec import Cell
from spikeplug_bench.store import DONE, Store
from spikeplug_bench.suite import parse_suite
from spikeplug_bench.tables import tables
from spikeplug_bench.zeroshot import local_task

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install lm_eval")
LM = {"source": "dense", "calibration": {"text": "text.txt", "seqlen": 32, "tokens": 512}}
CNN = {
    "source": "spikeplug_bench.embedded:shapes_cnn",
    "weights": "cnn.safetensors",
    "calibration": {"images": "shapes/train", "count": 80},
}


@pytest.fixture
def data(dense_folder, text, tokenizer):
    """A folder with a tiny language model, a text, and items of four tasks."""
    folder = dense_folder.parent
    for special in ("bos_token", "eos_token", "pad_token"):  # lm-eval needs them
        setattr(tokenizer, special, "!")
    tokenizer.save_pretrained(dense_folder)
    (folder / "zeroshot").mkdir()
    items = [
        {"query": f"The {i}th word", "choices": ["is short", "was very long", "x"], "gold": i % 3} for i in range(9)
    ]
    for name in ("hellaswag", "piqa"):
        (folder / "zeroshot" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    pairs = [{"context_options": [f"{i} a", f"{i} b"], "continuation": "ends", "gold": i % 2} for i in range(6)]
    (folder / "zeroshot" / "winogrande.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    ends = [{"context": f"The {i}th thing is", "continuation": "this"} for i in range(6)]
    (folder / "zeroshot" / "lambada_openai.jsonl").write_text("\n".join(map(json.dumps, ends)))
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return embedded.prepare(tmp_path_factory.mktemp("embedded"))


def _suite(model: dict, **grid):
    """A suite of one grid."""
    data = {"format": 1, "name": "mine", "title": "T", "models": {"net": model}}
    return parse_suite({**data, "grids": [{"model": "net", **grid}]})


def _row(model: dict, data: Path, task: dict, recipe: str = "bse", **more):
    cell = Cell.model_validate({"name": "net", "model": model, "recipe": recipe, "task": task, **more})
    row = json.loads(run_cell(json.dumps(spec_of(cell, data, data / "cache"))))
    assert row["status"] == DONE, row["error"]
    return row


def test_perplexity_is_that_of_the_command_line(data, cli):
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 4}
    row = _row(LM, data, task, steps=8)
    how = ["--recipe", "bse", "-s", "steps=8", "--calibrate-tokens", 512, "--seqlen", 32]
    assert cli("convert", data / "dense", *how, "--calibrate", data / "text.txt", "--out", data / "out")[0] == 0
    found = cli("eval", data / "out", "--ppl", data / "text.txt", "--seqlen", 32, "--max-tokens", 128, "--json")[1]
    assert row["metrics"]["perplexity"] == found["perplexity"]
    assert row["metrics"]["energy_ratio"] == found["energy"]["ratio"]
    assert row["metrics"]["spikes"] == found["spikes"]["per_token"]
    assert {"sha256", "seqlen", "tokens", "calibration", "steps"} <= set(row["protocol"])
    assert row["config"]["recipe"] == "bse"
    assert set(row["versions"]) >= {"spikeplug", "spike-plugin-bse", "transformers", "torch"}


def test_accuracy_energy_and_sites_of_a_cnn(shapes):
    task = {"kind": "accuracy", "images": "shapes/test", "limit": 40, "diagnose": 4}
    row = _row(CNN, shapes, task, "css")
    assert row["metrics"]["agreement"] > 0.95
    assert row["metrics"]["top1_dense"] > 0.9
    assert row["metrics"]["steps_to_result"] == 14
    assert row["metrics"]["energy_ratio"] > 0
    assert {"spikes", "residual"} <= set(row["detail"]["sites"][0])
    other = _row(CNN, shapes, {**task, "diagnose": 0}, "css", framework="snntorch")
    assert other["metrics"]["agreement"] > 0.95
    assert "energy_ratio" not in other["metrics"]
    dense = _row(CNN, shapes, task, "dense")
    assert dense["metrics"]["top1"] == row["metrics"]["top1_dense"]


def test_throughput_and_energy(shapes):
    row = _row(CNN, shapes, {"kind": "throughput", "images": "shapes/test", "batch_size": 8, "repeats": 2})
    assert row["timing"]["time_ratio"] > 0
    assert row["metrics"] == {}
    row = _row(CNN, shapes, {"kind": "energy", "images": "shapes/test", "limit": 8, "costs": "45 nm, int8"})
    assert row["metrics"]["dense_macs"] == sum(op["dense_macs"] for op in row["detail"]["ops"])
    assert "int8" in row["protocol"]["assumptions"]


@needs_lm_eval
def test_lm_eval_scores_local_tasks(data):
    task = {"kind": "lm-eval", "local": "zeroshot", "tasks": ["hellaswag", "piqa", "winogrande", "lambada_openai"]}
    dense = _row(LM, data, task, "dense")
    assert dense["detail"]["items"] == {"hellaswag": 9, "lambada_openai": 6, "piqa": 9, "winogrande": 6}
    assert set(dense["metrics"]) >= {"hellaswag.acc_norm", "winogrande.acc", "lambada_openai.perplexity", "mean_acc"}
    choices = dense["detail"]["predictions"]["hellaswag"]
    right = [choice == i % 3 for i, choice in enumerate(choices)]
    assert dense["metrics"]["hellaswag.acc"] == pytest.approx(sum(right) / 9)
    limited = _row(LM, data, {**task, "limit": 3}, "dense")
    assert set(limited["detail"]["items"].values()) == {3}


@needs_lm_eval
def test_answers_of_one_model_are_never_those_of_another(data):
    """lm-eval's own cache has no model in its key: one file for both would give the dense answers back."""
    task = {"kind": "lm-eval", "local": "zeroshot", "tasks": ["lambada_openai"]}
    suite = _suite(LM, recipe="rate", steps=2, task=task)
    rows = runner.run(suite, Store(data / "a.db"), data)
    assert [row.cell["recipe"] for row in rows] == ["dense", "rate"]
    first, second = (row.metrics["lambada_openai.perplexity"] for row in rows)
    assert first != second
    files = [path.name for path in runner.cache_of(data / "a.db").iterdir() if path.name.startswith("answers")]
    assert len(files) == 2
    # Alone and without a cache the spiking model gives the same.
    alone = runner.run(suite, Store(data / "b.db"), data)
    assert alone[1].metrics == rows[1].metrics


@needs_lm_eval
def test_a_cell_that_is_stopped_goes_on_in_the_same_batches(data):
    task = {"kind": "lm-eval", "local": "zeroshot", "tasks": ["hellaswag", "piqa", "winogrande"], "batch_size": 4}
    given = {"name": "net", "model": LM, "recipe": "bse", "steps": 4, "options": {"granularity": "tensor"}}
    cell = Cell.model_validate({**given, "task": task})
    batches: list[tuple[int, int]] = []

    def run(cache: str, until: int = 10**9):
        batches.clear()

        def watch(stage, done, of):
            if stage == "requests":
                batches.append((done, of))
                if len(batches) > until:
                    raise KeyboardInterrupt

        return json.loads(run_cell(json.dumps(spec_of(cell, data, data / cache)), watch))

    whole, every = run("whole"), len(batches)
    assert batches[0][0] == 0
    assert batches[-1][0] == batches[-1][1]
    for until in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            run("stopped", until)
    resumed = run("stopped")
    assert len(batches) == every - 3 - 5 < every
    assert (resumed["metrics"], resumed["detail"]) == (whole["metrics"], whole["detail"])
    assert len(list((data / "stopped").glob("answers*"))) == 1


@needs_lm_eval
def test_an_item_is_none_of_its_own_examples(data):
    import lm_eval

    task = local_task("piqa", data / "zeroshot")
    found = lm_eval.simple_evaluate(model="dummy", tasks=[task], num_fewshot=4, bootstrap_iters=0, log_samples=True)
    for sample in found["samples"]["piqa"]:
        prompt = sample["arguments"][0][0]
        assert prompt.count("Question:") == 5
        assert prompt.count(sample["doc"]["query"]) == 1


def test_filters_of_a_task_are_figures_of_their_own():
    answers = {"filtered_resps": ["18"]}
    found = {
        "results": {"gsm8k": {"exact_match,strict": 0.0, "exact_match,flexible": 0.5, "alias": "gsm8k"}},
        "samples": {"gsm8k": [{"doc_id": item, **answers} for item in (0, 1, 0, 1)]},
    }
    metrics, detail = _scores(found)
    assert metrics == {"gsm8k.exact_match.strict": 0.0, "gsm8k.exact_match.flexible": 0.5}
    assert detail["items"] == {"gsm8k": 2}


def test_statistics_behind_an_approximator_are_its_own(data):
    """Sites behind ASNC see what it gives, and its steps are those of the code."""
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 2}
    both = runner.run(_suite(LM, recipe="laser", steps=[2, 8], task=task), Store(data / "a.db"), data)
    alone = runner.run(_suite(LM, recipe="laser", steps=8, task=task), Store(data / "b.db"), data)
    assert both[-1].cell["steps"] == 8
    assert both[-1].metrics == alone[-1].metrics


def test_spikes_are_all_that_fire(data):
    """Those inside nonlinear operations too, at which no energy is counted."""
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 2}
    bse, laser = (_row(LM, data, task, recipe, steps=4)["metrics"] for recipe in ("bse", "laser"))
    assert bse["spikes"] == bse["spikes_charged"]
    assert laser["spikes"] > laser["spikes_charged"]


def test_the_seed_of_a_cell_is_that_of_a_rotation(data):
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 2}
    rows = [_row(LM, data, task, steps=4, options={"passes": ["rotate"]}, seed=seed) for seed in (0, 1, 1)]
    assert rows[1]["metrics"] == rows[2]["metrics"] != rows[0]["metrics"]
    assert [row["config"]["pass_options"]["rotate"]["seed"] for row in rows] == [0, 1, 1]
    assert rows[0]["protocol"]["model"] == "dense"


def test_scales_of_a_batch_are_marked(data):
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 2}
    suite = _suite(LM, recipe="bse", options={"granularity": "token"}, task=task)
    rows = runner.run(suite, Store(data / "a.db"), data)
    assert "not batch invariant" in tables(suite, rows)[0].rows[1]


# More than one process


@needs_lm_eval
@pytest.mark.slow
def test_ranks_share_the_items_of_lm_eval(data):
    task = {"kind": "lm-eval", "local": "zeroshot", "tasks": ["hellaswag", "winogrande"]}
    one, two = _row(LM, data, task, steps=8), _row(LM, data, task, steps=8, ranks=2)
    assert two["metrics"] == one["metrics"]
    assert two["detail"]["predictions"] == one["detail"]["predictions"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_ranks_that_hold_one_model_give_its_perplexity(data, parallel):
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 4}
    for recipe in ("dense", "bse"):
        one = _row(LM, data, task, recipe)
        two = _row({**LM, "parallel": parallel}, data, task, recipe, ranks=2)
        assert two["metrics"]["perplexity"] == pytest.approx(one["metrics"]["perplexity"], rel=1e-5)
        assert "energy_ratio" not in two["metrics"]


@pytest.mark.slow
def test_a_device_map_gives_the_same_perplexity(data):
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 4}
    one, mapped = _row(LM, data, task), _row({**LM, "device_map": "cpu"}, data, task)
    assert mapped["metrics"] == one["metrics"]


def test_hub_model_needs_its_commit(data):
    """What a branch holds may change, and the id of a cell with it."""
    task = {"kind": "perplexity", "text": "text.txt", "seqlen": 32, "limit": 2}
    for source in ("org/tiny", "org/tiny@main"):
        with pytest.raises(OptionError, match="it names no commit"):
            runner.plan(_suite({**LM, "source": source}, recipe="bse", task=task), None, data, cache=data)
    pinned = [_suite({**LM, "source": f"org/tiny@{digit * 40}"}, recipe="bse", task=task) for digit in "12"]
    first, second = (set(runner.plan(suite, None, data, cache=data).specs) for suite in pinned)
    assert len(first) == 2
    assert not first & second
