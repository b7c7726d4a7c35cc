"""How sharp is a policy, and how far does rounding move it? `python -m tir_alp.studies.landscape`.

    python -m tir_alp.studies.landscape RUN [--checkpoint last] [--sequences 32] [--probes 8]

Two properties of the policy of a checkpoint, on sequences of the last step that the run recorded:

* *Sharpness*: for each decoder layer, the trace of the Hessian of the surrogate in the hidden
  states that enter the layer, estimated with random signs (Hutchinson). By equation (7) of
  docs/algorithm.md this is what ALP's sigma follows.
* *Sensitivity to rounding*: how far logprobs move if the weights are rounded as engines round them,
  while all arithmetic stays float32: a property of the policy, and of no engine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from tir_alp.algorithm.loss import policy_loss
from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.engines.embedded.precision import layer_matrices, quantised
from tir_alp.process import run_command
from tir_alp.records.folder import read_run_config
from tir_alp.records.trajectories import from_record
from tir_alp.run.command_line import parse_config
from tir_alp.train import with_advantages
from tir_alp.training.batch import collate
from tir_alp.training.checkpoint_folder import find
from tir_alp.training.micro_batch import loss_inputs
from tir_alp.training.policy import PolicyLogprobs, load_policy
from tir_alp.types import Batch, Sample, Trajectory, TrajectoryGroup

Rounding = Literal["bfloat16", "fp8", "int8"]
ROUNDINGS: tuple[Rounding, ...] = ("bfloat16", "fp8", "int8")

_STEP = 0.02
"""Size of a displacement, in units of the root mean square of the hidden states."""
_CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Curvature:
    """The trace of the Hessian in the hidden states that enter a layer."""

    layer: int
    trace: float
    error: float
    """Standard error of the estimate, over the probes."""
    rms: float
    """Root mean square of the hidden states, by which a trace can be made relative: trace rms^2."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What rounding of the weights does to the logprobs of the loss tokens, in nats per token."""

    precision: Rounding
    mean: float
    """Mean absolute change."""
    largest: float
    kl: float
    """Mean of exact - rounded logprob, an estimate of KL(exact, rounded) if the tokens were sampled
    from the exact policy."""


def curvatures(
    model: Any,
    batch: Batch,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
    probes: int,
    only: Sequence[int] | None = None,
) -> list[Curvature]:
    """Estimate the curvature of the surrogate at each decoder layer.

    A probe is a random sign per element. With v a probe and g the gradient of the loss in h,
    v . (g(h + eps v) - g(h - eps v)) / (2 eps) is an estimate of the trace. Signs come from the
    indices of layer and probe, so the result is the same each time.

    Args:
        model: A causal LM loaded by `load_policy`; it is not changed.
        batch: Sequences with advantages.
        algorithm: The objective; its noise is not used.
        temperature: Temperature of the sampled distribution.
        probes: Number of probes, at least 2.
        only: Indices of layers; None: all layers.
    """
    policy = PolicyLogprobs(model, _CHUNK_TOKENS)
    found = []
    layers = find_decoder_layers(model)
    for index in range(len(layers)) if only is None else only:
        layer = layers[index]
        with _shifted(layer, None) as seen:
            _loss(policy, batch, algorithm, temperature)
        (hidden,) = seen
        rms = hidden.square().mean().sqrt()
        values = []
        for probe in range(probes):
            generator = torch.Generator().manual_seed(index * 1_000_003 + probe)
            signs = torch.randint(0, 2, hidden.shape, generator=generator).to(hidden) * 2 - 1
            sides = []
            for eps in (_STEP * rms, -_STEP * rms):
                shift = (eps * signs).requires_grad_()
                with _shifted(layer, shift):
                    loss = _loss(policy, batch, algorithm, temperature)
                    (gradient,) = torch.autograd.grad(loss, shift)
                sides.append((gradient * signs).sum())
            values.append(((sides[0] - sides[1]) / (2 * _STEP * rms)).item())
        error = stdev(values) / len(values) ** 0.5
        found.append(Curvature(index, fmean(values), error, rms.item()))
    return found


@contextmanager
def _shifted(layer: Any, shift: Tensor | None) -> Iterator[list[Tensor]]:
    """Add a shift to what enters a layer while the block runs; yields what entered it before."""
    seen: list[Tensor] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[:] = [hidden.detach()]
        moved = hidden if shift is None else hidden + shift
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _loss(
    policy: PolicyLogprobs, batch: Batch, algorithm: AlgorithmConfig, temperature: float
) -> Tensor:
    logprobs, entropy = policy(batch, temperature=temperature)
    return policy_loss(loss_inputs(batch, logprobs, entropy), algorithm)[0]


