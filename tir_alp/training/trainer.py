"""Owns the policy's weights and the optimizer: takes samples, makes updates, reports metrics.

A *step* takes the groups of the rollout queue and divides them over `updates_per_step` optimizer
*updates*. Each update runs over micro-batches, whose losses add up to that of the update because
they share one denominator. Where samples come from and who gets the weights is not decided here.

Trainers on several ranks together make the update that a single one would make. Every rank is given
all samples and takes its share; public methods are called on all ranks in the same order. With
`sequence_parallel`, the ranks of a team take the same samples and divide each forward.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.loss import loss_counts, loss_terms
from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.algorithm.ratio_metrics import sequence_ess
from tir_alp.algorithm.ratio_summary import RatioSummary
from tir_alp.config import TrainerConfig
from tir_alp.training.acceptance import Acceptance, Verdict
from tir_alp.training.arrangement import is_packed
from tir_alp.training.batch import pack
from tir_alp.training.divided_model import check_division
from tir_alp.training.forwards import Forwards
from tir_alp.training.gradient_baseline import Score, with_gradient_baseline
from tir_alp.training.gradient_norms import GradientNorms
from tir_alp.training.lora import Adapters
from tir_alp.training.micro_batch import SeenBatch, loss_inputs, moved
from tir_alp.training.optimizer import Optimizer
from tir_alp.training.policy import WRAPPER
from tir_alp.training.preparation import Looked, interpolated, prepare, versions_of
from tir_alp.training.ranks import Ranks
from tir_alp.training.seen_tokens import token_values
from tir_alp.training.sequence_parallel import divide_ranks
from tir_alp.training.sharding import gathered, on_first_rank, whole_weights
from tir_alp.training.step_metrics import (
    MadeUpdate,
    over_ranks,
    probe_metrics,
    sigma_metrics,
    sums_over_ranks,
)
from tir_alp.training.step_outcome import report_of
from tir_alp.training.step_report import StepReport
from tir_alp.training.weight_nudge import WeightNudge
from tir_alp.training.weight_versions import WeightVersions
from tir_alp.types import Batch, Sample

_OPTIMIZER = "optimizer."
OnBadUpdate = Callable[[int, Sequence[Batch]], None]
"""Called with the number and the micro-batches of an update that was skipped."""


class Trainer:
    """Trains a causal LM. It takes the model over: changes it in place and divides it over ranks.

    Args:
        model: The policy, loaded by `load_policy`, the same on every rank.
        config: Settings of optimizer, precision and memory.
        algorithm: The objective.
        ranks: The processes that train together.
        reference: The frozen initial model, if the objective has a KL term; it is taken over too.
        temperature: Temperature at which rollouts are sampled; the same distribution is trained.
        on_bad_update: Called if the loss or a gradient is not finite, or the gradient norm is a
            spike. The update is skipped. Every rank calls its own, with its share of micro-batches;
            of a team, only the first.
        num_steps: Number of steps of the run, over which the learning rate falls; None only if its
            schedule is constant.
        clean_every: Steps between measurements of the policy without noise; 0: never.
        num_kept_versions: Versions of the weights to keep for `proximal = "rollout_version"`: the
            most steps by which the weights that sampled a token may lag.
        max_token_values: Number of loss tokens of a step of which the report has what the loss saw.
    """

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        ranks: Ranks,
        reference: Any | None = None,
        temperature: float,
        on_bad_update: OnBadUpdate,
        num_steps: int | None = None,
        clean_every: int = 0,
        num_kept_versions: int = 0,
        max_token_values: int = 0,
    ) -> None:
        self.model, self.ranks, self._clean_every = model, ranks, clean_every
        self._team, self._takers = divide_ranks(
            ranks, config.sequence_parallel, config.rank_timeout_s
        )
        check_division(model, self._team)
        self._max_values = max_token_values // (self._takers.size * config.updates_per_step)
        self._config, self._algorithm = config, algorithm
        self._advantage = find(algorithm.advantage, ADVANTAGES, Advantage)
        self._on_bad_update = on_bad_update
        self._adapters = None
        if config.lora is not None:
            self._adapters = Adapters(model, config.lora, getattr(torch, config.dtype))
        self._forwards = Forwards(
            model, reference, config, algorithm, ranks, self._team, temperature
        )
        self._perturbation = self._forwards.perturbation
        log_sigma = None if self._perturbation is None else self._perturbation.log_sigma
        self._optimizer = Optimizer(self._trained(), log_sigma, config, num_steps)
        self._norms = GradientNorms(self._optimizer.norms, config.skip_grad_spike)
        lora = config.lora
        self._nudge = WeightNudge(self.model, None if lora is None else lora.alpha / lora.rank)
        self._versions = WeightVersions(self._trained(), num_kept_versions)
        self._acceptance = None
        if algorithm.acceptance is not None:
            self._acceptance = Acceptance(algorithm.acceptance, self._own_state())

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> StepReport:
        """Make the updates of one step.

        Args:
            groups: The samples of each group.
            step: Number of the step, from 0; it determines the noise of its updates.

        Returns:
            Metrics, and a record of each update. Metrics are means over the updates that were made;
            ratios are those of all their tokens, turns and sequences together, and
            `train/skipped_updates` is a count.
        """
        with self.ranks.together(f"step {step}"):
            return self._step(groups, step)

    def mean_loss(self, samples: Sequence[Sample]) -> float:
        """Return the mean negative logprob of the loss tokens of some samples, in nats per token.

        Weights are not changed, and there is no noise. Every rank returns the same value; NaN if
        there are no loss tokens.
        """
        with self.ranks.together("computing a loss"):
            sums = torch.zeros(2, dtype=torch.float64)
            max_tokens = self._config.micro_batch_tokens
            for packed in pack(samples, max_tokens, self._takers.rank, self._takers.size):
                batch = moved(packed, self.ranks.device)
                logprobs = self._forwards.clean(batch)[0]
                chosen = logprobs[batch.loss_mask].double()
                sums += torch.stack([-chosen.sum(), torch.tensor(float(len(chosen)))]).cpu()
            total, num_tokens = self._takers.sum(sums).tolist()
            return total / num_tokens if num_tokens else math.nan

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the policy's tensors one after the other, whole, by their names in the model.

        This is what an engine loads: sigma is not among them, and adapters are merged. A tensor may
        be the model's own; see `sharding.whole_weights`. Every rank must iterate to the end.
        """
        with self.ranks.together("gathering weights"):
            yield from whole_weights(self.model, self._adapters)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the factors of the adapters, whole, each pair as `MODULE.lora_A.weight` and so on.

        This is what an engine loads that takes adapters. Every rank must iterate to the end.
        """
        assert self._adapters is not None
        with self.ranks.together("gathering adapters"):
            for name, tensor in gathered(self._trained()):
                yield self._adapters.short_name(name), tensor.detach()

    def completion_logprobs(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[float]:
        """Return the logprob of each token of a completion, without noise, to check an engine.

        See `policy.completion_logprobs`. Every rank returns the same values.
        """
        with self.ranks.together("computing logprobs to check an engine"):
            ids = torch.tensor([*prompt, *completion], device=self.ranks.device)
            return self._forwards.policy.completion_logprobs(
                ids, len(prompt), temperature, top_p
            ).tolist()

    def perturb_weights(self, scale: float) -> None:
        """Change some of the weights by `scale` times their spread; 0 restores them bit for bit.

        This is used to test whether an engine follows the change.
        """
        self._nudge.by(scale)

    def save_model(self, folder: Path, end_token_ids: frozenset[int] = frozenset()) -> None:
        """Write a Hugging Face folder, and `adapters/` in peft's format if there are adapters.

        Meanwhile, rank 0 holds all weights in CPU memory.

        Args:
            folder: An empty folder.
            end_token_ids: Tokens that end a completion, for the generation config; if empty, those
                of the model stay in it.
        """
        whole = on_first_rank(self.weights(), self.ranks)
        of_adapters = {} if self._adapters is None else self._trained()
        adapters = on_first_rank(gathered(of_adapters), self.ranks)
        if self.ranks.is_first:
            if end_token_ids:
                self.model.generation_config.eos_token_id = sorted(end_token_ids)
            self.model.save_pretrained(folder, state_dict=whole)
            if self._adapters is not None:
                self._adapters.save(folder / "adapters", adapters)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that training changes, as sharded tensors shared with the trainer.

        Noise needs no state: it is a function of the number of the update.
        """
        accepted = {} if self._acceptance is None else self._acceptance.state()
        return self._own_state() | self._versions.state() | accepted

    def finish_loading(self, state: Mapping[str, Tensor]) -> None:
        """Take what is not shared from a state whose tensors were read in place."""
        self._take(state)
        self._versions.finish_loading(state)
        if self._acceptance is not None:
            self._acceptance.finish_loading(state)

    def _own_state(self) -> dict[str, Tensor]:
        """Return what updates change, without earlier states."""
        state = {f"weights.{name}": weight.detach() for name, weight in self._trained().items()}
        state |= {_OPTIMIZER + name: value for name, value in self._optimizer.state().items()}
        state |= self._norms.state()
        if self._perturbation is not None:
            state["log_sigma"] = self._perturbation.log_sigma.detach()
        return state

    def _take(self, state: Mapping[str, Tensor]) -> None:
        """Take what is not shared with the tensors of `_own_state`."""
        self._norms.finish_loading(state)
        of_optimizer = {name.removeprefix(_OPTIMIZER): each for name, each in state.items()}
        self._optimizer.finish_loading(of_optimizer)

    # ------------------------------------------------------------------------- a step, its updates

    def _step(self, groups: Sequence[Sequence[Sample]], step: int) -> StepReport:
        num_updates = self._config.updates_per_step
        per_update = len(groups) // num_updates
        lr, first = self._optimizer.begin_step(step), step * num_updates
        micro_batches = [  # all are prepared first, before an update changes the weights
            self._micro_batches(groups[start : start + per_update], step, first + index)
            for index, start in enumerate(range(0, len(groups), per_update))
        ]
        verdict = self._judge(micro_batches, step)
        self._versions.keep(step)
        is_clean_step = self._clean_every > 0 and step % self._clean_every == 0
        outcomes = [
            None
            if verdict.is_rejected
            else self._update(batches, first + index, step if index == 0 else None, is_clean_step)
            for index, batches in enumerate(micro_batches)
        ]
        metrics = {"train/lr": lr, **verdict.metrics}
        if self._perturbation is not None:
            metrics |= sigma_metrics(self._perturbation)
        if (loss_scale := self._optimizer.loss_scale) is not None:
            metrics["train/loss_scale"] = loss_scale
        return report_of(self._takers, micro_batches, outcomes, first, self._algorithm, metrics)

    def _judge(self, micro_batches: Sequence[Sequence[Batch]], step: int) -> Verdict:
        """Decide whether the updates of the step before stay, if the method asks for it."""
        if self._acceptance is None:
            return Verdict(False, {})
        state, batches = self._own_state(), [each for some in micro_batches for each in some]
        verdict = self._acceptance.judge(batches, step, self._takers, state)
        if verdict.is_rejected:
            self._take(state)
        return verdict

    def _micro_batches(
        self, groups: Sequence[Sequence[Sample]], step: int, update: int
    ) -> list[Batch]:
        """Return this rank's share of an update, with what the fixed policies say of it."""
        samples = [sample for group in groups for sample in group]
        max_tokens = self._config.micro_batch_tokens
        packed = pack(
            samples,
            max_tokens,
            self._takers.rank,
            self._takers.size,
            share_prompts=self._config.share_prompts and is_packed(self.model),
            with_versions=self._algorithm.proximal != "current",
            with_routing=self._forwards.replays_routing,
        )
        on_device = (moved(batch, self.ranks.device) for batch in packed)
        batches = [self._forwards.with_reference(batch) for batch in on_device]
        if self._algorithm.proximal == "interpolated":
            return [interpolated(batch, step) for batch in batches]
        if not self._algorithm.needs_proximal:
            return batches
        looked = self._look(batches, step)
        return prepare(looked, self._algorithm, self._takers, update)

    def _look(self, batches: Sequence[Batch], step: int) -> list[Looked]:
        """Add the proximal logprobs: with the current weights, or with those of each token."""
        proximal = self._forwards.proximal
        found = [Looked.of(batch, *proximal(batch)) for batch in batches]
        if not self._reads_versions:
            return found
        own = {version for batch in batches for version in versions_of(batch)}
        for version in sorted(set().union(*self.ranks.gather(own)) - {step}):
            with self._versions.loaded(version):
                found = [each.at_version(version, *proximal(each.batch)) for each in found]
        return found

    def _update(
        self, batches: Sequence[Batch], update: int, probe: int | None, measure_clean: bool
    ) -> MadeUpdate | None:
        """Make one optimizer update; return None if it was skipped.

        An update is skipped if it has no loss tokens, or if its loss or a gradient is not finite or
        a spike.

        Args:
            batches: The micro-batches of this rank.
            update: Number of updates of the run before this one.
            probe: Number of the step, to measure on the first micro-batch what the noise does to
                hidden states, and what noise and engine do to logprobs; None: not measured.
            measure_clean: Whether to measure the policy without noise on all tokens.
        """
        if batches and self._advantage.has_gradient_baseline:
            score = functools.partial(self._score, update)
            batches = with_gradient_baseline(batches, self._takers, score)
        own = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        for batch in batches:
            own += torch.stack([*loss_counts(loss_inputs(batch), self._algorithm)])
        counts = self._takers.sum(own.cpu()).tolist()
        if counts[0] == 0:
            return None
        self._optimizer.zero_grad()
        totals: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        seen: list[SeenBatch] = []
        probed: dict[str, float] = {}
        num_draws = self._forwards.num_draws
        for index, (batch, draw) in enumerate(itertools.product(batches, range(num_draws))):
            probe_now = probe if index == 0 else None
            is_measured = probe_now is not None
            with self._forwards.perturbed(batch, update, draw, is_measured) as effect:
                found = self._backward(batch, *counts)
            if probe_now is not None:
                probed = probe_metrics(
                    self.ranks,
                    batch,
                    probe_now,
                    found.logprobs,
                    effect,
                    lambda few: self._forwards.clean(few)[0],
                )
            for name, value in found.metrics.items():
                totals[name] = totals[name] + value / num_draws
            seen.append(found)
        ratios = functools.reduce(operator.add, [each.summary() for each in seen])
        self._sum_gradient_of_sigma()
        norms = self._optimizer.clip_gradients()
        metrics = sums_over_ranks(self._takers, totals) | norms | probed
        metrics |= self._forwards.router_metrics()
        if not self._norms.is_sound(metrics["loss/value"], norms):
            only_scale = self._optimizer.skip(math.isfinite(metrics["loss/value"]))
            if not only_scale and (self._team is None or self._team.is_first):
                self._on_bad_update(update, batches)
            return None
        self._norms.add(norms)
        clean, began, without_noise = None, time.perf_counter(), []
        if measure_clean:
            without_noise = [] if self._perturbation is None else self._without_noise(batches)
            found = [each.summary() for each in without_noise]
            clean = functools.reduce(operator.add, found) if found else ratios
        clean_s = time.perf_counter() - began
        of_first_draw = seen[::num_draws]
        values = token_values(
            of_first_draw, without_noise, self._algorithm, update, self._max_values
        )
        lag = None
        if self._reads_versions and self._perturbation is None:
            lag = functools.reduce(operator.add, [each.lag() for each in seen])
        scale = self._step_scale(ratios)
        if self._algorithm.step_scale != "none":
            metrics["train/step_scale"] = scale
        self._optimizer.step(scale)
        return MadeUpdate(metrics, ratios, clean, clean_s, lag, values)

    def _step_scale(self, ratios: RatioSummary) -> float:
        """Return what the learning rate of an update is multiplied by; call on every rank."""
        if self._algorithm.step_scale == "none":
            return 1.0
        return math.sqrt(sequence_ess(over_ranks(self._takers, [ratios])))

    @torch.no_grad()
    def _without_noise(self, batches: Sequence[Batch]) -> list[SeenBatch]:
        """Return what a loss of the policy without noise would see."""
        seen = []
        for batch in batches:
            logprobs, entropy = self._forwards.clean(batch)
            terms = loss_terms(loss_inputs(batch, logprobs, entropy), self._algorithm)
            seen.append(SeenBatch(batch, logprobs, entropy, terms.clipped, terms.metrics))
        return seen

    def _backward(self, batch: Batch, *counts: float) -> SeenBatch:
        """Add the gradients of one micro-batch, and return what the loss saw.

        Nothing here waits for the device, so that it never runs out of work. Noise has to be active
        in the backward pass too, where checkpointed layers run a second time.
        """
        logprobs, entropy = self._forwards.trained(batch)
        terms = loss_terms(loss_inputs(batch, logprobs, entropy), self._algorithm, *counts)
        self._optimizer.scaled(terms.loss / self._forwards.num_draws).backward()
        return SeenBatch(batch, logprobs.detach(), entropy.detach(), terms.clipped, terms.metrics)

    def _score(self, update: int, batch: Batch) -> Score:
        """Make a forward and a backward pass of the logprobs of one sequence, for its gradient."""
        self._optimizer.zero_grad()
        with self._forwards.perturbed(batch, update, draw=0, measure=False):
            logprobs = self._forwards.trained(batch)[0]
            number = max(batch.num_loss_tokens, 1)
            mean = torch.where(batch.loss_mask, logprobs, 0).sum() / number
            self._optimizer.scaled(mean).backward()
        change = torch.where(batch.loss_mask, logprobs.detach() - batch.rollout_logprobs, 0)
        return Score(change.sum().item(), self._optimizer.norm() * number)

    def _sum_gradient_of_sigma(self) -> None:
        """Sum the gradient of log sigma over ranks; FSDP2 sums that of the weights."""
        if self._perturbation is not None and self._perturbation.log_sigma.grad is not None:
            gradient = self._perturbation.log_sigma.grad
            gradient.copy_(self.ranks.sum(gradient))

    @property
    def _reads_versions(self) -> bool:
        """Whether proximal logprobs are those of the version that sampled each token."""
        algorithm = self._algorithm
        return algorithm.needs_proximal and algorithm.proximal == "rollout_version"

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the model without wrappers."""
        return {
            name.replace(WRAPPER, ""): each
            for name, each in self.model.named_parameters()
            if each.requires_grad
        }
