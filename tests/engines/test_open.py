"""Engines are opened by the factory that their section names, also one from outside the package."""

import asyncio
import textwrap

import pytest
import torch

from tir_alp.config import Config
from tir_alp.engines import open as engines_open
from tir_alp.engines.base import Sampling
from tir_alp.engines.open import open_engine
from tir_alp.models.tiny import BASE, TRAIN_CONFIG
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.training.policy import load_policy
from tir_alp.types import StopReason

PROMPT = (2, 45, 78, 33, 1, 3)

STUB = """
    \"\"\"A greedy sampler: one full forward per token, no batching.\"\"\"
    import asyncio
    from contextlib import asynccontextmanager
    from pathlib import Path

    import torch

    from tir_alp.engines.base import Completion, check_fit, check_request
    from tir_alp.training.attention import PackedSequences
    from tir_alp.training.policy import hidden_states, load_policy, next_token_logits
    from tir_alp.types import StopReason


    class Greedy:
        def __init__(self, model, version, log):
            self.model, self.version, self.log, self.made = model, version, log, 0

        async def generate(self, token_ids, sampling):
            check_request(token_ids, sampling)
            ids = await asyncio.to_thread(self.sample, token_ids, sampling)
            ends = ids[-1] in sampling.stop_token_ids
            return Completion(
                token_ids=ids,
                logprobs=(0.0,) * len(ids),
                stop_reason=StopReason.EOS if ends else StopReason.LENGTH,
                policy_version=self.version,
            )

        @torch.inference_mode()
        def sample(self, prompt, sampling):
            ids = list(prompt)
            while len(ids) - len(prompt) < sampling.max_tokens:
                rows = torch.tensor(ids)
                sequence = PackedSequences((len(ids),))
                hidden = hidden_states(self.model, rows, torch.arange(len(ids)), sequence)
                ids.append(int(next_token_logits(self.model, hidden[-1:]).argmax()))
                self.made += 1
                if ids[-1] in sampling.stop_token_ids:
                    break
            return tuple(ids[len(prompt):])

        async def load_weights(self, source, version):
            if isinstance(source, Path):
                source = load_policy(str(source)).state_dict()
            check_fit(self.model.state_dict(), source, version)
            self.model.load_state_dict(source)
            self.version = version

        async def lend_memory(self): pass
        async def abort(self, sequence_uid=None): pass
        def health(self): return {"tokens_generated": self.made}
        async def close(self): self.log("closed")


    @asynccontextmanager
    async def open_greedy(settings, context):
        model = load_policy(context.path).eval()
        context.log(f"greedy, {settings.kwargs['greeting']}, seed {context.seed}")
        engine = Greedy(model, context.version, context.log)
        try:
            yield engine
        finally:
            await engine.close()
"""


def config(**engine) -> Config:
    words = ["--seed", "7", "--rollout.temperature", "1"]
    return load_config(words, read_toml(TRAIN_CONFIG) | {"engine": engine})


async def nobody(token_ids):
    return None


def opened(of: Config, work, version: int = 0):
    log: list[str] = []

    async def body():
        async with open_engine(of, str(BASE), version, nobody, log.append) as engine:
            return await work(engine)

    return asyncio.run(body()), log


def test_an_engine_of_one_file_outside_the_package_is_opened_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "greedy_engine.py").write_text(textwrap.dedent(STUB))
    monkeypatch.syspath_prepend(tmp_path)
    sampling = Sampling(max_tokens=8, temperature=0.0)

    async def work(engine):
        first = await engine.generate(PROMPT, sampling)
        await engine.load_weights(load_policy(str(BASE)).state_dict(), 5)
        second = await engine.generate(PROMPT, sampling)
        return first, second, engine.health()

    custom = config(
        type="custom", factory="greedy_engine:open_greedy", kwargs={"greeting": "hello"}
    )
    (first, second, health), log = opened(custom, work, version=3)
    assert log == ["greedy, hello, seed 7", "closed"]
    assert (first.policy_version, second.policy_version) == (3, 5)
    assert health == {"tokens_generated": len(first.token_ids) + len(second.token_ids)}

    (expected, _, _), _ = opened(config(type="transformers"), work)
    assert first.token_ids == second.token_ids == expected.token_ids
    assert first.stop_reason is StopReason.LENGTH


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_engine:open_it", r'type = "custom" needs no_such_engine: see that Python finds'),
        ("json:open_it", r"engine\.factory = 'json:open_it': the module json has no open_it"),
    ],
)
def test_a_factory_that_is_not_there_is_named(factory, message):
    with pytest.raises(ValueError, match=message):
        opened(config(type="custom", factory=factory), nobody)


def test_a_package_that_an_engine_lacks_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp")

    monkeypatch.setattr(engines_open.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'"sglang" needs aiohttp: install it as docs/engines'):
        opened(config(type="sglang", device="cpu"), nobody)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_gpus_that_are_not_there_are_named_before_anything_starts(kind):
    of = config(type=kind, **({"python": "/usr/bin/python3"} if kind == "vllm" else {}))

    async def work(engine):
        raise AssertionError

    with pytest.raises(ValueError, match=r"takes the GPUs 0 to 0, and torch sees 0 here: set engi"):
        opened(of, work)


def test_a_server_on_a_cpu_has_a_bounded_cache_also_where_none_is_given():
    given = {"type": "sglang", "device": "cpu"}
    assert config(**given).engine.cache_tokens == 65536  # type: ignore[union-attr]
    bounded = config(**given, max_cache_tokens=512).engine
    assert bounded.cache_tokens == 512  # type: ignore[union-attr]
    assert config(type="sglang").engine.cache_tokens is None  # type: ignore[union-attr]
    process = pytest.importorskip("tir_alp.engines.sglang.process")
    arguments = process.server_arguments(config(**given).engine, "model", 0, 0, 0)
    assert arguments[arguments.index("--max-total-tokens") + 1] == "65536"
