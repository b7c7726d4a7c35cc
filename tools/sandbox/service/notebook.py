"""What the cells of a notebook show: `display` and the figures of matplotlib.

The session itself collects it, with the rights of the program and within its limits. It is what the
program chooses to show, like everything that it prints, and is read as such: in form and size.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.base import Session
from tir_alp.tools.sandbox.service.files import HELPER_LIMITS, helper_cell

MAX_IMAGES = 20
"""Number of images of one notebook that are returned, shown and saved ones each."""
_IMAGE_SUFFIXES = {"image/png": "png", "image/jpeg": "jpeg"}
_MAX_CALLS = 20
_CHUNK_CHARS = 700_000
"""Greatest length of what is shown at once, and so of one image in base64."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".pdf")

# Runs before the first cell and after each one, in a namespace of its own. A module keeps what is
# shown; an interpreter that was replaced gets a new one.
_COLLECT = """
import base64, importlib.machinery, io, json, os, sys, types

def install():
    state = sys.modules["_notebook"] = types.ModuleType("_notebook")
    state.shown = []
    forms = {"_repr_html_": "text/html", "_repr_markdown_": "text/markdown",
             "_repr_latex_": "text/latex", "_repr_svg_": "image/svg+xml",
             "_repr_png_": "image/png", "_repr_jpeg_": "image/jpeg"}

    def picture(figure):
        content = io.BytesIO()
        figure.savefig(content, format="png", bbox_inches="tight")
        return base64.b64encode(content.getvalue()).decode()

    def bundle(each):
        data = {"text/plain": repr(each)}
        for method, form in forms.items():
            try:
                shown = getattr(each, method)()
            except Exception:
                continue
            if isinstance(shown, bytes):
                shown = base64.b64encode(shown).decode()
            if isinstance(shown, str):
                data[form] = shown
        if type(each).__module__ == "matplotlib.figure":
            data["image/png"] = picture(each)
        return data

    def display(*objects, **_):
        state.shown += map(bundle, objects)

    def show(*_, **__):
        pyplot = sys.modules["matplotlib.pyplot"]
        display(*map(pyplot.figure, pyplot.get_fignums()))
        pyplot.close("all")

    class Backend:  # found and loaded when matplotlib asks for it
        def find_spec(name, path=None, target=None):
            if name == "_notebook_backend":
                return importlib.machinery.ModuleSpec(name, Backend)

        def create_module(spec):
            return None

        def exec_module(module):
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            module.FigureCanvas, module.show = FigureCanvasAgg, show

    state.display, state.show = display, show
    sys.meta_path.append(Backend)
    vars(sys.modules["__main__"])["display"] = display
    os.environ["MPLBACKEND"] = "module://_notebook_backend"

state = sys.modules.get("_notebook")
if state is None:
    install()
    state = sys.modules["_notebook"]
pyplot = sys.modules.get("matplotlib.pyplot")
if pyplot is not None and pyplot.get_fignums():
    state.show()
taken, room = [], chunk_chars
while state.shown:
    text = json.dumps(state.shown[0])
    if len(text) > chunk_chars:
        text = json.dumps({"text/plain": f"[left out: {len(text)} characters]"})
    if len(text) > room:
        break
    room -= len(text)
    taken.append(text)
    state.shown.pop(0)
answer = "[" + ",".join(taken) + "]"
"""
_SAVED = """
import os
answer = []
for folder, folders, names in os.walk("."):
    folders[:] = sorted(each for each in folders if each[0] != ".")
    answer += (os.path.normpath(os.path.join(folder, each)) for each in sorted(names)
               if each.lower().endswith(suffixes))
    if len(answer) > max_paths:
        break
answer = "\\0".join(answer[:max_paths])
"""


@dataclass(slots=True)
class Shown:
    """What the cells of one notebook have shown so far."""

    max_chars: int
    """Length of everything that is shown, of which images are in base64."""
    num_chars: int = 0
    images: dict[str, bytes] = field(default_factory=dict)
    """Path, such as `figures/cell_2_1.png` for the first image of the second cell -> content."""
    problem: str = ""
    """Why something that was shown is missing; empty if nothing is."""


async def prepare(session: Session) -> None:
    """Define `display`, and make matplotlib show its figures with it."""
    await _collect(session)


async def shown_by_cell(session: Session, number: int, shown: Shown) -> list[dict[str, Any]]:
    """What a cell has shown with `display` and `matplotlib`.

    Args:
        session: The session, after the cell.
        number: Number of the cell, from 1.
        shown: Gets the cell's images as files.

    Returns:
        For each object, MIME type -> text, or base64 for an image.
    """
    bundles: list[dict[str, Any]] = []
    for _ in range(_MAX_CALLS):
        more = await _collect(session)
        if not more:
            break
        bundles += more
    return [each for each in bundles if _fits(each, number, shown)]


async def saved_images(session: Session, uploaded: Mapping[str, bytes]) -> list[str]:
    """Paths of the images that the cells have saved in the working folder or below."""
    paths = MAX_IMAGES + len(uploaded)
    cell = helper_cell(_SAVED, suffixes=_SUFFIXES, max_paths=paths)
    result = await session.run(cell, HELPER_LIMITS)
    if result.outcome is not Outcome.OK or not result.value:
        return []
    found = _literal(result.value)
    if not isinstance(found, str):
        return []
    new = [path for path in found.split("\0") if path and path not in uploaded]
    return new[:MAX_IMAGES]


async def _collect(session: Session) -> list[dict[str, Any]]:
    """Take what was shown; nothing if the program has broken its interpreter."""
    result = await session.run(helper_cell(_COLLECT, chunk_chars=_CHUNK_CHARS), HELPER_LIMITS)
    if result.outcome is not Outcome.OK or not result.value:
        return []
    text = _literal(result.value)
    try:
        bundles = json.loads(text) if isinstance(text, str) else []
    except (ValueError, RecursionError):
        return []
    if not isinstance(bundles, list):
        return []
    return [
        {str(form): content for form, content in each.items() if isinstance(content, str)}
        for each in bundles
        if isinstance(each, dict)
    ]


def _fits(bundle: dict[str, str], number: int, shown: Shown) -> bool:
    """Add an object's images to the files; return whether there is room for the object."""
    images = {form: _image(bundle[form]) for form in _IMAGE_SUFFIXES if form in bundle}
    num_chars = shown.num_chars + sum(map(len, bundle.values()))
    num_images = len(shown.images) + len(images)
    if num_images > MAX_IMAGES or num_chars > shown.max_chars or not all(images.values()):
        shown.problem = (
            f"what cell {number} and later ones show is left out: {MAX_IMAGES} images and "
            f"{shown.max_chars} characters are returned"
        )
        return False
    shown.num_chars = num_chars
    for form, image in images.items():
        prefix = f"figures/cell_{number}_"
        count = 1 + sum(path.startswith(prefix) for path in shown.images)
        shown.images[f"{prefix}{count}.{_IMAGE_SUFFIXES[form]}"] = image
    return True


def _image(content: str) -> bytes:
    """The bytes of an image; none if the program shows something that is not base64."""
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _literal(value: str) -> Any:
    """What a cell's value is the `repr` of; None if it is none."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
