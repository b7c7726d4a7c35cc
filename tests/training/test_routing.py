"""The choices of routers: recorded, replayed, kept by the engine, and followed by the trainer."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.families import make_model
from tests.training.harness import flat, make_groups, noisy, trainer
from tests.training.test_shared_prompts import groups_of
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TransformersConfig
from tir_alp.engines.base import Completion, EngineContext, Sampling
from tir_alp.engines.transformers import open_transformers
from tir_alp.records.trajectories import from_record, to_record
from tir_alp.rollouts.traces import GrowingTrace
from tir_alp.tools.outcome import Outcome
from tir_alp.training.batch import collate, sequences_of
from tir_alp.training.policy import WRAPPER, PolicyLogprobs, recompute_layers
from tir_alp.training.routing import (
    RouterCounts,
    Routers,
    find_routers,
    recorded,
    replayed,
    router_metrics,
)
from tir_alp.types import Sample, StopReason, TokenSpan, Trajectory, Turn

MIXTURES = ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3")


def mixture(name: str) -> tuple[Any, Routers]:
    model = make_model(name)
    routers = find_routers(model)
    assert routers is not None
    return model, routers


def choices(model: Any, routers: Routers, batch: Any) -> tuple[Tensor, Tensor]:
    """Logprobs of a batch with the model's own choices, and these."""
    with torch.no_grad(), recorded(model, routers) as recording:
        logprobs = PolicyLogprobs(model, 64)(batch, temperature=1.0)[0]
    return logprobs, recording.experts()


@pytest.mark.parametrize("name", MIXTURES)
def test_own_choices_are_replayed_bit_for_bit_and_others_are_followed(name: str):
    model, routers = mixture(name)
    assert (routers.num_experts, routers.num_chosen) == (4, 2)
    batch = collate(flat(make_groups(2)))
    own, experts = choices(model, routers, batch)
    assert experts.shape == (len(batch.token_ids), 4, 2)
    assert (experts[:, 0] < 0).all() == (0 not in routers.calls)  # a layer without experts
    others = (experts + 1) % 4
    others[: -batch.lengths[-1]] = -1  # the model's own, in all sequences but the last

    def with_choices(given: Tensor) -> Tensor:
        with torch.no_grad(), replayed(model, routers, given):
            return PolicyLogprobs(model, 64)(batch, temperature=1.0)[0]

    assert torch.equal(with_choices(experts), own)
    assert torch.equal(with_choices(torch.full_like(experts, -1)), own)
    found = with_choices(others)
    assert torch.equal(found[:-1], own[:-1])
    assert (found[-1] - own[-1])[batch.loss_mask[-1]].abs().min() > 1e-3


def test_a_layer_that_is_recomputed_makes_the_same_choices_and_its_router_is_trained():
    batch = collate(flat(make_groups(2)))
    found = []
    for is_recomputed in (False, True):
        model, routers = mixture("qwen3_moe")
        experts = (choices(model, routers, batch)[1] + 1) % 4
        if is_recomputed:
            recompute_layers(model)
        with replayed(model, routers, experts):
            logprobs, _ = PolicyLogprobs(model, 64)(batch, temperature=1.0)
            logprobs.sum().backward()
        named = model.named_parameters()
        found.append({name.replace(WRAPPER, ""): each.grad for name, each in named})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    gates = [gradient for name, gradient in found[0].items() if name.endswith("gate.weight")]
    assert len(gates) == 4 and all(each.abs().max() > 1e-3 for each in gates)


@pytest.mark.parametrize("name", ["llama", "granitemoehybrid"])
def test_a_model_without_routers_or_in_rows_has_nothing_to_replay(name: str):
    assert find_routers(make_model(name)) is None


# ----------------------------------------------------------------------------------- the engine


def play(
    folder: Path, precision: str, lead: int = 300, number: int = 3
) -> list[tuple[list[int], Completion]]:
    """Two turns of sequences that begin alike, by the embedded engine."""

    async def one(engine: Any, uid: int) -> list[tuple[list[int], Completion]]:
        rng = np.random.default_rng(0)
        common = rng.integers(6, 262, lead).tolist()
        ids, found = [*common, *rng.integers(6, 262, 5 + uid).tolist()], []
        for _ in range(2):
            sampling = Sampling(max_tokens=12, seed=3, sequence_uid=uid)
            completion = await engine.generate(tuple(ids), sampling)
            found.append((list(ids), completion))
            ids += [*completion.token_ids, *range(40, 51)]
        return found

    async def main() -> list[Any]:
        config = TransformersConfig(type="transformers", precision=precision)  # type: ignore[arg-type]
        context = EngineContext(path=str(folder), device="cpu")
        async with open_transformers(config, context) as engine:
            return await asyncio.gather(*(one(engine, uid) for uid in range(number)))

    return [turn for turns in asyncio.run(main()) for turn in turns]


