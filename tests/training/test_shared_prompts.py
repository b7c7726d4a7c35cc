"""A prompt that is computed once, compared with one that is computed for each sequence."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.harness import (
    Groups,
    assert_close,
    gradients,
    model,
    noisy,
    on_policy,
    trainer,
)
from tests.training.test_attention import DECODERS, make_config
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.tools.outcome import Outcome
from tir_alp.training.attention import PACKED
from tir_alp.training.batch import collate, pack, sequences_of
from tir_alp.training.policy import PolicyLogprobs
from tir_alp.training.shared_prompts import computed_tokens, num_computed
from tir_alp.types import Batch, Sample, StopReason, TokenSpan, Trajectory, Turn


def groups_of(sizes=(3, 1, 4), num_prompt=(12, 20), num_words: int = 262) -> Groups:
    """Return groups of a prompt in common, and of completions of one or two turns."""
    rng, uid = random.Random(1), 0

    def words(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(6, num_words) for _ in range(rng.randint(low, high)))

    groups = []
    for group, size in enumerate(sizes):
        prompt, samples = words(*num_prompt), []
        for _ in range(size):
            turns = []
            for _ in range(rng.randint(1, 2)):
                ids = words(2, 6)
                said = TokenSpan(ids, tuple(rng.gauss(-5, 1) for _ in ids))
                turns.append(
                    Turn(said, TokenSpan(words(1, 4)), 0, StopReason.STOP, Outcome.OK, 0.0)
                )
            each = Trajectory("t", group, TokenSpan(prompt), tuple(turns), True, False, uid)
            samples.append(Sample(each, rng.uniform(-1, 1)))
            uid += 1
        groups.append(samples)
    return groups


def forked(groups: Groups) -> Groups:
    """Give each sample of a group another prompt, as the traces of a rewritten history have.

    The prompt of each continues that of one before it, or that of the group.
    """
    rng, made = random.Random(3), []
    for samples in groups:
        prompts, traces = [samples[0].trajectory.prompt.token_ids], [samples[0]]
        for sample in samples[1:]:
            added = tuple(rng.randrange(6, 60) for _ in range(rng.randint(0, 9)))
            prompts.append(rng.choice(prompts) + added)
            each = replace(sample.trajectory, prompt=TokenSpan(prompts[-1]))
            traces.append(replace(sample, trajectory=each))
        made.append(traces)
    return made


def near_policy(groups: Groups) -> Groups:
    """Give all tokens rollout logprobs near those of the model, as in training."""
    of, rng = model(), random.Random(2)

    def near(sample: Sample) -> Sample:
        each = sample.trajectory
        logprobs = [0.0, *on_policy(of, each.token_ids).tolist()]
        place, turns = len(each.prompt), []
        for turn in each.turns:
            own = logprobs[place : place + len(turn.completion)]
            span = TokenSpan(
                turn.completion.token_ids, tuple(value + rng.gauss(0, 0.05) for value in own)
            )
            turns.append(Turn(span, turn.observation, 0, StopReason.STOP, Outcome.OK, turn.reward))
            place += len(turn.completion) + len(turn.observation)
        made = Trajectory(
            "t", each.group_id, each.prompt, tuple(turns), True, False, each.sequence_uid
        )
        return Sample(made, sample.advantage)

    return [[near(sample) for sample in group] for group in groups]


def flat(groups: Groups) -> list[Sample]:
    return [sample for group in groups for sample in group]


@pytest.mark.parametrize("arrange", [lambda groups: groups, forked], ids=["groups", "forks"])
@pytest.mark.parametrize("name", DECODERS)
def test_logprobs_are_those_of_whole_sequences(name: str, arrange: Callable[[Groups], Groups]):
    torch.manual_seed(0)
    of = AutoModelForCausalLM.from_config(deepcopy(make_config(name)), attn_implementation=PACKED)
    with torch.no_grad():  # the attention of fresh weights is nearly uniform
        for parameter in of.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    samples = flat(arrange(groups_of(num_words=64)))
    random.Random(0).shuffle(samples)
    policy = PolicyLogprobs(of.double(), 2048)
    results = []
    for share in (False, True):
        batch = collate(samples, share_prompts=share)
        logprobs, entropy = policy(batch, temperature=0.7)
        of.zero_grad()
        logprobs.sum().backward()
        grads = {key: each.grad.clone() for key, each in of.named_parameters()}
        results.append((logprobs.detach(), entropy, grads))
    (expected, _, wanted), (found, entropy, grads) = results
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, results[0][1], rtol=0, atol=1e-6)
    assert_close(grads, wanted)


METHODS = {
    **{name: ALGORITHMS[name] for name in ALGORITHMS},
    "absolute noise on the logits": noisy(site="logits"),
    "relative noise": noisy(scale="relative", init_std=0.05),
    "two antithetic draws": noisy(draws=2, antithetic=True),
}


@pytest.mark.parametrize("name", [*METHODS, "alp of forks"])
def test_updates_are_those_without_sharing(name: str):
    groups = forked(groups_of()) if name == "alp of forks" else groups_of()
    groups, algorithm = near_policy(groups), METHODS.get(name, noisy())
    alone, shared = (trainer(algorithm, share_prompts=share) for share in (False, True))
    expected, found = alone.step(groups, 0).metrics, shared.step(groups, 0).metrics
    assert found["train/shared_tokens"] > 0.3 and expected["train/shared_tokens"] == 0
    for metric in ("loss/value", "ratio/p98", "kl/rollout", "tokens/loss", "grad_norm/policy"):
        assert found[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-7), metric
    assert_close(gradients(shared), gradients(alone))


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"micro_batch_tokens": 40}])
def test_noise_is_the_same_recomputed_and_in_other_micro_batches(settings):
    groups = near_policy(groups_of())
    whole, other = trainer(noisy(), share_prompts=False), trainer(noisy(), **settings)
    expected, found = whole.step(groups, 0).metrics, other.step(groups, 0).metrics
    assert found["loss/value"] == pytest.approx(expected["loss/value"], rel=1e-4)
    assert_close(gradients(other), gradients(whole))


def rows_of(batch: Batch) -> tuple[int, ...]:
    assert batch.prompts is not None
    return batch.prompts.rows


def test_only_equal_prompts_of_one_group_are_computed_once():
    one, two, three = flat(groups_of(sizes=(2, 1)))
    batch = collate([one, three, two], share_prompts=True)
    assert rows_of(batch) == (0, 1, 0)
    number = len(one.trajectory.prompt)
    computed = computed_tokens(batch)
    assert computed is not None and num_computed(batch) == len(computed)
    skipped = sorted({*range(sum(batch.lengths))} - {*computed.tolist()})
    start = batch.lengths[0] + batch.lengths[1]
    assert skipped == [*range(start, start + number)]
    assert computed_tokens(collate([one, three], share_prompts=True)) is None
    assert computed_tokens(collate([one, two])) is None
    assert rows_of(sequences_of(batch, (1, 2))) == (0, 1)
    assert rows_of(sequences_of(batch, (0, 2))) == (0, 0)


def test_traces_share_what_their_prompts_have_in_common():
    (sample,), _ = groups_of(sizes=(1, 1))

    def trace(*added: int) -> Sample:
        prompt = TokenSpan((*sample.trajectory.prompt.token_ids, *added))
        return replace(sample, trajectory=replace(sample.trajectory, prompt=prompt))

    samples = [trace(7, 8), trace(), trace(7, 9, 9), trace(7, 9, 9), trace(7, 9)]
    number = len(sample.trajectory.prompt)
    batch = collate(samples, share_prompts=True)
    assert batch.prompts is not None
    assert batch.prompts.rows == (0, 0, 0, 2, 2)
    assert batch.prompts.shared == (0, number, number + 1, number + 3, number + 2)
    part = sequences_of(batch, (1, 3, 4)).prompts  # row 2 is missing, by which two of them share
    assert part is not None and part.rows == (0, 0, 1)
    assert part.shared == (0, number, number + 2)
    uids = [
        uid
        for each in pack(samples, number + 30, share_prompts=True)
        for uid in each.sequence_uids
        if num_computed(each) <= number + 30
    ]
    assert len(uids) == 5
    assert num_computed(pack(samples, 10_000, share_prompts=True)[0]) == num_computed(batch)


def test_micro_batches_are_bounded_by_the_tokens_that_are_computed():
    samples = flat(groups_of(sizes=(6, 5, 2, 1), num_prompt=(30, 40)))
    for ranks in (1, 2, 3):
        uids = []
        for rank in range(ranks):
            for batch in pack(samples, 70, rank, ranks, share_prompts=True):
                assert num_computed(batch) <= 70
                uids += [uid for uid in batch.sequence_uids if batch.num_loss_tokens]
        assert sorted(uids) == [*range(14)]
    together = pack(samples, 10_000, share_prompts=True)
    assert [len(batch.lengths) for batch in together] == [14]


def test_no_rank_is_idle_while_another_has_a_whole_group():
    samples = flat(groups_of(sizes=(8,)))
    counts = [
        sum(len(b.lengths) for b in pack(samples, 10_000, rank, 2, share_prompts=True))
        for rank in (0, 1)
    ]
    assert min(counts) >= 3


def test_a_prompt_in_common_has_the_noise_of_its_group_even_where_it_is_not_shared():
    (first, second), _ = groups_of(sizes=(2, 1))
    perturbed = []
    for sample in (first, second):
        one = trainer(noisy(), share_prompts=False)
        states = []

        def keep(_, inputs, __, states=states):
            states.append(inputs[0][0])

        one.model.base_model.layers[-1].register_forward_hook(keep)
        one.step([[sample]], 0)
        perturbed.append(states[0])  # of the forward that is trained on
    number = len(first.trajectory.prompt)
    assert torch.equal(perturbed[0][:number], perturbed[1][:number])
    assert not torch.equal(perturbed[0][number:][:2], perturbed[1][number:][:2])
