"""What long trajectories take, and what the doctor says to switch on."""

from dataclasses import replace

from tests.doctor.test_memory import TINY, config
from tir_alp.doctor.__main__ import main as doctor
from tir_alp.doctor.long_context import LENGTHS, advice, plans
from tir_alp.doctor.memory import MACHINE, SHAPES, by_place, needs, trainer_needs

SHAPE = SHAPES["7 B"]
REAL = config("--trainer.dtype", "bfloat16")


def test_what_is_free_decides_what_is_switched_on():
    recomputed = {"trainer.gradient_checkpointing": True}
    offloaded = recomputed | {"trainer.offload_activations": True}
    divided = offloaded | {"trainer.sequence_parallel": 2}
    expected = {
        10**6: [{}, {}, {}],
        80: [{}, recomputed, recomputed],
        60: [recomputed, recomputed, offloaded],
        45: [recomputed, recomputed, divided],
    }
    for free, changes in expected.items():
        found = plans(REAL, SHAPE, "gpu 0", 10**9 * free, 8)
        assert [plan.length for plan in found] == [*LENGTHS]
        assert [plan.changes for plan in found] == changes
        assert all(plan.fits and plan.num_bytes <= 10**9 * free for plan in found)
    nothing = plans(REAL, SHAPE, "gpu 0", 10**9, 8)[0]
    assert not nothing.fits and str(nothing).endswith("which is more than is free")


def test_each_switch_takes_less_and_heads_and_ranks_are_divided():
    long = REAL.model_copy(
        update={
            "trainer": REAL.trainer.model_copy(update={"micro_batch_tokens": 131_072}),
            "rollout": REAL.rollout.model_copy(update={"max_context_tokens": 131_072}),
        }
    )

    def activations(**changes) -> int:
        trainer = long.trainer.model_copy(update=changes)
        settings = long.model_copy(update={"trainer": trainer})
        found = trainer_needs(settings, SHAPE, "gpu 0", 8)
        return next(each.num_bytes for each in found if each.what == "activations")

    recomputed = {"gradient_checkpointing": True}
    offloaded = recomputed | {"offload_activations": True}
    amounts = [activations(**each) for each in ({}, recomputed, offloaded)]
    assert amounts == sorted(amounts, reverse=True) and amounts[2] < amounts[0] / 10
    assert activations(**offloaded, sequence_parallel=4) == amounts[2] // 4
    odd = replace(SHAPE, num_heads=9)
    (plan,) = plans(REAL, odd, "gpu 0", 60 * 10**9, 2)[-1:]
    assert plan.changes["trainer.sequence_parallel"] in (3, 9)
    assert plan.changes["cluster.trainer.count"] % plan.changes["trainer.sequence_parallel"] == 0
    assert plan.changes["cluster.trainer.count"] % 2 == 0


def test_what_is_offloaded_counts_in_the_machine_of_the_gpus():
    words = ("--trainer.gradient_checkpointing", "true", "--trainer.offload_activations", "true")
    found = {each.what: each for each in needs(config(*words), TINY, "cuda", 2)}
    packed = max(REAL.trainer.micro_batch_tokens, 1)
    offloaded = found["offloaded activations"]
    assert offloaded.place == MACHINE
    assert offloaded.num_bytes == 4 * packed * TINY.hidden * TINY.num_layers
    plain = {each.what for each in needs(config(), TINY, "cuda", 2)}
    assert "offloaded activations" not in plain


def test_the_doctor_says_it_of_the_model_of_a_run():
    settings = config()
    own = by_place(needs(settings, TINY, "cpu", 2))[MACHINE]
    said = advice(settings, TINY, "cpu", {MACHINE: own + 10**12}, 2)
    assert said.startswith("a rank of the trainer, by trajectory of 8,192 tokens: ")
    assert "32,768 tokens: " in said and "131,072 tokens: " in said and "as it is set" in said
    tight = advice(settings, TINY, "cpu", {MACHINE: own + 3 * 10**8}, 2)
    assert "trainer.gradient_checkpointing = true" in tight
    assert "offload_activations" not in tight  # on a CPU it gains nothing
    assert advice(settings, TINY, "cuda", {MACHINE: own}, 2) == ""


def test_the_command_prints_it_for_models_of_usual_sizes(capsys):
    assert doctor(["memory"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert lines[0].startswith("| model | a trajectory of 8,192 tokens |")
    assert len(lines) == 2 + len(SHAPES)
    assert "`sequence_parallel = " in lines[-1]
