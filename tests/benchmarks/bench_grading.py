"""Time that a normal answer waits for its grade while a tenth of the answers is hostile.

    python tests/benchmarks/bench_grading.py [--answers 2000] [--threads 16] [--hostile 0.1]

Prints the median, the 99th percentile and the maximum of the time per normal answer: without
hostile answers, with them, and with some more that hold a grader until it is killed. Exits with 1
if a normal answer got a wrong grade.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tir_alp.envs import grading
from tir_alp.envs.grader_pool import GaveUp
from tir_alp.envs.grading import grade

NORMAL = (
    ("42", "42", True),
    ("41", "42", False),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
    ("2*pi/3", r"\frac{2\pi}{3}", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x+2", "(x+1)^2", False),
)
HOSTILE = (
    "9^{9^{9^{9}}}",
    "1000000!",
    "x^" * 200 + "x",
    r"\sqrt{" * 11 + "x" + "}" * 11,
    "(1,2)," * 60,
    r"\int_0^1 \sin(x^{x})^{\tan x} e^{x^3} dx",
    r"\sum_{n=1}^{100000000} \frac{\sin n}{n}",
    r"\cos(x^7+\sin(x^5+\tan(x^3+x)))^{13}-\sin(\cos(x))^{17}",
)
HANG = ("{" * 30 + "1" + "}" * 30, "1/3")  # `grade` refuses it, so the pool is asked itself
TRUTHS = ("42", r"\sqrt{2}", r"\frac{x^2-1}{x+1}")


def measure(
    num_answers: int, num_threads: int, hostile: float, hangs: float = 0.0
) -> tuple[list[float], int]:
    """Grade answers in threads, of which shares are hostile, or hang.

    Returns:
        Seconds per normal answer, and the number of normal answers with a wrong grade.
    """
    rng = random.Random(0)

    def play(kind: str, draw: float) -> tuple[float, bool] | None:
        begin = time.perf_counter()
        if kind == "hangs":
            with contextlib.suppress(GaveUp):
                grading._pool.verify(*HANG)
            return None
        if kind == "hostile":
            grade(HOSTILE[int(draw * len(HOSTILE))], TRUTHS[int(draw * 97) % len(TRUTHS)])
            return None
        answer, truth, correct = NORMAL[int(draw * len(NORMAL))]
        is_right = grade(answer, truth).correct is correct
        return time.perf_counter() - begin, is_right

    shares = (hangs, hostile, 1.0 - hangs - hostile)
    kinds = rng.choices(("hangs", "hostile", "normal"), shares, k=num_answers)
    with ThreadPoolExecutor(num_threads) as threads:
        played = threads.map(play, kinds, [rng.random() for _ in kinds])
        normal = [each for each in played if each is not None]
    return sorted(seconds for seconds, _ in normal), sum(not right for _, right in normal)


def main() -> int:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--hostile", type=float, default=0.1)
    parser.add_argument("--hangs", type=float, default=0.003)
    options = parser.parse_args()
    measure(400, options.threads, 0.0)  # the processes start
    num_wrong = 0
    for hostile, hangs in (0.0, 0.0), (options.hostile, 0.0), (options.hostile, options.hangs):
        seconds, wrong = measure(options.answers, options.threads, hostile, hangs)
        num_wrong += wrong
        p50, p99 = (seconds[int(len(seconds) * share)] * 1e3 for share in (0.5, 0.99))
        print(
            f"{hostile:4.0%} hostile, {hangs:.1%} hang: median {p50:.1f} ms, p99 {p99:.1f} ms, "
            f"max {seconds[-1] * 1e3:.1f} ms, {wrong} of {len(seconds)} graded wrong"
        )
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
