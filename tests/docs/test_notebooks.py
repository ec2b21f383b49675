"""The notebooks as they are committed. That they run is `make notebooks`."""

import json
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_all_are_there():
    names = ["01_quickstart", "02_milestones", "03_compare_methods", "04_new_method", "05_your_model"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_run(path):
    """Each cell was executed once, in order, without an error; nothing of the machine is left in what it printed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert "execute_result" in kinds and kinds <= {"execute_result", "stream"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    # The models of a machine lie somewhere; nobody wants to know where.
    text = json.dumps(outputs)
    assert not any(folder in text for folder in (str(EXAMPLES.parent), "/home/", "/tmp/", "site-packages"))


@pytest.mark.parametrize(("name", "figures"), [("02_milestones", 4), ("03_compare_methods", 1), ("04_new_method", 1)])
def test_figures_are_shown(name, figures):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) == figures


@pytest.mark.parametrize("name", ["01_quickstart", "02_milestones"])
def test_what_a_notebook_says_came_true(name):
    """The first two tell a story about one problem; their text is wrong if another run came out otherwise."""
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    printed = "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))
    assert "605 new tokens, right in every one: True" in printed
    if name == "02_milestones":
        lines = dict(line.split(":", 1) for line in printed.splitlines() if line.startswith("lines "))
        cited, used = (set(json.loads(found)) for found in lines.values())
        assert cited <= used
        assert "evicted in line" in printed and int(printed.split("evicted in line ")[1].split()[0]) > max(used)
    else:
        assert "the same tokens: True" in printed
