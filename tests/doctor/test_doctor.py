"""The doctor: a real engine passes; each way to break the contract is refused with a reason."""

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from tir_alp.config import Config, TransformersConfig
from tir_alp.doctor.__main__ import main as doctor_main
from tir_alp.doctor.check_result import CheckResult
from tir_alp.doctor.conversation import check_fence, check_template, check_tokenizer
from tir_alp.doctor.examine import Refused, demand, examine_config, examine_engine
from tir_alp.doctor.machine import check_disk, num_checkpoints, shape_of
from tir_alp.doctor.sandbox import check_sandbox
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.tiny import ABLE, TRAIN_CONFIG
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.tools.sandbox import SandboxConfig, create, shared_sandbox
from tir_alp.tools.sandbox.backends import seccomp
from tir_alp.tools.sandbox.backends.landlock import PlainJail
from tir_alp.tools.sandbox.backends.namespaces import NamespacesJail
from tir_alp.tools.sandbox.jail import kernel
from tir_alp.training.policy import completion_logprobs, load_policy, load_tokenizer
from tir_alp.training.ranks import alone
from tir_alp.training.structure import load_outline
from tir_alp.training.trainer import Trainer
from tir_alp.types import StopReason

PACKAGE = Path(__file__).parents[2] / "tir_alp"
TASK = Task("task", question="What is 6*7?", answer="42")


def config(*words: str) -> Config:
    return load_config(words, read_toml(TRAIN_CONFIG))


# ------------------------------------------------------------------------------------ the engine


def examined(
    kind: type[TransformersEngine] = TransformersEngine, *words: str
) -> dict[str, CheckResult]:
    """Return what the doctor finds for a kind of engine, by check."""

    async def main() -> list[CheckResult]:
        settings = config(*words)
        assert isinstance(settings.engine, TransformersConfig)
        tokenizer = load_tokenizer(str(ABLE))
        trainer = Trainer(
            load_policy(str(ABLE)),
            settings.trainer,
            settings.algorithm,
            ranks=alone(),
            temperature=settings.rollout.temperature,
            on_bad_update=lambda *_: None,
        )
        before = {name: tensor.clone() for name, tensor in trainer.weights()}
        engine = kind(
            load_policy(str(ABLE)),
            max_cache_tokens=4096,
            precision=settings.engine.precision,
            logit_noise=settings.engine.logit_noise,
        )
        try:
            findings = await examine_engine(
                settings,
                engine,
                load_outline(str(ABLE)),
                trainer,
                weights=lambda: dict(trainer.weights()),
                version=0,
                tokenizer=tokenizer,
                renderer=Renderer(tokenizer),
                prompts=[TASK.question, "What is 11*12-100?"],
            )
        finally:
            await engine.close()
        assert all(torch.equal(before[name], each) for name, each in trainer.weights())
        return findings

    return {finding.check: finding for finding in asyncio.run(main())}


def failed(findings: Mapping[str, CheckResult]) -> set[str]:
    return {name for name, finding in findings.items() if not finding.holds}


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--rollout.temperature", "0.6"),
        ("--engine.precision", "bfloat16"),
        ("--engine.precision", "int8"),
        ("--engine.precision", "fp8"),
        ("--engine.logit_noise", "0.1"),
    ],
    ids=" ".join,
)
def test_the_embedded_engine_holds_its_contract(words):
    assert failed(examined(TransformersEngine, *words)) == set()


class Misreporting(TransformersEngine):
    """Reports the logprobs of another distribution than the one it samples from."""

    def reported_at(self, sampling: Sampling) -> tuple[float, float]:
        raise NotImplementedError

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        completion = await super().generate(token_ids, sampling)
        if sampling.temperature == 0:
            return completion
        ids = torch.tensor([*token_ids, *completion.token_ids])
        temperature, top_p = self.reported_at(sampling)
        logprobs = completion_logprobs(self._forward.model, ids, len(token_ids), temperature, top_p)
        return replace(completion, logprobs=tuple(logprobs.tolist()))


class Raw(Misreporting):
    def reported_at(self, sampling: Sampling) -> tuple[float, float]:
        return 1.0, 1.0


class NotTruncated(Misreporting):
    def reported_at(self, sampling: Sampling) -> tuple[float, float]:
        return sampling.temperature, 1.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_raw_instead_of_tempered_logprobs(precision):
    words = ("--engine.precision", precision, "--rollout.temperature", "0.6")
    found = examined(Raw, *words)
    assert "logprobs" in failed(found)
    assert "raw, at temperature 1 and not truncated" in found["logprobs"].fix


def test_logprobs_that_are_not_truncated():
    found = examined(NotTruncated)
    assert failed(found) == {"logprobs"}
    assert "not truncated to top_p" in found["logprobs"].fix


class Stale(TransformersEngine):
    """Counts versions but keeps its weights."""

    def _copy_weights(self, source: Mapping[str, Tensor]) -> None:
        self._cache.clear()


