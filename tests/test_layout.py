"""The shape of the code: who imports whom, and how large things may get."""

import ast
import io
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlt_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from lower ranks, or from its own package.
RANKS = {
    "errors": 0,
    "records": 0,
    "masked": 0,
    "ranges": 1,
    "types": 1,
    "watchdog": 1,
    "settings": 2,
    "files": 2,
    "stores": 3,
    "models": 4,
    "data": 4,
    "training": 5,
    "costs": 6,
    "inference": 6,
    "rl": 7,
    "report": 7,
    "scoring": 8,
    "api": 9,
    "stages": 9,
    "chat": 10,
    "command_line": 10,
    "main": 11,
}
DEVICE_LIBRARIES = {"jax", "flax", "optax", "orbax"}
LINES_PER_FILE = 400
LINES_PER_FUNCTION = 60
LINES_PER_LOOP = 80  # `run` and `train` of a stage, which read top to bottom
PARAMETERS = 7
CODE_LINES = 12_200
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, also of those inside functions."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions_of(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines, docstring aside, of every function of a file."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, length


def parameters_of(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of parameters, self and cls aside, of every function of a file."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            names = [x.arg for x in given.posonlyargs + given.args + given.kwonlyargs]
            yield node.name, len([x for x in names if x not in ("self", "cls")])


def code_lines_of(file: Path) -> int:
    """Lines of code, without docstrings, comments and blank lines."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = {
        line
        for node in ast.walk(tree_of(file))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    layout |= {tokenize.INDENT, tokenize.DEDENT}
    text = file.read_text(encoding="utf-8")
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in layout
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - docstrings)


def top_of(dotted: str) -> str | None:
    """ "rlt_jax.rl.kl" -> "rl"; None for other libraries."""
    package, _, rest = dotted.partition(".")
    return rest.partition(".")[0] if package == "rlt_jax" else None


def test_every_package_and_module_has_a_rank() -> None:
    tops = {name_of(file).partition("/")[0].removesuffix(".py") for file in FILES}
    assert tops - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_one_way(file: Path) -> None:
    own = name_of(file).partition("/")[0].removesuffix(".py")
    for dotted in imports_of(file):
        top = top_of(dotted)
        if top is not None and top != own:
            assert top in RANKS, f"imports {dotted}"
            assert RANKS[top] < RANKS[own], f"imports {dotted}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "data").rglob("*.py")), ids=name_of)
def test_data_is_numpy_only(file: Path) -> None:
    tops = {dotted.partition(".")[0] for dotted in imports_of(file)}
    assert not tops & DEVICE_LIBRARIES


@pytest.mark.parametrize("folder", ["models", "rl"])
def test_models_and_algorithm_know_no_mesh(folder: str) -> None:
    # They take shardings as they are given, or leave all placement to their callers.
    for file in (PACKAGE / folder).rglob("*.py"):
        names = {dotted.rpartition(".")[2] for dotted in imports_of(file)}
        assert not names & {"Mesh", "make_mesh"}, name_of(file)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_stay_small(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LINES_PER_FILE
    for name, length in functions_of(file):
        is_loop = file.parent.name == "stages" and name in ("run", "train")
        assert length <= (LINES_PER_LOOP if is_loop else LINES_PER_FUNCTION), name


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_take_few_parameters(file: Path) -> None:
    for name, count in parameters_of(file):
        assert count <= PARAMETERS, name


def test_the_package_stays_small() -> None:
    assert sum(map(code_lines_of, FILES)) <= CODE_LINES


def test_main_stays_tiny() -> None:
    assert len((PACKAGE / "main.py").read_text().splitlines()) < 100


def test_names_say_what_is_inside() -> None:
    vague = [
        name_of(file)
        for file in FILES
        if file.stem in VAGUE_NAMES
        or file.stem.startswith("base_")
        or file.stem.endswith("_manager")
    ]
    assert not vague


def test_importing_everything_starts_no_backend() -> None:
    modules = [
        name_of(file).removesuffix(".py").replace("/", ".")
        for file in FILES
        if file.name != "__init__.py"
    ]
    # A platform that does not exist turns the start of a backend into an error.
    script = "import importlib\n" + "".join(
        f"importlib.import_module('rlt_jax.{module}')\n" for module in modules
    )
    environment = os.environ | {"JAX_PLATFORMS": "none_of_them"}
    touched = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert touched.returncode != 0, "the check would notice nothing"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
