"""The program of the ranks of `test_sequence_parallel.py`.

`python -m torch.distributed.run --nproc-per-node N tests/training/teams.py FOLDER`
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.training.families import make_model
from tests.training.harness import flat, gradients, noisy, trainer, weights_of
from tests.training.test_shared_prompts import groups_of, near_policy
from tir_alp.algorithm.perturbation import LayerwisePerturbation
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    NEGATIVE_LOG_LIKELIHOOD,
    AlgorithmConfig,
    KLConfig,
    PerturbationConfig,
    SelectionConfig,
)
from tir_alp.training.batch import collate, noise_keys
from tir_alp.training.divided_model import check_division
from tir_alp.training.policy import PolicyLogprobs
from tir_alp.training.ranks import Ranks, join
from tir_alp.training.routing import find_routers, replayed
from tir_alp.training.sequence_parallel import divide_ranks
from tir_alp.training.token_values import TokenValues

CASES: dict[str, tuple[AlgorithmConfig, dict[str, Any]]] = {
    "some sequences at a time": (noisy(), {"micro_batch_tokens": 60, "clean_every": 1}),
    "without shared prompts": (noisy("alp_token"), {"share_prompts": False}),
    "noise on the logits, computed twice": (
        noisy(site="logits", draws=2),
        {"gradient_checkpointing": True, "offload_activations": True},
    ),
    "noise relative to the state": (noisy(scale="relative"), {"gradient_checkpointing": True}),
    "an entropy bonus and a reference": (
        ALGORITHMS["grpo"].model_copy(
            update={"entropy_bonus": 0.1, "kl": KLConfig(coefficient=0.1)}
        ),
        {"micro_batch_tokens": 60},
    ),
    "what is read of all tokens of an update, and of versions": (
        ALGORITHMS["tir_otb"].model_copy(
            update={
                "selection": SelectionConfig(type="top_entropy", share=0.5),
                "proximal": "rollout_version",
                "step_scale": "ess",
            }
        ),
        {"micro_batch_tokens": 60, "num_kept_versions": 1, "clean_every": 1},
    ),
    "adapters": (noisy(), {"lora": {"rank": 4, "alpha": 8.0}, "lr": 1e-3}),
    "supervised fine-tuning": (NEGATIVE_LOG_LIKELIHOOD, {"micro_batch_tokens": 60}),
    "bfloat16": (noisy(init_std=0.01), {"dtype": "bfloat16"}),
}
"""Kinds of training that must not depend on how a forward is divided."""

FAMILIES = ("llama", "qwen3_moe", "gemma3_text", "deepseek_v3")
"""Keys and values for each head or for several, windows, experts, a latent state."""

Result = tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor], list[TokenValues]]


def train(ranks: Ranks, case: str, **more: Any) -> Result:
    """Make two steps; return their metrics, the gradients of the first, weights, and values."""
    algorithm, own = CASES[case]
    settings = {"max_grad_norm": 0.5, "max_token_values": 10_000} | own | more
    one = trainer(algorithm, ranks=ranks, **settings)
    groups = near_policy(groups_of())
    report = one.step(groups, 0)
    found = gradients(one)
    reports = [report.metrics, one.step(groups, 1).metrics]
    values = sorted(report.values, key=lambda each: each.uid)
    loss = {"mean loss": one.mean_loss(flat(groups))}
    return [*reports, loss], found, weights_of(one), values


def forward(name: str, ranks: Ranks, team: Ranks | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs of a family's small model, and the gradients of their sum over all ranks."""
    model = make_model(name).train()
    check_division(model, team)
    policy = PolicyLogprobs(model, 64, team)
    noise = LayerwisePerturbation(model, PerturbationConfig(init_std=0.05))
    batch = collate(flat(groups_of()), share_prompts=True)
    keys, where = noise_keys(batch, update=3), policy.tokens_in_forward(batch)
    routed: AbstractContextManager[None] = nullcontext()
    if (routers := find_routers(model)) is not None:
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(len(batch.token_ids), routers.num_layers, 4, generator=generator)
        routed = replayed(model, routers, scores.topk(2).indices[where])
    with noise.active(keys, batch.lengths, in_forward=where), routed:
        logprobs, _ = policy(batch, temperature=0.7)
        logprobs.sum().backward()
    named = {**dict(model.named_parameters()), "log_sigma": noise.log_sigma}
    found = {
        name: ranks.sum(torch.zeros_like(each) if each.grad is None else each.grad)
        for name, each in named.items()
    }
    return logprobs.detach(), found


class Shifted(nn.Module):
    """A layer that reads the state of the token before, and only of the same sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        before = F.pad(hidden_states[:, :-1], (0, 0, 1, 0))
        is_inside = keywords["position_ids"][..., None] > 0
        return self.layer(hidden_states + 0.1 * before * is_inside, *arguments, **keywords)


def refusal(team: Ranks | None) -> str:
    """Return what is said of a model whose layers read their neighbours."""
    model = make_model("llama")
    model.model.layers[1] = Shifted(model.model.layers[1])
    try:
        check_division(model, team)
    except ValueError as error:
        return str(error)
    return "it is not refused"


def main(folder: Path) -> None:
    """Train in teams of two, and compute forwards of families in a team of all."""
    torch.set_num_threads(1)
    with join(120, torch.device("cpu")) as ranks:
        found = {case: train(ranks, case, sequence_parallel=2) for case in CASES}
        torch.save(found, folder / f"train_{ranks.rank}.pt")
        team, _ = divide_ranks(ranks, ranks.size, 120)
        torch.save(
            {name: forward(name, ranks, team) for name in FAMILIES},
            folder / f"forward_{ranks.rank}.pt",
        )
        (folder / f"refusal_{ranks.rank}").write_text(refusal(team))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
