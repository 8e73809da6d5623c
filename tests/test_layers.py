"""Tests that files import in one direction only and that the core needs only torch, from the sources alone."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from adai_dist import AdaiV2

ROOT = Path(__file__).parent.parent
PACKAGE = "adai_dist"

# From left to right; a file imports only from its own layer and from those to its left.
LAYERS = (
    ("hyper", "rounding", "eight_bits", "equations", "storage", "precision"),
    ("kernels",),
    ("sharding",),
    ("optimizer",),
    ("integrations", "tools", "recipes"),
    ("cli", "__main__"),
)
CORE = {name for layer in LAYERS[:4] for name in layer} | {"__init__"}
# adai_dist/__init__.py imports the optimizers and the integrations: it ranks to the right of both.
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer} | {"__init__": 4.5}

# Distributions whose module has another name.
MODULE_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


class Import(NamedTuple):
    line: int
    module: str
    is_top_level: bool


def sources() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def component_of(module: str) -> str:
    """Return the first name below the package: `sharding` for adai_dist.sharding.mean, `__init__` for the package."""
    return [*module.split("."), "__init__"][1]


def imports_of(path: Path, modules: set[str]) -> Iterator[Import]:
    """Yield every import of a file, also inside functions, by the full name of the module it loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    top_level = set(map(id, tree.body))
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*prefix, *([node.module] if node.module else [])])
            # `from package import name` loads a module if the name is one, and the package otherwise
            names = [full if (full := f"{origin}.{alias.name}") in modules else origin for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(node.lineno, name, id(node) in top_level)


def modules() -> set[str]:
    return {module_of(path) for path in sources()}


def declared_modules() -> set[str]:
    """Return the modules of users' dependencies in pyproject.toml, read as text: Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = .*?(?=^\[project\.scripts\])", text, re.MULTILINE | re.DOTALL)
    assert dependencies
    names = set(re.findall(r'"([A-Za-z0-9_-]+)(?:\[[a-z,]+\])?[><=]', dependencies.group()))
    assert {"torch", "omegaconf", "pyyaml"} <= names
    assert "pytest" not in names, "dependency groups are for developers"
    return {MODULE_NAMES.get(name, name.replace("-", "_")) for name in names}


def wrong_imports(is_wrong: Callable[[str, str], bool]) -> list[str]:
    """Return the imports of all files for which `is_wrong(component of the file, imported module)` holds."""
    known = modules()
    return [
        f"{path.relative_to(ROOT)}:{item.line} imports {item.module}"
        for path in sources()
        for item in imports_of(path, known)
        if is_wrong(component_of(module_of(path)), item.module)
    ]


def test_every_file_belongs_to_a_layer() -> None:
    assert len(sources()) > 50
    homeless = [path for path in sources() if component_of(module_of(path)) not in RANK]
    assert not homeless, f"add these to LAYERS in {__file__}"


def test_a_file_imports_only_from_its_own_layer_and_those_to_its_left() -> None:
    def is_to_the_right(here: str, module: str) -> bool:
        return module.split(".")[0] == PACKAGE and RANK.get(component_of(module), 0) > RANK[here]

    assert not wrong_imports(is_to_the_right)


def test_the_core_imports_only_torch_and_the_rest_only_declared_dependencies() -> None:
    always = set(sys.stdlib_module_names) | {PACKAGE}
    declared = declared_modules()

    def is_undeclared(here: str, module: str) -> bool:
        return module.split(".")[0] not in always | ({"torch"} if here in CORE else declared)

    assert not wrong_imports(is_undeclared)


def test_imports_form_no_cycle() -> None:
    graph = {
        module_of(path): {item.module for item in imports_of(path, modules()) if item.is_top_level} & modules()
        for path in sources()
    }
    for module in graph:
        # a package is loaded before its modules, so `from package.module import x` within the package is not a cycle
        graph[module] = {other for other in graph[module] if not module.startswith(f"{other}.")}
    while free := {module for module in graph if not graph[module] & graph.keys()}:
        for module in free:
            del graph[module]
    assert not graph, "these files form an import cycle"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import torch.nn", "torch.nn"),
        ("from ..recipes import text", "adai_dist.recipes"),
        ("from . import mean", "adai_dist.sharding.mean"),
        ("from adai_dist.optimizer import Adai", "adai_dist.optimizer"),
        ("def f():\n    from adai_dist import cli", "adai_dist.cli"),
        ("if TYPE_CHECKING:\n    import transformers", "transformers"),
    ],
)
def test_every_form_of_import_is_found(
    statement: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / PACKAGE / "sharding" / "local_tensor.py"
    path.parent.mkdir(parents=True)
    path.write_text(statement, encoding="utf-8")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert [item.module for item in imports_of(path, {"adai_dist.sharding.mean", "adai_dist.cli"})] == [expected]


def test_private_names_of_the_optimizer_stay_within_its_package() -> None:
    """Integrations, tools and recipes use only the public API of the optimizer."""
    optimizer = AdaiV2([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    own = {name for base in type(optimizer).__mro__ if base.__module__.startswith(PACKAGE) for name in vars(base)}
    own |= vars(optimizer).keys() - vars(torch.optim.SGD(optimizer.params(), lr=0.1)).keys()
    private = {name for name in own if name.startswith("_") and not name.startswith("__")}
    assert {"_shard_caches", "_retirement", "_step"} <= private
    outside = [path for path in sources() if component_of(module_of(path)) != "optimizer"]
    used = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.attr}"
        for path in outside
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self"
    ]
    assert not used
    assert len(outside) > 30
