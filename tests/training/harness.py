"""Trainers of a tiny model, groups to train them on, and what to compare of them."""

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tir_alp.algorithm.perturbation import LayerwisePerturbation
from tir_alp.algorithm.presets import ALGORITHMS, AlgorithmConfig, PerturbationConfig
from tir_alp.config import TrainerConfig
from tir_alp.models.tiny.model import make_model, make_tokenizer
from tir_alp.tools.outcome import Outcome
from tir_alp.training import checkpoint
from tir_alp.training.attention import PackedSequences
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.policy import (
    WRAPPER,
    hidden_states,
    token_logprobs,
)
from tir_alp.training.ranks import Ranks, alone
from tir_alp.training.sharding import gathered
from tir_alp.training.trainer import Trainer
from tir_alp.types import Sample, StopReason, TokenSpan, Trajectory, Turn

torch.set_num_threads(1)

Groups = list[list[Sample]]


def model() -> Any:
    made = make_model(0)
    with torch.no_grad():  # fresh weights predict the same for every token
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def trainer(
    algorithm: AlgorithmConfig,
    of: Any = None,
    *,
    ranks: Ranks | None = None,
    temperature: float = 1.0,
    bad: Any = None,
    num_steps: int | None = None,
    clean_every: int = 0,
    num_kept_versions: int = 0,
    max_token_values: int = 0,
    **settings: Any,
) -> Trainer:
    policy = model() if of is None else of
    return Trainer(
        policy,
        TrainerConfig.model_validate({"lr": 1e-4, "max_grad_norm": 1e9} | settings),
        algorithm,
        ranks=ranks or alone(),
        reference=copy.deepcopy(policy) if algorithm.kl else None,
        temperature=temperature,
        on_bad_update=bad or (lambda update, _: pytest.fail(f"update {update} is not finite")),
        num_steps=num_steps,
        clean_every=clean_every,
        num_kept_versions=num_kept_versions,
        max_token_values=max_token_values,
    )


def noisy(name: str = "alp_sequence", **changes) -> AlgorithmConfig:
    perturbation = PerturbationConfig.model_validate({"init_std": 0.1} | changes)
    return ALGORITHMS[name].model_copy(update={"perturbation": perturbation})


def on_policy(of: Any, token_ids: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """Return the logprob of each token of a sequence except the first."""
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        hidden = hidden_states(of, ids, torch.arange(len(ids)), PackedSequences((len(ids),)))
        return token_logprobs(of, hidden[:-1], ids[1:], temperature=temperature)[0]


def make_groups(num_groups: int = 4, jitter: float = 0.02, temperature: float = 1.0) -> Groups:
    """Return groups of two-turn trajectories, on-policy up to the jitter of their logprobs."""
    rng, of = random.Random(0), model()

    def make(uid: int) -> Trajectory:
        lengths = [rng.randint(2, 9) for _ in range(4)]
        prompt, first, shown, second = (
            tuple(rng.randrange(6, 262) for _ in range(length)) for length in lengths
        )
        logprobs = [0.0, *on_policy(of, prompt + first + shown + second, temperature).tolist()]

        def said(ids: tuple[int, ...], start: int) -> TokenSpan:
            own = logprobs[start : start + len(ids)]
            return TokenSpan(ids, tuple(value + rng.gauss(0, jitter) for value in own))

        a, b = len(prompt), len(prompt) + len(first) + len(shown)
        turns = (
            Turn(said(first, a), TokenSpan(shown), 0, StopReason.STOP, Outcome.OK, 0.0),
            Turn(said(second, b), TokenSpan(()), 0, StopReason.EOS, Outcome.OK, 1.0),
        )
        return Trajectory("t", uid // 2, TokenSpan(prompt), turns, True, False, sequence_uid=uid)

    return [
        [Sample(make(2 * group), 0.8), Sample(make(2 * group + 1), -0.3)]
        for group in range(num_groups)
    ]


def flat(groups: Groups) -> list[Sample]:
    return [sample for group in groups for sample in group]


def gradients(of: Trainer | LayerwisePerturbation, at: Any = None) -> dict[str, Tensor]:
    """Return gradients by name, with that of log sigma if there is one."""
    named = (at if at is not None else of.model).named_parameters()  # type: ignore[union-attr]
    found = {
        name: whole
        for name, whole in gathered({name.replace(WRAPPER, ""): each.grad for name, each in named})
        if whole is not None
    }
    perturbation = of._perturbation if isinstance(of, Trainer) else of
    if perturbation is not None and perturbation.log_sigma.grad is not None:
        found["log_sigma"] = perturbation.log_sigma.grad
    return found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        tolerance = 1e-4 * other[name].abs().max().item()  # a wrong term is far more than that
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=name)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def weights_of(of: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.weights()}


def with_advantage(groups: Groups, value: float) -> Groups:
    return [[replace(groups[0][0], advantage=value), *groups[0][1:]], *groups[1:]]


def with_logprob(groups: Groups, value: float) -> Groups:
    sample = groups[0][0]
    first, *others = sample.trajectory.turns
    assert first.completion.rollout_logprobs is not None
    logprobs = (value, *first.completion.rollout_logprobs[1:])
    turns = (replace(first, completion=TokenSpan(first.completion.token_ids, logprobs)), *others)
    changed = replace(sample, trajectory=replace(sample.trajectory, turns=turns))
    return [[changed, *groups[0][1:]], *groups[1:]]


def saved(of: Trainer, folder: Path) -> Path:
    return checkpoint.save(folder, of, make_tokenizer(), Position(1, 4), {}, keep=1)
