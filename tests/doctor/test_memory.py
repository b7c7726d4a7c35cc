"""The memory of all processes of a run, by place."""

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tir_alp.doctor.__main__ import main as doctor
from tir_alp.doctor.machine import free_memory, shape_of
from tir_alp.doctor.memory import MACHINE, SHAPES, by_place, check_memory, needs, node_needs, table
from tir_alp.models.tiny import ABLE, TRAIN_CONFIG
from tir_alp.roles import Node
from tir_alp.run.command_line import load_config, read_toml

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = shape_of(str(ABLE))


def config(*words, file=TRAIN_CONFIG):
    return load_config(words, read_toml(file))


def amounts(settings, device="cpu", shape=TINY):
    found = needs(settings, shape, device, num_cpus=2)
    return {(each.place, each.what): each.num_bytes for each in found}


def test_a_run_in_one_process():
    found = amounts(config())
    assert found[MACHINE, "weights, gradients, optimizer"] == 16 * TINY.num_parameters
    assert found[MACHINE, "the engine's weights"] == 4 * TINY.num_parameters
    assert found[MACHINE, "cache"] == 4 * 128 * 256 * TINY.cache_width * TINY.num_layers
    assert found[MACHINE, "graders"] == 2 * (70 << 20)
    assert found[MACHINE, "the sandbox"] == 128 * (6 << 20)


def test_the_budget_of_the_sandbox_counts_where_it_is_given():
    found = amounts(config("--env.kwargs.sandbox.memory_budget_mb", "3000"))
    assert found[MACHINE, "the sandbox"] == 3000 << 20


def test_servers_are_counted_where_they_compute():
    file = CONFIGS / "math_sglang.toml"
    assert ("gpu 0", "the engine's weights") not in amounts(config(file=file), "cuda")
    beside = ("--engine.release_memory", "false")  # else it takes turns with the trainer
    shared = amounts(config(*beside, file=file), "cuda")
    assert shared["gpu 0", "the engine's weights"] == 2 * TINY.num_parameters
    assert ("gpu 0", "cache") not in shared
    assert (MACHINE, "servers and actors") in shared
    bounded = amounts(config(*beside, "--engine.max_cache_tokens", "1000", file=file), "cuda")
    assert bounded["gpu 0", "cache"] == 1000 * 2 * TINY.cache_width * TINY.num_layers
    spread = ("--engine.first_gpu", "1", "--engine.num_servers", "2")
    wide = ("--engine.tensor_parallel", "2")
    apart = amounts(config(*beside, *spread, *wide, file=file), "cuda")
    places = {place for place, what in apart if what == "the engine's weights"}
    assert places == {"gpu 1", "gpu 2", "gpu 3", "gpu 4"}
    assert apart["gpu 1", "the engine's weights"] == TINY.num_parameters
    on_cpu = ("--engine.device", "cpu", "--engine.num_servers", "2")
    both = amounts(config(*beside, *on_cpu, file=file))
    assert both[MACHINE, "the engine's weights"] == 4 * TINY.num_parameters


def test_a_local_cluster_is_the_sum_of_its_actors():
    words = ("--cluster", "local", "--cluster.trainer.count", "2", "--cluster.engines.count", "3")
    found = needs(config(*words), TINY, "cpu", num_cpus=2)
    trainers = [each for each in found if each.what == "weights, gradients, optimizer"]
    assert [each.num_bytes for each in trainers] == [8 * TINY.num_parameters] * 2
    found = amounts(config(*words))
    assert found[MACHINE, "the engine's weights"] == 12 * TINY.num_parameters
    assert found[MACHINE, "servers and actors"] == (2 + 3 + 1) * (800 << 20)


def test_the_actors_of_a_node_are_added_up_from_its_share_of_the_run():
    counts = {"trainer": 2, "engines": 3, "environments": 2, "sandboxes": 0}
    words = [w for kind, n in counts.items() for w in (f"--cluster.{kind}.count", str(n))]
    settings = config("--cluster", "auto", *words)
    parts = (
        Node("node a", 10**12, 2, {"trainer": 2, "environments": 1}),
        Node("node b", 10**12, 2, {"engines": 3, "environments": 1}),
    )
    sums = by_place([need for node in parts for need in node_needs(settings, TINY, "cpu", node)])
    whole = by_place(needs(config("--cluster", "local", *words), TINY, "cpu", num_cpus=2))
    assert sum(sums.values()) == whole[MACHINE] and set(sums) == {"node a", "node b"}
    found = {each.what: each.num_bytes for each in node_needs(settings, TINY, "cpu", parts[1])}
    assert found["the engine's weights"] == 12 * TINY.num_parameters
    assert found["servers and actors"] == 4 * (800 << 20)
    assert found["graders"] == 2 * (70 << 20)
    assert found["the sandbox"] == 64 * (6 << 20)  # half of the episodes
    assert "weights, gradients, optimizer" not in found


