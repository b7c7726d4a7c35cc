"""A GGUF file as a Hugging Face folder, against the package gguf and the file itself."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.models.gguf_files import MERGES, TEMPLATE, byte_characters, vocabulary, write_gguf
from tir_alp.models.from_gguf import cached, convert
from tir_alp.models.gguf_tokenizer import SPLITTING
from tir_alp.models.resolve import resolve
from tir_alp.models.tiny import BASE

ROOT = Path(__file__).parents[2]
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = ("a  12\n\n1", "it's\n    x = 123 // 7é\n", " 1234\n\n\n56  in\t in", "▁ <0x41>")


def quiet(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(file)
    return file


@pytest.fixture(scope="module")
def folder(source) -> Path:
    convert(source, source.parent / "small", "float32", quiet)
    return source.parent / "small"


def test_weights_are_the_files_own_bit_for_bit(source, folder):
    weights = load_file(folder / "model.safetensors")
    tensors = {each.name: each for each in gguf.GGUFReader(source).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    }
    for of_file, of_folder in names.items():
        each = tensors[of_file]
        expected = gguf.dequantize(each.data, each.tensor_type)
        assert weights[of_folder].dtype == torch.float32
        assert np.array_equal(weights[of_folder].numpy(), expected), of_file
    kinds = {tensors[name].tensor_type.name for name in names}
    assert kinds == {"Q8_0", "Q4_1", "F32"}


def test_template_and_end_marks_are_kept(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [2, 0]  # <|im_end|>, as the file declares, and <|endoftext|>
    assert tokenizer("<|im_end|><tool>").input_ids == [2, vocabulary().index("<tool>")]
    assert json.loads((folder / "source.json").read_text())["licence"] == "mit"


def merged(piece: str) -> list[str]:
    """The tokens of a piece by the definition of byte-pair encoding."""
    characters = byte_characters()
    parts = [characters[byte] for byte in piece.encode()]
    ranks: dict[tuple[str, ...], int] = {
        tuple(each.split(" ")): rank for rank, each in enumerate(MERGES)
    }
    while pairs := [(ranks[pair], pair) for pair in itertools.pairwise(parts) if pair in ranks]:
        _, (left, right) = min(pairs)
        joined, rest = [], parts
        while rest:
            if tuple(rest[:2]) == (left, right):
                joined, rest = [*joined, left + right], rest[2:]
            else:
                joined, rest = [*joined, rest[0]], rest[1:]
        parts = joined
    return parts


PATTERNS = {  # how programs for GGUF files split text, by tokenizer.ggml.pre: one after the other
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


def pieces(text: str, patterns: list[str]) -> list[str]:
    found = [text]
    for pattern in patterns:
        split = []
        for piece in found:
            at = 0
            for match in regex.finditer(pattern, piece):
                split += [piece[at : match.start()], match.group()]
                at = match.end()
            split.append(piece[at:])
        found = [each for each in split if each]
    return found


@pytest.mark.parametrize("splitting", PATTERNS)
def test_text_is_split_as_the_file_says(tmp_path, splitting):
    write_gguf(tmp_path / "model.gguf", splitting=splitting)
    convert(tmp_path / "model.gguf", tmp_path / "out", "float32", quiet)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        expected = [part for each in pieces(text, PATTERNS[splitting]) for part in merged(each)]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == expected, text
        assert tokenizer.decode(ids) == text
    assert {*PATTERNS} == {*SPLITTING}


def test_an_unknown_way_of_splitting_is_said(tmp_path):
    write_gguf(tmp_path / "model.gguf", splitting="of-my-own")
    lines: list[str] = []
    convert(tmp_path / "model.gguf", tmp_path / "out", "float32", lines.append)
    assert any("of-my-own" in line for line in lines)


def test_bfloat16_rounds_the_same_numbers(source, folder, tmp_path):
    convert(source, tmp_path / "out", "bfloat16", quiet)
    rounded = load_file(tmp_path / "out/model.safetensors")
    exact = load_file(folder / "model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not a GGUF file"), (b"PK\3\4zip", "not a GGUF file"), (b"GGUF", "not complete")],
)
def test_another_file_is_named(tmp_path, content, reason):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as raised:
        convert(tmp_path / "model.gguf", tmp_path / "out", "float32", quiet)
    assert "model.gguf" in str(raised.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_file_that_ends_early_is_named(source, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-64])
    with pytest.raises(ValueError, match=r"cut\.gguf is damaged or not complete"):
        convert(tmp_path / "cut.gguf", tmp_path / "out", "float32", quiet)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ({"architecture": "nosuch"}, "architecture is 'nosuch'"),
        ({"architecture": "t5"}, "architecture is 't5'"),
        ({"without": "blk.1.ffn_up.weight"}, r"no fitting weights for model\.layers\.1\.mlp"),
        ({"extra": {"rope_freqs.weight": np.ones(16, np.float32)}}, "rotary positions"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, r"rotary positions \(yarn\)"),
        ({"fields": {"split.count": 2}}, "one of 2 parts"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "of which transformers"),
    ],
)
def test_a_model_that_would_be_another_one_is_refused(tmp_path, written, reason):
    write_gguf(tmp_path / "model.gguf", **written)
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "model.gguf", tmp_path / "out", "float32", quiet)
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_fix_is_named(source):
    code = "import sys, pathlib; from tir_alp.models.gguf_header import read_header;"
    code += "read_header(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(  # -S: without the packages that are installed
        [sys.executable, "-S", "-c", code, str(source)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "ValueError" in done.stderr and "pip install 'tir_alp[gguf]'" in done.stderr


def test_a_folder_with_something_in_it_is_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "float32", quiet)  # it is empty
    with pytest.raises(ValueError, match="is not empty"):
        convert(source, tmp_path / "out", "float32", quiet)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not a folder"):
        convert(source, tmp_path / "file", "float32", quiet)
    assert (tmp_path / "file").read_text() == "mine"


KILLED = """
import sys, time
from pathlib import Path
import tir_alp.models.from_gguf as module
from tir_alp.models.from_gguf import convert

