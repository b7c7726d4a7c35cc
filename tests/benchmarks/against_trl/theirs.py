"""The side of TRL: its GRPOTrainer with its own sampling, tool loop and update.

It runs in a Python of its own. Three things are fixed, each by a subclass, so that both sides do
the same work: the length of a completion, that each is read as a tool call, and when a step begins.
The tool runs its program in the process itself, without a sandbox.
"""

from __future__ import annotations

import contextlib
import io
import time
from itertools import groupby
from typing import Any, ClassVar

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

from tests.benchmarks.against_trl.worker import (
    PROGRAM,
    SHOWN,
    Case,
    Channel,
    report,
    serve,
    wait_for_turn,
)


class CallingTokenizer(PreTrainedTokenizerFast):
    """Reads every completion as a call of the tool; the trainer's own limit ends the calls."""

    response_schema: ClassVar[Any] = {"type": "object"}

    def parse_response(self, ids: Any, **_: Any) -> dict[str, Any]:
        """Return the message that a completion is."""
        call = {"type": "function", "function": {"name": "python", "arguments": {"code": PROGRAM}}}
        return {"role": "assistant", "content": self.decode(ids), "tool_calls": [call]}


def python(code: str) -> str:
    """
    Run Python code and return what it prints.

    Args:
        code: Python source code.

    Returns:
        What the code prints.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip() == SHOWN
    return printed.getvalue().strip()


class TimedTrainer(GRPOTrainer):
    """Measures how long the rollout of a step takes, and notes its lengths."""

    rollout_s = 0.0
    sequences: Any = None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        began = time.monotonic()
        found = super()._generate_and_score_completions(inputs)
        self.rollout_s = time.monotonic() - began
        return found

    def _generate(self, prompts: Any) -> Any:
        found = super()._generate(prompts)
        self.sequences = found[:3]  # prompts, completions, which tokens the model wrote
        return found

    def facts(self, group_size: int, seconds: float) -> dict[str, Any]:
        """Return what is reported of the last step."""
        prompts, completions, masks = self.sequences
        masks = masks or [[1] * len(ids) for ids in completions]
        runs = [[(bit, len([*run])) for bit, run in groupby(mask)] for mask in masks]
        return report(
            seconds,
            self.rollout_s,
            prompts[::group_size],
            [[length for bit, length in each if bit] for each in runs],
            [sum(length for bit, length in each if not bit) for each in runs],
        )


class Turns(TrainerCallback):
    """Lets a step begin when it is this side's turn, and reports it."""

    def __init__(self, case: Case, channel: Channel) -> None:
        self._case, self._channel, self._began = case, channel, 0.0
        self.trainer: TimedTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the turn."""
        wait_for_turn(self._channel)
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report after the optimizer's update."""
        assert self.trainer is not None
        seconds = time.monotonic() - self._began
        self._channel.send(self.trainer.facts(self._case.group_size, seconds))


def make_model(case: Case) -> Any:
    """Return the model, whose completions all have the same length."""
    config: Any = AutoConfig.from_pretrained(case.folder)
    (name,) = config.architectures
    kind: Any = getattr(transformers, name)

    class FixedLengths(kind):  # type: ignore[misc, valid-type]
        """Samples as many tokens as the case says; no end mark is sampled before."""

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            lengths = {"max_new_tokens": case.num_tokens, "min_new_tokens": case.num_tokens}
            return super().generate(*args, **kwargs | lengths)

    FixedLengths.__name__ = name
    return FixedLengths.from_pretrained(case.folder, dtype=torch.float32)


def arguments_of(case: Case) -> GRPOConfig:
    """Return TRL's settings, with all that is optional and costs time switched off."""
    return GRPOConfig(
        output_dir="trl",
        use_cpu=True,
        bf16=case.precision == "bfloat16",
        per_device_train_batch_size=case.num_sequences,
        gradient_accumulation_steps=1,
        num_generations=case.group_size,
        max_completion_length=case.num_completions * (case.num_tokens + 64),
        max_tool_calling_iterations=case.num_completions - 1,
        max_steps=case.steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )


def perform(case: Case, channel: Channel) -> None:
    """Make the steps of a case."""
    torch.set_num_threads(case.threads)
    rows = [{"prompt": [{"role": "user", "content": each}]} for each in case.questions]
    turns = Turns(case, channel)
    trainer = TimedTrainer(
        model=make_model(case),
        reward_funcs=lambda completions, **_: [float(n % 2) for n in range(len(completions))],
        args=arguments_of(case),
        train_dataset=Dataset.from_list(rows),
        processing_class=CallingTokenizer.from_pretrained(case.folder, padding_side="left"),
        callbacks=[turns],
        tools=[python] if case.has_tool else None,
    )
    turns.trainer = trainer
    channel.send({"opened": True})
    trainer.train()


if __name__ == "__main__":
    serve(perform)
