"""docs/walk.ipynb runs, and what is stored in it is what it shows.

python -m tests.test_walk      # run its cells and store their outputs
"""

import ast
import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FILE = Path(__file__).parent.parent / "docs" / "walk.ipynb"


def run_cell(source: str, scope: dict[str, Any]) -> list[dict]:
    """The outputs of a cell in the form of nbformat: what it prints, and its last expression if that is a picture."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), scope)
        value = last and eval(compile(ast.Expression(last.value), "cell", "eval"), scope)
    outputs = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "png", optimize=True)
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["a picture"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def run_notebook() -> tuple[dict, list[list[dict]]]:
    """The notebook as it is stored, and what its code cells put out now."""
    notebook = json.loads(FILE.read_text())
    scope: dict[str, Any] = {}
    outputs = [run_cell("".join(cell["source"]), scope) for cell in code_cells(notebook)]
    scope["run"].stack.close()  # the process group, which lives as long as a Python prompt otherwise
    return notebook, outputs


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def store() -> None:
    notebook, outputs = run_notebook()
    for number, (cell, of_cell) in enumerate(zip(code_cells(notebook), outputs), 1):
        cell |= {"execution_count": number, "outputs": of_cell}
    FILE.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def notebook() -> tuple[dict, list[list[dict]]]:
    return run_notebook()


def text_of(output: dict) -> str:
    return "".join(output.get("text", ""))


def pixels_of(output: dict) -> np.ndarray:
    png = base64.b64decode(output["data"]["image/png"])
    return np.array(Image.open(io.BytesIO(png)), dtype=float)


def test_the_stored_outputs_are_those_of_the_cells(notebook):
    stored, outputs = notebook
    number = r"-?\d+\.\d+"
    pictures = 0
    for cell, shown in zip(code_cells(stored), outputs, strict=True):
        assert len(cell["outputs"]) == len(shown), cell["source"]
        for a, b in zip(cell["outputs"], shown):
            assert re.sub(number, "", text_of(a)) == re.sub(number, "", text_of(b))
            # Other processors and numbers of threads round differently.
            values = [list(map(float, re.findall(number, text_of(output)))) for output in (a, b)]
            assert values[0] == pytest.approx(values[1], abs=2e-3, rel=2e-3)
            if "data" in a:
                pictures += 1
                assert np.abs(pixels_of(a) - pixels_of(b)).mean() < 2
    assert pictures == 4


def test_the_reward_went_up(notebook):
    _, outputs = notebook
    before, after = re.search(r"mean +(\S+) to (\S+)", text_of(outputs[-1][0])).groups()
    assert float(after) > float(before)


def test_cells_are_short_have_text_between_them_and_the_file_is_small(notebook):
    stored, _ = notebook
    kinds = [cell["cell_type"] for cell in stored["cells"]]
    assert kinds[0] == kinds[-1] == "markdown"
    assert all(len(cell["source"]) <= 5 for cell in code_cells(stored))
    assert [cell["execution_count"] for cell in code_cells(stored)] == list(range(1, kinds.count("code") + 1))
    assert FILE.stat().st_size < 400_000


if __name__ == "__main__":
    store()
