"""What a cell is: a network, the form it runs in, and the task that is measured."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pydantic

DENSE = "dense"
"""The recipe of a network that is not converted."""

Distribution = Literal["uniform", "normal", "laplace", "half-normal"]


class Strict(pydantic.BaseModel):
    """Refuses keys that it does not know."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Perplexity(Strict):
    """Perplexity of a text in windows that do not overlap.

    Attributes:
        limit: windows; None: all.
    """

    kind: Literal["perplexity"] = "perplexity"
    text: str
    seqlen: int = pydantic.Field(default=512, ge=2)
    limit: int | None = pydantic.Field(default=None, ge=1)


class LmEval(Strict):
    """Tasks of lm-eval.

    Attributes:
        tasks: names as lm-eval has them.
        local: folder of NAME.jsonl files to read the tasks from, instead of a hub.
        limit: items of each task; None: all.
    """

    kind: Literal["lm-eval"] = "lm-eval"
    tasks: tuple[str, ...]
    local: str | None = None
    fewshot: int = pydantic.Field(default=0, ge=0)
    limit: int | None = pydantic.Field(default=None, ge=1)
    batch_size: int = pydantic.Field(default=8, ge=1)


class Accuracy(Strict):
    """Top-1 and top-5, and the share of images of which the dense and the spiking network name the same class.

    Attributes:
        limit: images, spread evenly; None: all.
        diagnose: images for spikes, error and potential left of every site; 0: none.
    """

    kind: Literal["accuracy"] = "accuracy"
    images: str
    limit: int | None = pydantic.Field(default=None, ge=1)
    batch_size: int = pydantic.Field(default=16, ge=1)
    diagnose: int = pydantic.Field(default=0, ge=0)


class Reconstruction(Strict):
    """Mean squared error of an encoder on values whose range it knows, beside the least that is possible.

    Attributes:
        encoder: its name; `*`: every installed one.
        limit: values.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    encoder: str
    distribution: Distribution = "uniform"
    limit: int = pydantic.Field(default=10_000, ge=2)


class Throughput(Strict):
    """Time of the dense and the spiking network in turn, in one process.

    Attributes:
        text, images: what runs; one of them.
        limit: batches that are timed, each `repeats` times; the fastest counts.
    """

    kind: Literal["throughput"] = "throughput"
    text: str | None = None
    images: str | None = None
    seqlen: int = pydantic.Field(default=512, ge=2)
    batch_size: int = pydantic.Field(default=1, ge=1)
    limit: int = pydantic.Field(default=1, ge=1)
    repeats: int = pydantic.Field(default=5, ge=1)


class Energy(Strict):
    """Operations, spikes and traffic of every layer, and what they cost.

    Attributes:
        text, images: what runs; one of them.
        limit: windows or images.
        costs: name of a cost model, or a JSON file of one.
    """

    kind: Literal["energy"] = "energy"
    text: str | None = None
    images: str | None = None
    seqlen: int = pydantic.Field(default=512, ge=2)
    batch_size: int = pydantic.Field(default=1, ge=1)
    limit: int = pydantic.Field(default=1, ge=1)
    costs: str = "45 nm"


Task = Annotated[
    Perplexity | LmEval | Accuracy | Reconstruction | Throughput | Energy, pydantic.Field(discriminator="kind")
]
TASKS: dict[str, type[Strict]] = {
    cls.model_fields["kind"].default: cls for cls in (Perplexity, LmEval, Accuracy, Reconstruction, Throughput, Energy)
}


class Calibration(Strict):
    """What a conversion is calibrated on: `tokens` of a text in windows of `seqlen`, or `count` images."""

    text: str | None = None
    seqlen: int = pydantic.Field(default=512, ge=2)
    tokens: int = pydantic.Field(default=16384, ge=2)
    images: str | None = None
    count: int = pydantic.Field(default=1000, ge=1)


class Model(Strict):
    """A network of a suite.

    Attributes:
        source: as `spikeplug convert` takes it; paths are relative to the data folder.
        weights: of an image network, its state dict.
        device_map: lays a language model over devices by accelerate, where it does not fit one: `auto`.
        parallel: what a cell of several ranks does: `data`, each has the model and takes a share of lm-eval's items;
            `tensor` or `pipeline`, together they hold one model.
    """

    source: str
    weights: str | None = None
    calibration: Calibration = Calibration()
    device_map: str | None = None
    parallel: Literal["data", "tensor", "pipeline"] = "data"


class Cell(Strict):
    """One point: what is measured, of which network, in which form.

    Attributes:
        recipe: its name; `dense`: not converted; None for a task about a code alone.
        steps: None: the recipe's own.
        framework: what an image network runs in.
        execution: None: the recipe's own.
        ranks: processes of `torchrun`; see `Model.parallel`.
    """

    name: str
    model: Model | None = None
    recipe: str | None = None
    steps: int | None = pydantic.Field(default=None, ge=1)
    options: dict[str, Any] = {}
    framework: str = "torch"
    execution: Literal["fused", "stepped"] | None = None
    task: Task
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    ranks: int = pydantic.Field(default=1, ge=1)

    @property
    def all_options(self) -> dict[str, Any]:
        """Options of the conversion."""
        given = dict(self.options)
        if self.steps is not None:
            given["steps"] = self.steps
        if self.execution is not None:
            given["execution"] = self.execution
        return given

    def label(self) -> str:
        """What a progress bar and a table call it."""
        what = self.task.encoder if isinstance(self.task, Reconstruction) else self.recipe
        steps = f" T={self.steps}" if self.steps else ""
        options = "".join(f" {key}={_brief(value)}" for key, value in self.options.items())
        where = "" if self.framework == "torch" else f" in {self.framework}"
        return f"{self.name} {what}{steps}{options}{where}: {self.task.kind}".strip()


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
