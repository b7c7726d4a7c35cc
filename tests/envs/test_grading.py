import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tir_alp.envs import grading
from tir_alp.envs.grader_pool import GaveUp, GraderError, GraderPool
from tir_alp.envs.grading import Grade, grade
from tir_alp.tools.outcome import Outcome

HANGS = ("{" * 30 + "1" + "}" * 30, "1/3")  # for the pool alone: `grade` never asks this


@pytest.fixture(scope="module")
def pool():
    pool = GraderPool(num_workers=1, deadline_s=1.0)
    yield pool
    pool.close()


def worker_pids(pool):
    return [worker.pid for worker in pool._slots.idle()]


def is_alive(pid):
    try:
        os.kill(pid, 0)  # succeeds for zombies too
    except ProcessLookupError:
        return False
    return True


def wait_for_the_end_of(*pids):
    end = time.monotonic() + 10.0
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, f"still alive: {[*filter(is_alive, pids)]}"
        time.sleep(0.01)


# ------------------------------------------------------------------------ without a process


@pytest.mark.parametrize(
    ("answer", "truth", "correct"),
    [
        ("1888", "1888", True),
        (" 1888 ", "1888", True),
        ("1887", "1888", False),
        ("+7", "7", True),
        ("007", "7", True),
        ("-7", "7", False),
        ("2/4", "1/2", True),
        ("4/2", "2", True),
        ("1/3", "1/2", False),
        ("hello", "hello", True),
        ("37*48+112", "1888", False),
        (r"37 \times 48 + 112", "1888", False),
        ("37\u00d748", "1776", False),
        ("2000-112", "1888", False),
        ("x = 37*48 + 112", "1888", False),
    ],
)
def test_plain_numbers_need_no_math_verify(monkeypatch, answer, truth, correct):
    monkeypatch.setattr(grading, "_pool", None)
    assert grade(answer, truth).correct is correct


def test_plain_numbers_take_microseconds():
    begin = time.process_time()
    for _ in range(1000):
        grade("1887", "1888")
    assert time.process_time() - begin < 0.5


# ------------------------------------------------------------------------- with math-verify


@pytest.mark.parametrize(
    ("answer", "truth", "correct"),
    [
        ("0.5", "1/2", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\dfrac{12}{24}", "0.5", True),
        ("1,888", "1888", True),
        ("$1888$", "1888", True),
        ("$-5$", "-5", True),
        ("x = -5", "-5", True),
        ("37*48+112 = 1888", "1888", True),
        (r"1888\text{ cm}", "1888", True),
        (r"1.5\times 10^3", "1500", True),
        ("2x+3", "3+2x", True),
        (r"\{2,1\}", r"\{1,2\}", True),
        ("1,2,3", "3", False),
        ("7 or 12", "12", False),
        ("it is 12", "12", False),
        ("1887.999", "1888", False),
        ("x>5", "5", False),
        ("nonsense", "5", False),
        ("((((", "5", False),
        ("", "5", False),
    ],
)
def test_other_answers_are_compared_as_mathematics(answer, truth, correct):
    assert grade(answer, truth) == Grade(correct=correct)


def test_a_fraction_over_zero_is_a_wrong_answer():
    assert grade("1/0", "5").correct is False


def test_a_truth_that_cannot_be_parsed_is_a_grader_error():
    result = grade("5", "}{")
    assert (result.correct, result.outcome) == (None, Outcome.GRADER_ERROR)
    assert "'}{'" in result.error


# --------------------------------------------------------------------- hangs, crashes, ends


_HANGING_JUDGE = """import os, time
def judge(answer, truth, *_):
    if "hang" in answer + truth:
        sum(iter(int, 1))
    if "die" in answer + truth:
        os._exit(3)
    if "raise" in answer + truth:
        raise ValueError("as it was told to")
    return False
"""


@pytest.fixture
def hanging(monkeypatch, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text(_HANGING_JUDGE)
    pool = GraderPool(num_workers=1, judge_file=judge, deadline_s=0.5)
    monkeypatch.setattr(grading, "_pool", pool)
    yield pool
    pool.close()


@pytest.mark.parametrize("answer", [r"\hang", r"\die", r"\raise"])
def test_an_answer_on_which_the_grader_gives_up_is_wrong(hanging, answer):
    result = grade(answer, "x+1")
    assert (result.correct, result.outcome) == (False, Outcome.OK)
    assert "cannot be evaluated" in result.error


@pytest.mark.parametrize("truth", [r"\hang", r"\die", r"\raise"])
def test_a_truth_on_which_the_grader_gives_up_is_a_grader_error(hanging, truth):
    result = grade("5", truth)
    assert (result.correct, result.outcome) == (None, Outcome.GRADER_ERROR)
    assert "the truth" in result.error


def test_graders_that_cannot_start_are_a_grader_error(monkeypatch, tmp_path):
    pool = GraderPool(num_workers=1, judge_file=tmp_path / "missing.py")
    monkeypatch.setattr(grading, "_pool", pool)
    assert grade("x", "x+1").outcome is Outcome.GRADER_ERROR


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "10^{10^{10}}",
        "2^{9999999999}",
        "1000000!",
        "9**9**9**9",
        "Interval(0, 9**9**9**9)",
        "[0, 10**10**10)",
        "{1, 9**9**9**9}",
        "0 < x < 9**9**9**9",
        "(1+i)^{99999999}",
        "factorial(100000000)",
        "exp(exp(exp(100)))",
        "x^" * 250 + "x",
        "(1,2)," * 800,
        "{" * 300 + "1" + "}" * 300,
        r"\sqrt{" * 40 + "2" + "}" * 40,
        "7" * 5000,
    ],
)
@pytest.mark.parametrize("truth", ["12", r"\sqrt{2}", "x+1", r"\{1,2\}"])
def test_an_answer_that_would_take_forever_is_wrong_at_once(answer, truth):
    grade("x", "y")  # a worker has started
    begin = time.perf_counter()
    result = grade(answer, truth)
    assert (result.correct, result.outcome) == (False, Outcome.OK)
    assert time.perf_counter() - begin < 2.0


