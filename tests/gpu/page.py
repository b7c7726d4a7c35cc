"""The page of the results: one table per part, with every figure of the JSON file that it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]


def page(results: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    made, parts = results["environment"], results["parts"]
    reduced = (
        "**There was no GPU: every part ran in reduced form on the CPU. The figures show only that "
        "the script works.**"
    )
    lines = [
        "# Results on a GPU",
        "",
        *([reduced, ""] if results["is_reduced"] else []),
        table(["machine", ""], [[name, figure(value)] for name, value in made.items()]),
        "",
        table(
            ["part", "status", "seconds", "reason"],
            [
                [name, part["status"], figure(part["seconds"]), part["reason"] or ""]
                for name, part in parts.items()
            ],
        ),
    ]
    for name, part in parts.items():
        sections = SECTIONS[name](part["figures"]) if part["figures"] else []
        lines += ["", f"## {TITLES[name]}", "", *(sections or ["Nothing was measured."])]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def figure(value: Any) -> str:
    """Return a number with three digits that count, and anything else as it is."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def of_marked(figures: Figures) -> list[str]:
    """Tests, and how they ended."""
    counts = ", ".join(f"{number} {end}" for end, number in figures.get("counts", {}).items())
    rows = [[f"`{name}`", end] for name, end in figures.get("ends", {}).items()]
    return [counts, "", table(["test", ""], rows)]


def of_training(figures: Figures) -> list[str]:
    """Variants of the training step by model."""
    lines = [
        f"A product of large bfloat16 matrices runs at "
        f"{figure(figures.get('product_flops_per_s', 0.0) / 1e12)} TFLOP/s. MFU is relative to "
        f"{figure(figures.get('peak', {}).get('flops_per_s', 0.0) / 1e12)} TFLOP/s "
        f"({figures.get('peak', {}).get('source')}). A step: "
        + ", ".join(f"{name} {number}" for name, number in figures.get("step", {}).items())
        + "."
    ]
    for name in [each for each in figures if "variants" in str(figures[each])]:
        found = figures[name]
        rows = [
            [
                variant,
                *(figure(row[key]) for key in ("seconds", "tokens_per_s", "mfu", "peak_memory_gb")),
            ]
            for variant, row in found["variants"].items()
        ]
        rows += [
            [pair, figure(found[pair]["seconds"]), "", "", figure(found[pair]["peak_memory_gb"])]
            for pair in found
            if "_over_" in pair
        ]
        head = [f"{name} ({found['weights']})", "seconds", "tokens/s", "MFU", "peak memory, GB"]
        lines += ["", table(head, rows)]
    return lines


def of_decode(figures: Figures) -> list[str]:
    """Numbers of sequences by model."""
    rows = [
        [
            name,
            count,
            *(
                figure(row[key])
                for key in ("tokens_per_s", "seconds_per_step", "reading_weights_s")
            ),
        ]
        for name, found in figures.items()
        if isinstance(found, dict)
        for count, row in found.items()
    ]
    head = ["model", "sequences", "tokens/s", "seconds per step", "reading the weights once, s"]
    return [table(head, rows)]


def of_noise(figures: Figures) -> list[str]:
    """Seconds of the noise by model."""
    found = {name: each for name, each in figures.items() if isinstance(each, dict)}
    found.pop("compiled", None)
    names = [*dict.fromkeys(key for each in found.values() for key in each)]
    rows = [[key, *(figure(each.get(key)) for each in found.values())] for key in names]
    lines = [table(["", *found], rows)]
    if "compiled" in figures:
        made = ", ".join(f"{key} {figure(value)}" for key, value in figures["compiled"].items())
        lines += ["", f"`torch.compile` of the noise: {made}."]
    return lines


def of_collectives(figures: Figures) -> list[str]:
    """Whatever was found."""
    return [table(["", ""], [[name, figure(value)] for name, value in figures.items()])]


def of_curve(figures: Figures) -> list[str]:
    """Rewards of all steps, ten in a row."""
    rewards = [row.get("rollout/reward") for row in figures.get("curve", ())]
    rows = [
        [f"{start + 1}", " ".join(figure(each) for each in rewards[start : start + 10])]
        for start in range(0, len(rewards), 10)
    ]
    figures = {name: value for name, value in figures.items() if name != "curve"}
    return [*of_collectives(figures), "", table(["from step", "mean reward of each step"], rows)]


TITLES = {
    "marked": "Tests that need a GPU",
    "training": "Training step in bfloat16",
    "decode": "Embedded engine in bfloat16",
    "noise": "Noise",
    "collectives": "One rank",
    "curve": "A short run",
}
SECTIONS = {
    "marked": of_marked,
    "training": of_training,
    "decode": of_decode,
    "noise": of_noise,
    "collectives": of_collectives,
    "curve": of_curve,
}