@torch.no_grad()
def sensitivity(
    model: Any, batch: Batch, precision: Rounding, *, temperature: float
) -> Sensitivity:
    """Measure what rounding of a model's weights does; its weights are as before afterwards.

    `bfloat16` rounds all weights; `fp8` and `int8` round the matrices of the decoder layers, as the
    embedded engine does.
    """
    policy = PolicyLogprobs(model, _CHUNK_TOKENS)
    exact = policy(batch, temperature=temperature)[0][batch.loss_mask].double()
    with _rounded(model, precision):
        rounded = policy(batch, temperature=temperature)[0][batch.loss_mask].double()
    change = exact - rounded
    sizes = change.abs()
    return Sensitivity(precision, sizes.mean().item(), sizes.max().item(), change.mean().item())


@contextmanager
def _rounded(model: Any, precision: Rounding) -> Iterator[None]:
    weights: Mapping[str, Tensor] = dict(model.named_parameters())
    if precision != "bfloat16":
        weights = {name: weights[name] for name in layer_matrices(model)}
    kept = {name: each.detach().clone() for name, each in weights.items()}
    try:
        for each in weights.values():
            is_wide = precision == "bfloat16"
            each.data.copy_(each.bfloat16() if is_wide else quantised(each.data, precision))
        yield
    finally:
        for name, each in weights.items():
            each.data.copy_(kept[name])


# ------------------------------------------------------------------------------------- the command


def recorded_batch(run: Path, number: int) -> tuple[Batch, AlgorithmConfig, float]:
    """Return sequences of the last recorded step of a run, its objective and its temperature.

    Args:
        run: Folder of the run.
        number: Number of sequences with loss tokens, at most.

    Raises:
        ValueError: If it has recorded none.
    """
    config = parse_config(read_run_config(run))
    files = sorted((run / "trajectories").glob("*.jsonl"))
    if not files:
        raise ValueError(f"{run} has no recorded trajectories")
    records = [json.loads(line) for line in files[-1].read_text().splitlines()]
    members: dict[int, list[Trajectory]] = {}
    for record in records:
        trajectory = from_record(record)
        members.setdefault(trajectory.group_id, []).append(trajectory)
    groups = [
        TrajectoryGroup(each[0].task_id, group_id, tuple(each))
        for group_id, each in members.items()
    ]
    samples: list[Sample] = [each for group in with_advantages(groups, config) for each in group]
    chosen = [each for each in samples if any(each.trajectory.loss_mask)][:number]
    if not chosen:
        raise ValueError(f"{files[-1]} has no trajectory with tokens to train on")
    plain = {"perturbation": None, "correction": None, "rejection": None, "selection": None}
    plain |= {"denominator": "rollout", "kl": None, "entropy_bonus": 0.0}
    return collate(chosen), config.algorithm.model_copy(update=plain), config.rollout.temperature


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        "python -m tir_alp.studies.landscape", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument("run", type=Path, help="folder of a run")
    found.add_argument("--checkpoint", default="last", help="best, last, or the number of a step")
    found.add_argument("--sequences", type=int, default=32, help="number of sequences")
    found.add_argument("--probes", type=int, default=8, help="random probes per layer, at least 2")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code. The result is one JSON object."""
    options = parser().parse_args(arguments)
    if options.probes < 2 or options.sequences < 1:
        parser().error("--probes must be at least 2 and --sequences at least 1")
    try:
        path = find(options.run / "checkpoints", options.checkpoint).path
        if path is None:
            raise ValueError(f"{options.run} has no checkpoint of step {options.checkpoint}")
        batch, algorithm, temperature = recorded_batch(options.run, options.sequences)
        model = load_policy(str(path))
    except ValueError as error:
        print(f"tir_alp.studies.landscape: {error}", file=sys.stderr)
        return 2
    sharp = curvatures(model, batch, algorithm, temperature=temperature, probes=options.probes)
    moved = [sensitivity(model, batch, each, temperature=temperature) for each in ROUNDINGS]
    report = {"checkpoint": path.name, "tokens": batch.num_loss_tokens}
    report |= {"sharpness": list(map(asdict, sharp)), "rounding": list(map(asdict, moved))}
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