def as_sample(ids: list[int], completion: Completion, uid: int) -> Sample:
    turn = Turn(
        TokenSpan(completion.token_ids, completion.logprobs),
        TokenSpan(()),
        0,
        StopReason.LENGTH,
        Outcome.OK,
        1.0,
        routing=completion.routing,
    )
    prompt = TokenSpan(tuple(ids))
    return Sample(Trajectory("t", uid, prompt, (turn,), True, False, uid), 1.0 - uid % 2)


def test_the_engine_reports_the_choices_of_all_tokens_that_it_has_read(tmp_path: Path):
    """Read at once, one by one, after a prefix in common, and on from where a turn ended."""
    model, routers = mixture("qwen3_moe")
    model.save_pretrained(tmp_path)
    for ids, completion in play(tmp_path, "float32"):
        batch = collate([as_sample(ids, completion, 0)], with_routing=True)
        _, expected = choices(model, routers, batch)
        assert completion.routing is not None and completion.routing.dtype == np.int16
        assert len(completion.routing) == len(batch.token_ids) - 1
        assert batch.routing is not None
        found = batch.routing[:-1].sort(-1).values
        same = (found == expected[:-1].sort(-1).values).float().mean()
        assert same > 0.999  # a tie can be broken otherwise by rounding


def test_replay_takes_out_of_the_mismatch_what_comes_from_other_experts(tmp_path: Path):
    model, _ = mixture("qwen3_moe")
    model.save_pretrained(tmp_path)
    played = play(tmp_path, "bfloat16", lead=60, number=10)
    samples = [as_sample(*turn, uid) for uid, turn in enumerate(played)]
    found = {}
    for is_replayed in (False, True):
        one = trainer(ALGORITHMS["grpo"], of=make_model("qwen3_moe"), replay_routing=is_replayed)
        found[is_replayed] = one.step([samples], 0).metrics
    assert "router/agreement" not in found[False]
    assert 0.9 < found[True]["router/agreement"] < 1
    assert 0 < found[True]["router/entropy"] < 1
    without, with_replay = (found[each]["mismatch/k3"] for each in (False, True))
    assert with_replay < 0.4 * without  # the rest is rounding


# ---------------------------------------------------------------------------------- the trainer


def test_counts_are_those_of_the_choices_that_are_made():
    model, routers = mixture("qwen3_moe")
    batch = collate(flat(make_groups(2)))
    own = choices(model, routers, batch)[1]
    given = torch.tensor([0, 1], dtype=torch.int16).expand_as(own).clone()
    given[: batch.lengths[0]] = -1
    counts = RouterCounts(routers)
    with torch.no_grad(), replayed(model, routers, given, counts):
        policy = PolicyLogprobs(model, 64)
        policy(batch, temperature=1.0)
        policy(batch, temperature=1.0)  # is not counted twice
    sums = counts.sums()
    is_known = given[:, 0, 0] >= 0
    assert sums[-1] == is_known.sum() * len(routers.calls) * 2
    load = sums[:-2].view(len(routers.calls), 4)
    assert torch.equal(load.sum(-1), torch.full((4,), 2.0 * len(own), dtype=torch.float64))
    of_first = torch.bincount(own[: batch.lengths[0], 0].flatten().long(), minlength=4)
    of_others = torch.tensor([1, 1, 0, 0]) * is_known.sum()
    assert torch.equal(load[0], (of_first + of_others).double())
    even = torch.tensor([4.0, 4, 0, 0, 6, 8], dtype=torch.float64)
    assert router_metrics(Routers({0: 0}, 1, 4, 2), even) == {
        "router/entropy": pytest.approx(0.5),
        "router/largest_share": 0.5,
        "router/agreement": 0.75,
    }


