"""Learning of phase neurons (MGPC): Algorithm 1, alternating steps on neuron and bases, and Algorithm 2, the search."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikeplug.coding.site import Site, sites
from spikeplug.coding.statistics import ActivationStats
from spikeplug.coding.types import CodeParams
from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.conversion.record import conversion_of
from spikeplug.conversion.verbs import observe
from spikeplug.errors import CalibrationError, OptionError, indexed

from .encoder import Learning, Phase, even

CHUNK = 8
"""Sites that learn together on a CPU: their tensors then stay in its cache."""

WIDTH = 0.5
"""Width of the surrogate's sigmoid, in units of the last step's worth."""

SEARCH_ROUNDS, SEARCH_SAMPLES, SEARCH_RATE = 10, 2000, 0.5


class Learned(NamedTuple):
    """Thresholds, resets and decode weights `[T]` of one site; its bases `[G]`; the course of its learning.

    Attributes:
        losses: mean squared error in units of the last step's worth, before every step of Algorithm 1.
        course: bases `[rounds + 1, G]`, before the first round and after every one.
        allocation: index of the base of every step.
    """

    threshold: Tensor
    reset: Tensor
    weight: Tensor
    bases: Tensor
    losses: Tensor
    course: Tensor
    allocation: tuple[int, ...]


def learn_all(
    code: Phase, stats: Sequence[ActivationStats], watch: Watch = unwatched
) -> tuple[list[CodeParams], list[Learned]]:
    """Parameters of many sites, and how they were learned. None is worse on its sample than rounding.

    Raises:
        CalibrationError: a site saw one value only; `index` says which.
    """
    scales, rounding = [], []
    for index, each in enumerate(stats):
        with indexed(index):
            if float(each.low.min()) == float(each.high.max()):
                raise CalibrationError(f"every activation seen is {float(each.low.min()):g}: nothing can be learned")
            scales.append(code.scale_for(each))
            rounding.append(code.params_of(scales[-1], *dataclasses.replace(code, bases=()).start()))
    magnitudes = [each.values.double().abs() / scale for each, scale in zip(stats, scales, strict=True)]
    learned, params = learn(code, magnitudes, watch), []
    for scale, start, x, own in zip(scales, rounding, magnitudes, learned, strict=True):
        choices = [start, code.params_of(scale, own.threshold, own.reset, own.weight)]
        errors = [float((code.fused(x * scale, p) - x * scale).square().mean()) for p in choices]
        # What was learned was put on a grid since, and meets more values here than it was learned from.
        params.append(choices[errors[1] < errors[0]])
    return params, learned


def learn(code: Phase, magnitudes: Sequence[Tensor], watch: Watch = unwatched) -> list[Learned]:
    """Learn the neurons of many sites, each from the magnitudes `[V]` it saw, in units of its scale."""
    x = torch.stack([_sampled(each, code.samples) for each in magnitudes]).float()
    found: list[Learned] = []
    for start in range(0, len(x), CHUNK):
        watch("learning", start, len(x))
        found += _learn(code, x[start : start + CHUNK])
    return found


def _sampled(values: Tensor, samples: int) -> Tensor:
    """So many of the values; they come in random order, and are repeated where there are fewer."""
    return values[torch.arange(samples) % values.numel()]


def _learn(code: Phase, x: Tensor) -> list[Learned]:
    allocations = [even(code.steps, code.grains)] * len(x)
    if code.allocation == "search" and 1 < code.grains < code.steps:
        allocations = search(code, x)
    found: list[Learned | None] = [None] * len(x)
    for allocation in sorted(set(allocations)):
        rows = [row for row, each in enumerate(allocations) if each == allocation]
        neurons = _Neurons(code, x[rows], allocation)
        losses, course = neurons.run(code.rounds, code.inner_neuron, code.inner_bases)
        for index, row in enumerate(rows):
            found[row] = Learned(
                threshold=neurons.best[0][index].double(),
                reset=neurons.best[1][index].double(),
                weight=neurons.best[2][index].double(),
                bases=neurons.best[3][index].double(),
                losses=losses[:, index],
                course=course[:, index],
                allocation=allocation,
            )
    return [each for each in found if each is not None]


def candidates(steps: int, grains: int) -> list[tuple[int, ...]]:
    """Every way to give consecutive steps to bases, each at least one."""
    found = []
    for cuts in itertools.combinations(range(1, steps), grains - 1):
        found.append(tuple(sum(step >= cut for cut in cuts) for step in range(steps)))
    return found


def search(code: Phase, x: Tensor) -> list[tuple[int, ...]]:
    """Algorithm 2: for every site the allocation whose weight in a softmax of all of them is largest (Eq. 56-58)."""
    choices = candidates(code.steps, code.grains)
    part = x[:, :SEARCH_SAMPLES]
    neurons = [_Neurons(code, part, choice) for choice in choices]
    alpha = torch.zeros(len(x), len(choices), dtype=x.dtype)
    for _ in range(SEARCH_ROUNDS):
        for each in neurons:
            each.run(1, 1, 1)
        outputs = torch.stack([each.output() for each in neurons], dim=1)  # [S, O, V]
        share = alpha.softmax(1)
        mixed = (share.unsqueeze(2) * outputs).sum(1)
        error = (mixed - part) * 4.0**code.steps
        slope = 2 * (error.unsqueeze(1) * (outputs - mixed.unsqueeze(1))).mean(2) * share
        alpha -= SEARCH_RATE * slope / slope.abs().amax(1, keepdim=True).clamp(min=1e-12)
    return [choices[index] for index in alpha.argmax(1).tolist()]


class _Neurons:
    """Neurons of some sites under one allocation, and the steps of Algorithm 1.

    Losses are in units of the last step's worth, `2^-T`; gradient steps are Adam's, which need no more tuning for
    parameters of such different size, in the same unit.
    """

    def __init__(self, code: Phase, x: Tensor, allocation: tuple[int, ...]) -> None:
        self.x, self.v = x, x.clamp(max=1.0)
        self.unit = 2.0**-code.steps
        self.owner = torch.tensor(allocation)
        self.times = torch.arange(1, code.steps + 1, dtype=torch.float32)
        threshold, reset, _ = (each.float().expand(len(x), -1).clone() for each in code.start())
        self.neuron = _Adam([threshold, reset], code.lr_neuron * self.unit)
        # A base moves d(1) = 1 / B by about the same as a threshold moves.
        start = torch.tensor(code.bases or (2.0,) * code.grains, dtype=torch.float32).expand(len(x), -1).clone()
        self.bases = _Adam([start], 4 * code.lr_bases * self.unit)
        self._best_loss = torch.full((len(x),), float("inf"), dtype=x.dtype)
        self.best = [threshold.clone(), reset.clone(), self.weight(), self.bases.values[0].clone()]

    def weight(self) -> Tensor:
        """d `[S, T]` of the bases."""
        return self.bases.values[0][:, self.owner] ** -self.times

    def run(self, rounds: int, inner_neuron: int, inner_bases: int) -> tuple[Tensor, Tensor]:
        """Alternate; return the losses `[steps, S]` and the bases `[rounds + 1, S, G]`."""
        losses, course = [], [self.bases.values[0].clone()]
        for turn in range(rounds):
            # Smaller steps towards the end settle what the first ones found.
            self.neuron.share = self.bases.share = 1 - 0.9 * turn / rounds
            for _ in range(inner_neuron):
                losses.append(self._neuron_step())
            losses += self._bases_steps(inner_bases)
            course.append(self.bases.values[0].clone())
        self._forward(keep=False)
        return torch.stack(losses), torch.stack(course)

    def output(self) -> Tensor:
        """Decoded values `[S, V]`."""
        return self._forward(keep=False)[0]

    def _forward(self, keep: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Output, distances to the threshold, spikes, loss; the best parameters are kept on the way."""
        threshold, reset = self.neuron.values
        weight, v, y = self.weight(), self.v.clone(), torch.zeros_like(self.v)
        distances, spikes = [], []
        for t in range(len(self.times)):
            u = v - threshold[:, t, None]
            s = (u >= 0).to(v.dtype)
            v -= reset[:, t, None] * s
            y += weight[:, t, None] * s
            if keep:
                distances.append(u)
                spikes.append(s)
        loss = (y - self.x).square().mean(1) / self.unit**2
        better = loss < self._best_loss
        self._best_loss = torch.where(better, loss, self._best_loss)
        now = [threshold, reset, weight, self.bases.values[0]]
        self.best = [torch.where(better[:, None], new, old) for new, old in zip(now, self.best, strict=True)]
        return y, distances, spikes, loss

    def _neuron_step(self) -> Tensor:
        """One step on thresholds and resets, the sigmoid's slope in the place of the step function's (Eq. 8)."""
        y, distances, spikes, loss = self._forward()
        weight, reset = self.weight(), self.neuron.values[1]
        error = (y - self.x).mul_(2 / self.unit**2 / self.x.shape[1])
        to_threshold, to_reset = torch.empty_like(reset), torch.empty_like(reset)
        flow = torch.zeros_like(error)  # dL / dv(t + 1)
        for t in reversed(range(len(self.times))):
            # dL / ds(t), by the output and by the potential that the reset leaves.
            of_spike = error * weight[:, t, None] - reset[:, t, None] * flow
            sigmoid = torch.sigmoid(distances[t].mul_(1 / (WIDTH * self.unit)))
            of_distance = of_spike.mul_(sigmoid).mul_(1 - sigmoid).mul_(1 / (WIDTH * self.unit))
            to_threshold[:, t] = -of_distance.sum(1)
            to_reset[:, t] = -(spikes[t] * flow).sum(1)
            flow += of_distance
        self.neuron.step([to_threshold, to_reset])
        return loss

    def _bases_steps(self, steps: int) -> list[Tensor]:
        """Steps on the bases by their true gradient. Spikes stay as they are, so two sums over the sample do."""
        _, _, spikes, _ = self._forward()
        planes = torch.stack(spikes, dim=1)  # [S, T, V]
        size = self.x.shape[1]
        gram, cross = planes @ planes.transpose(1, 2) / size, (planes @ self.x.unsqueeze(2)).squeeze(2) / size
        power = self.x.square().mean(1)
        losses = []
        for _ in range(steps):
            bases, d = self.bases.values[0], self.weight()
            joint = (gram @ d.unsqueeze(2)).squeeze(2)
            losses.append(((d * joint).sum(1) - 2 * (d * cross).sum(1) + power) / self.unit**2)
            of_weight = 2 * (joint - cross) / self.unit**2
            of_base = of_weight * -self.times * d / bases[:, self.owner]
            gradient = torch.zeros_like(bases).index_add_(1, self.owner, of_base)
            self.bases.step([gradient])
            self.bases.values[0].clamp_(min=1.01)
        return losses


