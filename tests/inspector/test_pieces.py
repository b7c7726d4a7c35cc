"""The text of each token: together they are the whole text, and secrets are not shown."""

import random

import pytest
from tokenizers import Tokenizer

from tests.inspector.made import TOKENIZER
from tir_alp.inspector.highlight import code_ranges
from tir_alp.inspector.pieces import load_pieces, pieces_of, without_secrets
from tir_alp.models.tiny import ABLE
from tir_alp.records.readable import REDACTED

FAST = Tokenizer.from_file(str(ABLE / "tokenizer.json"))


@pytest.mark.parametrize("text", ["plain words", "naïve 日本語 🙂🏳️‍🌈", "a\r\n\tb\x00\u202ec", ""])
def test_pieces_make_the_whole(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces = pieces_of(FAST, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_random_tokens_have_a_piece_each():
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(FAST.get_vocab_size()) for _ in range(30)]
        assert len(pieces_of(FAST, ids)) == 30
    unknown = pieces_of(FAST, [70, 10**6, 71])
    assert len(unknown) == 3 and "".join(unknown) == TOKENIZER.decode([70, 71])


def test_a_secret_is_shown_by_none_of_its_tokens():
    secret = "sk-abcdefghijklmnop0123"
    pieces = ["a ", "b sk", "-abcdefgh", "ijklmnop", "0123", ". c"]
    shown = without_secrets(pieces, ())
    assert shown == ["a ", f"b {REDACTED}", "", "", "", ". c"]
    assert secret not in "".join(shown)
    assert without_secrets(["my", " word", "s go"], (" words",)) == ["my", REDACTED, " go"]
    assert without_secrets(["x", "y"], ()) == ["x", "y"]


def test_two_secrets_in_one_token():
    first, second = "hf_" + "a" * 24, "hf_" + "b" * 24
    assert without_secrets([f"{first} and {second}!"], ()) == [f"{REDACTED} and {REDACTED}!"]


def test_a_run_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError):
        load_pieces(tmp_path, {"model": {"path": str(tmp_path / "none")}})


def test_code_in_fences_and_in_calls_is_coloured():
    text = "so\n```python\nx = 'a' # c\nfor i in range(3): pass\n```\nand <tool_call>{\"n\": 7}"
    found = {(text[start:stop], kind) for start, stop, kind in code_ranges(text)}
    assert {("'", "string"), ("# c", "comment"), ("for", "keyword"), ("3", "number")} <= found
    assert {("range", "builtin"), ("7", "number")} <= found
    assert code_ranges("no code, for example `for`") == []
