"""What was rendered and sampled in one episode, and how a request continues it. Pure.

A *trace* is one sequence of tokens that the model read and wrote. A request whose messages extend
those of a trace goes on with it, by its tokens. Any other request begins a new trace: it inherits
the tokens of the longest beginning that a trace shares with it, up to the end of a reply, and the
rest is encoded from text. What a trace inherits is context there and is trained on where it was
sampled, so that every sampled token is trained on at most once.

Whether messages extend a trace is decided by comparing all of them with what the trace has: the
client's copy of a reply is compared with the reply that it was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from tir_alp.agents.messages import Dialogue, Message, difference, num_common
from tir_alp.agents.replies import ReplyRule
from tir_alp.engines.base import Completion
from tir_alp.types import MAX_TRACES, StopReason

Ids = tuple[int, ...]


class CaptureFull(ValueError):
    """The episode has as many traces as it can have."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its reply, in one trace."""

    asked: tuple[Message, ...]
    """Messages of the request that the trace did not have; all of them in a trace that inherits
    nothing."""
    shown: Ids
    """Tokens that the model read before the completion, and that the trace did not have."""
    completion: Completion
    """What was sampled; its tokens are part of the trace."""
    reply: Message
    """What the client was sent."""
    rule: ReplyRule
    """How the completion ended and was read."""
    number: int = 0
    """Position among the episode's completions, in the order in which they ended."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One sequence of tokens, as the model read and wrote it."""

    number: int
    tools: str
    """The tools that are shown at its beginning; see `Dialogue`."""
    parent: tuple[int, int] | None = None
    """Number of the trace whose beginning it inherits, and how many of its exchanges; None: its
    beginning was encoded from text."""
    inherited: tuple[Message, ...] = ()
    inherited_ids: Ids = ()
    inherited_stop: StopReason = StopReason.EOS
    """How the completion ended that was the last reply of the inherited beginning."""
    reason: str = ""
    """Why it is no continuation of another trace; empty for the first trace."""
    exchanges: tuple[Exchange, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages, the replies included."""
        return self.inherited + tuple(
            message for each in self.exchanges for message in (*each.asked, each.reply)
        )

    @property
    def token_ids(self) -> Ids:
        """All tokens."""
        parts = ((each.shown, each.completion.token_ids) for each in self.exchanges)
        return tuple(chain(self.inherited_ids, *chain.from_iterable(parts)))

    @property
    def num_sampled(self) -> int:
        """Number of tokens that were sampled in it."""
        return sum(len(each.completion.token_ids) for each in self.exchanges)

    def boundaries(self) -> list[int]:
        """Number of messages at the end of the inherited beginning and of each exchange."""
        ends = [len(self.inherited)]
        for each in self.exchanges:
            ends.append(ends[-1] + len(each.asked) + 1)
        return ends

    def first(self, num_exchanges: int) -> Trace:
        """Return the trace with its first exchanges only."""
        return replace(self, exchanges=self.exchanges[:num_exchanges])

    @property
    def last_stop(self) -> StopReason:
        """How the completion ended that was the last reply."""
        return self.exchanges[-1].completion.stop_reason if self.exchanges else self.inherited_stop


@dataclass(frozen=True, slots=True)
class Pending:
    """A completion that is being sampled."""

    trace: int
    asked: tuple[Message, ...]
    context: Ids
    """All tokens that the model continues."""
    shown: Ids
    """Those at its end that the trace did not have."""
    rule: ReplyRule
    name: str
    """Identity of the completion within the episode."""


@dataclass(frozen=True, slots=True)
class Capture:
    """Everything that was rendered and sampled in one episode."""

    traces: tuple[Trace, ...] = ()
    busy: frozenset[int] = frozenset()
    """Numbers of traces whose next completion is being sampled."""

    @property
    def num_exchanges(self) -> int:
        """Number of completions."""
        return sum(len(each.exchanges) for each in self.traces)


Encode = Callable[[Dialogue, int, StopReason], Ids | None]
"""Encodes what follows a known reply: the conversation, the number of its messages that are known,
and how the last of them ended. With 0 known messages it encodes all of it. None: the template
writes what is known in another way now."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a request continues."""

    trace: Trace
    num_exchanges: int
    goes_on: bool
    """Whether it extends the trace itself; otherwise a new trace inherits its beginning."""

    @property
    def num_known(self) -> int:
        return self.trace.boundaries()[self.num_exchanges]


def begin(
    capture: Capture, dialogue: Dialogue, encode: Encode, rule: ReplyRule
) -> tuple[Capture, Pending]:
    """Decide where a request continues, and reserve the place.

    Args:
        capture: The episode so far.
        dialogue: The conversation to continue.
        encode: Encodes messages.
        rule: How the completion ends and is read.

    Raises:
        CaptureFull: It would begin one trace too many.
    """
    place, reason = _find(capture, dialogue)
    shown: Ids | None = None
    if place is not None:
        known = place.trace.first(place.num_exchanges)
        shown = encode(dialogue, len(known.messages), known.last_stop)
        if shown is None:
            place, reason = None, "the chat template writes the history in another way now"
    if place is not None and place.goes_on:
        assert shown is not None
        trace = place.trace
        asked = dialogue.messages[len(trace.messages) :]
        name = f"{trace.number}/{len(trace.exchanges)}"
        context = trace.token_ids + shown
        pending = Pending(trace.number, asked, context, shown, rule, name)
        return replace(capture, busy=capture.busy | {trace.number}), pending
    number = len(capture.traces)
    if number >= MAX_TRACES:
        raise CaptureFull(
            f"the episode has {MAX_TRACES} traces: conversations that do not extend one another"
        )
    trace = Trace(number, dialogue.tools, reason=reason)
    if place is not None:
        trace = replace(
            trace,
            parent=(place.trace.number, place.num_exchanges),
            inherited=known.messages,
            inherited_ids=known.token_ids,
            inherited_stop=known.last_stop,
        )
    if shown is None:
        shown = encode(dialogue, 0, StopReason.EOS)
        assert shown is not None
    asked = dialogue.messages[len(trace.inherited) :]
    pending = Pending(number, asked, trace.inherited_ids + shown, shown, rule, f"{number}/0")
    return Capture((*capture.traces, trace), capture.busy | {number}), pending


def resume_text(capture: Capture, dialogue: Dialogue) -> Dialogue:
    """Divide a prompt that is one text into what a trace has already, and the rest.

    Args:
        capture: The episode so far.
        dialogue: The prompt, as a single message.

    Returns:
        The messages of the trace that has most of the prompt, and the rest as a new one.
    """
    (prompt,) = dialogue.messages
    length, known = 0, ()
    for trace in capture.traces:
        messages, end = trace.messages, 0
        if messages and messages[0].role != "text":
            continue
        for start, stop in pairwise((0, *trace.boundaries())):
            piece = Dialogue(messages[start:stop]).text()
            if not prompt.content.startswith(piece, end):
                break
            end += len(piece)
            if end > length:
                length, known = end, messages[:stop]
    rest = replace(prompt, content=prompt.content[length:])
    return replace(dialogue, messages=(*known, rest))


def finish(capture: Capture, pending: Pending, completion: Completion, reply: Message) -> Capture:
    """Add a completion to the trace that was reserved for it."""
    trace = capture.traces[pending.trace]
    exchange = Exchange(
        asked=pending.asked,
        shown=pending.shown,
        completion=completion,
        reply=reply,
        rule=pending.rule,
        number=capture.num_exchanges,
    )
    grown = replace(trace, exchanges=(*trace.exchanges, exchange))
    traces = tuple(grown if each.number == trace.number else each for each in capture.traces)
    return Capture(traces, capture.busy - {trace.number})


def give_up(capture: Capture, pending: Pending) -> Capture:
    """Free a reserved place after a request that failed; nothing of it is kept."""
    return replace(capture, busy=capture.busy - {pending.trace})


def _find(capture: Capture, dialogue: Dialogue) -> tuple[_Place | None, str]:
    """Return where a request continues, and if it does not extend a trace why."""
    places: list[_Place] = []
    nearest: tuple[int, Trace] | None = None
    for trace in capture.traces:
        if trace.tools != dialogue.tools or not trace.exchanges:
            continue
        common = num_common(trace.messages, dialogue.messages)
        if nearest is None or common > nearest[0]:
            nearest = common, trace
        usable = min(common, len(dialogue.messages) - 1)
        whole = sum(end <= usable for end in trace.boundaries()[1:])
        is_free = trace.number not in capture.busy
        if whole:
            goes_on = whole == len(trace.exchanges) and is_free
            places.append(_Place(trace, whole, goes_on))
    best = max(places, key=lambda each: (each.num_known, each.goes_on), default=None)
    if best is not None and best.goes_on:
        return best, ""
    return best, _reason(capture, dialogue, nearest)


def _reason(capture: Capture, dialogue: Dialogue, nearest: tuple[int, Trace] | None) -> str:
    """Say why a request does not extend a trace."""
    if not any(each.exchanges for each in capture.traces):
        return "a trace is under way" if capture.busy else ""
    if nearest is None:
        return "the tools are others"
    common, trace = nearest
    known, given = trace.messages, dialogue.messages
    if common == len(given):
        return f"the conversation ends after message {common}, where the trace goes on"
    if common == len(known):
        return f"trace {trace.number} is under way"
    role = known[common].role
    whose = "a reply" if role == "assistant" else f"a message of the {role}"
    if common == 0:
        return "it is another conversation"
    return f"message {common}, {whose}, was changed: {difference(known[common], given[common])}"


# ------------------------------------------------------------------------------- what is trained


def answer_trace(capture: Capture) -> Trace | None:
    """Return the trace of the completion that ended last; None if there is no completion."""
    traces = [each for each in capture.traces if each.exchanges]
    return max(traces, key=lambda each: each.exchanges[-1].number, default=None)


def longest_trace(capture: Capture) -> Trace | None:
    """Return the trace with most sampled tokens; None if there is no completion."""
    traces = [each for each in capture.traces if each.exchanges]
    return max(traces, key=lambda each: each.num_sampled, default=None)


def check(capture: Capture) -> Sequence[str]:
    """Return what contradicts the invariants of a capture, in sentences; empty if nothing does."""
    faults: list[str] = []
    for trace in capture.traces:
        where = f"trace {trace.number}"
        if trace.parent is None:
            if trace.inherited or trace.inherited_ids:
                faults.append(f"{where} inherits from no trace")
            continue
        number, num_exchanges = trace.parent
        if not 0 <= number < trace.number:
            faults.append(f"{where} inherits from trace {number}, which is not before it")
            continue
        source = capture.traces[number]
        kept = source.first(num_exchanges)
        if not 1 <= num_exchanges <= len(source.exchanges):
            faults.append(f"{where} inherits {num_exchanges} exchanges of trace {number}")
        elif kept.token_ids != trace.inherited_ids:
            faults.append(f"{where} inherits other tokens than trace {number} has")
        elif num_common(kept.messages, trace.inherited) != len(trace.inherited) or len(
            kept.messages
        ) != len(trace.inherited):
            faults.append(f"{where} inherits other messages than trace {number} has")
        elif kept.last_stop is not trace.inherited_stop:
            faults.append(f"{where} inherits another ending than trace {number} has")
        if source.tools != trace.tools:
            faults.append(f"{where} inherits from a trace with other tools")
    numbers = sorted(each.number for trace in capture.traces for each in trace.exchanges)
    if numbers != list(range(len(numbers))):
        faults.append(f"the completions are numbered {numbers}")
    return faults
