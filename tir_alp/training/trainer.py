"""Owns the policy's weights and the optimizer: takes samples, makes updates, reports.

A *step* takes the groups of the rollout queue and divides them over `updates_per_step` optimizer
*updates*; each update runs over micro-batches whose losses add up to that of the update, because
they share one denominator. Not here: where samples come from, and who gets the weights.

One trainer on each of several ranks makes the update that one alone would make. Every rank is
given all samples and takes its share; public methods are called on all ranks in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import loss_counts, loss_terms
from tir_alp.algorithm.metrics import mismatch_metrics, ratio_metrics
from tir_alp.algorithm.perturbation import Effect, LayerwisePerturbation, NoiseKey
from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.algorithm.ratio_summary import RatioSummary, summarise
from tir_alp.config import TrainerConfig
from tir_alp.training.batch import Sample, pack, sequences_of
from tir_alp.training.lora import Adapters
from tir_alp.training.optimizer import MOST_NORMS, Optimizer, is_spike
from tir_alp.training.policy import WRAPPER, PolicyLogprobs, recompute_layers
from tir_alp.training.ranks import Ranks
from tir_alp.training.sharding import gathered, shard
from tir_alp.training.weight_nudge import WeightNudge
from tir_alp.types import Batch

_NUM_PROBED = 128  # tokens, about, of each step whose logprobs are also taken without noise

OnBadUpdate = Callable[[int, Sequence[Batch]], None]
"""Told the number and the micro-batches of an update that was skipped."""

OnUpdate = Callable[[int, Sequence[Batch], bool], None]
"""Told, behind an update, its number, the micro-batches as the loss got them, and whether it was
made or skipped."""


class Trainer:
    """Trains a causal LM, which it takes over: it is changed in place and divided over ranks.

    Args:
        model: Loaded by `load_policy`, the same on every rank.
        config: Optimizer, precision and memory.
        algorithm: The objective.
        ranks: Who trains.
        reference: The frozen initial model, where the objective has a KL term; it is taken over.
        temperature: At which rollouts sample; the trained distribution has the same.
        on_bad_update: Called where a loss or gradient is not finite, or the gradient a spike. The
            update is skipped. Every rank calls its own, with the micro-batches of its share.
        on_update: Called behind every update, on every rank with its share.
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
        on_update: OnUpdate = lambda update, batches, made: None,
    ) -> None:
        self.model, self.ranks = model, ranks
        self._config, self._algorithm = config, algorithm
        self._temperature = temperature
        self._on_bad_update, self._on_update = on_bad_update, on_update
        self._adapters = None
        if config.lora is not None:
            self._adapters = Adapters(model, config.lora, getattr(torch, config.dtype))
        if config.gradient_checkpointing:
            recompute_layers(model)
        model.train()
        self._policy = self._sharded(model)
        self._reference = None if reference is None else self._sharded(reference)
        self._perturbation, self._num_draws = None, 1
        noise = algorithm.perturbation
        if noise is not None:
            self._num_draws = noise.draws
            self._perturbation = LayerwisePerturbation(model, noise)
        self._is_head_noisy = noise is not None and noise.site == "logits"
        log_sigma = None if self._perturbation is None else self._perturbation.log_sigma
        self._optimizer = Optimizer(self._trained(), log_sigma, config)
        self._norms = {name: deque[float](maxlen=MOST_NORMS) for name in self._optimizer.norms}
        self._nudge = WeightNudge(self.model)

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """Make the updates of one step.

        Args:
            groups: The samples of each group.
            step: Number of the step, from 0; the noise of its updates follows from it.

        Returns:
            Means over the updates that were made; ratios are those of all their tokens, turns and
            sequences together, and `train/skipped_updates` is a count.
        """
        with self.ranks.together(f"step {step}"):
            return self._step(groups, step)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's tensors one after the other, whole, by their names in the model.

        That is what an engine needs: no sigma is among them, and adapters are merged. A tensor may
        be the model's own; one of two names, such as a tied head, is the same object under both.
        Every rank has to go through all of them.
        """
        names: dict[int, list[str]] = {}
        state = self.model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            names.setdefault(id(tensor), []).append(name)
        others = {first: rest for first, *rest in names.values()}
        with self.ranks.together("gathering weights"):
            tensors = gathered({name: state[name].detach() for name in others})
            if self._adapters is not None:
                tensors = self._adapters.merged(tensors)
            for name, tensor in tensors:
                yield name, tensor
                for other in others.get(name, ()):
                    yield other, tensor

    def completion_logprobs(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[float]:
        """Logprob of each token of a completion, without noise: what an engine is checked against.

        See `policy.completion_logprobs`. Every rank gives the same.
        """
        with self.ranks.together("judging an engine"):
            ids = torch.tensor([*prompt, *completion], device=self.ranks.device)
            return self._policy.completion_logprobs(ids, len(prompt), temperature, top_p).tolist()

    def perturb_weights(self, scale: float) -> None:
        """Change some of the weights by `scale` times their spread, or by 0: bit for bit back.

        That is to see whether an engine follows.
        """
        self._nudge.by(scale)

    def save_model(self, folder: Path) -> None:
        """Write a Hugging Face folder, and `adapters/` in peft's format if there are such.

        Rank 0 holds all of the weights in its CPU's memory meanwhile.
        """
        whole = self._on_first_rank(self.weights())
        adapters = self._on_first_rank(gathered({} if self._adapters is None else self._trained()))
        if self.ranks.is_first:
            self.model.save_pretrained(folder, state_dict=whole)
            if self._adapters is not None:
                self._adapters.save(folder / "adapters", adapters)

    def state_dict(self) -> dict[str, Tensor]:
        """All that training changes, as tensors that are shared with the trainer and sharded.

        Noise needs no state: it follows from the number of the update.
        """
        state = {f"weights.{name}": weight.detach() for name, weight in self._trained().items()}
        state |= {f"optimizer.{name}": value for name, value in self._optimizer.state().items()}
        state |= {name: _padded(norms) for name, norms in self._norms.items()}
        if self._perturbation is not None:
            state["log_sigma"] = self._perturbation.log_sigma.detach()
        return state

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Finish loading what was read into the tensors of `state_dict`: they are in place."""
        for name, norms in self._norms.items():
            norms.clear()
            norms.extend(norm for norm in state[name].tolist() if norm == norm)

    # -------------------------------------------------------------------------- one update

    def _step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        per_update = len(groups) // self._config.updates_per_step
        parts = [
            pack(
                [sample for group in groups[start : start + per_update] for sample in group],
                self._config.micro_batch_tokens,
                self.ranks.rank,
                self.ranks.size,
            )
            for start in range(0, len(groups), per_update)
        ]
        parts = [[self._prepare(batch) for batch in part] for part in parts]
        first = step * self._config.updates_per_step
        reports = [
            self._update(part, first + index, probe=step if index == 0 else None)
            for index, part in enumerate(parts)
        ]
        for index, (part, report) in enumerate(zip(parts, reports, strict=True)):
            self._on_update(first + index, part, report is not None)
        made = [report for report in reports if report is not None]
        names = {name for report, _ in made for name in report}
        metrics = {
            name: sum(report[name] for report, _ in made if name in report)
            / sum(name in report for report, _ in made)
            for name in names
        }
        if made:
            metrics |= ratio_metrics(self._over_ranks([summary for _, summary in made]))
        if self._perturbation is not None:
            sigma = self._perturbation.sigma
            metrics["alp/sigma_mean"] = sigma.mean().item()
            names = self._perturbation.names
            each_sigma = zip(names, sigma.tolist(), strict=True)
            metrics |= {f"alp/sigma_{name}": each for name, each in each_sigma}
        batches = [batch for part in parts for batch in part]
        if self._algorithm.needs_proximal and batches:
            mismatch = [summarise(_inputs(batch, batch.proximal_logprobs)) for batch in batches]
            metrics |= mismatch_metrics(self._over_ranks(mismatch))
        metrics["train/skipped_updates"] = len(reports) - len(made)
        num_tokens = torch.tensor(sum(batch.num_loss_tokens for batch in batches))
        metrics["tokens/loss"] = int(self.ranks.sum(num_tokens))
        return metrics

    def _sharded(self, model: Any) -> PolicyLogprobs:
        policy = PolicyLogprobs(model, self._config.logprob_chunk_tokens)
        shard(policy, self._config, self.ranks)
        return policy

    def _trained(self) -> dict[str, nn.Parameter]:
        """What is trained of the model, by the name that it has there without any wrapper."""
        return {
            name.replace(WRAPPER, ""): each
            for name, each in self.model.named_parameters()
            if each.requires_grad
        }

    def _prepare(self, batch: Batch) -> Batch:
        """Move a micro-batch to the model, and add the logprobs of policies that stand still."""
        batch = _to(batch, self.ranks.device)
        if self._algorithm.needs_proximal:
            batch = replace(batch, proximal_logprobs=self._frozen_logprobs(self._policy, batch))
        if self._reference is not None:
            batch = replace(batch, reference_logprobs=self._frozen_logprobs(self._reference, batch))
        return batch

    @torch.no_grad()
    def _frozen_logprobs(self, policy: PolicyLogprobs, batch: Batch) -> Tensor:
        return policy(batch, temperature=self._temperature)[0]

    def _probe(self, batch: Batch, step: int, noisy: Tensor | None) -> dict[str, float]:
        """What the engine and the noise each make of a few sequences, evenly spaced.

        With d = trainer's logprob without noise - rollout logprob, `mismatch/probe_kl` is the mean
        of -d, `mismatch/probe_mean` and `mismatch/probe_max` are of |d|, and `alp/logprob_shift` is
        the mean |change of logprob| by the noise, on loss tokens.

        Args:
            batch: A micro-batch, before the weights change.
            step: Number of the step: each begins with another sequence.
            noisy: [B, T] logprobs of the forward that is trained on; None: it has no noise.
        """
        every = -(-sum(batch.lengths) // _NUM_PROBED)
        rows = range(step % min(every, len(batch.lengths)), len(batch.lengths), every)
        probe = sequences_of(batch, rows)
        own = probe.proximal_logprobs
        if own is None:
            own = self._frozen_logprobs(self._policy, probe)
        difference = (own - probe.rollout_logprobs)[probe.loss_mask].cpu()
        parts = {
            "mismatch/probe_kl": -difference.sum(),
            "mismatch/probe_mean": difference.abs().sum(),
            "tokens": difference.numel(),
        }
        if noisy is not None:
            shift = (noisy.detach()[list(rows)] - own)[probe.loss_mask]
            parts["alp/logprob_shift"] = shift.abs().sum()
        totals = self._sums(parts)
        num_tokens = totals.pop("tokens")
        largest = max(self.ranks.gather(max(difference.abs().tolist(), default=0.0)))
        if num_tokens == 0:
            return {}
        metrics = {name: total / num_tokens for name, total in totals.items()}
        return metrics | {"mismatch/probe_max": largest}

    def _update(
        self, batches: Sequence[Batch], update: int, probe: int | None
    ) -> tuple[dict[str, float], RatioSummary] | None:
        """One optimizer update; None if it had nothing finite to offer and was skipped.

        With `probe`, the number of the step, what the noise does to the states of the first
        micro-batch is looked at, and what noise and engine each do to its logprobs.
        """
        own = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            own += torch.stack([*loss_counts(_inputs(batch), self._algorithm)]).cpu()
        num_tokens, num_sequences = self.ranks.sum(own).tolist()
        if num_tokens == 0:
            return None
        self._optimizer.zero_grad()
        totals: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        summary = None  # a running sum: one a micro-batch would grow with their number
        looked_at: dict[str, float] = {}
        num_draws = self._num_draws
        for index, (batch, draw) in enumerate(itertools.product(batches, range(num_draws))):
            # Backward belongs inside: checkpointed layers run a second time there.
            measure = probe is not None and index == 0
            with self._perturbed(batch, update, draw, measure) as effect:
                logprobs, entropy = self._policy(
                    batch, temperature=self._temperature, is_head_noisy=self._is_head_noisy
                )
                terms = loss_terms(
                    _inputs(batch, logprobs), self._algorithm, num_tokens, num_sequences
                )
                (terms.loss / num_draws).backward()
            if probe is not None and index == 0:
                looked_at = self._means(effect.metrics())
                looked_at |= self._probe(batch, probe, logprobs if looked_at else None)
            for name, value in terms.metrics.items():
                totals[name] = totals[name] + value / num_draws
            ratios = summarise(_inputs(batch, logprobs), entropy, terms.clipped)
            summary = ratios if summary is None else summary + ratios
        self._sum_gradient_of_sigma()
        norms = self._optimizer.clip_gradients()
        report = self._sums(totals) | norms | looked_at
        factor = self._config.skip_grad_spike
        is_finite = all(map(_is_finite, (report["loss/value"], *norms.values())))
        has_spike = any(is_spike(norms[name], self._norms[name], factor) for name in norms)
        if not is_finite or has_spike:
            self._optimizer.zero_grad()
            self._on_bad_update(update, batches)
            return None
        for name, norm in norms.items():
            self._norms[name].append(norm)
        self._optimizer.step()
        assert summary is not None  # there are tokens, so there was a micro-batch
        return report, summary

    def _perturbed(
        self, batch: Batch, update: int, draw: int, measure: bool
    ) -> AbstractContextManager[Effect]:
        if self._perturbation is None:
            return contextlib.nullcontext(Effect())
        keys = [NoiseKey(update, uid) for uid in batch.sequence_uids]
        return self._perturbation.active(keys, batch.lengths, draw=draw, measure=measure)

    def _sum_gradient_of_sigma(self) -> None:
        """Add up what the sequences of all ranks say; that of the weights is summed by FSDP2."""
        if self._perturbation is not None and self._perturbation.log_sigma.grad is not None:
            gradient = self._perturbation.log_sigma.grad
            gradient.copy_(self.ranks.sum(gradient))

    # --------------------------------------------------------------------------- all ranks

    def _sums(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Sums over ranks, which all have the same names."""
        own = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        return dict(zip(values, self.ranks.sum(own).tolist(), strict=True))

    def _means(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: total / self.ranks.size for name, total in self._sums(values).items()}

    def _over_ranks(self, summaries: Sequence[RatioSummary]) -> RatioSummary:
        own = functools.reduce(operator.add, summaries)
        return functools.reduce(operator.add, self.ranks.gather(own))

    def _on_first_rank(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Take tensors to the CPU of rank 0; other ranks only help to gather them."""
        kept = {}
        for name, tensor in tensors:
            if self.ranks.is_first:
                kept[name] = tensor.cpu()
        return kept


def _padded(norms: Sequence[float]) -> Tensor:
    """[MOST_NORMS] float64: a checkpoint has tensors of one shape only."""
    missing = [torch.nan] * (MOST_NORMS - len(norms))
    return torch.tensor([*norms, *missing], dtype=torch.float64)


def _inputs(batch: Batch, logprobs: Tensor | None = None) -> LossInputs:
    return LossInputs(
        logprobs=batch.rollout_logprobs if logprobs is None else logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        advantages=batch.advantages,
        loss_mask=batch.loss_mask,
        proximal_logprobs=batch.proximal_logprobs,
        reference_logprobs=batch.reference_logprobs,
        turn_ids=batch.turn_ids,
    )


def _to(batch: Batch, device: torch.device) -> Batch:
    moved = {
        name: value.to(device)
        for name in Batch.__slots__
        if isinstance(value := getattr(batch, name), Tensor)
    }
    return replace(batch, **moved)


def _is_finite(number: float) -> bool:
    return abs(number) < float("inf")
