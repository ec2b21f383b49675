"""The notebooks as they are committed. That they run is `make notebooks`."""

import json
import re
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


def printed(name):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def test_what_the_quickstart_says_came_true():
    assert "605 new tokens, right in every one: True" in printed("01_quickstart")
    assert "the same tokens: True" in printed("01_quickstart")


def test_what_the_milestones_say_came_true():
    """The text tells a story about one problem. It is wrong if another run came out otherwise."""
    said = printed("02_milestones")
    assert "all predicted: True" in said
    lives = re.findall(r"(\w+) +derived in line +\d+, compared with in (.*), used in (.*), evicted in line (\d+)", said)
    found = {name: (json.loads(needed), json.loads(used), int(evicted)) for name, needed, used, evicted in lives}
    assert list(found) == ["Henry", "Peter", "Alexander"]
    for name in ("Henry", "Alexander"):
        needed, used, evicted = found[name]
        assert set(needed) <= set(used) and max(used) < evicted
    needed, used, evicted = found["Peter"]
    assert not used and evicted < min(needed)
    assert [int(line) for line in re.findall(r"(\d+) WRONG", said)] == needed == [12, 14]
    assert re.findall(r"Next is (\w+)\. \1 has \d \w+ coins than Peter", said.split("tokens, all")[1]) == [
        "Ruth",
        "Julia",
    ]
