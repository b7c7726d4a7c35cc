"""The doctor: a real engine holds its contract; each way to break it is refused, with why."""

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

from tir_alp.algorithm.presets import Section
from tir_alp.config import Config, TrainerConfig, load_config, read_toml
from tir_alp.doctor import Finding, Refused, demand, examine_config, examine_engine
from tir_alp.doctor.__main__ import main as doctor_main
from tir_alp.doctor.config_keys import unread_keys
from tir_alp.doctor.conversation import check_fence, check_template, check_tokenizer
from tir_alp.doctor.machine import check_disk, check_memory, memory_needed, shape_of
from tir_alp.doctor.sandbox import check_sandbox
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.config import TransformersConfig
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.tiny import ABLE, TRAIN_CONFIG
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import Renderer
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
) -> dict[str, Finding]:
    """What the doctor finds with an engine of some kind, by check."""

    async def main() -> list[Finding]:
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
                *(settings, engine, load_outline(str(ABLE)), trainer),
                *(lambda: dict(trainer.weights()), 0),
                *(tokenizer, Renderer(tokenizer), [TASK.question, "What is 11*12-100?"]),
            )
        finally:
            await engine.close()
        assert all(torch.equal(before[name], each) for name, each in trainer.weights())
        return findings

    return {finding.check: finding for finding in asyncio.run(main())}


def failed(findings: Mapping[str, Finding]) -> set[str]:
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


class Judged(TransformersEngine):
    """Reports the logprobs of another distribution than the one that it samples from."""

    def judged_at(self, sampling: Sampling) -> tuple[float, float]:
        raise NotImplementedError

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        completion = await super().generate(token_ids, sampling)
        if sampling.temperature == 0:
            return completion
        ids = torch.tensor([*token_ids, *completion.token_ids])
        judged = completion_logprobs(
            self._forward.model, ids, len(token_ids), *self.judged_at(sampling)
        )
        return replace(completion, logprobs=tuple(judged.tolist()))


class Raw(Judged):
    def judged_at(self, sampling: Sampling) -> tuple[float, float]:
        return 1.0, 1.0


class NotTruncated(Judged):
    def judged_at(self, sampling: Sampling) -> tuple[float, float]:
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


class Deaf(TransformersEngine):
    """Counts versions, and keeps its weights."""

    def _copy_weights(self, source: Mapping[str, Tensor]) -> None:
        self._cache.clear()


class HalfDeaf(TransformersEngine):
    """Takes all tensors but those of one layer."""

    def _copy_weights(self, source: Mapping[str, Tensor]) -> None:
        own = self._forward.model.state_dict()
        super()._copy_weights(
            {name: own[name] if ".layers.1." in name else new for name, new in source.items()}
        )


class Uncounted(TransformersEngine):
    async def load_weights(self, source: Any, version: int) -> None:
        await super().load_weights(source, version=0)


@pytest.mark.parametrize("kind", [Deaf, HalfDeaf, Uncounted])
def test_a_stale_engine_after_a_sync(kind):
    found = examined(kind)
    assert failed(found) == {"sync"}
    assert "goes on with old weights" in found["sync"].fix


def test_a_stale_engine_in_few_bits():
    assert failed(examined(Deaf, "--engine.precision", "bfloat16")) == {"sync"}


class Talkative(TransformersEngine):
    """Does not know a rule to stop by."""

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        return await super().generate(token_ids, replace(sampling, stop_matcher=None))


class Endless(TransformersEngine):
    """Cuts the end token off."""

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        completion = await super().generate(token_ids, sampling)
        if completion.stop_reason is not StopReason.EOS:
            return completion
        ids, logprobs = completion.token_ids[:-1], completion.logprobs[:-1]
        return replace(completion, token_ids=ids, logprobs=logprobs)


def test_an_engine_that_goes_on_behind_the_rule():
    found = examined(Talkative)
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
    assert "1024 positions" in check_tokenizer(tokenizer, renderer, model, 1025).figure
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    assert "the model ends with [7]" in check_tokenizer(tokenizer, renderer, model, 9).figure
    tokenizer.add_tokens(["<|new|>"])
    assert "no row among" in check_tokenizer(tokenizer, renderer, model, 9).figure


# ---------------------------------------------------------------------------------- config keys


class WiderTrainer(TrainerConfig):
    every: int = 0
    """`every` is read of two other sections."""


class New(Section):
    read: int = 0
    unread: int = 0


class Wider(Config):
    trainer: TrainerConfig = WiderTrainer()
    new: New = New()


Wider.model_fields["trainer"].annotation = WiderTrainer


def test_every_key_of_the_config_is_read():
    assert unread_keys(Config, PACKAGE) == []


def test_an_unused_config_key_is_named(tmp_path):
    for file in PACKAGE.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "user.py").write_text("def use(config: Wider):\n    return config.new.read\n")
    unread = set(unread_keys(Wider, tmp_path)) - set(unread_keys(Config, tmp_path))
    assert unread == {"new.unread", "trainer.every"}


class Part(New):
    share: float = 1.0
    forgotten: float = 1.0


class Whole(New):
    parts: tuple[Part, ...] = ()


class InParts(Config):
    whole: Whole = Whole()


def test_keys_of_sections_in_a_tuple_are_read_in_loops_and_by_the_base_that_they_widen(tmp_path):
    (tmp_path / "user.py").write_text(
        "def use(one: New):\n    return one.read\n\n"
        "def all(config: InParts):\n    return [part.share for part in config.whole.parts]\n"
    )
    unread = {key for key in unread_keys(InParts, tmp_path) if key.startswith("whole")}
    assert unread == {"whole.unread", "whole.parts.unread", "whole.parts.forgotten"}


