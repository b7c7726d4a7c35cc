"""Random clients against the capture: it goes on by tokens, and every change is found."""

import random
from dataclasses import replace

import pytest

from tests.agents.templates import TOOLS, encoder
from tir_alp.agents import capture as captures
from tir_alp.agents.capture import Capture, CaptureFull
from tir_alp.agents.messages import Call, Dialogue, Message, from_record, num_common, to_record
from tir_alp.agents.replies import ReplyRule, read_reply
from tir_alp.engines.base import Completion
from tir_alp.types import StopReason

ENCODERS = {name: encoder(name) for name in ("hermes", "mistral", "drops")}
RULE = ReplyRule()


class Client:
    """Plays against a capture, with an engine that writes random words and calls."""

    def __init__(self, seed: int, template: str = "hermes"):
        self.random = random.Random(seed)
        self.encoder = ENCODERS[template]
        self.tools = TOOLS if template != "drops" else ""
        self.capture = Capture()
        self.contexts: dict[int, tuple[int, ...]] = {}  # of each completion, by its number
        self.sampled: list[tuple[int, ...]] = []

    def encode(self, dialogue, num_known, ended):
        if num_known == 0:
            return self.encoder.opening(dialogue)
        return self.encoder.extension(dialogue, num_known, ended)

    def rule(self, dialogue):
        return ReplyRule(self.encoder.style(dialogue))

    def begin(self, dialogue):
        begun, pending = captures.begin(self.capture, dialogue, self.encode, self.rule(dialogue))
        self.capture = begun
        return pending

    def finish(self, pending):
        text = "".join(self.random.choices("abc <>|\n{}", k=self.random.randint(1, 9)))
        if self.tools and self.random.random() < 0.5:
            text += '<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>'
        reason = self.random.choice([StopReason.EOS, StopReason.LENGTH, StopReason.STOP])
        end = "<|end|>" if reason is StopReason.EOS else ""
        ids = tuple(self.encoder.tokenizer.encode(text + end, add_special_tokens=False))
        completion = Completion(
            token_ids=ids, logprobs=(-1.0,) * len(ids), stop_reason=reason, policy_version=0
        )
        reply = read_reply(self.encoder.text(ids), pending.rule, pending.name)
        self.contexts[self.capture.num_exchanges] = pending.context
        self.sampled.append(ids)
        self.capture = captures.finish(self.capture, pending, completion, reply)
        return reply

    def ask(self, messages):
        dialogue = Dialogue(tuple(messages), self.tools)
        pending = self.begin(dialogue)
        return pending, self.finish(pending)

    def news(self, reply=None):
        if reply is not None and reply.calls:
            return [Message("tool", "out", call_id=each.call_id) for each in reply.calls]
        return [Message("user", "".join(self.random.choices("xyz<|end|>", k=4)))]


def consistent(client):
    """Assert what holds of any capture, whatever the client did."""
    capture = client.capture
    assert captures.check(capture) == []
    exchanges = sorted(
        (each for trace in capture.traces for each in trace.exchanges), key=lambda e: e.number
    )
    assert [each.completion.token_ids for each in exchanges] == client.sampled
    for trace in capture.traces:
        ids = trace.inherited_ids
        for each in trace.exchanges:
            ids += each.shown
            assert ids == client.contexts[each.number]
            ids += each.completion.token_ids
        assert ids == trace.token_ids


@pytest.mark.parametrize("template", ["hermes", "mistral"])
@pytest.mark.parametrize("seed", range(25))
def test_a_client_that_only_appends_has_one_trace(seed, template):
    client = Client(seed, template)
    messages = client.news()
    for _ in range(6):
        _, reply = client.ask(messages)
        messages += [reply, *client.news(reply)]
    assert len(client.capture.traces) == 1
    consistent(client)


def test_dropped_thinking_begins_a_trace_per_turn():
    client = Client(0, "drops")
    messages = client.news()
    for _ in range(3):
        pending = client.begin(Dialogue(tuple(messages)))
        text = "<think>x</think>y<|end|>"
        ids = tuple(client.encoder.tokenizer.encode(text, add_special_tokens=False))
        completion = Completion(
            token_ids=ids,
            logprobs=(0.0,) * len(ids),
            stop_reason=StopReason.EOS,
            policy_version=0,
        )
        reply = Message("assistant", text.removesuffix("<|end|>"))
        client.contexts[client.capture.num_exchanges] = pending.context
        client.sampled.append(ids)
        client.capture = captures.finish(client.capture, pending, completion, reply)
        messages += [reply, *client.news()]
    traces = client.capture.traces
    assert [len(each.exchanges) for each in traces] == [1, 1, 1]
    assert "in another way" in traces[1].reason and traces[1].parent is None
    consistent(client)


