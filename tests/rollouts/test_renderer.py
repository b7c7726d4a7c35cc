"""Text to tokens and back. Ids are literal; the tiny tokenizer has one token per byte.

Its marks are <|pad|> 0, <|end|> 1, <|user|> 2, <|assistant|> 3, <|tool|> 4, <|system|> 5.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.envs.parsing import parse_action
from tir_alp.models.tiny.model import make_model, make_tokenizer
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeRunner
from tir_alp.rollouts.renderer import PromptTooLong, Renderer
from tir_alp.rollouts.text_encoder import TextEncoder
from tir_alp.types import StopReason, Trajectory

END, USER, ASSISTANT, TOOL, SYSTEM = 1, 2, 3, 4, 5
A, B = 70, 71  # the tokens of "a" and "b"
BLOCK = "So:\n```python\nprint(1)\n```"


def byte_ids(text: str) -> list[int]:
    """Ids of printable ASCII and line ends, computed without the tokenizer."""
    order = sorted(ByteLevel.alphabet())
    return [
        6 + order.index({" ": "\u0120", "\n": "\u010a", "\r": "\u010d"}.get(c, c)) for c in text
    ]


def completion(ids, reason=StopReason.LENGTH) -> Completion:
    logprobs = tuple(-float(index) for index in range(len(ids)))
    return Completion(token_ids=tuple(ids), logprobs=logprobs, stop_reason=reason, policy_version=0)


def stop_at(renderer: Renderer, ids) -> int | None:
    """Return the index of the first token for which the matcher returns True."""
    matches = renderer.stop_matcher()
    return next((index for index, token in enumerate(ids) if matches(token)), None)


# ------------------------------------------------------------------------- prompt, observation


def test_a_prompt_ends_where_the_first_completion_starts():
    assert Renderer(make_tokenizer()).prompt("ab").token_ids == (USER, A, B, END, ASSISTANT)


def test_a_system_prompt_stands_before_the_task():
    prompt = Renderer(make_tokenizer(), system="b").prompt("a")
    assert prompt.token_ids == (SYSTEM, B, END, USER, A, END, ASSISTANT)


def test_prompts_and_observations_have_no_logprobs():
    renderer = Renderer(make_tokenizer())
    assert not any(renderer.prompt("a").loss_mask)
    assert not any(renderer.observation("a", StopReason.STOP).loss_mask)


def test_an_observation_closes_the_turn_that_the_stop_rule_ended():
    observation = Renderer(make_tokenizer()).observation("ab", StopReason.STOP)
    assert observation.token_ids == (END, TOOL, A, B, END, ASSISTANT)


def test_an_observation_does_not_repeat_an_end_token_that_was_sampled():
    observation = Renderer(make_tokenizer()).observation("ab", StopReason.EOS)
    assert observation.token_ids == (TOOL, A, B, END, ASSISTANT)


def test_an_episode_has_the_tokens_of_the_template_without_a_second_tokenisation():
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    ids = [
        *renderer.prompt("ab").token_ids,
        *byte_ids(BLOCK),
        *renderer.observation("1", StopReason.STOP).token_ids,
    ]
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": BLOCK},
        {"role": "tool", "content": "1"},
    ]
    assert ids == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("text", ["<|end|>", "a<|assistant|>b", "<|end|><|tool|>"])
def test_text_from_outside_never_becomes_a_special_token(text):
    renderer = Renderer(make_tokenizer())
    assert renderer.prompt(text).token_ids == (USER, *byte_ids(text), END, ASSISTANT)
    assert renderer.observation(text, StopReason.EOS).token_ids == (
        TOOL,
        *byte_ids(text),
        END,
        ASSISTANT,
    )


def test_a_lone_surrogate_is_shown_as_a_replacement_character():
    renderer = Renderer(make_tokenizer())
    assert renderer.prompt("a\ud800") == renderer.prompt("a\ufffd")
    whole = renderer.observation("\udfff\U0001f600", StopReason.EOS)
    assert whole == renderer.observation("\ufffd\U0001f600", StopReason.EOS)


def test_a_long_observation_keeps_its_head_and_its_tail():
    renderer = Renderer(make_tokenizer(), max_observation_tokens=5)
    ids = byte_ids("abcdefgh")
    assert renderer.observation("abcdefgh", StopReason.EOS).token_ids == (
        TOOL,
        *(*ids[:2], *ids[-3:]),
        END,
        ASSISTANT,
    )
    assert len(renderer.observation("abcde", StopReason.EOS)) == 5 + 3


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_limit_of_an_observation_is_exact_however_small(limit):
    renderer = Renderer(make_tokenizer(), max_observation_tokens=limit)
    assert len(renderer.observation("abcdefgh", StopReason.EOS)) == limit + 3


def test_a_prompt_that_leaves_no_room_is_reported_with_its_task_and_the_setting():
    renderer = Renderer(make_tokenizer())
    assert len(renderer.prompt_within("ab", 6, "t7")) == 5
    message = "task t7 has 5 tokens.*rollout.max_context_tokens = 5: raise it"
    with pytest.raises(PromptTooLong, match=message):
        renderer.prompt_within("ab", 5, "t7")


# ------------------------------------------------------------------------------------- action


def test_an_action_is_the_text_without_its_end_token():
    renderer = Renderer(make_tokenizer())
    assert renderer.action((A, B, END)) == "ab"
    assert renderer.action((A, B)) == "ab"
    assert renderer.action((END,)) == ""
    assert renderer.action(()) == ""


def test_an_action_shows_the_special_tokens_that_a_model_wrote_in_mid_text():
    assert Renderer(make_tokenizer()).action((A, TOOL, B, END)) == "a<|tool|>b"


def test_an_action_keeps_every_space():
    text = "x = [1 , 2]  # it 's . ok ?"
    assert Renderer(make_tokenizer()).action(byte_ids(text)) == text


# ------------------------------------------------------------------- the fence, a token a byte


@pytest.mark.parametrize(
    "text",
    [
        BLOCK,
        "```python\nprint(1)\n```",
        "```py\nprint(1)\n```",
        "```\nprint(1)\n```",
        "```python\r\nprint(1)\r\n```",
        "```python\n```",
        "```text\nno\n```\n```python\nprint(1)\n```",
        '```python\nx = "```"\n```',
        "Let me see: ```python\nprint(1)\n```",
    ],
)
def test_the_matcher_holds_at_the_third_backtick(text):
    ids = byte_ids(text)
    assert stop_at(Renderer(make_tokenizer()), ids) == len(ids) - 1


@pytest.mark.parametrize(
    "text",
    [
        "no code at all",
        "```python\nprint(1)\n``",
        "```text\nnot a program\n```",
        "`inline` and ``` in mid-line\n``` x",
        '```python\nx = "```"\n',
    ],
)
def test_the_matcher_waits_while_no_python_block_is_complete(text):
    assert stop_at(Renderer(make_tokenizer()), byte_ids(text)) is None


def test_a_character_spread_over_tokens_does_not_disturb_the_matcher():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("```python\nprint('€π')\n```", add_special_tokens=False)
    assert len(ids) == len("```python\nprint('€π')\n```") + 2 + 1
    assert stop_at(Renderer(tokenizer), ids) == len(ids) - 1


def test_bytes_that_are_no_text_do_not_disturb_the_matcher():
    order = sorted(ByteLevel.alphabet())
    stray = 6 + order.index("\u00ff")  # a byte that UTF-8 never contains
    ids = [stray, *byte_ids("\n```python\nprint(1)\n```")]
    assert stop_at(Renderer(make_tokenizer()), ids) == len(ids) - 1


def test_every_matcher_starts_afresh():
    renderer, ids = Renderer(make_tokenizer()), byte_ids(BLOCK)
    assert stop_at(renderer, ids[:8]) is None
    assert stop_at(renderer, ids[8:]) is None


def test_cut_drops_what_follows_the_first_block():
    ids = byte_ids(BLOCK + "\nand ```python\nprint(2)\n```")
    kept = Renderer(make_tokenizer()).cut(completion(ids))
    length = len(BLOCK)
    assert kept == completion(ids[:length], StopReason.STOP)
    assert kept.logprobs[-1] == -(length - 1)


def test_cut_leaves_alone_what_has_no_block():
    whole = completion((*byte_ids("it is 7"), END), StopReason.EOS)
    assert Renderer(make_tokenizer()).cut(whole) is whole


# ---------------------------------------------------------------- the fence, tokens that straddle


def bpe_tokenizer(*words: str, **changes):
    """Make the tiny tokenizer, with one more token for each of `words` and their prefixes."""
    tiny = make_tokenizer()
    vocabulary = dict(tiny.get_vocab())
    merges = []
    for word in (word.replace("\n", "\u010a").replace(" ", "\u0120") for word in words):
        for length in range(2, len(word) + 1):
            merges.append((word[: length - 1], word[length - 1]))
            vocabulary.setdefault(word[:length], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|tool|>", "<|system|>"],
        chat_template=tiny.chat_template,
        **changes,
    )


def ids_of(tokenizer, *tokens: str) -> tuple[int, ...]:
    names = [token.replace("\n", "\u010a").replace(" ", "\u0120") for token in tokens]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert None not in ids
    return tuple(ids)


@pytest.mark.parametrize(
    "fence",
    [
        ("\n```",),
        ("\n```\n\nThe",),
        ("\n", "```\n\nThe"),
        ("\n``", "`\n\nThe"),
        ("\n", "`", "``"),
        ("\n`", "`", "`"),
    ],
)
def test_cut_keeps_a_token_that_straddles_the_fence_whole(fence):
    words = ("```python\n", "print", "\n```\n\nThe", "```\n\nThe", "`\n\nThe")
    tokenizer = bpe_tokenizer(*words)
    kept = ids_of(tokenizer, "```python\n", "print", "(", "1", ")", *fence)
    sampled = completion((*kept, *ids_of(tokenizer, "print", "```")))
    cut = Renderer(tokenizer).cut(sampled)
    assert cut == completion(kept, StopReason.STOP)
    assert Renderer(tokenizer).action(cut.token_ids) == "```python\nprint(1)" + "".join(fence)


def test_a_straddling_token_belongs_to_the_action_and_the_call_is_the_same():
    tokenizer = bpe_tokenizer("```python\n", "```\n\nThe")
    ids = tokenizer.encode("```python\nprint(1)\n```\n\nThe end", add_special_tokens=False)
    renderer = Renderer(tokenizer)
    action = renderer.action(renderer.cut(completion(ids)).token_ids)
    assert action == "```python\nprint(1)\n```\n\nThe"
    assert parse_action(action) == parse_action("```python\nprint(1)\n```")


# ------------------------------------------------------------------- tokenizers that do not fit


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos token; set eos_token"):
        Renderer(tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; add chat_template"):
        Renderer(tokenizer)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        name_or_path = "slow"
        is_fast = False

    with pytest.raises(ValueError, match="'slow' is not a fast one"):
        Renderer(Slow())


BODY = "<|{{ message.role }}|>{{ message.content }}<|end|>"


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{% for message in messages %}<|user|>{{ message.content | upper }}{% endfor %}", "user"),
        (
            "{% for message in messages %}{% if message.role != 'tool' %}"
            + BODY
            + "{% endif %}{% endfor %}",
            "tool",
        ),
        (
            "{% for message in messages %}{% if message.role == 'assistant' %}"
            "<|assistant|>{{ message.content.split('s')[-1] }}<|end|>{% else %}"
            + BODY
            + "{% endif %}{% endfor %}",
            "tool",
        ),
        ("{% for message in messages %}" + BODY + BODY + "{% endfor %}", "user"),
    ],
    ids=["changes the task", "drops the tool", "cuts the completion", "says it twice"],
)
def test_a_template_that_does_not_keep_what_it_is_given_is_refused(template, role):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"does not keep the content of a '{role}' message"):
        Renderer(tokenizer)


def test_a_template_that_refuses_a_role_is_reported_with_its_message():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'tool' %}"
        "{{ raise_exception('no tools here') }}{% endif %}" + BODY + "{% endfor %}"
    )
    with pytest.raises(ValueError, match="no tools here"):
        Renderer(tokenizer)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) | length }}", "Range too big"),
        ("{{ messages[0].content.no_such() }}", "no_such"),
        ("{{ 'x' + 1 }}", "can only concatenate str"),
        ("{{ messages[0]['content'].index('nowhere') }}", "substring not found"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_whatever_a_template_raises_is_its_refusal(fault, reason):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = fault + "{% for message in messages %}" + BODY + "{% endfor %}"
    with pytest.raises(ValueError, match=f"the chat template of .* refuses a message: .*{reason}"):
        Renderer(tokenizer)


# --------------------------------------------------------------- nothing is tokenised twice


class Echo(gymnasium.Env[str, str]):
    """Returns `<length of the action>` twice and then ends the episode."""

    def reset(self, *, seed=None, options=None):
        self.actions: list[str] = []
        return "Q:", {}

    def step(self, action):
        self.actions.append(action)
        return f"<{len(action)}>", 0.0, len(self.actions) == 3, False, {}


class Watched:
    """A tokenizer that records every text it has to encode, by whichever method."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.encoded: list[str] = []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, text, **how):
        self.encoded.append(text)
        return self._tokenizer.encode(text, **how)

    def __call__(self, *_, **__):
        raise AssertionError("the renderer has one way to encode")

    tokenize = encode_plus = batch_encode_plus = __call__


