"""Synthetic transcripts for the warm start: the right format, mostly the wrong thing to say.

Two thirds guess the answer without the tool. The others call it, but most of those write a program
for another question: four in five for the base model, one in two for the able one. All of them then
report what the program printed. So the model knows every move, and it is left to reinforcement
learning to find out which of them pay.
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
    """One episode as text: what the model says in each turn, and what the tool answers between."""

    question: str
    completions: tuple[str, ...]
    observations: tuple[str, ...]
    """One fewer than the completions."""


def transcript(seed: int, index: int, wrong_program_share: float = 0.8) -> Transcript:
    """Make one transcript on a training task; a pure function of its arguments."""
    rng = random.Random(f"{seed}/{index}")
    task = arithmetic_task(seed, index)
    question, answer = task["question"], task["answer"]
    if rng.random() < GUESS_SHARE:
        guess = int(int(answer) * rng.uniform(0.7, 1.3))
        return Transcript(question, (_say(guess),), ())
    expression = question.removeprefix("What is ").removesuffix("?")
    if rng.random() < wrong_program_share:
        expression = _spoil(expression, rng)
    printed = eval(expression, {"__builtins__": {}})  # three numbers of our own and two operators
    program = f"```python\nprint({expression})\n```"
    return Transcript(question, (program, _say(printed)), (str(printed),))


def encode(renderer: Renderer, tokenizer: Any, shown: Transcript) -> tuple[list[int], list[bool]]:
    """Token ids of a transcript, as a rollout would have them, and which the model is to learn."""
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


def _say(number: int) -> str:
    return f"\\boxed{{{number}}}"


def _spoil(expression: str, rng: random.Random) -> str:
    """Change two digits to others that are not 0, so that no number gets shorter or octal."""
    characters = list(expression)
    places = [index for index, character in enumerate(characters) if character.isdigit()]
    for place in rng.sample(places, 2):
        characters[place] = rng.choice("123456789".replace(characters[place], ""))
    return "".join(characters)
