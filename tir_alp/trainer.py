"""Owns the policy's weights and the optimizer: takes samples, makes updates, reports.

A *step* takes the groups of the rollout queue and divides them over `updates_per_step` optimizer
*updates*; each update runs over micro-batches whose losses add up to that of the update, because
they share one denominator. Not here: where samples come from, and who gets the weights.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tir_alp.attention import PackedSequences
from tir_alp.batch import Sample, loss_positions, pack, sequences_of, to_rows
from tir_alp.config import AlgorithmConfig, TrainerConfig
from tir_alp.guards import MOST_NORMS, is_spike
from tir_alp.loss import LossInputs, clipped_tokens, loss_counts, policy_loss
from tir_alp.metrics import mismatch_metrics, ratio_metrics
from tir_alp.perturbation import Effect, LayerwisePerturbation, NoiseKey
from tir_alp.policy import hidden_states, recompute_layers, token_logprobs
from tir_alp.ratio_summary import RatioSummary, summarise
from tir_alp.types import Batch

_NUM_PROBED = 128  # tokens, about, of each step whose logprobs are also taken without noise

OnBadUpdate = Callable[[int, Sequence[Batch]], None]
"""Told the number and the micro-batches of an update that was skipped."""

OnUpdate = Callable[[int, Sequence[Batch], bool], None]
"""Told, behind an update, its number, the micro-batches as the loss got them, and whether it was
made or skipped."""


class Trainer:
    """Trains a causal LM in place.

    Args:
        model: Loaded by `load_policy`.
        config: Optimizer and memory.
        algorithm: The objective.
        reference: The frozen initial model, where the objective has a KL term.
        temperature: At which rollouts sample; the trained distribution has the same.
        on_bad_update: Called where a loss or gradient is not finite, or the gradient a spike. The
            update is skipped.
        on_update: Called behind every update.
    """

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        reference: Any | None = None,
        temperature: float,
        on_bad_update: OnBadUpdate,
        on_update: OnUpdate = lambda update, batches, made: None,
    ) -> None:
        self.model = model
        self._config, self._algorithm = config, algorithm
        self._temperature = temperature
        self._on_bad_update, self._on_update = on_bad_update, on_update
        self._reference = reference
        if config.gradient_checkpointing:
            recompute_layers(model)
        model.train()
        weights = {
            "params": list(model.parameters()),
            "lr": config.lr,
            "weight_decay": config.weight_decay,
        }
        parameter_groups = [weights]
        self._perturbation, self._num_draws = None, 1
        if algorithm.perturbation is not None:
            self._num_draws = algorithm.perturbation.draws
            self._perturbation = LayerwisePerturbation(model, algorithm.perturbation)
            parameter_groups.append(
                {
                    "params": [self._perturbation.log_sigma],
                    "lr": config.perturbation_lr,
                    "weight_decay": 0.0,
                }
            )
        self._optimizer = torch.optim.AdamW(parameter_groups, betas=config.betas)
        self._norms: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MOST_NORMS))

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """Make the updates of one step.

        Args:
            groups: The samples of each group.
            step: Number of the step, from 0; the noise of its updates follows from it.

        Returns:
            Means over the updates that were made; ratios are those of all their tokens, turns and
            sequences together, and `train/skipped_updates` is a count.
        """
        per_update = len(groups) // self._config.updates_per_step
        parts = [
            pack(
                [sample for group in groups[start : start + per_update] for sample in group],
                self._config.micro_batch_tokens,
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
            metrics |= ratio_metrics(functools.reduce(operator.add, [part for _, part in made]))
        if self._perturbation is not None:
            sigma = self._perturbation.sigma
            metrics["alp/sigma_mean"] = sigma.mean().item()
            names = self._perturbation.names
            each_sigma = zip(names, sigma.tolist(), strict=True)
            metrics |= {f"alp/sigma_{name}": each for name, each in each_sigma}
        batches = [batch for part in parts for batch in part]
        if self._algorithm.needs_proximal and batches:
            mismatch = (summarise(_inputs(batch, batch.proximal_logprobs)) for batch in batches)
            metrics |= mismatch_metrics(functools.reduce(operator.add, mismatch))
        metrics["train/skipped_updates"] = len(reports) - len(made)
        metrics["tokens/loss"] = sum(batch.num_loss_tokens for batch in batches)
        return metrics

    @torch.no_grad()
    def sequence_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token of a sequence but the first, without noise, at temperature 1."""
        ids = torch.tensor(token_ids, device=self.model.device)
        layout = PackedSequences((len(ids),), ids.device)
        places = torch.arange(len(ids), device=ids.device)
        hidden = hidden_states(self.model, ids, places, layout)
        return token_logprobs(self.model, hidden[:-1], ids[1:])[0].tolist()

    def weights(self) -> dict[str, Tensor]:
        """The policy's tensors, shared with the model: what an engine needs. No sigma in it."""
        return self.model.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights for the policy, as `weights` gives them."""
        self.model.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the model's own folder."""
        state: dict[str, Any] = {
            "optimizer": self._optimizer.state_dict(),
            "grad_norms": {name: [*norms] for name, norms in self._norms.items()},
        }
        if self._perturbation is not None:
            state["log_sigma"] = self._perturbation.log_sigma.detach()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave. The model's weights are not part of it."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._norms.clear()
        for name, norms in state["grad_norms"].items():
            self._norms[name].extend(norms)
        if self._perturbation is not None:
            with torch.no_grad():
                self._perturbation.log_sigma.copy_(state["log_sigma"])

    # -------------------------------------------------------------------------- one update

    def _prepare(self, batch: Batch) -> Batch:
        """Move a micro-batch to the model, and add the logprobs of policies that stand still."""
        batch = _to(batch, self.model.device)
        if self._algorithm.needs_proximal:
            batch = replace(batch, proximal_logprobs=self._frozen_logprobs(self.model, batch))
        if self._reference is not None:
            batch = replace(batch, reference_logprobs=self._frozen_logprobs(self._reference, batch))
        return batch

    @torch.no_grad()
    def _frozen_logprobs(self, model: Any, batch: Batch) -> Tensor:
        return self._logprobs(model, batch)[0]

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
            own = self._frozen_logprobs(self.model, probe)
        difference = (own - probe.rollout_logprobs)[probe.loss_mask]
        metrics = {
            "mismatch/probe_kl": -float(difference.mean()),
            "mismatch/probe_mean": float(difference.abs().mean()),
            "mismatch/probe_max": float(difference.abs().max()),
        }
        if noisy is not None:
            shift = (noisy.detach()[list(rows)] - own)[probe.loss_mask].abs()
            metrics["alp/logprob_shift"] = float(shift.mean())
        return metrics

    def _update(
        self, batches: Sequence[Batch], update: int, probe: int | None
    ) -> tuple[dict[str, float], RatioSummary] | None:
        """One optimizer update; None if it had nothing finite to offer and was skipped.

        With `probe`, the number of the step, what the noise does to the states of the first
        micro-batch is looked at, and what noise and engine each do to its logprobs.
        """
        counts = [loss_counts(_inputs(batch), self._algorithm) for batch in batches]
        num_tokens = sum(float(count.num_loss_tokens) for count in counts)
        num_sequences = sum(float(count.num_sequences) for count in counts)
        if num_tokens == 0:
            return None
        self._optimizer.zero_grad(set_to_none=True)
        totals: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        summary = None  # a running sum: one a micro-batch would grow with their number
        effect_metrics: dict[str, float] = {}
        num_draws = self._num_draws
        for index, (batch, draw) in enumerate(itertools.product(batches, range(num_draws))):
            # Backward belongs inside: checkpointed layers run a second time there.
            measure = probe is not None and index == 0
            with self._perturbed(batch, update, draw, measure) as effect:
                logprobs, entropy = self._logprobs(self.model, batch, perturbed=True)
                loss, metrics = policy_loss(
                    _inputs(batch, logprobs), self._algorithm, num_tokens, num_sequences
                )
                (loss / num_draws).backward()
            if probe is not None and index == 0:
                effect_metrics = effect.metrics()
                noisy = logprobs if effect_metrics else None
                effect_metrics |= self._probe(batch, probe, noisy)
            for name, part in metrics.items():
                totals[name] = totals[name] + part / num_draws
            inputs = _inputs(batch, logprobs.detach())
            ratios = summarise(inputs, entropy, clipped_tokens(inputs, self._algorithm))
            summary = ratios if summary is None else summary + ratios
        report = {name: float(total) for name, total in totals.items()}
        norms = self._clip_gradients()
        report |= norms | effect_metrics
        is_finite = all(map(_is_finite, (report["loss/value"], *norms.values())))
        factor = self._config.skip_grad_spike
        has_spike = any(is_spike(norms[name], self._norms[name], factor) for name in norms)
        if not is_finite or has_spike:
            self._optimizer.zero_grad(set_to_none=True)
            self._on_bad_update(update, batches)
            return None
        for name, norm in norms.items():
            self._norms[name].append(norm)
        self._optimizer.step()
        assert summary is not None  # there are tokens, so there was a micro-batch
        return report, summary

    def _logprobs(self, model: Any, batch: Batch, perturbed: bool = False) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, T] of the tokens of the loss, 0 elsewhere."""
        hidden = hidden_states(
            model,
            batch.token_ids,
            batch.position_ids,
            PackedSequences(batch.lengths, batch.token_ids.device),
        )
        places = loss_positions(batch)
        noise = self._algorithm.perturbation if perturbed else None
        logprobs, entropy = token_logprobs(
            model,
            hidden.index_select(0, places - 1),
            batch.token_ids[places],
            temperature=self._temperature,
            chunk_tokens=self._config.logprob_chunk_tokens,
            rows=places - 1 if noise is not None and noise.site == "logits" else None,
        )
        return to_rows(batch, logprobs), to_rows(batch, entropy)

    def _perturbed(
        self, batch: Batch, update: int, draw: int, measure: bool
    ) -> AbstractContextManager[Effect]:
        if self._perturbation is None:
            return contextlib.nullcontext(Effect())
        keys = [NoiseKey(update, uid) for uid in batch.sequence_uids]
        return self._perturbation.active(keys, batch.lengths, draw=draw, measure=measure)

    def _clip_gradients(self) -> dict[str, float]:
        """Bound the gradient of the weights and, by itself, log sigma's; return both norms."""
        bound = self._config.max_grad_norm
        clip = torch.nn.utils.clip_grad_norm_
        norms = {"grad_norm/policy": float(clip(self.model.parameters(), bound))}
        if self._perturbation is not None:
            norms["grad_norm/log_sigma"] = float(clip([self._perturbation.log_sigma], bound))
        return norms


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
