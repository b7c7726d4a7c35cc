"""Makes the tiny models: `python -m tir_alp.models.tiny.make [--able] --out FOLDER`.

Ordinary supervised learning on `transcripts`, with the loss on the model's own text. The recipe is
written to `recipe.json` beside the weights, together with the losses of the first steps, so that a
test can check whether weights and recipe belong together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from tir_alp.models.tiny import BASE
from tir_alp.models.tiny.model import make_model, make_tokenizer
from tir_alp.models.tiny.transcripts import Transcript, encode, transcript
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.attention import PackedSequences
from tir_alp.training.policy import hidden_states, load_policy, token_logprobs


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the weights depend on."""

    seed: int = 0
    steps: int = 1000
    sequences_per_step: int = 96
    lr: float = 3e-3
    warmup_steps: int = 100
    wrong_program_share: float = 0.8
    """Share of the tool-calling transcripts whose program is for another question."""
    from_base: bool = False
    """Whether training starts from the base model instead of random weights."""


ABLE_RECIPE = Recipe(
    seed=1, steps=150, lr=1e-3, warmup_steps=20, wrong_program_share=0.5, from_base=True
)
"""Recipe of the able model, which solves 10 to 20 % of the tasks before reinforcement learning."""


def warm_start(recipe: Recipe) -> Iterator[tuple[Any, float]]:
    """Train on transcripts; yield the model and the loss after each step, in nats per token."""
    model = load_policy(str(BASE)) if recipe.from_base else make_model(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / recipe.warmup_steps)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
        ),
    )
    for step in range(recipe.steps):
        first = step * recipe.sequences_per_step
        numbers = range(first, first + recipe.sequences_per_step)
        shown = [transcript(recipe.seed, each, recipe.wrong_program_share) for each in numbers]
        loss = loss_of(model, shown)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield model, loss.item()


def loss_of(model: Any, transcripts: Sequence[Transcript]) -> Tensor:
    """Return the mean negative logprob of the model's text in transcripts, in nats per token."""
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    examples = [encode(renderer, tokenizer, each) for each in transcripts]
    lengths = tuple(len(ids) for ids, _ in examples)
    token_ids = torch.tensor([token for ids, _ in examples for token in ids])
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    learn = torch.tensor([bit for _, learn in examples for bit in learn]).nonzero().squeeze(1)
    hidden = hidden_states(model, token_ids, position_ids, PackedSequences(lengths))
    return -token_logprobs(model, hidden[learn - 1], token_ids[learn])[0].mean()


def digest(folder: Path) -> str:
    """Return the SHA-256 digest of the weights in a folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Make a model and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--able", action="store_true", help="make the able model instead of the base"
    )
    arguments = parser.parse_args()
    recipe = ABLE_RECIPE if arguments.able else Recipe()
    losses = []
    model = None
    for trained, loss in track(warm_start(recipe), "warm start", total=recipe.steps):
        model = trained
        losses.append(loss)
        if len(losses) % 100 == 0:
            print(f"step {len(losses)}: loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    assert model is not None
    model.save_pretrained(arguments.out)
    make_tokenizer().save_pretrained(arguments.out)
    record = {
        "recipe": asdict(recipe),
        "first_losses": losses[:5],
        "last_loss": sum(losses[-100:]) / len(losses[-100:]),
        "sha256": digest(arguments.out),
    }
    (arguments.out / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
