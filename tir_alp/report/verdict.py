"""What became of a run, in sentences that are made from its numbers. Pure.

Did it learn: the beginning and the end, with intervals. Is it stable: measures of the policy
without noise. What to look at: what usually explains a run that does not learn. Where there is too
little data, the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean, median

from tir_alp.report.document import Finding, Findings, Level
from tir_alp.report.formats import counted, number, share, with_interval
from tir_alp.report.intervals import (
    Interval,
    difference_of,
    difference_of_shares,
    mean_of,
    share_of,
)
from tir_alp.report.read import RecordedRun
from tir_alp.report.series import num_not_finite, spread

MOST_STEPS = 10
"""Steps at the beginning and at the end whose means are compared, at most."""
LEAST_STEPS = 4
"""Fewer steps say nothing about learning."""
LEAST_MEASURED = 3
"""Fewer measurements say nothing about stability, unless one is out of bounds."""
MUCH_KL = 0.1
"""|KL| to the rollout policy that is large, in nats per token."""
WIDE = 10.0
"""P98 over P2 of sequence ratios that is wide."""
GROWTH = 3.0
"""From the first to the last third of the measurements: a growth that is worth a look."""
MUCH_CLIPPED = 0.2
"""Share of clipped tokens that is large."""
LITTLE_ENTROPY = 0.1
"""Share of its first entropy at which a policy has nearly stopped to explore."""
LONGER = 1.5
"""Growth of the tokens of a step that is worth a look."""
MANY = 0.5
"""Share of turns, groups or trajectories that is worth a look."""
_NEGLIGIBLE_KL = 1e-3
_MOST_SAID = 2


def verdict_of(run: RecordedRun) -> Findings:
    """Return the findings about a run: learning, then stability, then what to look at."""
    if not run.series:
        text = "Nothing can be said: no metric has been recorded yet."
        return Findings((Finding("learning", "unknown", text), *_state(run)))
    if run.command == "sft":
        found = [*_held_out_loss(run), *_training_loss(run)]
    else:
        found = [*_accuracy(run), *_reward(run)]
        if run.command == "train":
            found += [*_stability(run)]
    if not any(each.about == "learning" for each in found):
        text = "Whether it learned cannot be said: neither reward, accuracy nor loss was recorded."
        found.insert(0, Finding("learning", "unknown", text))
    return Findings((*found, *_state(run), *_attention(run)))


def headline_of(findings: Findings) -> str:
    """Return the findings in one line."""
    levels = {
        about: [each.level for each in findings.findings if each.about == about]
        for about in ("learning", "stability")
    }
    # The first finding about learning is the one that counts: accuracy before reward.
    learned = {
        "good": "It learned.",
        "bad": "It got worse.",
        "neutral": "No learning is shown.",
        "unknown": "Too little data to say whether it learned.",
    }[levels["learning"][0] if levels["learning"] else "unknown"]
    words = [learned]
    if stability := levels["stability"]:
        if "bad" in stability:
            words.append("Its stability needs a look.")
        elif "good" in stability:
            words.append("It is stable by what was measured.")
        else:
            words.append("Too little data to say whether it is stable.")
    things = sum(each.about == "attention" for each in findings.findings)
    if things:
        words.append(f"{counted(things, 'thing', 'things')} to look at.")
    return " ".join(words)


# ------------------------------------------------------------------------------------ learning


def _accuracy(run: RecordedRun) -> Iterator[Finding]:
    series = run.series.get("eval/accuracy")
    points = [] if series is None else [(s, v) for s, v in series.at().items() if math.isfinite(v)]
    if not points:
        return
    tasks = run.series["eval/tasks"].at() if "eval/tasks" in run.series else {}
    (start, first), (end, last) = points[0], points[-1]
    before, after = (share_of(value, int(tasks.get(s, 0))) for s, value in (points[0], points[-1]))
    greedy = run.series["eval/greedy_accuracy"].at() if "eval/greedy_accuracy" in run.series else {}
    more = [counted(int(tasks[end]), "task", "tasks")] if end in tasks else []
    more += [f"greedily {share(greedy[end])}"] if math.isfinite(greedy.get(end, math.nan)) else []
    of_tasks = f" ({'; '.join(more)})" if more else ""
    if start == end:
        text = f"Held-out accuracy was measured once, in step {end}: {_percent(after)}{of_tasks}."
        yield Finding("learning", "unknown", text)
        return
    found = difference_of_shares(after, before)
    level, words = _judged(found)
    moved = "rose" if last > first else "fell" if last < first else "went"
    yield Finding(
        "learning",
        level,
        f"Held-out accuracy {moved} from {_percent(before)} in step {start} to {_percent(after)} "
        f"in step {end}{of_tasks}: {words}.",
    )


def _reward(run: RecordedRun) -> Iterator[Finding]:
    yield from _first_and_last(run, "rollout/reward", "The mean reward of training", 1)


def _training_loss(run: RecordedRun) -> Iterator[Finding]:
    yield from _first_and_last(run, "loss/value", "The training loss", -1)


def _first_and_last(run: RecordedRun, metric: str, name: str, better: int) -> Iterator[Finding]:
    """Compare the first and the last steps; `better` is the sign of an improvement."""
    values = run.finite(metric)
    if not values:
        return
    if len(values) < LEAST_STEPS:
        shown = ", ".join(map(number, values))
        text = f"{name}: {shown} in {counted(len(values), 'step', 'steps')}, too few to judge by."
        yield Finding("learning", "unknown", text)
        return
    size = min(MOST_STEPS, len(values) // 2)
    first, last = values[:size], values[-size:]
    level, words = _judged(difference_of(last, first), better)
    moved = (
        "rose" if fmean(last) > fmean(first) else "fell" if fmean(last) < fmean(first) else "went"
    )
    before, after = (with_interval(mean_of(each), ".3g") for each in (first, last))
    text = f"{name} {moved} from {before} in the first {size} steps to {after} in the last {size}"
    yield Finding("learning", level, f"{text}: {words}.")


def _held_out_loss(run: RecordedRun) -> Iterator[Finding]:
    series = run.series.get("eval/loss")
    points = [] if series is None else [(v, s) for s, v in series.at().items() if math.isfinite(v)]
    if len(points) < 2:
        return
    (first, _), (last, end), (best, step) = points[0], points[-1], min(points)
    text = f"The loss on held-out conversations went from {number(first)} to {number(last)}"
    if last > best:
        text += (
            f"; it was lowest, {number(best)}, in step {step}, and rose after it until step {end}"
        )
    level: Level = "good" if last < first else "bad" if last > first else "neutral"
    yield Finding("learning", level, f"{text} (nats per token, one value each, without interval).")


def _judged(difference: Interval, better: int = 1) -> tuple[Level, str]:
    """Return the level of a difference, and what its interval says."""
    if not difference.is_known:
        return "unknown", "there is no interval, so the change may be chance"
    if difference.low == difference.high == 0:
        return "neutral", "it did not change"
    if difference.sign == 0:
        return "neutral", "the intervals are too wide to tell a change from chance"
    return ("good" if difference.sign == better else "bad"), "more than chance explains"


# ----------------------------------------------------------------------------------- stability


def _stability(run: RecordedRun) -> Iterator[Finding]:
    yield from _kl(run)
    yield from _tails(run)
    yield from _clipped(run)
    yield from _entropy(run)


def _kl(run: RecordedRun) -> Iterator[Finding]:
    values = [abs(value) for value in run.finite("kl_clean/rollout")]
    if not values:
        other = [abs(value) for value in run.finite("kl/rollout")]
        if other:
            level: Level = "bad" if max(other) > MUCH_KL else "unknown"
            text = (
                "The KL of the policy without noise was not measured (metrics.clean_every); that "
                f"of the trained policy was at most {number(max(other))} nats per token."
            )
            yield Finding("stability", level, text)
        return
    is_growing = _growth(values) > GROWTH and max(values) > _NEGLIGIBLE_KL
    is_large = max(values) > MUCH_KL
    text = f"The clean |KL| to the rollout policy was at most {number(max(values))} nats per token"
    if is_growing:
        text += f" and grew {_growth(values):.3g}-fold from the first to the last third"
    yield _measured(text, values, is_large or is_growing)


def _tails(run: RecordedRun) -> Iterator[Finding]:
    factors = spread(run, "ratio_clean/p")
    values = factors.finite if factors else []
    if factors and not values:
        text = "P98 over P2 of the clean sequence ratios was never finite: P2 was 0."
        yield Finding("stability", "bad", text)
    if not values:
        return
    is_growing = _growth(values) > GROWTH
    text = f"P98 over P2 of the clean sequence ratios was at most {number(max(values))}"
    if is_growing:
        text += f" and grew {_growth(values):.3g}-fold from the first to the last third"
    yield _measured(text, values, max(values) > WIDE or is_growing)


def _clipped(run: RecordedRun) -> Iterator[Finding]:
    values = run.finite("loss_clean/clip_fraction")
    if values:
        text = f"Of the tokens, {share(fmean(values))} were clipped, without noise"
        yield _measured(text, values, fmean(values) > MUCH_CLIPPED)


def _entropy(run: RecordedRun) -> Iterator[Finding]:
    values = run.finite("entropy_clean/mean") or run.finite("entropy/mean")
    if not values:
        return
    first, last = values[0], values[-1]
    text = f"The entropy went from {number(first)} to {number(last)} nats per token"
    if len(values) == 1:
        text = f"The entropy was {number(first)} nats per token"
    is_low = first > 0 and last < LITTLE_ENTROPY * first
    is_high = first > 0 and last > GROWTH * first
    if is_low:
        text += ": the policy has nearly stopped to explore"
    elif is_high:
        text += ": the policy becomes more random"
    yield _measured(text, values, is_low or is_high)


def _measured(text: str, values: list[float], is_bad: bool) -> Finding:
    few = len(values) < LEAST_MEASURED
    level: Level = "bad" if is_bad else "unknown" if few else "good"
    of = f" ({counted(len(values), 'measurement', 'measurements')})"
    more = ", too few to show a trend" if few and not is_bad else ""
    return Finding("stability", level, f"{text}{of}{more}.")


def _growth(values: list[float]) -> float:
    """Return the median of the last third over that of the first; NaN if there is too little."""
    size = len(values) // 3
    first = median(values[:size]) if size else 0.0
    return median(values[-size:]) / first if first > 0 else math.nan


# ------------------------------------------------------------------------------- what to look at


def _state(run: RecordedRun) -> Iterator[Finding]:
    wanted = run.settings.get("steps")
    if run.command != "evaluate" and isinstance(wanted, int) and run.last_step < wanted:
        text = f"The run has made {run.last_step} of {counted(wanted, 'step', 'steps')}."
        yield _look(text)
    for event in run.events[-_MOST_SAID:]:
        yield _look(
            f"Step {event['step']}, {event.get('kind', 'event')}: {event.get('reason', '')}"
        )
    if lost := num_not_finite(run):
        yield _look(f"In {counted(lost, 'step', 'steps')} a metric was NaN or infinite.")
    if skipped := sum(run.finite("train/skipped_updates")):
        yield _look(f"{counted(int(skipped), 'update was', 'updates were')} skipped.")


def _attention(run: RecordedRun) -> Iterator[Finding]:
    if run.command == "train":
        yield from _signal(run)
        yield from _behaviour(run)
        yield from _overfit(run)
    for each in run.advice[-_MOST_SAID:]:
        yield _look(f"The run said in step {each['step']}: {each.get('advice', '')}")


def _signal(run: RecordedRun) -> Iterator[Finding]:
    rewards = run.finite("rollout/reward")
    if rewards and min(rewards) == max(rewards):
        text = f"The mean reward was {number(rewards[0])} in every step"
        if rewards[0] <= 0:
            text += ": compare how answers are written with the format that the grader reads"
        yield _look(f"{text}.")
    flat, groups = run.finite("rollout/zero_signal_groups"), _groups(run.settings)
    if flat and groups and fmean(flat) > MANY * groups:
        text = f"In a step, {number(fmean(flat))} groups had equal rewards on average ({groups} "
        yield _look(f"{text}are trained on), which teach nothing: too easy or too hard tasks.")
    if (void := run.finite("rollout/void_turns")) and fmean(void) > MANY:
        whole = " (all of them)" if fmean(void) == 1 else ""
        text = (
            f"{share(fmean(void))} of the turns{whole} hold neither a complete call nor an answer."
        )
        yield _look(text)
    if failed := sum(run.finite("rollout/failed")):
        trajectories = counted(int(failed), "trajectory was", "trajectories were")
        yield _look(f"{trajectories} lost to failures of the infrastructure.")


def _behaviour(run: RecordedRun) -> Iterator[Finding]:
    calls = run.finite("rollout/tool_calls")
    has_tools = not run.environment or any("tools" in each for each in run.environment)
    if calls and not any(calls) and has_tools:
        yield _look("No tool was ever called.")
    tokens = run.finite("tokens/generated")
    if len(tokens) >= LEAST_STEPS:
        size = min(MOST_STEPS, len(tokens) // 2)
        first, last = fmean(tokens[:size]), fmean(tokens[-size:])
        if first > 0 and last > LONGER * first:
            text = f"The tokens of a step grew from {number(round(first))} to {number(round(last))}"
            yield _look(f"{text} (means of {size} steps).")
    truncated = run.finite("rollout/truncated")
    if truncated and fmean(truncated[-MOST_STEPS:]) > MANY:
        text = f"A limit cut {share(fmean(truncated[-MOST_STEPS:]))} of the latest trajectories."
        yield _look(text)


def _overfit(run: RecordedRun) -> Iterator[Finding]:
    learned = {
        each.text.startswith("Held"): each.level for each in (*_accuracy(run), *_reward(run))
    }
    if learned == {True: "bad", False: "good"}:
        yield _look("The reward rose while held-out accuracy fell.")


def _groups(settings: Mapping[str, object]) -> int:
    found = settings.get("rollout.groups_per_step")
    return found if isinstance(found, int) else 0


def _look(text: str) -> Finding:
    return Finding("attention", "neutral", text)


def _percent(found: Interval) -> str:
    return with_interval(found, ".1%")
