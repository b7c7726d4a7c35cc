"""Text in the records: what the tokens say, of bounded size, and without secrets."""

import json
import time

import pytest

from tir_alp.models.tiny import ABLE
from tir_alp.records.readable import (
    REDACTED,
    decoder,
    holds_redacted,
    reading,
    redacted,
    secret_values,
    shortened,
    shows,
)
from tir_alp.records.trajectories import from_record, texts_of, to_record
from tir_alp.tools.outcome import Outcome
from tir_alp.training.policy import load_tokenizer
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn

SECRETS = (
    "sk-proj-abcdefghij0123456789",
    "hf_abcdefghijklmnopqrstuvwxyz",
    "ghp_0123456789abcdefghijklmnopqrstuvwxyz",
    "AKIAABCDEFGHIJKLMNOP",
    "xoxb-0123456789-abc",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF_-123",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
)


def episode(tokenizer, observation: str) -> Trajectory:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    words = ids("so print 6 * 7")
    turn = Turn(
        completion=TokenSpan(words, (-0.5,) * len(words)),
        observation=TokenSpan(ids(observation)),
        policy_version=0,
        stop_reason=StopReason.STOP,
        outcome=Outcome.OK,
        reward=1.0,
        info={"observation": observation, "outputs": [{"text": observation}], "tool_calls": 1},
    )
    return Trajectory("t", 0, TokenSpan(ids("what is 6 * 7")), (turn,), True, False)


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_recognised_by_their_form(secret):
    assert redacted(f"before {secret} after") == f"before {REDACTED} after"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("password = 'hunter2hunter2'", f"password = '{REDACTED}'"),
        ('{"api_key": "abcd1234efgh"}', f'{{"api_key": "{REDACTED}"}}'),
        ("Authorization: Bearer abcdefghij0123456789", f"Authorization: Bearer {REDACTED}"),
        ("postgres://me:topsecret@db/x", f"postgres://me:{REDACTED}@db/x"),
    ],
)
def test_the_value_that_a_name_gives_away_goes_and_the_name_stays(text, shown):
    assert redacted(text) == shown


def test_mathematics_and_code_stay():
    text = "risk-free sk-1 = 3; key = lambda x: x; password_length = 12; https://a.b/c?d=e@f 3:4"
    assert redacted(text) == text


def test_values_of_environment_variables_are_secrets_if_their_names_say_so():
    values = secret_values(
        {"MY_TOKEN": "plain words", "TOKENIZERS_PARALLELISM": "false and long", "A_KEY": "short"}
    )
    assert values == ("plain words",)
    assert redacted("it said plain words.", values) == f"it said {REDACTED}."


def test_a_hostile_text_is_searched_in_linear_time():
    began = time.perf_counter()
    for piece in ("eyJa.", "a-", "sk-", "://a:", "password ", "-----BEGIN PRIVATE KEY-----", "=1"):
        redacted(piece * 100_000)
    assert time.perf_counter() - began < 5


def test_long_texts_lose_their_middle_and_still_show_the_whole():
    whole = "".join(map(str, range(1000)))
    short = shortened(whole, 100)
    assert len(short) < 150
    assert short.startswith("01234") and short.endswith("999")
    assert shows(short, whole)
    assert not shows(short, whole[:-1] + "8") and not shows(short, "1" + whole)


def test_what_is_left_out_may_be_anything_but_not_overlap():
    assert shows(f"a{REDACTED}b{REDACTED}c", "a12b34c")
    assert not shows(f"a{REDACTED}b{REDACTED}c", "a12d34c")
    assert not shows(f"aa{REDACTED}aa", "aaa")
    assert not shows("aaa", "aab")


def test_a_record_has_text_and_no_secret_and_reads_back(monkeypatch):
    tokenizer = load_tokenizer(str(ABLE))
    monkeypatch.setenv("DATABASE_PASSWORD", "4711 47110815")
    trajectory = episode(tokenizer, "the answer is 4711 47110815 here")
    record = to_record(trajectory, reading(tokenizer, 1000))
    written = json.dumps(record)
    assert "47110815" not in written
    assert holds_redacted(record["turns"][0]["info"])
    texts = texts_of(record)
    assert texts[:2] == ["what is 6 * 7", "so print 6 * 7"]
    assert texts[2] == f"the answer is {REDACTED} here"
    assert [*from_record(json.loads(written)).spans()] == [*trajectory.spans()]


def test_a_record_without_text_is_exact_and_so_are_old_ones():
    tokenizer = load_tokenizer(str(ABLE))
    trajectory = episode(tokenizer, "password = 'hunter2hunter2'")
    record = to_record(trajectory)
    assert texts_of(record) == [None] * 3
    assert from_record(json.loads(json.dumps(record))) == trajectory
    silent = to_record(trajectory, reading(tokenizer, 0))
    assert texts_of(silent) == [None] * 3 and holds_redacted(silent)


def test_a_text_that_is_none_is_refused():
    record = json.loads(json.dumps(to_record(episode(load_tokenizer(str(ABLE)), "x"))))
    record["prompt"]["text"] = 7
    with pytest.raises(ValueError, match="text"):
        from_record(record)


def test_special_tokens_are_shown():
    tokenizer = load_tokenizer(str(ABLE))
    mark = tokenizer.eos_token
    assert decoder(tokenizer)([tokenizer.eos_token_id]) == mark
