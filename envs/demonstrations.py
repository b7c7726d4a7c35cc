r"""Transcripts that show how to solve a task with Python, for supervised fine-tuning.

Each kind of task has a program that solves it. The transcript is an episode that was really played:
the program runs in the environment's sandbox, what it prints is what the model is shown, and the
answer is graded. In some episodes the first program has a mistake, and the next turn repairs it:
the mistake has weight 0, so that only the repair is learnt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from tir_alp.envs.tasks import ArithmeticTasks, ReasoningGymTasks, TaskSource
from tir_alp.envs.word_problems import WordProblems
from tir_alp.tools.held_out import Split

_OPENINGS = (
    "I compute this with Python.",
    "A short program gives the answer.",
    "Let me calculate it.",
    "I will run some code.",
)
_REPAIRS = (
    "The program has a mistake. I correct it.",
    "That failed. Here is the corrected program.",
    "I made an error in the code. Again:",
)

Program = Callable[[Mapping[str, Any]], str | None]
"""Writes a program that prints the answer of a task; None: nothing can find that answer."""


def _arithmetic(task: Mapping[str, Any]) -> str:
    expression = task["question"].removeprefix("What is ").removesuffix("?")
    return f"print({expression})"


def _word_problem(task: Mapping[str, Any]) -> str:
    return f"print({task['expression']})"


def _chain_sum(task: Mapping[str, Any]) -> str:
    return f"print({task['metadata']['expression']})"


def _gcd(task: Mapping[str, Any]) -> str:
    numbers = ", ".join(map(str, task["metadata"]["numbers"]))
    return f"import math\nprint(math.gcd({numbers}))"


def _lcm(task: Mapping[str, Any]) -> str:
    numbers = ", ".join(map(str, task["metadata"]["numbers"]))
    return f"import math\nprint(math.lcm({numbers}))"


def _count_primes(task: Mapping[str, Any]) -> str:
    start, end = task["metadata"]["start"], task["metadata"]["end"]
    return (
        "count = 0\n"
        f"for n in range({start}, {end} + 1):\n"
        "    if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)):\n"
        "        count += 1\n"
        "print(count)"
    )


def _letter_counting(task: Mapping[str, Any]) -> str:
    text, letter = " ".join(task["metadata"]["span"]), task["metadata"]["target_letter"]
    return f"text = {text!r}\nprint(text.lower().count({letter!r}))"


def _count_bits(task: Mapping[str, Any]) -> str:
    return f"print(bin({task['metadata']['number']}).count('1'))"


def _simple_equations(task: Mapping[str, Any]) -> str | None:
    left, right = task["metadata"]["equation"].split(" = ")
    name = task["metadata"]["variable"]
    if name not in left:  # the set has equations such as 0 = 0
        return None
    return f"for {name} in range(-10000, 10001):\n    if {left} == {right}:\n        print({name})"


def _leg_counting(task: Mapping[str, Any]) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # takes seconds to import

    animals = task["metadata"]["animals"]
    terms = [f"{count} * {ANIMALS[animal]}" for animal, count in animals.items()]
    return f"print({' + '.join(terms)})"


def _fraction(task: Mapping[str, Any]) -> str:
    found = task["metadata"]
    return (
        "from fractions import Fraction\n"
        f"print(Fraction({found['numerator']}, {found['denominator']}))"
    )


PROGRAMS: dict[str, Program] = {
    "arithmetic": _arithmetic,
    "word_problems": _word_problem,
    "chain_sum": _chain_sum,
    "products": _chain_sum,
    "gcd": _gcd,
    "lcm": _lcm,
    "count_primes": _count_primes,
    "letter_counting": _letter_counting,
    "count_bits": _count_bits,
    "simple_equations": _simple_equations,
    "leg_counting": _leg_counting,
    "fraction_simplification": _fraction,
}
"""Kinds of tasks that can be demonstrated. All but the first two are data sets of reasoning-gym."""


def tasks_of(kind: str, seed: int, size: int, split: Split = "train") -> TaskSource:
    """Open the tasks of a kind.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in PROGRAMS:
        raise ValueError(f"there is no demonstration of {kind!r}; there are {', '.join(PROGRAMS)}")
    if kind == "arithmetic":
        return ArithmeticTasks(seed=seed, size=size, split=split)
    if kind == "word_problems":
        return WordProblems(seed=seed, size=size, split=split)
    return ReasoningGymTasks(kind, seed=seed, size=size, split=split)