class _Adam:
    """Adam on a few tensors whose gradients are worked out by hand."""

    def __init__(self, values: list[Tensor], rate: float) -> None:
        self.values, self.rate, self.share, self._count = values, rate, 1.0, 0
        self._mean, self._square = ([torch.zeros_like(each) for each in values] for _ in range(2))

    def step(self, gradients: list[Tensor]) -> None:
        self._count += 1
        for value, gradient, mean, square in zip(self.values, gradients, self._mean, self._square, strict=True):
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            unbiased = (square / (1 - 0.99**self._count)).sqrt_().add_(1e-12)
            value.sub_(self.share * self.rate * mean / (1 - 0.9**self._count) / unbiased)


@dataclasses.dataclass(frozen=True)
class MGPC(Learning):
    """Trainer: learns the phase neurons of a converted model anew, from the activations of some batches.

    Args:
        grains: as of `Phase`. The others: as of `Learning`.
    """

    grains: int = 2

    name: ClassVar[str] = "mgpc"

    def train(
        self, model: nn.Module, batches: Sequence[Any], *, checkpoint: Any = None, watch: Watch = unwatched
    ) -> list[float]:
        """Learn in place; weights stay. Returns the mean loss of all sites before every step.

        Raises:
            OptionError: the model is not phase-coded, an option is out of range, or a checkpoint is asked for.
            CalibrationError: a site saw one value only; the message names it.
        """
        if checkpoint is not None:
            raise OptionError("the trainer mgpc takes minutes and keeps no checkpoint: leave it out")
        config = conversion_of(model).config
        found = {
            name: site
            for name, site in sites(model).items()
            if isinstance(site, Site) and isinstance(site.encoder, Phase)
        }
        if not found or config.encoder != Phase.name:
            raise OptionError(f"the model is coded by '{config.encoder}': the trainer mgpc learns 'phase'")
        statistics = observe(model, batches, watch=watch)
        options = dataclasses.asdict(self)
        losses = []
        for code in {cast(Phase, site.encoder) for site in found.values()}:
            names = [name for name, site in found.items() if site.encoder == code]
            new = dataclasses.replace(code, **options)
            try:
                params, learned = learn_all(new, [statistics[name] for name in names], watch)
            except CalibrationError as error:
                raise CalibrationError(f"site '{found[names[error.index or 0]].name}': {error}") from None
            for name, p in zip(names, params, strict=True):
                found[name].encoder = new
                found[name].set_params({key: tensor.to(statistics[name].device) for key, tensor in p.tensors().items()})
            losses += [each.losses for each in learned]
        learned_config = config.model_copy(update={"encoder_options": {**config.encoder_options, **options}})
        conversion_of(model).config = learned_config
        return [float(loss) for loss in torch.stack(losses).mean(0)]