class HalfStale(TransformersEngine):
    """Copies all tensors but those of one layer."""

    def _copy_weights(self, source: Mapping[str, Tensor]) -> None:
        own = self._forward.model.state_dict()
        super()._copy_weights(
            {name: own[name] if ".layers.1." in name else new for name, new in source.items()}
        )


class Uncounted(TransformersEngine):
    async def load_weights(self, source: Any, version: int) -> None:
        await super().load_weights(source, version=0)


@pytest.mark.parametrize("kind", [Stale, HalfStale, Uncounted])
def test_a_stale_engine_after_a_sync(kind):
    found = examined(kind)
    assert failed(found) == {"sync"}
    assert "still uses some old weights" in found["sync"].fix


def test_a_stale_engine_in_low_precision():
    assert failed(examined(Stale, "--engine.precision", "bfloat16")) == {"sync"}


class IgnoresRule(TransformersEngine):
    """Ignores the stop matcher."""

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        return await super().generate(token_ids, replace(sampling, stop_matcher=None))


class Endless(TransformersEngine):
    """Cuts off the end token."""

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        completion = await super().generate(token_ids, sampling)
        if completion.stop_reason is not StopReason.EOS:
            return completion
        ids, logprobs = completion.token_ids[:-1], completion.logprobs[:-1]
        return replace(completion, token_ids=ids, logprobs=logprobs)


def test_an_engine_that_continues_after_the_rule():
    found = examined(IgnoresRule)
    assert failed(found) == {"stop"}
    assert "the rule holds at the third token" in found["stop"].figure


def test_an_engine_that_drops_the_end_token():
    assert {"ids", "stop"} <= failed(examined(Endless))


# ------------------------------------------------------------------- template, tokenizer, fence

FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_drops_thinking():
    tokenizer = load_tokenizer(str(ABLE))
    assert check_template(tokenizer, "").holds
    assert check_template(tokenizer, "You compute.").holds
    tokenizer.chat_template = FORGETFUL
    found = check_template(tokenizer, "")
    assert not found.holds
    assert "it drops the thinking of a turn ('thought 0' is not in" in found.figure
    assert "thoughts" in found.fix


def test_the_fence_stops_where_a_block_is_whole():
    tokenizer = load_tokenizer(str(ABLE))
    assert check_fence(tokenizer, Renderer(tokenizer)).holds


def test_a_tokenizer_of_another_model():
    tokenizer, model = load_tokenizer(str(ABLE)), load_policy(str(ABLE))
    renderer = Renderer(tokenizer)
    assert check_tokenizer(tokenizer, renderer, model, 1024).holds
    too_long = check_tokenizer(tokenizer, renderer, model, 1025)
    assert "1024 positions" in too_long.figure
    assert too_long.fix == "set rollout.max_context_tokens to 1024 or less"
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    assert "the model's end tokens are [7]" in check_tokenizer(tokenizer, renderer, model, 9).figure
    tokenizer.add_tokens(["<|new|>"])
    assert "has no embedding" in check_tokenizer(tokenizer, renderer, model, 9).figure


# ------------------------------------------------------------------------------ machine, sandbox


def test_disk_is_compared_with_what_is_free(tmp_path):
    settings, shape = config(), shape_of(str(ABLE))
    assert shape.num_parameters == sum(p.numel() for p in load_policy(str(ABLE)).parameters())
    assert check_disk(settings, shape, tmp_path / "runs").holds
    huge = replace(shape, num_parameters=10**15)
    assert "lower checkpoint.keep" in check_disk(settings, huge, tmp_path / "runs").fix
    assert not check_disk(settings, huge, tmp_path / "runs").holds


@pytest.mark.parametrize(
    ("steps", "every", "keep", "evaluated_every", "number"),
    [
        (100, 20, 2, 0, 3),  # a third is being saved while two are there
        (100, 20, 2, 10, 4),  # and the best one
        (1, 20, 2, 0, 1),
        (30, 20, 2, 0, 2),
        (100, 0, 2, 0, 1),
        (2, 0, 2, 1, 2),
        (0, 20, 2, 10, 1),
    ],
)
def test_a_run_of_few_steps_needs_room_for_few_checkpoints(
    steps, every, keep, evaluated_every, number
):
    words = f"--steps {steps} --checkpoint.every {every} --checkpoint.keep {keep}"
    settings = config(*words.split(), "--eval.every", str(evaluated_every))
    assert num_checkpoints(settings) == number


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_process_that_starts_a_cluster_needs_no_gpu():
    def checks(*words: str) -> dict[str, CheckResult]:
        settings = config("--trainer.device", "cuda", *words)
        tokenizer = load_tokenizer(str(ABLE))
        with closing(make_environment(settings)) as env:
            results = examine_config(settings, str(ABLE), tokenizer, Renderer(tokenizer), env, TASK)
            return {result.check: result for result in results}

    assert "disk" in checks("--cluster", "local")
    assert "gpu" not in checks("--cluster", "local")["memory"].figure
    assert "memory" not in checks("--cluster", "auto")
    with pytest.raises(ValueError, match="sees no GPU here"):
        checks()


