"""Which tokens end a completion: marks only, never ordinary text.

The tiny tokenizer's marks are <|pad|> 0, <|end|> 1, <|user|> 2, <|assistant|> 3, <|tool|> 4,
<|system|> 5; every other token is a byte.
"""

import json

import pytest

from tir_alp.doctor.conversation import check_tokenizer
from tir_alp.models.tiny import SHIPPED
from tir_alp.models.tiny.model import make_model, make_tokenizer
from tir_alp.rollouts.end_marks import is_mark, ordinary_tokens
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.structure import declared_end_token_ids
from tir_alp.types import StopReason

PAD, END, TOOL = 0, 1, 4


def tokenizer_with(body):
    tokenizer = make_tokenizer()
    prompt = "<|assistant|>" if body.startswith("<") else "assistant: "
    tokenizer.chat_template = (
        "{% for m in messages %}"
        + body
        + "{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
    )
    return tokenizer


BODIES = {
    "a mark after a line end": ("<|{{ m.role }}|>{{ m.content }}\n<|end|>\n", {END}),
    "a mark after a space": ("<|{{ m.role }}|>{{ m.content }} <|end|>", {END}),
    "a line end, then the next role": ("<|{{ m.role }}|>{{ m.content }}\n", {END, TOOL}),
    "plain text": ("{{ m.role }}: {{ m.content }}\n", {END}),
    "another mark than eos": ("<|{{ m.role }}|>{{ m.content }}<|pad|>", {PAD, END}),
}


@pytest.mark.parametrize(("body", "stops"), BODIES.values(), ids=BODIES)
def test_ordinary_text_of_a_frame_never_ends_a_completion(body, stops):
    tokenizer = tokenizer_with(body)
    assert Renderer(tokenizer).stop_token_ids == stops
    assert ordinary_tokens(tokenizer, stops) == {}


@pytest.mark.parametrize("body", [body for body, _ in BODIES.values()], ids=BODIES)
def test_an_observation_completes_what_the_policy_has_sampled_of_the_frame(body):
    tokenizer = tokenizer_with(body)
    renderer = Renderer(tokenizer)
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "so"},
        {"role": "tool", "content": "1"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.decode(renderer.prompt("ab").token_ids)
    stopped = renderer.observation("1", StopReason.STOP)
    assert prompt + "so" + tokenizer.decode(stopped.token_ids) == whole
    after_mark = renderer.observation("1", StopReason.EOS)
    ended, mark, rest = whole[len(prompt) + len("so") :].partition("<|end|>")
    if mark and not ended.strip():
        assert tokenizer.decode(after_mark.token_ids) == rest
    assert not any((*stopped.loss_mask, *after_mark.loss_mask))


def test_a_frame_without_an_end_mark_follows_an_end_token_whole():
    renderer = Renderer(tokenizer_with("{{ m.role }}: {{ m.content }}\n"))
    assert renderer.observation("1", StopReason.EOS) == renderer.observation("1", StopReason.STOP)


def test_spaces_that_a_tokenizer_adds_to_its_vocabulary_are_text():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["        ", "<|own|>"])
    spaces, own = (tokenizer.convert_tokens_to_ids(each) for each in ("        ", "<|own|>"))
    assert not is_mark(tokenizer, spaces)
    assert is_mark(tokenizer, own)


def test_every_end_token_of_the_model_ends_a_completion_unless_it_is_text():
    renderer = Renderer(make_tokenizer(), end_token_ids=(0, 1, 70))
    assert renderer.stop_token_ids == {0, 1}


def test_the_end_tokens_of_a_folder_are_those_of_both_config_files(tmp_path):
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((SHIPPED["tiny"] / name).read_text())
        settings["eos_token_id"] = {"config.json": 1, "generation_config.json": [4, 5]}[name]
        (tmp_path / name).write_text(json.dumps(settings))
    assert declared_end_token_ids(str(tmp_path)) == {1, 4, 5}
    (tmp_path / "generation_config.json").unlink()
    assert declared_end_token_ids(str(tmp_path)) == {1}


def test_the_doctor_refuses_an_end_token_that_is_text():
    tokenizer, model = make_tokenizer(), make_model(0)
    model.generation_config.eos_token_id = [1, 70]
    found = check_tokenizer(tokenizer, Renderer(tokenizer), model, 64)
    assert not found.holds
    assert "end tokens are ordinary text: {70: 'a'}" in found.figure
