"""The README keeps its word: its examples run, its links lead somewhere, its tables name what there is."""

import re
from pathlib import Path

import numpy as np

import jaxwalk as jw

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["log_probs"].shape == (8,)
    assert names["every_station"].shape == names["walk"].stations.shape == (5, 16, 32)
    parts, direction = names["parts"], names["direction"]
    rest = (parts.by_position.sum(0) + parts.bias) @ direction + names["constant"]
    log_p = jw.next_log_probs(names["model"], names["paths"][0])[-1, 2]
    np.testing.assert_allclose(names["shares"].sum() + rest, log_p, rtol=1e-5)
    assert names["exact"].all()
    assert 0 < float(names["visit"].value) < 1
    assert names["influence"].shape == (8, 16, 16)
    # An untrained model knows less than the world, on average over its paths.
    assert float(np.mean(names["regret"])) > 0


def test_links_and_tables():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
    for name in jw.analyses.names():
        assert f"jaxwalk/analyses/{name}.py" in README
    for name in jw.aggregates.names():
        assert name in README


def test_the_two_lines_are_what_ci_runs():
    for mark in ("main", "tests"):
        assert re.search(rf"<!-- {mark} -->\n```bash\npython3 -m venv [^\n]+\n```\n", README), mark


def test_config_docstrings_name_their_command():
    files = sorted((ROOT / "configs").glob("*.py"))
    assert files
    assert all(f"configs/{file.name}" in file.read_text("utf-8") for file in files)
