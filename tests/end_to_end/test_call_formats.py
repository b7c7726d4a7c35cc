"""A conversation of every form of calls: rendered, generated, read, run, observed and audited.

The tokens of the turns are forced; model, engine, sandbox and audit are the real ones. The forms
are those of small templates and, where a folder of them is at hand, of the families' own.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.templates import tokenizer_for
from tests.random_model import save_random_model
from tests.rollouts.call_templates import FAMILIES, REAL
from tests.runs import assert_honest, train_with
from tir_alp.records.trajectories import from_record
from tir_alp.rollouts.formats import CallForm
from tir_alp.rollouts.formats.detect import start_of_turn
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.command_line import load_config
from tir_alp.tools.base import function_schema
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import PythonTool
from tir_alp.types import StopReason

FOLDER = os.environ.get("TIR_ALP_TEMPLATES", "")
TOOLS = (function_schema(PythonTool(None)),)
PROGRAMS = ('x = "6*7"\nprint(eval(x))', 'print(x + "</tool>")')
OUTPUTS = ("42", "6*7</tool>")

pytestmark = [pytest.mark.slow, pytest.mark.sandbox, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Family:
    """A chat template, and what its model writes."""

    template: str
    form: str

    @property
    def tokenizer(self) -> Any:
        return tokenizer_for(self.template)

    def renderer(self, **settings: Any) -> Renderer:
        return Renderer(
            self.tokenizer,
            call_format="tool_call",
            tools=TOOLS,
            rewritten_history="append",
            **settings,
        )


def families() -> list[Any]:
    own = [pytest.param(Family(text, form), id=name) for name, (form, text) in FAMILIES.items()]
    if not FOLDER:
        return own
    real = {name: Path(FOLDER) / f"{name}.jinja" for name in REAL}
    return own + [
        pytest.param(Family(path.read_text(), REAL[name]), id=name)
        for name, path in real.items()
        if path.exists()
    ]


def written_ids(form: CallForm, count: int) -> list[str]:
    """The ids of the calls, as the models of a form write them."""
    if form.name == "kimi":
        return [f"functions.python:{index}" for index in range(count)]
    return [f"{index}bcdefghi" for index in range(count)]


def conversation(renderer: Renderer, num_calls: int) -> tuple[str, str]:
    """What the template makes of a turn of calls: the turn, and the conversation with outputs.

    If the template does not keep the prompt, the latter is only what follows the turn. Models
    whose templates write no calls write them as their forms say.
    """
    template, form = renderer.template, renderer.form
    ids = written_ids(form, num_calls)
    prompt = template.render([{"role": "user", "content": "What is 6*7?"}], generation=True)
    outputs = [
        {"role": "tool", "name": "python", "tool_call_id": each, "content": output}
        for each, output in zip(ids, OUTPUTS, strict=False)
    ]
    calls = [
        {"id": each, "type": "function", "function": {"name": "python", "arguments": arguments}}
        for each, arguments in zip(ids, [{"code": each} for each in PROGRAMS], strict=False)
    ]
    user = {"role": "user", "content": "What is 6*7?"}
    if not form.is_in_history:
        listed = [{"name": "python", "arguments": {"code": each}} for each in PROGRAMS[:num_calls]]
        turn = form.opening + json.dumps(listed) + form.closing
        words = {"role": "assistant", "content": turn}
        return turn, template.render([user, words, *outputs], generation=True)
    for as_text in (False, True):
        for call in calls:
            arguments = call["function"]["arguments"]
            if as_text:
                call["function"]["arguments"] = json.dumps(arguments)
        try:
            turn = {"role": "assistant", "content": "", "tool_calls": calls}
            whole = template.render([user, turn, *outputs], generation=True)
            made = template.render([user, turn])
        except ValueError:
            continue
        if made.startswith(prompt):
            return made.removeprefix(prompt), whole
        # The prompt begins a thought, which the template does not write in its history.
        after = start_of_turn(template, made)
        return made[after:], whole[after + len(made[after:]) :]
    raise AssertionError("the template refuses the calls")


@pytest.mark.parametrize("family", families())
def test_a_conversation_round_trips(family, tmp_path):
    single = family.renderer()
    num_calls = 1 if single.form.one_per_turn else 2
    renderer = family.renderer(max_calls=num_calls)
    assert renderer.form.name == family.form
    tokenizer = family.tokenizer
    turn, whole = conversation(renderer, num_calls)

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    broken = turn[: turn.rindex("6*7")]  # the call breaks off in the middle of its program
    end = renderer.end_mark
    scripts = [
        [encoded(turn), [*encoded(broken), end], [*encoded(f"\\boxed{{{answer}}}"), end]]
        for answer in (42, 41)
    ]
    model = save_random_model(tokenizer, tmp_path / "model", 16384)
    questions = [f"What is 6*7? ({number})" for number in range(40)]
    rows = [{"question": question, "answer": "42"} for question in questions]
    (tmp_path / "tasks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = [
        *("--name", "formats", "--model.path", str(model), "--steps", "1"),
        *("--model.rewritten_history", "append", "--env.id", "tir_alp.envs:MultiTool-v0"),
        *("--env.kwargs.tools", '["python"]', "--env.kwargs.instruction", ""),
        *("--env.kwargs.max_calls", str(num_calls), "--env.kwargs.sandbox.preload", "[]"),
        *("--data.source", "jsonl", "--data.path", str(tmp_path / "tasks.jsonl")),
        *("--rollout.groups_per_step", "1", "--rollout.group_size", "2"),
        *("--rollout.max_turn_tokens", "1024", "--rollout.max_context_tokens", "16000"),
        *("--eval.every", "0", "--eval.num_tasks", "1", "--eval.greedy", "false"),
        *("--engine.type", "custom"),
        *("--engine.factory", "tests.forced_engine:open_engine"),
        *("--engine.kwargs.scripts", json.dumps(scripts)),
    ]
    run = train_with(tmp_path, load_config(words, {}))
    assert_honest(run)
    rows = (run / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    first, second = (from_record(json.loads(row)) for row in rows)
    assert [first.reward, second.reward] == [1.0, 0.0]
    called, bad, _ = first.turns

    assert called.stop_reason is (StopReason.EOS if renderer.form.ends_turn else StopReason.STOP)
    assert called.info["tool_calls"] == num_calls and called.info["bad_calls"] == 0
    texts = [each["text"] for each in called.info["calls"]] or [called.info["observation"]]
    assert texts == list(OUTPUTS[:num_calls])
    (question,) = [each for each in questions if each in tokenizer.decode(first.prompt.token_ids)]
    spans = (first.prompt, called.completion, called.observation)
    shown = [token for span in spans for token in span.token_ids]
    assert tokenizer.decode(shown).endswith(whole.replace("What is 6*7?", question))
    assert tokenizer.decode(first.prompt.token_ids) == renderer.template.render(
        [{"role": "user", "content": question}], generation=True
    )

    assert bad.info["bad_calls"] == 1 and bad.outcome is Outcome.TOOL_ERROR
    said = bad.info["error"].partition('"')[0]  # some templates write outputs as JSON
    assert len(said) > 20 and said in tokenizer.decode(bad.observation.token_ids)
