"""Lone surrogates: code points that Python's `str` can hold and no tokenizer can encode."""

import re

SURROGATE = re.compile("[\ud800-\udfff]")