# ------------------------------------------------------------------------------ machine, sandbox


def test_memory_and_disk_are_held_against_what_there_is(tmp_path):
    settings, shape = config(), shape_of(str(ABLE))
    needed = memory_needed(settings, shape, "cpu")
    assert shape.num_parameters == sum(p.numel() for p in load_policy(str(ABLE)).parameters())
    assert needed["weights, gradients, optimizer"] == 16 * shape.num_parameters
    assert needed["cache"] == 4 * 128 * 256 * shape.cache_width * shape.num_layers
    total = sum(needed.values())
    assert check_memory(needed, total).holds
    assert not check_memory(needed, total - 1).holds
    assert check_disk(settings, shape, tmp_path / "runs").holds
    huge = replace(shape, num_parameters=10**15)
    assert "lower checkpoint.keep" in check_disk(settings, huge, tmp_path / "runs").fix
    assert not check_disk(settings, huge, tmp_path / "runs").holds


def test_servers_on_the_trainers_gpu_are_counted_and_others_are_not():
    words = read_toml(PACKAGE.parent / "configs" / "math_sglang.toml")
    shape = shape_of(str(ABLE))
    assert memory_needed(load_config([], words), shape, "cuda")["the engine's weights"] == 0
    words["engine"]["release_memory"] = False  # else it takes turns with the trainer
    shared = memory_needed(load_config([], words), shape, "cuda")
    assert (shared["the engine's weights"], shared["cache"]) == (2 * shape.num_parameters, 0)
    limited = load_config(["--engine.max_cache_tokens", "1000"], words)
    of_a_token = 2 * shape.cache_width * shape.num_layers
    assert memory_needed(limited, shape, "cuda")["cache"] == 1000 * of_a_token
    apart = load_config(["--engine.first_gpu", "1"], words)
    assert memory_needed(apart, shape, "cuda")["the engine's weights"] == 0
    assert memory_needed(limited, shape, "cpu")["cache"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_who_starts_the_parts_of_a_cluster_needs_no_gpu():
    def checks(*words: str) -> set[str]:
        settings = config("--trainer.device", "cuda", *words)
        tokenizer = load_tokenizer(str(ABLE))
        with closing(make_environment(settings)) as env:
            parts = (tokenizer, Renderer(tokenizer), env, TASK)
            return {finding.check for finding in examine_config(settings, str(ABLE), *parts)}

    assert "disk" in checks("--cluster", "local")
    assert "memory" not in checks("--cluster", "local")
    with pytest.raises(ValueError, match="sees no GPU here"):
        checks()


def sandboxed(backend: str) -> Finding:
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
    assert found.figure == "4 ways out tried, none works"


def test_a_sandbox_weakened_on_purpose(capfd):
    found = sandboxed("unsafe")
    assert not found.holds
    for way in ("a file of the host", "to write", "the network", "other programs"):
        assert way in found.figure


def examined_with(backend: str, weaken: Callable[[Any], Any], number: int) -> tuple[int, Any]:
    """The command's exit code, with a sandbox that is weakened where it is made."""
    plan = create.BACKENDS[backend]
    sandbox = {"backend": backend, "preload": [], "tmp_files": 1000 + number}  # no other test's
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
    """Nothing gets out yet; the sandbox's own probes miss the wall, and the doctor has them run."""
    code, _ = examined_with(backend, weaken, 1)
    assert code == 2
    said = capsys.readouterr().err
    assert f"tir_alp.doctor: the sandbox does not hold on this machine: {probe} (" in said


def with_sockets(jail: PlainJail) -> PlainJail:
    """The filter of system calls lets a program connect, and no rule set is asked about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seccomp, "ALLOWED", [*seccomp.ALLOWED, "connect", "socket"])
        bits = seccomp.compile_filter(kernel.BRANCH_IN_PLACE, ask_for_threads=True)
    return without_landlock(replace(jail, spec=replace(jail.spec, seccomp=bits.hex())))


def with_files(jail: PlainJail) -> PlainJail:
    """No rule set of Landlock, and no user of its own."""
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
def test_a_backend_with_a_way_out_that_says_that_it_is_sound(weaken, reached, monkeypatch, capsys):
    """Its own probes are content with anything; the doctor lets a program look for itself."""

    async def content(*_: object) -> None: ...

    monkeypatch.setattr(create, "refuse_if_weak", content)
    monkeypatch.setenv("COLUMNS", "500")  # so that no cell is broken into lines
    code, sandbox = examined_with("landlock", weaken, len(reached))
    shared_sandbox(sandbox).close()
    table = " ".join(capsys.readouterr().out.split())
    assert (code, table.count("FAILS")) == (2, 1), table
    assert f"sandbox FAILS a program reached {reached}" in table


# ------------------------------------------------------------------------------------- verdicts


def test_what_fails_stops_the_run_unless_it_is_named():
    findings = [
        Finding("disk", False, "12 GB", "free some"),
        Finding("sync", False, "0.3", "copy all"),
        Finding("ids", True, "7"),
    ]
    with pytest.raises(Refused, match=r"(?s)disk: 12 GB\n  fix: free some.*ignore disk,sync"):
        demand(findings, [])
    with pytest.raises(Refused, match=r"(?s)sync: 0.3"):
        demand(findings, ["disk"])
    assert demand(findings, ["disk", "sync"]) == [
        "ignored by doctor.ignore: disk: 12 GB",
        "ignored by doctor.ignore: sync: 0.3",
    ]
