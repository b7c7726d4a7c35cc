"""The gateway as a command: two clients, two episodes, and what is written of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tir_alp.records.trajectories import from_record

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")


def test_a_served_model_answers_both_clients_and_its_captures_are_written(tmp_path):
    out = tmp_path / "captures.jsonl"
    command = [sys.executable, "-m", "tir_alp.agents", "serve", "--port", "0"]
    command += ["--calls", "fenced", "--max-context-tokens", "256", "--out", str(out)]
    environment = {**os.environ, "TIR_ALP_AGENTS_KEY": "sk-test"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if found := re.search(r"ANTHROPIC_BASE_URL=(\S+)/NAME", line):
                url = found[1]
                break
        ask = [{"role": "user", "content": "What is 37*48+112?"}]
        with openai.OpenAI(base_url=f"{url}/one/v1", api_key="sk-test") as client:
            reply = client.chat.completions.create(model="m", messages=ask, max_tokens=40, seed=1)
            again = client.chat.completions.create(model="m", messages=ask, max_tokens=40, seed=1)
        with anthropic.Anthropic(base_url=f"{url}/two", api_key="sk-test") as client:
            message = client.messages.create(model="m", max_tokens=40, messages=ask)
        with (
            openai.OpenAI(base_url=f"{url}/three/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.chat.completions.create(model="m", messages=ask)
    finally:
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.wait(30)
    assert process.returncode == 0 and time.monotonic() - began < 30
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each.pop("episode") for each in records] == ["one", "two"]
    one, two = map(from_record, records)
    assert [len(each.turns) for each in one.sequences] == [1, 1]
    said = [each.turns[0].info["exchange"]["reply"]["content"] for each in (*one.sequences, two)]
    # The trajectory itself is the trace of the last completion: the second one.
    first, second = (each.choices[0].message.content for each in (reply, again))
    assert said == [second, first, message.content[0].text]


def test_mistakes_of_the_command_line_exit_with_2(capsys, tmp_path):
    from tir_alp.agents.__main__ import main

    (tmp_path / "there").write_text("")
    assert main(["serve", "--model", "/no/such/model"]) == 2
    assert main(["serve", "--out", str(tmp_path / "there")]) == 2
    assert "exists already" in capsys.readouterr().err
