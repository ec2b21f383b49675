"""Each message of the code has a heading in docs/troubleshooting.md, and each heading is a message of the code."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]


def trees():
    for folder in (ROOT / "src" / "raas_cache", ROOT / "kernels" / "raas_kernels"):
        for path in sorted(folder.rglob("*.py")):
            yield path, ast.parse(path.read_text())


def template(node):
    """What a string says, with an ellipsis for what differs."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def messages():
    """Where an error is raised or a warning given, and what it says, if that is written there."""
    for path, tree in trees():
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            is_warning = isinstance(call, ast.Call) and ast.unparse(call.func) == "warnings.warn"
            if isinstance(call, ast.Call) and call.args and (isinstance(node, ast.Raise) or is_warning):
                yield f"{path.name}:{call.lineno}", template(call.args[0])


TROUBLES = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def test_messages_in_troubleshooting_are_in_the_code():
    said = {template(node) or "" for _, tree in trees() for node in ast.walk(tree)}
    assert len(TROUBLES) > 50
    assert [trouble for trouble in TROUBLES if not any(trouble in text for text in said)] == []


def test_messages_in_the_code_are_in_troubleshooting():
    said = {place: text for place, text in messages() if text and len(re.findall(r"\w+", text)) > 2}
    assert len(said) > 50
    missing = {place: text for place, text in said.items() if not any(trouble in text for trouble in TROUBLES)}
    assert missing == {}, "give each a heading in docs/troubleshooting.md, its constant part in backticks"
