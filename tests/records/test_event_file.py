"""TensorBoard reads what a run writes, and after a resume only what still holds."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tir_alp.records.event_file import EventFile


def test_a_resumed_run_replaces_the_scalars_of_later_steps(tmp_path):
    for begins_at, value in ((0, 1.5), (3, 9.0)):
        file = EventFile(tmp_path, begins_at)
        for step in range(begins_at + 1, 6):
            file.log(step, {"rollout/reward": value, "loss/value": float("nan")})
        file.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["rollout/reward", "loss/value"]
    assert [(each.step, each.value) for each in events.Scalars("rollout/reward")] == [
        *((step, 1.5) for step in (1, 2, 3)),
        *((step, 9.0) for step in (4, 5)),
    ]
