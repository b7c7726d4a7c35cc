"""Audits a run of supervised fine-tuning: only the assistant's own words were learnt.

Three accounts have to agree on each conversation: the data as it is read today, the trajectory that
the run recorded, and what the trainer packed. The first one is compared as text, decoded from the
tokens, so that a fault in the encoding shows as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tir_alp.audit.findings import Findings, Location
from tir_alp.audit.records import RecordedTrajectory, read_ledger, read_trajectories, records_of
from tir_alp.audit.step import check_packed
from tir_alp.audit.texts import check_texts
from tir_alp.config import SFTConfig
from tir_alp.records.folder import read_origin, read_run_config, step_file
from tir_alp.records.readable import decoder
from tir_alp.rollouts.data import Shuffled
from tir_alp.rollouts.renderer import Renderer
from tir_alp.rollouts.surrogates import SURROGATE
from tir_alp.rollouts.transcripts import Message, Transcript
from tir_alp.run.command_line import parse_as
from tir_alp.run.demonstrations import Demonstrations, model_of, open_demonstrations
from tir_alp.run.open_sft import encoders
from tir_alp.tools.calls import ToolCall, find_call, write_call
from tir_alp.training.packed_sequence import packed_sequence
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.samples import samples_of
from tir_alp.types import TokenSpan, Trajectory

_METRICS = "metrics.jsonl"


def audit_sft(path: Path, tokenizer: Any = None) -> Findings:
    """Audit the folder of a run of supervised fine-tuning.

    Args:
        path: The run folder.
        tokenizer: Tokenizer of the run; None: that of its newest checkpoint.

    Raises:
        ValueError: If the folder cannot be audited: its data or its tokenizer is missing.
    """
    try:
        config = parse_as(SFTConfig, read_run_config(path))
    except ValueError as error:
        raise ValueError(f"the run {path} cannot be audited: {error}") from error
    tokenizer = load_tokenizer(model_of(path)) if tokenizer is None else tokenizer
    renderer, demonstrator = encoders(config.as_run(), tokenizer, read_origin(path))
    data = open_demonstrations(
        config.data, demonstrator, tokenizer, config.rollout.max_context_tokens, lambda line: None
    )
    findings = Findings()
    metrics = {
        record["step"]: (location, record)
        for location, record in records_of(path, _METRICS, findings)
        if "tokens/loss" in record
    }
    last = max(
        (
            int(file.stem.removeprefix("step_"))
            for name in ("trajectories", "ledger")
            for file in (path / name).glob("step_*.jsonl")
        ),
        default=0,
    )
    audit = _SFTAudit(path, config, data, renderer, findings)
    for number in range(1, max(last, *metrics, 0) + 1):
        audit.step(number, metrics.get(number))
    if last < (config.steps or 0):
        findings.notes.append(f"the run has made {last} of its {config.steps} steps")
    return findings


class _SFTAudit:
    """Audits the steps of one run in order."""

    def __init__(
        self,
        path: Path,
        config: SFTConfig,
        data: Demonstrations,
        renderer: Renderer,
        findings: Findings,
    ) -> None:
        self._path, self._size, self._data = path, config.sequences_per_step, data
        self._renderer, self._findings = renderer, findings
        self._order = Shuffled(len(data.trained), config.seed)

    def step(self, number: int, metrics: tuple[Location, Mapping[str, Any]] | None) -> None:
        """Audit one step; `number` counts from 1."""
        findings, location = self._findings, Location(step_file(number))
        findings.count("steps")
        findings.expect(metrics is not None, "steps", location, f"no record in {_METRICS}")
        recorded = read_trajectories(self._path, "trajectories", number, findings)
        uids = [each.trajectory.episode_uid for each in recorded]
        due = list(range((number - 1) * self._size, number * self._size))
        findings.count("groups", len(recorded))
        findings.expect(
            uids == due, "groups", location, f"sequences {uids}: expected {due}, each once"
        )
        for each in recorded:
            if each.trajectory.episode_uid in due:
                self._conversation(each)
        ledger = read_ledger(self._path, number, findings)
        updates = [entry.record.update for entry in ledger.updates]
        findings.expect(
            updates == [number - 1],
            "sequences in the loss",
            ledger.location,
            f"updates {updates}; step {number} makes the update {number - 1}",
        )
        samples = [(s, each) for each in recorded for s in samples_of(each.trajectory, 1.0)]
        packed = {
            sample.trajectory.sequence_uid: packed_sequence(sample)
            for sample, _ in samples
            if any(sample.trajectory.loss_mask)
        }
        locations = {sample.trajectory.sequence_uid: each.location for sample, each in samples}
        for entry in ledger.updates:
            check_packed(entry, packed, locations, findings)
        if metrics is not None:
            num_tokens = sum(each.num_loss_tokens for each in packed.values())
            findings.count("metrics")
            findings.expect(
                metrics[1].get("tokens/loss") == num_tokens,
                "metrics",
                metrics[0],
                f"tokens/loss is {metrics[1].get('tokens/loss')}; the conversations have "
                f"{num_tokens}",
            )

    def _conversation(self, recorded: RecordedTrajectory) -> None:
        trajectory, location, findings = recorded.trajectory, recorded.location, self._findings
        findings.count("trajectories")
        check_texts(recorded, decoder(self._renderer.tokenizer), findings)
        uid = trajectory.episode_uid
        row = self._data.trained[self._order[uid]]
        try:
            due = self._data.source.trajectory(row, uid)
            transcript = self._data.source.transcript(row)
        except ValueError as error:
            findings.drift("trajectories", location, f"the data cannot be read today: {error}")
            return
        traces, others = trajectory.conversation, due.conversation
        findings.expect(
            [(each.sequence_uid, len(each.turns)) for each in traces]
            == [(each.sequence_uid, len(each.turns)) for each in others]
            and len(traces) == len(trajectory.sequences),
            "trajectories",
            location,
            f"it has {len(trajectory.conversation_turns)} turns in {len(trajectory.sequences)} "
            f"traces; the data has {len(due.conversation_turns)} in {len(others)}",
        )
        for trace, other in zip(traces, others, strict=False):
            self._spans(trace, other, location)
        if transcript is not None:
            self._texts(trajectory, transcript, location)

    def _spans(self, trajectory: Trajectory, due: Trajectory, location: Location) -> None:
        """Compare a trace with what the data gives."""
        findings = self._findings
        for index, (span, other) in enumerate(zip(trajectory.spans(), due.spans(), strict=False)):
            kind = "sampled tokens" if index % 2 else "observation tokens"
            kind = "prompt tokens" if index == 0 else kind
            findings.count(kind, len(span))
            here = location.at(turn=max(0, (index - 1) // 2)) if index else location
            findings.expect(
                span.token_ids == other.token_ids,
                kind,
                here,
                "the recorded tokens are not those of the data",
            )
            findings.count("loss mask", len(span))
            findings.expect(
                span.loss_mask == other.loss_mask,
                "loss mask",
                here,
                f"{sum(span.loss_mask)} of {len(span)} tokens are to be learnt; by the data "
                f"{sum(other.loss_mask)} are",
            )

    def _texts(self, trajectory: Trajectory, transcript: Transcript, location: Location) -> None:
        """Compare the decoded tokens with the text of the data."""
        task, *messages = transcript.messages
        traces = trajectory.conversation
        self._shows(traces[0].prompt, task.text, "prompt tokens", location)
        shown = [  # after each turn: its observation, or the prompt of the next trace
            span
            for number, trace in enumerate(traces)
            for span in (
                *(turn.observation for turn in trace.turns[:-1]),
                traces[number + 1].prompt if number + 1 < len(traces) else TokenSpan(()),
            )
        ]
        for index, turn in enumerate(trajectory.conversation_turns[: len(messages) // 2 + 1]):
            here = location.at(turn=index)
            written = messages[2 * index]
            words = self._renderer.action(turn.completion.token_ids)
            self._findings.expect(
                is_written(words, written, self._renderer),
                "sampled tokens",
                here,
                f"the tokens read {words[:80]!r}; the data has {written.text[:80]!r}",
            )
            self._findings.expect(
                turn.completion.trainable == written.trainable and turn.completion.is_sampled,
                "loss mask",
                here,
                "the turn is learnt although its weight is 0, or the reverse",
            )
            if 2 * index + 1 < len(messages):
                answer = messages[2 * index + 1]
                self._shows(shown[index], answer.text, "observation tokens", here)

    def _shows(self, span: TokenSpan, text: str, check: str, location: Location) -> None:
        decoded = self._renderer.decode(span.token_ids)
        shown = SURROGATE.sub("\ufffd", text).strip()
        as_json = json.dumps(shown, ensure_ascii=False)[1:-1]  # as some templates show outputs
        found = any(each in decoded or _is_cut(each, decoded) for each in (shown, as_json))
        self._findings.expect(
            found and not any(span.loss_mask),
            check,
            location,
            f"the tokens read {decoded[:80]!r}, or are learnt; the data has {text[:80]!r}",
        )


def is_written(words: str, message: Message, renderer: Renderer) -> bool:
    """Whether the decoded words of a turn are those of the assistant's message."""
    text = SURROGATE.sub("\ufffd", message.text)
    if message.call is None:
        return words.strip() == text.strip()
    if renderer.call_format == "tool_call":
        found = find_call(words, "tool_call")
        is_same = isinstance(found, ToolCall) and found == message.call
        return is_same and words.strip().startswith(text.strip())
    call = write_call(message.call, renderer.call_format) or ""
    return words.strip() == f"{text.rstrip()}\n{call}".strip()


def _is_cut(text: str, decoded: str) -> bool:
    """Whether a long output is there with its middle missing."""
    return len(text) > 64 and text[:16] in decoded and text[-16:] in decoded