def test_sandbox_hosts_take_the_memory_of_the_sandbox():
    settings = config("--cluster", "auto", "--cluster.sandboxes.count", "2")
    runner = node_needs(settings, TINY, "cpu", Node("a", None, 2, {"environments": 1}))
    host = node_needs(settings, TINY, "cpu", Node("b", None, 2, {"sandboxes": 1}))
    assert "the sandbox" not in {each.what for each in runner}
    assert {e.what: e.num_bytes for e in host}["the sandbox"] == 64 * (6 << 20)
    budget = config("--cluster", "local", "--env.kwargs.sandbox.memory_budget_mb", "3000")
    assert amounts(budget)[MACHINE, "the sandbox"] == 3000 << 20


def test_a_trainer_on_gpus_takes_the_weights_of_a_checkpoint_from_its_node():
    settings = config("--cluster", "auto", "--trainer.offload", "true")
    found = node_needs(settings, TINY, "cuda", Node("a", None, 2, {"trainer": 1}))
    assert {e.what: e.num_bytes for e in found} == {
        "weights of a checkpoint": 4 * TINY.num_parameters,
        "offloaded optimizer": 16 * TINY.num_parameters,
        "servers and actors": 800 << 20,
    }


def test_a_place_that_is_too_small_is_named_with_the_keys_that_take_most():
    big = replace(TINY, num_parameters=10**9)
    found = needs(config(), big, "cpu", num_cpus=2)
    total = by_place(found)[MACHINE]
    assert check_memory(found, {MACHINE: total}).holds
    result = check_memory(found, {MACHINE: total - 1})
    assert not result.holds
    assert "weights, gradients, optimizer: trainer.lora, trainer.offload or" in result.fix
    assert f"{MACHINE}: needs" in result.figure and "weights, gradients, optimizer 16 GB" in (
        result.figure
    )
    found = needs(config(), big, "cuda", num_cpus=2)
    result = check_memory(found, {MACHINE: 10**12, "gpu 0": 10**9})
    assert not result.holds and "gpu 0: needs" in result.figure
    assert check_memory(found, {MACHINE: 10**12}).holds


def test_every_key_that_is_named_exists():
    every = {
        key
        for device in ("cpu", "cuda")
        for words in ((), ("--cluster", "local", "--trainer.offload", "true"))
        for each in needs(config(*words), SHAPES["7 B"], device, num_cpus=2)
        for key in each.key.replace(", ", " or ").split(" or ")
    }
    from tir_alp.run.settings import annotations_of

    assert every and all(annotations_of(key) for key in every if not key.startswith("env.kwargs"))


def test_less_is_needed_per_gpu_the_more_there_are():
    rows = table(config())
    assert [row.size for row in rows] == ["0.1 B", "0.5 B", "1.5 B", "3 B", "7 B", "14 B", "32 B"]
    for row in rows:
        assert [*row.trainer] == sorted(row.trainer, reverse=True)
        assert row.lora < row.trainer[0]
    assert rows[4].trainer[0] > 16 * 7.6e9


def test_the_command_prints_the_table_without_torch(capsys):
    assert doctor(["memory", "--trainer.micro_batch_tokens", "8192"]) == 0
    settings, table, *_ = capsys.readouterr().out.split("\n\n")
    lines = table.splitlines()
    assert "trainer.micro_batch_tokens = 8192" in settings
    assert "trainer.gradient_checkpointing = true" in settings
    assert lines[0].startswith("| model | trainer, 1 GPU | trainer, 2 GPUs |")
    assert len(lines) == 2 + len(SHAPES) and len({line.count("|") for line in lines}) == 1
    program = (
        "import sys; from tir_alp.doctor.__main__ import main; main(['memory']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_the_quickstart_shows_what_the_command_prints(capsys):
    assert doctor(["memory"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    page = (Path(__file__).parents[2] / "docs/quickstart.md").read_text()
    assert [line for line in printed if line not in page] == []


def test_a_terabyte_is_written_without_an_exponent(capsys):
    words = ["--trainer.gradient_checkpointing", "false", "--trainer.dtype", "float32"]
    assert doctor(["memory", *words]) == 0
    printed = capsys.readouterr().out
    assert "| 1,332 |" in printed and "e+" not in printed


def test_free_memory_is_that_of_the_machine():
    free = free_memory()
    assert 0 < free[MACHINE] < 2**50
    assert resource.getpagesize() <= free[MACHINE]


def test_the_state_to_which_a_trainer_may_go_back_counts():
    kept = 3 * 4 * TINY.num_parameters
    words = ("--algorithm", "mipu")
    assert amounts(config(*words))[MACHINE, "accepted state"] == kept
    assert amounts(config(*words), "cuda")[MACHINE, "accepted state"] == kept
    assert (MACHINE, "accepted state") not in amounts(config("--algorithm", "grpo"))


def test_weights_of_earlier_versions_count():
    stale = ("--rollout.max_staleness", "3", "--rollout.hold", "true")
    words = ("--algorithm", "tis_same_version", *stale)
    kept = 4 * 4 * TINY.num_parameters  # three versions, and the current one while those are used
    assert amounts(config(*words))[MACHINE, "weights of versions"] == kept
    assert amounts(config(*words), "cuda")[MACHINE, "weights of versions"] == kept
    assert (MACHINE, "weights of versions") not in amounts(config("--algorithm", "grpo", *stale))
