"""The README's Python, run from top to bottom as a newcomer would."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_every_snippet_runs(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 11
    scope = {"__name__": "readme"}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "FoldNorm" in printed
    assert "mul(logits.weight, 0.5)" in printed


def test_the_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"(?:`|^)make (\w+)", README.read_text(), re.MULTILINE))
    makefile = (README.parent / "Makefile").read_text()
    assert {"demo", "test", "bench", "zoo"} <= targets
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)
