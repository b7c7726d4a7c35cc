"""A micro-batch is computed without the host ever waiting for the device.

On a CPU nothing is waited for, so the operations that would wait on a GPU are counted: those whose
result the host needs, be it a number or the size of a tensor.
"""

import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.harness import noisy, trainer
from tests.training.test_shared_prompts import groups_of, near_policy
from tir_alp.algorithm.presets import ALGORITHMS

WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount"),
}
METHODS = ALGORITHMS | {
    "noise on the logits": noisy(site="logits"),
    "relative noise": noisy(scale="relative"),
}


class Waits(TorchDispatchMode):
    """Counts operations that wait, by their name and the line of ours that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_mask = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        of_unknown_size = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or is_mask or of_unknown_size:
            lines = [f"{each.filename}:{each.lineno}" for each in traceback.extract_stack()]
            ours = [line for line in lines if "tir_alp/" in line]
            self.found[f"{name} in {(ours or lines)[-1]}"] += 1
        return func(*args, **(kwargs or {}))


NARROW = {"gradient_checkpointing": True, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in METHODS), ("alp_sequence", NARROW), ("mis_token", NARROW)],
)
def test_nothing_waits_inside_a_micro_batch(name: str, settings: dict[str, Any], monkeypatch):
    one = trainer(METHODS[name], micro_batch_tokens=60, **settings)
    waits, backward, calls = Waits(), one._backward, 0

    def watched(*arguments):
        nonlocal calls
        calls += 1
        with waits:
            return backward(*arguments)

    monkeypatch.setattr(one, "_backward", watched)
    one.step(near_policy(groups_of(sizes=(3, 1, 4))), 0)
    assert calls > 1 and not waits.found


def test_a_number_that_the_host_reads_is_counted():
    with (waits := Waits()):
        assert torch.ones(3).sum().item() == 3
        torch.arange(4)[torch.ones(4, dtype=torch.bool)]
    assert sum(waits.found.values()) == 2
