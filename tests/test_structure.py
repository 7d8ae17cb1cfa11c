"""The shape of the package: data flows one way, imports are late, names resolve, everything public is documented."""

import ast
import functools
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jaxwalk as jw

PACKAGE = Path(jw.__file__).parent
# A module imports only from lower levels, or from its own room.
LEVELS = {
    "_versions": 0,
    "_program_cache": 0,
    "_products": 0,
    "config": 0,
    "sharding": 0,
    "filters": 1,
    "text": 1,
    "worlds": 1,
    "_loops": 2,
    "aggregates": 2,
    "model": 3,
    "paths": 4,
    "checkpoint": 4,
    "pretrained": 5,
    "probes": 5,
    "training": 5,
    "sweep": 6,
    "evidence": 7,
    "analyses": 8,
    "comparison": 8,
    "report": 9,
}
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree, room):
    """The rooms of jaxwalk that are imported anywhere in a file, and whether it is by name of the whole package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: relative import")
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "jaxwalk" and len(parts) > 1 and parts[1] in LEVELS and parts[1] != room:
                yield node.lineno, parts[1]


@each_file
def test_a_module_imports_only_from_lower_levels(path):
    room = room_of(path)
    if room == "__init__":
        pytest.skip("re-exports everything, lazily")
    assert room in LEVELS, f"{room}: give the new room its level"
    for line, other in imported_rooms(ast.parse(path.read_text()), room):
        assert LEVELS[other] < LEVELS[room], f"{path.name}:{line}: {room} imports {other}, which is not below it"


@each_file
def test_no_assert_and_every_public_name_documented(path):
    tree = ast.parse(path.read_text())
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)], "assert is not for a user's error"
    assert ast.get_docstring(tree)
    documented = {}  # methods that implement a documented contract carry its docstring
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            bases = {getattr(b, "id", getattr(b, "attr", "")) for b in node.bases}
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    documented[node.name, method.name] = bool(ast.get_docstring(method)), bases
    missing = [name for name, (there, bases) in documented.items() if not there and not inherited(name[1], bases)]
    assert not missing


def inherited(method, bases):
    contracts = {"Aggregate": jw.aggregates.Aggregate, "AggregateConfig": jw.aggregates.AggregateConfig}
    for shared in (PACKAGE / "aggregates").glob("_[a-z]*.py"):  # what several families have in common
        contracts |= vars(importlib.import_module(f"jaxwalk.aggregates.{shared.stem}"))
    contracts["Checked"] = jw.config.Checked
    found = [getattr(contracts.get(base), method, None) for base in bases]
    return any(one is not None and inspect.getdoc(one) for one in found)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    ["import jaxwalk", "import jaxwalk.config", "import jaxwalk as jw; jw.aggregates.config('attention')"][:2],
)
def test_importing_the_package_imports_no_jax(imports):
    heavy = ("jax", "flax", "optax", "orbax", "numpy", "datasets", "tokenizers", "matplotlib", "plotly")
    assert run(f"{imports}\nimport sys\nprint([m for m in {heavy!r} if m in sys.modules])").strip() == "[]"


def test_importing_every_room_of_the_core_imports_no_extra():
    code = "import jaxwalk, sys\n[getattr(jaxwalk, n) for n in ('probes', 'sample_paths', 'init', 'load')]\n"
    assert (
        run(
            code + "print([m for m in ('datasets', 'tokenizers', 'matplotlib', 'plotly', 'tyro', 'scipy.stats', "
            "'torch', 'gguf', 'huggingface_hub', 'safetensors') if m in sys.modules])"
        ).strip()
        == "[]"
    )


@pytest.mark.parametrize("name", jw.__all__)
def test_every_public_name_resolves(name):
    value = getattr(jw, name)
    assert value is not None
    if name in jw._OWNER:
        assert value.__doc__
        assert getattr(importlib.import_module(jw._OWNER[name]), name) is value


def test_type_checkers_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {name.asname: f"{node.module}.{name.name}" for node in typed.body for name in node.names}
    owners = {name: f"{jw._OWNER.get(name, 'jaxwalk')}.{name}" for name in jw.__all__}
    assert imported == owners


def test_names_are_listed_and_unknown_ones_refused():
    assert set(dir(jw)) >= {"init", "path_log_prob", "aggregates"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jw.nothing  # noqa: B018


def test_names_of_the_design_exist():
    fixed = [
        "ModelConfig",
        "init",
        "astype",
        "load",
        "next_log_probs",
        "path_log_prob",
        "sample_paths",
        "top_paths",
        "init_state",
        "step",
        "prefill",
        "path_entropy",
        "event_probability",
        "encoding_walk",
        "context_vector",
        "path_gradient",
        "station_gradient",
        "context_sensitivity",
        "worlds",
        "aggregates",
        "Finding",
    ]
    assert set(fixed) <= set(jw.__all__)


@functools.cache
def constants(path):
    return [(n.value, n.lineno) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]


@pytest.mark.parametrize("name", jw.aggregates.names())
def test_an_aggregate_is_one_file_with_a_config_of_its_name(name):
    assert (PACKAGE / "aggregates" / f"{name}.py").is_file()
    assert jw.aggregates.config_class(name).name == name
    # Nothing else knows it by name, but for the default of a model, and pretrained families of the same name.
    for path in FILES:
        if room_of(path) in ("aggregates", "analyses", "pretrained"):
            continue
        knows = [line for value, line in constants(path) if value == name]
        assert not knows or (path.name, name) == ("_model.py", "attention"), (path.name, knows)