def sandboxed(backend: str) -> CheckResult:
    sandbox = f'{{"sandbox": {{"backend": "{backend}", "preload": []}}}}'
    with closing(make_environment(config("--env.kwargs", sandbox))) as env:
        return check_sandbox(env, TASK)


class Parrot(gymnasium.Env[str, str]):
    def reset(self, *, seed=None, options=None):
        return "say", {}

    def step(self, action):
        return action, 0.0, False, False, {}


def test_an_environment_that_repeats_a_program_has_not_run_it():
    assert check_sandbox(Parrot(), TASK).holds


def test_a_sandbox_that_holds():
    found = sandboxed("auto")
    assert found.holds, found
    assert found.figure == "4 escapes tried, none succeeded"


def test_a_sandbox_weakened_on_purpose(capfd):
    found = sandboxed("unsafe")
    assert not found.holds
    for way in ("a file of the host", "to write", "the network", "other programs"):
        assert way in found.figure


def examined_with(backend: str, weaken: Callable[[Any], Any], number: int) -> tuple[int, Any]:
    """Return the command's exit code with a sandbox that is weakened when it is created."""
    plan = create.BACKENDS[backend]
    sandbox = {
        "backend": backend,
        "preload": [],
        "tmp_files": 1000 + number,
    }  # unlike that of any other test
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(create.BACKENDS, backend, lambda config: weaken(plan(config)))
        code = doctor_main(["--env.kwargs", json.dumps({"max_turns": 2, "sandbox": sandbox})])
    return code, SandboxConfig.model_validate(sandbox)


def without_landlock(jail: Any) -> Any:
    return replace(jail, spec=replace(jail.spec, landlock=False))


def without_network_namespace(jail: NamespacesJail) -> NamespacesJail:
    return replace(jail, arguments=tuple(a for a in jail.arguments if a != "--unshare-net"))


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("backend", "weaken", "probe"),
    [
        ("namespaces", without_network_namespace, "net namespace"),
        ("landlock", without_landlock, "system files"),
    ],
)
def test_a_backend_that_lacks_one_of_several_walls(backend, weaken, probe, capsys):
    """Nothing escapes yet: the sandbox's own probes, which the doctor runs, notice the lack."""
    code, _ = examined_with(backend, weaken, 1)
    assert code == 2
    error = capsys.readouterr().err
    assert f"tir_alp.doctor: the sandbox does not hold on this machine: {probe} (" in error


def with_sockets(jail: PlainJail) -> PlainJail:
    """The system-call filter allows connections, and no Landlock rule set restricts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seccomp, "ALLOWED", [*seccomp.ALLOWED, "connect", "socket"])
        bits = seccomp.compile_filter(kernel.BRANCH_IN_PLACE, ask_for_threads=True)
    return without_landlock(replace(jail, spec=replace(jail.spec, seccomp=bits.hex())))


def with_files(jail: PlainJail) -> PlainJail:
    """No Landlock rule set, and no user of its own."""
    return without_landlock(replace(jail, visible=()))


def with_programs(jail: PlainJail) -> PlainJail:
    return without_landlock(replace(jail, spec=replace(jail.spec, seccomp="")))


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("weaken", "reached"),
    [
        (with_files, "a file of the host; a folder of the host, to write"),
        (with_sockets, "the network"),
        (with_programs, "the network; other programs"),
    ],
)
def test_an_escape_that_the_backend_reports_as_sound_is_found(weaken, reached, monkeypatch, capsys):
    """The backend's own probes accept anything, but the doctor tries the escapes itself."""

    async def accept(*_: object) -> None: ...

    monkeypatch.setattr(create, "refuse_if_weak", accept)
    monkeypatch.setenv("COLUMNS", "500")  # so that no cell is wrapped
    code, sandbox = examined_with("landlock", weaken, len(reached))
    shared_sandbox(sandbox).close()
    table = " ".join(capsys.readouterr().out.split())
    assert (code, table.count("FAILS")) == (2, 1), table
    assert f"sandbox FAILS a program reached {reached}" in table


# ------------------------------------------------------------------------------------- verdicts


def test_what_fails_stops_the_run_unless_it_is_named():
    findings = [
        CheckResult("disk", False, "12 GB", "free some"),
        CheckResult("sync", False, "0.3", "copy all"),
        CheckResult("ids", True, "7"),
    ]
    with pytest.raises(Refused, match=r"(?s)disk: 12 GB\n  fix: free some.*ignore disk,sync"):
        demand(findings, [])
    with pytest.raises(Refused, match=r"(?s)sync: 0.3"):
        demand(findings, ["disk"])
    assert demand(findings, ["disk", "sync"]) == [
        "ignored by doctor.ignore: disk: 12 GB",
        "ignored by doctor.ignore: sync: 0.3",
    ]