@dataclass(frozen=True, slots=True)
class Style:
    """How demonstrations are written."""

    mistakes: float = 0.2
    """Share of the episodes whose first program fails and is repaired."""
    guesses: float = 0.0
    """Share of the episodes that answer at once, with a number that may be wrong. They teach the
    form of an answer without the way to it, so that reinforcement learning has something to do."""


def demonstrations(
    env: gymnasium.Env[str, str], kinds: Sequence[str], number: int, seed: int, style: Style
) -> Iterator[dict[str, Any]]:
    """Play episodes, and yield each as a row for `tir_alp.sft`.

    Args:
        env: An environment with a Python tool and boxed answers, such as `PythonMath-v0`.
        kinds: Kinds of tasks, which take turns.
        number: Number of rows.
        seed: Seed of tasks and style.
        style: How they are written.

    Raises:
        ValueError: There is no such kind.
        RuntimeError: An episode did not end as it should have: the sandbox failed, or a program or
            an answer is wrong.
    """
    # Twice as many tasks as are needed, because some cannot be solved.
    solved = [_solved(kind, tasks_of(kind, seed, 2 * -(-number // len(kinds)))) for kind in kinds]
    for index in range(number):
        rng = random.Random(f"{seed}/{index}")
        task, program = next(solved[index % len(kinds)])
        messages = _play(env, dict(task), program, rng, style)
        yield {"task_id": task["task_id"], "messages": messages}


def _solved(kind: str, source: TaskSource) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield tasks with the program that solves each."""
    for index in range(len(source)):
        task = source[index]
        program = PROGRAMS[kind](task)
        if program is not None:
            yield task, program


def _play(
    env: gymnasium.Env[str, str],
    task: dict[str, Any],
    program: str,
    rng: random.Random,
    style: Style,
) -> list[dict[str, Any]]:
    text, _ = env.reset(options={"task": task})
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    if rng.random() < style.guesses:
        answer = _guess(task["answer"], rng)
        return [*messages, {"role": "assistant", "content": f"\\boxed{{{answer}}}"}]
    turns = [(rng.choice(_OPENINGS), program)]
    if rng.random() < style.mistakes:
        turns = [
            (rng.choice(_OPENINGS), _spoiled(program, rng)),
            (rng.choice(_REPAIRS), program),
        ]
    output = ""
    for number, (words, code) in enumerate(turns, start=1):
        action = f"{words}\n```python\n{code}\n```"
        output, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            raise RuntimeError(f"{task['task_id']} ended after its program: {info}")
        weight = int(number == len(turns))  # the repair is to be learnt, and not the mistake
        messages += [
            {"role": "assistant", "content": action, "weight": weight},
            {"role": "tool", "content": output},
        ]
    action = f"The answer is \\boxed{{{output.strip()}}}."
    _, _, terminated, _, info = env.step(action)
    if not terminated or not info["correct"]:
        raise RuntimeError(
            f"{task['task_id']} was not solved by its program, which printed {output[:200]!r}, and "
            f"the answer is {task['answer']!r}"
        )
    return [*messages, {"role": "assistant", "content": action}]


def _spoiled(program: str, rng: random.Random) -> str:
    """Return the program with a mistake that Python reports."""
    ways = [
        lambda: program[: program.rindex(")")],  # a bracket that is not closed
        lambda: program.replace("print(", "prnt("),
        lambda: f"{program}\nprint(result)",
    ]
    if "import math" in program:
        ways.append(lambda: program.replace("import math\n", ""))
    if "from fractions import Fraction" in program:
        ways.append(lambda: program.replace("from fractions import Fraction\n", ""))
    return rng.choice(ways)()


def _guess(answer: str, rng: random.Random) -> str:
    """Return a number of the answer's size; for other answers, the answer itself."""
    if not re.fullmatch(r"-?\d+", answer):
        return answer
    return str(round(int(answer) * rng.uniform(0.7, 1.3)) + rng.randint(-2, 2))
