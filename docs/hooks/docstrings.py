"""griffe extension: remove types such as "budget (`int`): ..." from docstrings in the style of transformers.

mkdocstrings would print them as text. Without them, it shows the types from the signature.
"""

import re

from griffe import Extension, Object


TYPE = re.compile(r"^( +\w+) \(`[^)]*\):", re.MULTILINE)


class SignaturesTypes(Extension):
    def on_object(self, *, obj: Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = TYPE.sub(r"\1:", obj.docstring.value)
