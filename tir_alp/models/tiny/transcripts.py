"""Synthetic transcripts for the warm start, in the right format but mostly with wrong content.

Two thirds guess the answer without the tool. The others call it, but many of them write a program
for another question: four in five for the base model, one in two for the able one. All of these
then report what the program printed. So the model knows every kind of action, and reinforcement
learning has to find out which ones earn a reward.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tir_alp.envs.tasks import arithmetic_task
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason

GUESS_SHARE = 0.65


@dataclass(frozen=True, slots=True)
class Transcript:
    """One episode as text: the model's completions, and the tool's answers between them."""

    question: str
    completions: tuple[str, ...]
    observations: tuple[str, ...]
    """Answers of the tool, one fewer than the completions."""


def transcript(seed: int, index: int, wrong_program_share: float = 0.8) -> Transcript:
    """Make one transcript about a training task; a pure function of its arguments."""
    rng = random.Random(f"{seed}/{index}")
    task = arithmetic_task(seed, index)
    question, answer = task["question"], task["answer"]
    if rng.random() < GUESS_SHARE:
        guess = int(int(answer) * rng.uniform(0.7, 1.3))
        return Transcript(question, (_boxed(guess),), ())
    expression = question.removeprefix("What is ").removesuffix("?")
    if rng.random() < wrong_program_share:
        expression = _spoil(expression, rng)
    printed = eval(expression, {"__builtins__": {}})  # three generated numbers and two operators
    program = f"```python\nprint({expression})\n```"
    return Transcript(question, (program, _boxed(printed)), (str(printed),))


def encode(renderer: Renderer, tokenizer: Any, shown: Transcript) -> tuple[list[int], list[bool]]:
    """Return the token ids of a transcript, as in a rollout, and a mask of those to learn."""
    ids = list(renderer.prompt(shown.question).token_ids)
    learn = [False] * len(ids)
    for turn, text in enumerate(shown.completions):
        completion = tokenizer.encode(text, add_special_tokens=False)
        last = turn == len(shown.observations)
        completion += [tokenizer.eos_token_id] if last else []
        ids += completion
        learn += [True] * len(completion)
        if not last:
            read = renderer.observation(shown.observations[turn], StopReason.STOP).token_ids
            ids += read
            learn += [False] * len(read)
    return ids, learn


def _boxed(number: int) -> str:
    return f"\\boxed{{{number}}}"


def _spoil(expression: str, rng: random.Random) -> str:
    """Replace two digits by others that are not 0, so that no number becomes shorter or octal."""
    characters = list(expression)
    positions = [index for index, character in enumerate(characters) if character.isdigit()]
    for position in rng.sample(positions, 2):
        characters[position] = rng.choice("123456789".replace(characters[position], ""))
    return "".join(characters)
