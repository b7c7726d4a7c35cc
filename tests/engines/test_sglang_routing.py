"""SGLang reports which experts computed each token, against a real server."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tests.engines.harness import needs_sglang
from tests.training.families import make_model
from tests.training.test_routing import as_sample, choices
from tir_alp.config import SGLangConfig
from tir_alp.engines.base import Completion, EngineContext, Sampling
from tir_alp.engines.sglang.engine import open_sglang
from tir_alp.training.batch import collate
from tir_alp.training.routing import find_routers

pytestmark = [needs_sglang, pytest.mark.timeout(900), pytest.mark.slow]


def test_a_server_reports_the_experts_of_all_tokens_that_it_has_read(tmp_path: Path):
    model = make_model("qwen3_moe")
    routers = find_routers(model)
    assert routers is not None
    model.save_pretrained(tmp_path)

    async def play() -> list[tuple[list[int], Completion]]:
        config = SGLangConfig(type="sglang", device="cpu", dtype="float32", max_running=4)
        context = EngineContext(path=str(tmp_path), device="cpu")
        async with open_sglang(config, context) as engine:
            ids, found = list(range(7, 40)), []
            for _ in range(2):
                completion = await engine.generate(tuple(ids), Sampling(max_tokens=12))
                found.append((list(ids), completion))
                ids += [*completion.token_ids, *range(40, 51)]
            return found

    for ids, completion in asyncio.run(play()):
        batch = collate([as_sample(ids, completion, 0)], with_routing=True)
        assert completion.routing is not None and completion.routing.dtype == np.int16
        assert len(completion.routing) >= len(batch.token_ids) - 1
        _, expected = choices(model, routers, batch)
        assert batch.routing is not None
        found = batch.routing[:-1].sort(-1).values
        same = (found == expected[:-1].sort(-1).values).float().mean()
        assert same > 0.999
