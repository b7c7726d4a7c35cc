"""Does the engine keep its contract? It samples, and a forward of the trainer's model is the judge.

What is compared are the logprobs of the tokens that the engine itself sampled: so any engine can be
asked, wherever it runs. A mismatch on purpose (`engine.precision`, `engine.logit_noise`) widens the
tolerance; a wrong temperature, a truncation that is left out or weights of another version are far
outside of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tir_alp.config import Config
from tir_alp.doctor.finding import Finding
from tir_alp.engines.base import Completion, Engine, LogprobSource, Sampling
from tir_alp.engines.config import LOGPROB_TOLERANCE
from tir_alp.types import StopReason

_NUM_TOKENS = 16  # of a completion that is sampled for a check
_DEADLINE_S = 300.0
_MAX_OVER_MEAN = 20  # a single token may be off by so many times the tolerance of the mean
_SHIFT = 10  # a change of the weights has to move logprobs by so many tolerances


def tolerance_of(config: Config) -> float:
    """By how much the mean |difference of logprobs| may be off, in nats."""
    own = config.trainer.dtype
    rounding = 0.0 if own == "float32" else LOGPROB_TOLERANCE[own]
    return config.engine.logprob_tolerance + rounding


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion, and what it continued."""

    prompt: tuple[int, ...]
    sampling: Sampling
    completion: Completion


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """Asks one engine.

    Args:
        engine: To be asked.
        judge: The trainer, which has the same weights.
        num_rows: Tokens that the model knows: ids are below it.
        prompts: Token ids; some should be ids at random, which no text would give.
        temperature: Of the run.
        stop_token_ids: Of the run.
        tolerance: See `tolerance_of`.
    """

    engine: Engine
    judge: LogprobSource
    num_rows: int
    prompts: Sequence[tuple[int, ...]]
    temperature: float
    stop_token_ids: frozenset[int]
    tolerance: float

    async def logprobs(self) -> tuple[Finding, Finding]:
        """Sample at several temperatures and truncations; what comes back, and its logprobs."""
        settings = {(each, 1.0) for each in (self.temperature, 0.7, 1.0)}
        settings.add((self.temperature, 0.9))
        sampled = [
            each
            for temperature, top_p in sorted(settings)
            for each in await self._sample(temperature=temperature, top_p=top_p)
        ]
        return self._ids(sampled), await asyncio.to_thread(self._logprobs, sampled)

    async def _sample(self, **sampling: Any) -> list[Sampled]:
        """A completion of each prompt."""
        given = {"max_tokens": _NUM_TOKENS, "stop_token_ids": self.stop_token_ids, "seed": 1}
        wanted = [
            Sampling(**given | sampling, sequence_uid=index) for index in range(len(self.prompts))
        ]
        async with asyncio.timeout(_DEADLINE_S):
            completions = await asyncio.gather(*map(self.engine.generate, self.prompts, wanted))
        return [Sampled(*each) for each in zip(self.prompts, wanted, completions, strict=True)]

    def _ids(self, sampled: Sequence[Sampled]) -> Finding:
        rows = self.num_rows
        wrong: dict[str, bool] = {}
        for each in sampled:
            ids, reason = each.completion.token_ids, each.completion.stop_reason
            ends = [index for index, token in enumerate(ids) if token in self.stop_token_ids]
            is_end = reason is StopReason.EOS
            wrong |= {
                f"{len(ids)} tokens of {_NUM_TOKENS}": not 0 < len(ids) <= _NUM_TOKENS,
                f"ids outside of the model's {rows}": not all(0 <= each < rows for each in ids),
                f"end tokens at {ends} of {len(ids)}, and the reason is {reason}": ends
                != ([len(ids) - 1] if is_end else []),
                f"the reason is {reason} at {len(ids)} of {_NUM_TOKENS} tokens": not is_end
                and (reason is not StopReason.LENGTH or len(ids) != _NUM_TOKENS),
            }
        failures = [what for what, is_wrong in wrong.items() if is_wrong]
        num_tokens = sum(len(each.completion.token_ids) for each in sampled)
        return Finding(
            "ids",
            not failures,
            failures[0] if failures else f"{len(sampled)} completions, {num_tokens} tokens",
            "the engine has to return the ids that it sampled, the end token included, and nothing "
            "else",
        )

    def _logprobs(self, sampled: Sequence[Sampled]) -> Finding:
        mean, most, num_tokens = self._distance(sampled)
        figure = f"mean |difference| {mean:.2g}, largest {most:.2g} over {num_tokens} tokens"
        holds = mean <= self.tolerance and most <= _MAX_OVER_MEAN * self.tolerance
        distances = {name: self._distance(sampled, at)[0] for name, at in _MISTAKES.items()}
        nearest = min(distances, key=lambda name: distances[name])
        fix = "the engine computes with other weights, another temperature or other tokens"
        if distances[nearest] <= self.tolerance:
            fix = (
                f"the engine's logprobs are {nearest}: let it return those of the distribution "
                "that it samples from"
            )
        return Finding("logprobs", holds, f"{figure}; tolerance {self.tolerance:g}", fix)

    def _distance(
        self,
        sampled: Sequence[Sampled],
        judged_at: Callable[[Sampling], tuple[float, float]] = lambda each: (
            each.temperature,
            each.top_p,
        ),
    ) -> tuple[float, float, int]:
        """Mean and largest |engine - trainer| of all logprobs, and their number."""
        differences = torch.cat(
            [
                torch.tensor(each.completion.logprobs)
                - torch.tensor(
                    self.judge.completion_logprobs(
                        each.prompt, each.completion.token_ids, *judged_at(each.sampling)
                    )
                )
                for each in sampled
            ]
        ).abs()
        return float(differences.mean()), float(differences.max()), len(differences)

    async def stop(self) -> Finding:
        """Both ways to stop, each forced: a token is declared an end, a matcher counts to three."""
        free = await self._sample(temperature=0.0, stop_token_ids=frozenset())
        ids = free[0].completion.token_ids
        end = ids[min(3, len(ids) - 1)]
        (by_token, *_) = await self._sample(temperature=0.0, stop_token_ids=frozenset({end}))
        (by_rule, *_) = await self._sample(
            temperature=0.0, stop_token_ids=frozenset(), stop_matcher=_third_token
        )
        stopped, ruled = by_token.completion, by_rule.completion
        wrong = {
            f"{end} was declared an end; it stands at places "
            f"{[i for i, token in enumerate(stopped.token_ids) if token == end]} of "
            f"{len(stopped.token_ids)}, and the reason is {stopped.stop_reason}": (
                end in stopped.token_ids[:-1]
                or (stopped.token_ids[-1] == end) != (stopped.stop_reason is StopReason.EOS)
            ),
            f"the rule holds at the third token; there are {len(ruled.token_ids)}, and the reason "
            f"is {ruled.stop_reason}": len(ruled.token_ids) != 3
            or ruled.stop_reason is not StopReason.STOP,
        }
        failures = [what for what, is_wrong in wrong.items() if is_wrong]
        return Finding(
            "stop",
            not failures,
            "; ".join(failures) or "exactly at the end token, and at the token of the rule",
            "the engine has to cut its completions by token: nothing behind the one that ends them",
        )

    async def sync(self, weights: Callable[[], Any], version: int) -> Finding:
        """Change the model a little, sync, and see that the engine's logprobs follow; and back.

        Args:
            weights: What `load_weights` takes, of the judge as it is.
            version: Of the model's weights.
        """
        probe = await self._sample(temperature=self.temperature)
        in_thread = asyncio.to_thread  # what the judge says may take long, or never come
        try:
            shift = await in_thread(self._nudge, probe)
            await self.engine.load_weights(await in_thread(weights), version=version + 1)
            changed = await self._sample(temperature=self.temperature)
            ahead, _, _ = await in_thread(self._distance, changed)
        finally:
            await in_thread(self.judge.perturb_weights, 0.0)  # bit for bit back
        await self.engine.load_weights(await in_thread(weights), version=version)
        restored = await self._sample(temperature=self.temperature)
        back, _, num_tokens = await in_thread(self._distance, restored)
        versions = [
            {each.completion.policy_version for each in sampled} for sampled in (changed, restored)
        ]
        holds = max(ahead, back) <= self.tolerance and versions == [{version + 1}, {version}]
        return Finding(
            "sync",
            holds,
            f"weights that move logprobs by {shift:.2g} leave a difference of {ahead:.2g}, and "
            f"taken back {back:.2g}, over {num_tokens} tokens; versions {versions}",
            "the engine goes on with old weights, all or some, after load_weights: see that it "
            "copies every tensor, empties its cache and counts the version",
        )

    def _nudge(self, probe: Sequence[Sampled]) -> float:
        """Change some weights until the judge has moved; by how much it has, in nats."""
        shift = 0.0
        for scale in (0.05, 0.1, 0.2, 0.4, 0.8):
            self.judge.perturb_weights(scale)
            shift = self._distance(probe)[0]
            if shift >= _SHIFT * self.tolerance:
                break
        return shift


_MISTAKES: dict[str, Callable[[Sampling], tuple[float, float]]] = {
    "raw, at temperature 1 and not truncated": lambda sampling: (1.0, 1.0),
    "not truncated to top_p": lambda sampling: (sampling.temperature, 1.0),
    "those of temperature 1": lambda sampling: (1.0, sampling.top_p),
}


def _third_token() -> Callable[[int], bool]:
    count = 0

    def feed(token_id: int) -> bool:
        nonlocal count
        count += 1
        return count == 3

    return feed