def test_a_hang_is_killed_at_the_deadline_and_replaced(pool):
    assert pool.verify("0.5", "1/2")
    (pid,) = worker_pids(pool)
    begin = time.perf_counter()
    with pytest.raises(GraderError, match="within 1 s"):
        pool.verify(*HANGS)
    # One second of processor time: on a busy machine it lasts longer, ten seconds at most.
    assert 1.0 <= time.perf_counter() - begin < 13.0
    assert not is_alive(pid)
    assert pool.verify("0.5", "1/2")


def test_a_worker_that_dies_at_work_is_an_error_and_replaced(pool):
    assert pool.verify("0.5", "1/2")
    (pid,) = worker_pids(pool)
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(GraderError, match="ended with status -9"):
        pool.verify(*HANGS)
    killer.join()
    assert pool.verify("0.5", "1/2")


def test_a_worker_that_died_while_idle_is_an_error_and_replaced(pool):
    assert pool.verify("0.5", "1/2")
    (pid,) = worker_pids(pool)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(GraderError):
        pool.verify("0.5", "1/2")
    assert pool.verify("0.5", "1/2")


def test_a_full_pool_is_an_error_after_its_own_deadline():
    pool = GraderPool(num_workers=1, deadline_s=2.0, patience_s=9.0, queue_deadline_s=0.1)
    assert pool.verify("0.5", "1/2")

    def hang():
        with pytest.raises(GraderError):
            pool.verify(*HANGS)

    hanging = threading.Thread(target=hang)
    hanging.start()
    time.sleep(0.3)
    with pytest.raises(GraderError, match="all 1 graders were busy"):
        pool.verify("0.5", "1/2")
    hanging.join()
    pool.close()


