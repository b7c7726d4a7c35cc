"""Checks that the chat template keeps earlier text, and that tokenizer and model fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from tir_alp.doctor.check_result import CheckResult
from tir_alp.rollouts.chat_template import ChatTemplate
from tir_alp.rollouts.end_marks import ordinary_tokens
from tir_alp.rollouts.prefix_stability import check_prefix_stability, grow_conversation
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.structure import end_token_ids

_SENTENCE = "Let x² ≈ 3.14·10⁻³; print('ok')\n\tThe answer is \\boxed{42}.\n"


def check_template(
    tokenizer: Any,
    system: str,
    clock: datetime | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> CheckResult:
    """Check that a growing conversation is only appended to, as text and as tokens.

    A rollout only appends tokens. A template that changes or drops earlier text, such as the
    thoughts of earlier turns, gives the deployed model other input than it was trained on.

    Args:
        tokenizer: The tokenizer, with its chat template.
        system: System prompt of the run; may be empty.
        clock: Local time that the run's prompts are rendered with; None: the real time.
        tools: JSON schemas of functions, if calls are written in the template's own form.
    """
    template = ChatTemplate(tokenizer, system, tuple(tools), clock)
    if rewritten := check_prefix_stability(template):
        return CheckResult(
            "template",
            False,
            "; ".join(rewritten),
            "use a chat template that keeps every earlier message as it was written, including its "
            "thoughts (<think>...</think>)",
        )
    prompts = grow_conversation(template).prompts
    ids = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in prompts]
    for turn, (before, after) in enumerate(pairwise(ids)):
        if after[: len(before)] != before:
            pairs = enumerate(zip(before, after, strict=False))
            same = next((position for position, (a, b) in pairs if a != b), len(after))
            return CheckResult(
                "template",
                False,
                f"token {same} of {len(before)} changes after turn {turn}",
                "the template's generation prompt must end with a special token or a line break",
            )
    return CheckResult(
        "template",
        True,
        f"{len(prompts)} turns with thoughts, {len(ids[-1])} tokens, only appended to",
    )


def check_fence(tokenizer: Any, renderer: Renderer) -> CheckResult:
    """Check that the stop rule ends generation with exactly the token that completes a call."""
    ids = _tokens_with_call(tokenizer, renderer)
    if not renderer.has_call(tokenizer.decode(ids)):
        return CheckResult("template", True, "a call ends with the turn, so there is no stop rule")
    matches = renderer.stop_matcher()
    end = next((index + 1 for index, token in enumerate(ids) if matches(token)), 0)
    is_whole = [renderer.has_call(tokenizer.decode(ids[:stop])) for stop in (end, max(end - 1, 0))]
    return CheckResult(
        "template",
        is_whole == [True, False],
        f"stops after {end} of {len(ids)} tokens: {tokenizer.decode(ids[:end])[-12:]!r}",
        "the tokenizer does not decode the end of a call token by token: use another tokenizer",
    )


def _tokens_with_call(tokenizer: Any, renderer: Renderer) -> list[int]:
    """Return the tokens of a turn with as many calls as it may have, and words after them."""
    after = tokenizer.encode("\nand more", add_special_tokens=False, verbose=False)
    match renderer.call_format:
        case "fenced":
            text = "So:\n```python\nprint(6*7)\n```"
            return [*tokenizer.encode(text, add_special_tokens=False, verbose=False), *after]
        case "tool_call":
            return [*renderer.sample_calls(), *after]
        case "none":
            return after


def check_tokenizer(tokenizer: Any, renderer: Renderer, model: Any, max_tokens: int) -> CheckResult:
    """Check embedding rows, end tokens, a round trip of text, and the number of positions.

    Args:
        tokenizer: Tokenizer of the run.
        renderer: Renderer of the run, which has its stop tokens.
        model: The model, or its outline without weights.
        max_tokens: `rollout.max_context_tokens`.
    """
    rows = min(
        model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]
    )
    largest = max(tokenizer.get_vocab().values())
    ends = end_token_ids(model)
    ordinary = ordinary_tokens(tokenizer, ends | renderer.stop_token_ids)
    back = tokenizer.decode(tokenizer.encode(_SENTENCE, add_special_tokens=False))
    positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
    is_too_long = positions < max_tokens
    wrong = {
        f"token {largest} has no embedding: the model has {rows} rows": largest >= rows,
        f"the model's end tokens are {sorted(ends)}, those of the template "
        f"{sorted(renderer.stop_token_ids)}": bool(ends) and not ends & renderer.stop_token_ids,
        f"end tokens are ordinary text: {ordinary}": bool(ordinary),
        f"{_SENTENCE!r} comes back as {back!r}": back.strip() != _SENTENCE.strip(),
    }
    failures = [what for what, is_wrong in wrong.items() if is_wrong]
    fixes = ["use the tokenizer that belongs to the model"] if failures else []
    if is_too_long:
        failures.append(
            f"rollout.max_context_tokens = {max_tokens}, but the model has {positions} positions"
        )
        fixes.append(f"set rollout.max_context_tokens to {positions} or less")
    return CheckResult(
        "tokenizer",
        not failures,
        "; ".join(failures) or f"largest id {largest}, {rows} rows, end tokens {sorted(ends)}",
        ", and ".join(fixes),
    )
