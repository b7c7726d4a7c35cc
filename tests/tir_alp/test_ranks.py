"""Two real processes that share an update make the update of one, noise and sigma included."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tir_alp.attention import PackedSequences
from tir_alp.batch import Sample, collate, loss_positions, to_rows
from tir_alp.config import ALGORITHMS, AlgorithmConfig, PerturbationConfig
from tir_alp.loss import LossInputs, loss_counts, policy_loss
from tir_alp.perturbation import LayerwisePerturbation, NoiseKey
from tir_alp.policy import hidden_states, token_logprobs
from tir_alp.tiny.model import make_model
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn


def make_samples() -> list[Sample]:
    """Six sequences of different lengths, so that the ranks have unequal shares of the tokens."""
    generator = torch.Generator().manual_seed(0)

    def make(uid: int) -> Sample:
        ids = torch.randint(6, 262, (5 + 3 * uid,), generator=generator).tolist()
        said = TokenSpan(tuple(ids[2:]), (-5.5,) * (len(ids) - 2))
        turn = Turn(said, TokenSpan(()), 0, StopReason.EOS, Outcome.OK, 1.0)
        trajectory = Trajectory("t", 0, TokenSpan((*ids[:2],)), (turn,), True, False, uid)
        return Sample(trajectory, (-1.0) ** uid * 0.5)

    return [make(uid) for uid in range(6)]


def algorithm(**noise: Any) -> AlgorithmConfig:
    config = PerturbationConfig.model_validate({"init_std": 0.1} | noise)
    changes = {"perturbation": config, "ratio_level": "token"}
    return ALGORITHMS["alp_sequence"].model_copy(update=changes)


def gradients(samples: Sequence[Sample], method: AlgorithmConfig, is_split: bool) -> list[Tensor]:
    """Gradients of one update; if split, these samples are a share and the sums are over ranks."""
    assert method.perturbation is not None
    model = make_model(0)
    perturbation = LayerwisePerturbation(model, method.perturbation)
    batch = collate(samples)
    inputs = LossInputs(
        logprobs=batch.rollout_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        advantages=batch.advantages,
        loss_mask=batch.loss_mask,
    )
    counts = torch.stack([*loss_counts(inputs, method)]).double()
    if is_split:
        dist.all_reduce(counts)
    keys = [NoiseKey(3, uid) for uid in batch.sequence_uids]
    with perturbation.active(keys, batch.lengths):
        layout = PackedSequences(batch.lengths)
        hidden = hidden_states(model, batch.token_ids, batch.position_ids, layout)
        places = loss_positions(batch)
        rows = places - 1 if method.perturbation.site == "logits" else None
        logprobs, _ = token_logprobs(model, hidden[places - 1], batch.token_ids[places], rows=rows)
        inputs = LossInputs(
            logprobs=to_rows(batch, logprobs),
            rollout_logprobs=batch.rollout_logprobs,
            advantages=batch.advantages,
            loss_mask=batch.loss_mask,
        )
        policy_loss(inputs, method, *counts.tolist())[0].backward()
    found = [each.grad for each in (*model.parameters(), perturbation.log_sigma)]
    whole = [each for each in found if each is not None]
    if is_split:
        for each in whole:
            dist.all_reduce(each)
    return whole


METHODS = [algorithm(), algorithm(site="logits")]


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    share = make_samples()[rank::2][::-1]  # in another order, too
    found = [gradients(share, method, is_split=True) for method in METHODS]
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


def test_two_ranks_make_the_update_of_one(tmp_path: Path):
    spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    for method, split in zip(METHODS, torch.load(tmp_path / "gradients.pt"), strict=True):
        one = gradients(make_samples(), method, is_split=False)
        assert len(split) == len(one)
        for ours, theirs in zip(split, one, strict=True):
            tolerance = 1e-4 * theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_other_noise_is_another_update():
    one, other = (
        gradients(make_samples(), algorithm(seed=seed), is_split=False) for seed in (0, 1)
    )
    assert (one[-1] - other[-1]).abs().max() > 1e-2 * one[-1].abs().max()
