"""Which task killed the host: an innocent task is never excluded, a guilty one at its second."""

import threading

import pytest

from tir_alp.cluster.poison_tasks import HostGone, PoisonTask, Suspects


def work(suspects, *task_ids, host="host-0", dies=False):
    """Run calls of several tasks at once on one host, which dies at the end if `dies`."""
    together = threading.Barrier(len(task_ids) + 1)

    def call(task_id):
        with suspects.at_work(task_id, host) as report_death:
            together.wait(10)
            if dies:
                report_death("killed")

    threads = [threading.Thread(target=call, args=(task_id,)) for task_id in task_ids]
    for thread in threads:
        thread.start()
    together.wait(10)
    for thread in threads:
        thread.join()


def test_a_task_that_kills_two_hosts_is_excluded_and_named():
    said = []
    suspects = Suspects(said.append, timeout_s=10)
    work(suspects, "good", "bad", "fine", dies=True)
    work(suspects, "bad", host="host-1", dies=True)
    assert suspects.guilty == ()  # somebody else may have killed both
    work(suspects, "bad", host="host-2", dies=True)
    assert suspects.guilty == ("bad",)
    assert said == [
        "task bad is excluded: it killed its host twice (host-1, killed; host-2, killed)"
    ]
    with pytest.raises(PoisonTask, match="bad"), suspects.at_work("bad", "host-0"):
        pass


def test_suspects_run_one_at_a_time_on_a_host():
    suspects = Suspects(print, timeout_s=0.05)
    work(suspects, "good", "bad", dies=True)
    with suspects.at_work("good", "host-1"):
        with pytest.raises(TimeoutError), suspects.at_work("bad", "host-1"):
            pass
        with suspects.at_work("other", "host-1"):
            pass  # it is no suspect, and does not wait
        for host in ("host-2", "host-3"):
            with suspects.at_work("bad", host) as report_death:
                report_death("killed")
    assert suspects.guilty == ("bad",)


def test_a_task_that_waited_while_a_suspect_killed_the_host_is_innocent():
    suspects = Suspects(print, timeout_s=10)
    work(suspects, "good", "bad", dies=True)
    for task in ("good", "bad"):  # after one more, it is guilty
        work(suspects, task, host=f"of-{task}", dies=True)

    refused = []

    def wait():
        with pytest.raises(HostGone), suspects.at_work("good", "host-1"):
            pass
        refused.append("good")

    with suspects.at_work("bad", "host-1") as report_death:
        waiting = threading.Thread(target=wait)
        waiting.start()
        report_death("killed")
    waiting.join(10)
    assert refused == ["good"]
    for later in ("good", "new"):  # nor are tasks that come later
        with pytest.raises(HostGone), suspects.at_work(later, "host-1"):
            pass
    work(suspects, "new", host="host-2", dies=True)
    assert suspects.guilty == ("bad",)
    work(suspects, "good", "fine", host="host-3")
    with suspects.at_work("good", "host-1", generation=1) as report_death:
        report_death("killed")
    assert suspects.guilty == ("bad", "good")


def test_hosts_that_die_for_other_reasons_cost_no_task():
    suspects = Suspects(print, timeout_s=10)
    for number in range(20):
        tasks = (f"{letter}{number}" for letter in "abc")
        work(suspects, *tasks, host=f"host-{number}", dies=True)
    assert suspects.guilty == ()