def _edit(rng: random.Random, messages: list[Message]) -> list[Message]:
    """Change one message before the last, in a way that a client might."""
    edited = [*messages]
    at = rng.randrange(len(edited) - 1)
    old = edited[at]
    ways = ["content", "drop", "double", "role"]
    if old.calls:
        ways += ["arguments", "call", "call_id"]
    if at + 2 < len(edited):
        ways.append("swap")
    match rng.choice(ways):
        case "content":
            place = rng.randint(0, len(old.content))
            edited[at] = replace(old, content=old.content[:place] + "Q" + old.content[place:])
        case "drop":
            del edited[at]
        case "double":
            edited.insert(at, old)
        case "role":
            role = "user" if old.role != "user" else "system"
            edited[at] = Message(role, old.content)
        case "arguments":
            call = replace(old.calls[0], arguments='{"code": "2"}')
            edited[at] = replace(old, calls=(call, *old.calls[1:]))
        case "call":
            edited[at] = replace(old, calls=())
        case "call_id":
            call = replace(old.calls[0], call_id="changed00")
            edited[at] = replace(old, calls=(call, *old.calls[1:]))
        case "swap":
            edited[at], edited[at + 1] = edited[at + 1], edited[at]
    return edited


@pytest.mark.parametrize("seed", range(40))
def test_no_edited_history_goes_on_with_a_trace(seed):
    client = Client(seed)
    messages = client.news()
    for _ in range(4):
        _, reply = client.ask(messages)
        messages += [reply, *client.news(reply)]
    for number in range(50):
        rng = random.Random(f"{seed}/{number}")
        edited = _edit(rng, messages)
        known = client.capture.traces[0].messages
        if num_common(known, edited) == len(known):  # it was added to, which is no change
            continue
        try:
            pending = client.begin(Dialogue(tuple(edited), client.tools))
        except ValueError:  # the template refuses it
            continue
        trace = client.capture.traces[pending.trace]
        assert pending.trace > 0 and trace.reason
        kept = client.capture.traces[0].messages[: len(trace.inherited)]
        assert trace.inherited == kept
        text = client.encoder.tokenizer.decode(list(pending.context))
        assert text.endswith("<|assistant|>")
        client.capture = captures.give_up(client.capture, pending)
    consistent(client)


@pytest.mark.parametrize("seed", range(30))
def test_clients_that_do_everything_at_once_stay_exact(seed):
    client = Client(seed)
    talks = [client.news()]
    waiting = []
    for _ in range(40):
        action = client.random.random()
        talk = client.random.choice(talks)
        if action < 0.45:
            waiting.append((talk, client.begin(Dialogue(tuple(talk), client.tools))))
        elif action < 0.8 and waiting:
            asked, pending = waiting.pop(client.random.randrange(len(waiting)))
            reply = client.finish(pending)
            talks.append([*asked, reply, *client.news(reply)])
        elif action < 0.85 and waiting:
            _, pending = waiting.pop()
            client.capture = captures.give_up(client.capture, pending)
        elif action < 0.93:
            talks.append(client.news())  # a sub-agent
        else:
            talks.append([*talk[:1], *client.news()])  # a compacted context
    places = [pending.trace for _, pending in waiting]
    assert len(places) == len(set(places)), "two requests continue the same trace"
    consistent(client)


def test_a_retry_reads_the_tokens_that_the_first_try_read():
    client = Client(3)
    first, reply = client.ask(client.news())
    messages = [*first.asked, reply, *client.news(reply)]
    one, _ = client.ask(messages)
    again, _ = client.ask(messages)
    assert one.trace == 0 and again.trace == 1 and one.context == again.context
    assert client.capture.traces[1].parent == (0, 1)
    assert "where the trace goes on" in client.capture.traces[1].reason


def test_arguments_that_a_client_wrote_again_are_the_same_call():
    client = Client(0)
    pending = client.begin(Dialogue(tuple(client.news()), TOOLS))
    call = Call("a00000000", "python", '{"code": "1", "x": 1.0}')
    text = "<tool_call>"
    ids = tuple(client.encoder.tokenizer.encode(text, add_special_tokens=False))
    completion = Completion(
        token_ids=ids, logprobs=(-1.0,) * len(ids), stop_reason=StopReason.EOS, policy_version=0
    )
    reply = Message("assistant", "", (call,))
    client.capture = captures.finish(client.capture, pending, completion, reply)
    for arguments, trace in (('{"x":1.0,"code":"1"}', 0), ('{"x": 1, "code": "1"}', 1)):
        again = replace(reply, calls=(replace(call, arguments=arguments),))
        dialogue = Dialogue((*pending.asked, again, Message("tool", "1", call_id="a")), TOOLS)
        assert client.begin(dialogue).trace == trace


def test_an_episode_cannot_have_traces_without_end():
    client = Client(0)
    for number in range(captures.MAX_TRACES):
        client.ask([Message("user", str(number))])
    with pytest.raises(CaptureFull, match="500 traces"):
        client.ask([Message("user", "one more")])


def test_the_answer_and_the_longest_trace():
    client = Client(1)
    assert captures.answer_trace(client.capture) is None
    for number in range(5):
        client.ask([Message("user", str(number))])
    sizes = [each.num_sampled for each in client.capture.traces]
    longest, last = captures.longest_trace(client.capture), captures.answer_trace(client.capture)
    assert longest is not None and longest.num_sampled == max(sizes)
    assert last is not None and last.number == 4


def test_messages_survive_their_record():
    message = Message("assistant", "a\ud800", (Call("1", "f", "{}"),))
    assert from_record(to_record(message)) == message
    with pytest.raises(ValueError, match="the role is 'robot'"):
        from_record({"role": "robot", "content": ""})