def test_nothing_that_the_model_wrote_is_ever_encoded(monkeypatch):
    tokenizer = Watched(make_tokenizer())
    renderer = Renderer(tokenizer)
    tokenizer.encoded.clear()
    encode = TextEncoder.content

    def content(self, text, starts_text):
        tokenizer.encoded.append(text)
        return encode(self, text, starts_text)

    monkeypatch.setattr(TextEncoder, "content", content)
    sampled: list[Completion] = []
    env = Echo()

    async def play() -> Trajectory:
        engine = TransformersEngine(make_model(0), max_cache_tokens=512)

        async def generate(token_ids, sampling):
            sampled.append(await engine.generate(token_ids, sampling))
            return sampled[-1]

        with ThreadPoolExecutor(1) as threads:
            runner = EpisodeRunner(
                make_env=lambda: env,
                generate=generate,
                renderer=renderer,
                limits=RolloutConfig(max_turn_tokens=24, max_context_tokens=256),
                threads=threads,
                slots=asyncio.Semaphore(1),
                seed=0,
                on_failure=lambda failure: pytest.fail(str(failure)),
            )
            trajectory = await runner.run_episode(Task("t", "Q:", "A"), 0, 0)
            await engine.close()
        return trajectory

    trajectory = asyncio.run(play())
    first, second, _ = env.actions
    assert tokenizer.encoded == ["Q:", f"<{len(first)}>", f"<{len(second)}>"]
    assert [turn.completion.token_ids for turn in trajectory.turns] == [
        each.token_ids for each in sampled
    ]
    # Random bytes are not text, so a second tokenisation would have given other tokens.
    assert any("\ufffd" in action for action in env.actions)