def test_a_batch_has_the_routing_of_each_token_that_is_known():
    first, second = flat(make_groups(1))
    length = len(first.trajectory.token_ids)
    pieces = [np.full((length - 4, 3, 2), 7, np.int16), np.full((3, 3, 2), 8, np.int16)]
    turns = tuple(
        replace(turn, routing=piece)
        for turn, piece in zip(first.trajectory.turns, pieces, strict=True)
    )
    told = replace(first, trajectory=replace(first.trajectory, turns=turns))
    batch = collate([second, told], with_routing=True)
    assert batch.routing is not None and batch.routing.shape == (len(batch.token_ids), 3, 2)
    expected = [-1] * batch.lengths[0] + [7] * (length - 4) + [8] * 3 + [-1]
    assert batch.routing[:, 2, 1].tolist() == expected
    few = sequences_of(batch, [1]).routing
    assert few is not None and few[:, 0, 0].tolist() == expected[batch.lengths[0] :]
    assert collate([second, told]).routing is None
    assert collate([second], with_routing=True).routing is None
    gap = replace(told.trajectory, turns=(replace(turns[0], routing=None), turns[1]))
    assert gap.routing == ()


def test_a_turn_keeps_the_routing_of_the_tokens_that_are_new_in_it():
    def completion(ids: tuple[int, ...], num_read: int) -> Completion:
        read = np.arange(num_read, dtype=np.int16)[:, None, None]
        return Completion(
            token_ids=ids,
            logprobs=(-1.0,) * len(ids),
            stop_reason=StopReason.STOP,
            policy_version=0,
            routing=read,
        )

    def turn(ids: tuple[int, ...], shown: tuple[int, ...], num_read: int) -> Turn:
        done = completion(ids, num_read)
        return Turn(
            TokenSpan(done.token_ids, done.logprobs),
            TokenSpan(shown),
            0,
            StopReason.STOP,
            Outcome.OK,
            0.0,
            routing=trace.new_routing(done),
        )

    trace = GrowingTrace(TokenSpan((1, 2, 3)))
    trace.turns.append(turn((4, 5), (6, 7), num_read=8))  # three more tokens were cut off
    trace.turns.append(turn((8, 9), (), num_read=8))
    kept = [each.routing.flatten().tolist() for each in trace.turns]  # type: ignore[union-attr]
    assert kept == [[0, 1, 2, 3, 4], [5, 6, 7]]
    whole = Trajectory("t", 0, trace.prompt, tuple(trace.turns), True, False)
    again = from_record(json.loads(json.dumps(to_record(whole))))
    assert [each.tolist() for each in again.routing] == [each.tolist() for each in whole.routing]
    assert again.routing[0].dtype == np.int16 and again == whole


@pytest.mark.parametrize("share", [False, True])
def test_a_step_replays_what_the_samples_say_with_and_without_shared_prompts(share: bool):
    groups = groups_of(sizes=(3, 2))
    rng = np.random.default_rng(0)

    def routed(sample: Sample, prompt: Any) -> Sample:
        each = sample.trajectory
        rest = len(each.token_ids) - len(each.prompt)
        chosen = np.concatenate([prompt, rng.permuted(np.tile(np.arange(4), (rest, 4, 1)), axis=2)])
        pieces = [chosen[..., :2].astype(np.int16), *[chosen[:0, :, :2].astype(np.int16)] * 9]
        turns = tuple(
            replace(turn, routing=piece) for turn, piece in zip(each.turns, pieces, strict=False)
        )
        return replace(sample, trajectory=replace(each, turns=turns))

    told = []
    for group in groups:
        number = len(group[0].trajectory.prompt)
        prompt = rng.permuted(np.tile(np.arange(4), (number, 4, 1)), axis=2)
        told.append([routed(sample, prompt) for sample in group])
    model, routers = mixture("qwen3_moe")
    batch = collate(flat(told), with_routing=True)
    assert batch.routing is not None
    with torch.no_grad(), replayed(model, routers, batch.routing):
        expected = PolicyLogprobs(model, 64)(batch, temperature=1.0)[0]
    algorithm = noisy(init_std=0.0)
    one = trainer(algorithm, of=model, share_prompts=share, max_token_values=10_000)
    report = one.step(told, 0)
    found = {each.uid: each.columns["logprob"] for each in report.values}
    for row, uid in enumerate(batch.sequence_uids):
        wanted = expected[row][batch.loss_mask[row]].numpy()
        assert found[uid] == pytest.approx(wanted, abs=2e-5)
    assert 0.3 < report.metrics["router/agreement"] < 0.7
