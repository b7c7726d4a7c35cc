"""How models write tool calls: each family has a form of its own.

Which form a model writes is found in its chat template (`detect`). The stop rule and the reader of
a form are one scanner (`scan`), linear in the text and bounded, whatever the text is. A turn's
calls are rewritten in the one form that environments read, `tir_alp.tools.calls`; what cannot be
read becomes a call with the reason, which the environment answers to the model and counts.

The response schemas that transformers reads (`parse_response`) are not used for this: they find
calls with regular expressions over a whole turn, which take quadratic time on some texts, raise on
a call that they cannot read, and do not say where a call ends. The tests use them to check ours.
"""

from tir_alp.rollouts.formats.detect import PROBE, find_form, with_tools_shown, written_call
from tir_alp.rollouts.formats.form import CallForm, ParameterTypes, ReadCall
from tir_alp.rollouts.formats.forms import FORMS, HERMES, TOLD
from tir_alp.rollouts.formats.scan import canonical, find_blocks, read_calls, watcher

__all__ = [
    "FORMS",
    "HERMES",
    "PROBE",
    "TOLD",
    "CallForm",
    "ParameterTypes",
    "ReadCall",
    "canonical",
    "find_blocks",
    "find_form",
    "read_calls",
    "watcher",
    "with_tools_shown",
    "written_call",
]
