"""griffe extension: types that a docstring repeats in transformers' manner, "budget (`int`): ...", are the signature's.

mkdocstrings would show them raw; without them it takes those of the signature.
"""

import re

from griffe import Extension, Object


TYPE = re.compile(r"^( +\w+) \(`[^)]*\):", re.MULTILINE)


class SignaturesTypes(Extension):
    def on_object(self, *, obj: Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = TYPE.sub(r"\1:", obj.docstring.value)
