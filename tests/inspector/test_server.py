"""The server: closed to others, and its numbers are those of the loss."""

import json
import math
import subprocess
import sys

import pytest
from safetensors import safe_open
from starlette.testclient import TestClient

from tests.inspector.made import rewrite, trained, trajectory, write_run
from tir_alp.inspector.server import HOST, make_app, new_token
from tir_alp.inspector.source import RunSource
from tir_alp.records.readable import REDACTED
from tir_alp.types import trace_uid


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run recorded by the real trainer, with ALP."""
    return trained(tmp_path_factory.mktemp("inspected"), "real")


def client(*paths) -> TestClient:
    sources = [RunSource(path) for path in paths]
    for each in sources:
        each.index.refresh()
    return TestClient(make_app(sources, "secret"), f"http://{HOST}:1234/secret/")


def get(of: TestClient, path: str):
    answer = of.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_numbers_on_the_page_are_those_in_the_loss(real):
    page = client(real)
    rows = get(page, "api/trajectories/0?sort=uid&kind=trajectories")["rows"]
    records = {
        json.loads(line)["sequence_uid"]: json.loads(line)
        for file in (real / "trajectories").glob("*.jsonl")
        for line in file.read_text().splitlines()
    }
    compared = 0
    for row in rows:
        found = get(page, f"api/trajectory/0/trajectories/{row['step']}/{row['line']}")
        columns, record = found["columns"], records[row["uid"]]
        rollout = [value for value in columns["rollout"] if value is not None]
        assert rollout == [
            each for turn in record["turns"] for each in turn["completion"]["rollout_logprobs"]
        ]
        in_loss = [index for index, bit in enumerate(columns["mask"]) if bit]
        if not in_loss:
            continue
        with safe_open(real / "tokens" / f"step_{row['step']:06d}.safetensors", "pt") as file:
            uids, stops = file.get_tensor("uids").tolist(), file.get_tensor("stops").tolist()
            place = uids.index(row["uid"])
            start, stop = ([0, *stops])[place], stops[place]
            for name in {*file.keys()} - {"uids", "updates", "stops"}:
                tensor = file.get_tensor(name)[start:stop].tolist()
                expected = [None if math.isnan(value) else value for value in tensor]
                assert [columns[name][index] for index in in_loss] == expected
                compared += len(expected)
        for index in in_loss:  # the ratio of the loss, from the two logprobs beside it
            difference = columns["logprob"][index] - columns["rollout"][index]
            assert columns["log_ratio"][index] == pytest.approx(difference, abs=1e-5)
        assert columns["advantage"][in_loss[0]] == pytest.approx(row["advantage"])
    assert compared > 500
    logged = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    (first,) = [each for each in logged if each["step"] == 1 and "entropy/mean" in each]
    values = [
        value
        for row in rows
        if row["step"] == 1
        for value in get(page, f"api/trajectory/0/trajectories/1/{row['line']}")["columns"].get(
            "entropy", []
        )
        if value is not None
    ]
    assert sum(values) / len(values) == pytest.approx(first["entropy/mean"], rel=1e-5)


def test_the_text_of_tokens_is_that_of_the_record(real):
    found = get(client(real), "api/trajectory/0/trajectories/1/1")
    record = json.loads((real / "trajectories/step_000001.jsonl").read_text().splitlines()[0])
    spans = [
        record["prompt"],
        *(t[k] for t in record["turns"] for k in ("completion", "observation")),
    ]
    texts = ["".join(found["pieces"][each["start"] : each["stop"]]) for each in found["spans"]]
    assert texts == [each["text"] for each in spans if each["token_ids"]]
    assert found["columns"]["version"][-1] == 0 and found["no_tokenizer"] == ""


@pytest.mark.parametrize("path", ["", "api/state", "main.js", "style.css", "api/trajectories/0"])
def test_without_the_token_there_is_nothing(tmp_path, path):
    page = client(write_run(tmp_path / "run", []))
    assert page.get(path).status_code == 200
    assert page.get(f"http://{HOST}:1234/{path}").status_code == 404
    assert page.get(f"http://{HOST}:1234/other/{path}").status_code == 404
    assert page.get(path, headers={"host": "evil.example"}).status_code == 400
    assert new_token() != new_token() and len(new_token()) >= 20


def test_every_answer_forbids_what_does_not_come_from_here(tmp_path):
    page = client(write_run(tmp_path / "run", []))
    for path in ("", "main.js", "api/runs", "api/trajectory/0/trajectories/9/9"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        *("api/metrics/7", "api/trajectory/0/trajectories/1/99", "api/trajectory/0/ledger/1/1"),
        *("api/trajectories/0?reward=x:", "api/trajectory/0/trajectories/1/1?sequence=3"),
        "api/trajectory/0/trajectories/1/1?sequence=-1",
    ],
)
def test_what_is_not_there_is_an_error_in_words(tmp_path, path):
    page = client(write_run(tmp_path / "run", [[trajectory(0, ("a", "b"))]]))
    answer = page.get(path)
    assert answer.status_code == 404 and answer.json()["error"]


def test_infinite_numbers_and_odd_text_are_json(tmp_path):
    path = write_run(tmp_path / "run", [[trajectory(0, ("a", "b"))]], x=math.inf, y=math.nan)
    rewrite(
        path / "trajectories/step_000001.jsonl",
        lambda record: record["turns"][0]["info"].update(odd="\ud800\u202e", score=math.nan),
    )
    page = client(path)
    curves = get(page, "api/metrics/0?name=x&name=y")["curves"]
    assert curves["x"]["values"] == curves["y"]["values"] == [None]
    assert get(page, "api/trajectory/0/trajectories/1/1")["turns"][0]["info"]["score"] is None


def test_secrets_of_old_records_are_not_shown(tmp_path, monkeypatch):
    secret = "sk-abcdefghij0123456789"
    path = write_run(tmp_path / "run", [[trajectory(0, ("a", f"key {secret}", secret, "b"))]])
    rewrite(  # an older version wrote no text, and left `info` as it was
        path / "trajectories/step_000001.jsonl",
        lambda record: record["turns"][0]["info"].update(observation=secret),
    )
    found = json.dumps(get(client(path), "api/trajectory/0/trajectories/1/1"))
    assert secret not in found and REDACTED in found
    assert secret not in json.dumps(get(client(path), "api/trajectories/0"))


def test_without_a_tokenizer_the_text_of_the_records_is_shown(tmp_path):
    path = write_run(tmp_path / "run", [[trajectory(0, ("what", "words"))]])
    config = json.loads((path / "config.json").read_text())
    config["model"]["path"] = str(tmp_path / "gone")
    (path / "config.json").write_text(json.dumps(config))
    found = get(client(path), "api/trajectory/0/trajectories/1/1")
    assert found["pieces"] is None and "gone" in found["no_tokenizer"]
    assert [each["text"] for each in found["spans"]] == ["what", "words"]


def test_branches_are_a_tree(tmp_path):
    path = write_run(tmp_path / "run", [[trajectory(0, ("start", "one", "two", "three"))]])

    def add(record):
        whole = {name: value for name, value in record.items() if name != "branches"}
        other = json.loads(json.dumps(whole)) | {"sequence_uid": trace_uid(0, 1)}
        other["turns"] = other["turns"][:1]
        other["turns"][0]["completion"]["token_ids"][-1] += 1
        record["branches"] = [other]

    rewrite(path / "trajectories/step_000001.jsonl", add)
    page = client(path)
    main, branch = get(page, "api/trajectory/0/trajectories/1/1")["sequences"]
    assert main["parent"] is None and branch["parent"] == 0
    assert branch["shared"] == len("start") + len("on")
    found = get(page, "api/trajectory/0/trajectories/1/1?sequence=1")
    assert found["uid"] == trace_uid(0, 1) and len(found["ids"]) == branch["tokens"]


def test_the_audit_runs_beside_the_page_and_its_findings_have_places(real, tmp_path):
    import shutil

    path = shutil.copytree(real, tmp_path / "copy")
    rewrite(
        path / "trajectories/step_000001.jsonl",
        lambda record: record["turns"][0]["completion"].update(trainable=False),
    )
    source = RunSource(path)
    source.index.refresh()
    page = TestClient(make_app([source], "secret"), f"http://{HOST}/secret/")
    assert get(page, "api/audit/0")["state"] == "none"
    assert page.post("api/audit/0").json()["state"] in ("running", "done")
    source.audit.wait(200)
    audit = get(page, "api/audit/0")
    assert audit["state"] == "done" and audit["num_drifts"] > 0, audit
    findings = get(page, "api/trajectory/0/trajectories/1/1")["findings"]
    assert {"loss mask"} <= {each["check"] for each in findings}
    assert all(each["line"] in (None, 1) for each in findings)


def test_the_command_names_what_is_no_run(tmp_path):
    words = [sys.executable, "-m", "tir_alp.inspect", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "is not a run folder" in done.stderr