def test_a_slow_request_does_not_hold_up_the_others(tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text(_HANGING_JUDGE)
    pool = GraderPool(num_workers=1, judge_file=judge, deadline_s=3.0, patience_s=0.1)
    assert pool.verify("1", "2") is False

    def hang():
        with pytest.raises(GaveUp):
            pool.verify("hang", "1")

    hanging = threading.Thread(target=hang)
    begin = time.perf_counter()
    hanging.start()
    time.sleep(0.05)
    assert pool.verify("1", "2") is False  # waits until another process has started
    assert time.perf_counter() - begin < 2.5
    hanging.join()
    assert pool.verify("1", "2") is False
    assert len(worker_pids(pool)) == 1
    pool.close()


def test_a_killed_worker_is_replaced_in_milliseconds(pool):
    assert pool.verify("0.5", "1/2")
    begin = time.process_time(), time.perf_counter()
    for _ in range(5):
        (pid,) = worker_pids(pool)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(GraderError):
            pool.verify("0.5", "1/2")
        assert pool.verify("0.5", "1/2")
        assert worker_pids(pool) != [pid]
    assert time.perf_counter() - begin[1] < 2.0  # five starts of a process with sympy: five seconds


def test_the_process_that_workers_are_forked_from_is_replaced_too(pool):
    assert pool.verify("0.5", "1/2")
    template, (pid,) = pool._template._running[0].pid, worker_pids(pool)
    os.kill(template, signal.SIGKILL)
    wait_for_the_end_of(pid)
    with pytest.raises(GraderError) as failure:
        pool.verify("0.5", "1/2")
    assert not isinstance(failure.value, GaveUp)  # no fault of the answer
    assert pool.verify("0.5", "1/2")


def test_an_answer_at_work_when_the_template_ends_is_not_at_fault(pool):
    assert pool.verify("0.5", "1/2")
    killer = threading.Timer(0.2, os.kill, (pool._template._running[0].pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(GraderError) as failure:
        pool.verify(*HANGS)
    assert not isinstance(failure.value, GaveUp)
    killer.join()
    assert pool.verify("0.5", "1/2")


def test_requests_are_served_in_the_order_in_which_they_came(tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("import time\ndef judge(*_):\n    time.sleep(0.002)\n    return True\n")
    pool = GraderPool(num_workers=1, judge_file=judge)
    pool.verify()
    waits = []

    def ask():
        for _ in range(25):
            begin = time.perf_counter()
            pool.verify()
            waits.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    waits.sort()
    assert waits[-1] < 8 * waits[len(waits) // 2]


def test_many_threads_get_their_own_verdicts(pool):
    verdicts = {}

    def check(number):
        verdicts[number] = pool.verify(f"{number}.0", str(number % 7))

    threads = [threading.Thread(target=check, args=(number,)) for number in range(14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: number < 7 for number in range(14)}
    assert len(worker_pids(pool)) == 1


def test_closing_leaves_no_process():
    pool = GraderPool(num_workers=1)
    assert pool.verify("0.5", "1/2")
    (pid,) = worker_pids(pool)
    pool.close()
    assert not is_alive(pid)


def test_a_forked_child_has_graders_of_its_own():
    assert grade("0.5", "1/2").correct
    ours = grading._pool
    child = os.fork()
    if child == 0:
        alone = grading._pool is not ours and not worker_pids(grading._pool)
        os._exit(0 if alone and grade("0.25", "1/4").correct else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert grading._pool is ours


def test_the_graders_of_a_program_end_with_it():
    program = """if True:
        from tir_alp.envs import grading
        assert grading.grade("0.5", "1/2").correct
        print(*(w.pid for w in grading._pool._slots.idle()))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert not any(is_alive(int(pid)) for pid in done.stdout.split())


def test_nothing_is_left_of_a_program_that_is_killed_while_it_grades():
    program = """if True:
        import threading
        from tir_alp.envs import grading
        assert grading.grade("0.5", r"\\frac{\\sqrt{4}}{4}").correct
        idle = [worker.pid for worker in grading._pool._slots.idle()]
        hang = ("{" * 30 + "1" + "}" * 30, "1/3")
        threading.Thread(target=grading._pool.verify, args=hang).start()
        threading.Event().wait(0.3)
        print(grading._pool._template._running[0].pid, *idle, flush=True)
        threading.Event().wait()
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        template, *idle = map(int, killed.stdout.readline().split())
        workers = children_of(template)
        assert set(idle) <= workers and workers
        killed.kill()
    wait_for_the_end_of(template, *workers)


def children_of(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return set(map(int, listed.split()))