def slow(*_):
    print("written", flush=True)
    time.sleep(60)

module.check_saved = slow
convert(Path(sys.argv[1]), Path(sys.argv[2]), "float32", lambda line: None)
"""


def test_a_killed_conversion_leaves_no_folder_and_the_next_one_makes_it(source, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert not out.exists() and list(tmp_path.glob(".out*"))
    convert(source, out, "float32", quiet)
    assert (out / "model.safetensors").exists() and not list(tmp_path.glob(".out*"))


def test_two_processes_convert_a_file_once(source, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tir_alp.models.from_gguf import cached;"
        "lines = []; print(cached(Path(sys.argv[1]), lines.append));"
        "print(any('reading' in each for each in lines))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source)],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert outputs[0][0] == outputs[1][0] and Path(outputs[0][0], "config.json").exists()
    assert sorted(each[1] for each in outputs) == ["False", "True"]


def test_a_file_is_converted_once_into_the_cache(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    first = cached(source, lines.append)
    assert first.is_relative_to(tmp_path / "tir_alp/gguf") and lines
    before = (first / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "small.gguf"
    copy.write_bytes(source.read_bytes())
    assert cached(copy, quiet) == first  # by the content, not by the place
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    copy.write_bytes(source.read_bytes() + b"\0")
    assert cached(copy, quiet) != first


def test_what_a_path_names(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve("tiny") == str(BASE)
    assert resolve("some/model") == "some/model"
    assert Path(resolve(str(source), quiet), "config.json").exists()
    with pytest.raises(ValueError, match="there is no model file"):
        resolve(str(tmp_path / "missing.gguf"), quiet)


def test_a_name_that_is_no_folder_is_announced_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    lines = []
    assert [resolve(path, lines.append) for path in ("here", "tiny", "./gone", "me/model")] == [
        *("here", str(BASE), "./gone", "me/model")
    ]
    assert lines == ["there is no folder 'me/model' here: looking for it on the Hugging Face hub"]
