"""Where a run comes from, how long it took, and what it used: rows of name and value. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tir_alp.report.formats import counted, duration, number
from tir_alp.report.read import RecordedRun

_HOUR_S = 3600.0
_LONGEST = 4000  # characters of a value
_MOST_STARTS = 20


def provenance_of(run: RecordedRun, price_per_hour: float | None = None) -> list[tuple[str, str]]:
    """Return what is known of a run's origin and of its cost.

    Args:
        run: The run.
        price_per_hour: What an hour of the machine costs, in any currency; None: unknown.
    """
    saved = run.provenance
    if not saved:
        return [("provenance", "the run recorded none")]
    resumed = [each for each in _items(saved.get("resumed")) if isinstance(each, Mapping)]
    rows = [
        ("command", _text(saved.get("command"))),
        *(("resumed by", _text(each.get("command"))) for each in resumed[:_MOST_STARTS]),
        ("commit", _commit([saved, *resumed])),
        ("versions", _versions(saved.get("versions"))),
        ("hardware", _hardware(saved.get("hardware"))),
        *_times(run),
        *_used(run),
    ]
    hours = _seconds(run) / _HOUR_S
    if price_per_hour is not None:
        price = f"{hours * price_per_hour:.2f}, at {price_per_hour:g} per hour of the machine"
        rows.append(("cost", price))
    return [(name, value[:_LONGEST]) for name, value in rows if value]


def _commit(starts: list[Mapping[str, Any]]) -> str:
    found = dict.fromkeys(_text(each.get("commit")) for each in starts)
    return ", then ".join(each or "no checkout: an installed package" for each in found)


def _versions(found: Any) -> str:
    if not isinstance(found, Mapping):
        return ""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _hardware(found: Any) -> str:
    if not isinstance(found, Mapping):
        return ""
    gpus = [str(each) for each in _items(found.get("gpus"))]
    kinds = dict.fromkeys(gpus)
    parts = [
        _text(found.get("processor")),
        f"{found['cores']} cores" if "cores" in found else "",
        f"{found['memory_gb']} GB of memory" if "memory_gb" in found else "",
        ", ".join(f"{gpus.count(kind)} x {kind}" for kind in kinds) or "no GPU",
        _text(found.get("system")),
    ]
    return "; ".join(filter(None, parts))


def _times(run: RecordedRun) -> list[tuple[str, str]]:
    times = _starts(run)
    if not times:
        return []
    last = times[-1].get("ended")
    ended = str(last) if last else "not recorded: it is going on, or it was killed"
    if len(times) > 1:
        ended += f"; {len(times)} starts"
    rows = [("began", _text(times[0].get("started"))), ("ended", ended)]
    if seconds := _seconds(run):
        steps = f", {duration(seconds / run.last_step)} per step" if run.last_step else ""
        until = "" if last else " until its last metrics"
        rows.append(("duration", f"{duration(seconds)}{until}{steps}"))
    return rows


def _used(run: RecordedRun) -> list[tuple[str, str]]:
    times = _starts(run)
    rows = []
    own, child = (
        max((_number(each.get(name)) for each in times), default=0.0)
        for name in ("peak_memory_gb", "peak_memory_of_a_child_gb")
    )
    if own:
        more = f"; the largest of its ended children {number(child)} GB" if child else ""
        rows.append(("peak memory", f"{number(own)} GB of the process{more}"))
    gpu = [_number(gb) for each in times for gb in _items(each.get("peak_gpu_memory_gb"))]
    if any(gpu):
        rows.append(("peak GPU memory", f"{number(max(gpu))} GB of one GPU, by PyTorch"))
    used = []
    if cpu := sum(_number(each.get("cpu_s")) for each in times):
        hours, seconds = number(round(cpu / _HOUR_S, 2)), number(round(cpu))
        used.append(f"{hours} core hours" if cpu >= _HOUR_S else f"{seconds} core seconds")
    hardware = run.provenance.get("hardware")
    gpus = len(_items(hardware.get("gpus"))) if isinstance(hardware, Mapping) else 0
    if gpus and (seconds := _seconds(run)):
        hours = number(round(gpus * seconds / _HOUR_S, 3))
        used.append(f"{hours} GPU hours ({counted(gpus, 'GPU', 'GPUs')} for the whole duration)")
    if tokens := sum(run.finite("tokens/generated")):
        used.append(f"{tokens:,.0f} tokens written by the policy")
    if used:
        rows.append(("used", "; ".join(used)))
    return rows


def _seconds(run: RecordedRun) -> float:
    """Return how long all starts took together; of one without an end, until the last metrics."""
    total = 0.0
    times = _starts(run)
    for index, each in enumerate(times):
        started, ended = _moment(each.get("started")), _moment(each.get("ended"))
        if started is None:
            continue
        if ended is None and index == len(times) - 1:
            ended = run.last_written
        total += max(0.0, ended - started) if ended is not None else 0.0
    return total


def _starts(run: RecordedRun) -> list[Mapping[str, Any]]:
    return [each for each in _items(run.provenance.get("times")) if isinstance(each, Mapping)]


def _moment(value: Any) -> float | None:
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _text(value: Any) -> str:
    return "" if value is None else str(value)
