"""Everything that communicates documents which ranks must call it, under "Collective" in a docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adai_dist"

# Calls in which a rank waits for other ranks. DTensors communicate in full_tensor and redistribute.
COMMUNICATES = re.compile(
    r"dist\.(all_\w+|barrier|broadcast\w*|reduce\w*|gather\w*|scatter\w*|send|recv|new_group|init_process_group)\("
    r"|\b(full_tensor|redistribute|init_device_mesh|fully_shard|global_mean|get_state_dict|set_state_dict)\("
    r"|\bdcp\.(save|load)\(|\b_on_(all|main)\("
)


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef, list[str]]]:
    """Yield the public functions and methods of a file: name, definition, and the docstrings that apply to it."""
    source = ast.parse(path.read_text(encoding="utf-8"))
    for node in source.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node, [ast.get_docstring(node) or ""]
        elif isinstance(node, ast.ClassDef):
            inherited = [CLASSES[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in CLASSES]
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    own = [ast.get_docstring(item) or "", ast.get_docstring(node) or "", *inherited]
                    yield f"{node.name}.{item.name}", item, own


def class_docstrings() -> dict[str, str]:
    """Return, by class name, the docstrings of the class and of all its bases."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py"))
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}

    def of(name: str) -> str:
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name) and base.id in classes]
        return "\n".join([ast.get_docstring(classes[name]) or "", *map(of, bases)])

    return {name: of(name) for name in classes}


CLASSES = class_docstrings()


def undocumented(path: Path) -> list[str]:
    wrong: list[str] = []
    for name, function, docstrings in functions(path):
        is_private = name.split(".")[-1].startswith("_") or name.startswith("_")
        code = "\n".join(ast.unparse(statement) for statement in function.body)
        is_documented = any("Collective" in docstring for docstring in docstrings)
        if not is_private and COMMUNICATES.search(code) and not is_documented:
            wrong.append(f"{path.relative_to(PACKAGE)}:{function.lineno} {name}")
    return wrong


def test_everything_public_that_communicates_documents_who_must_call_it() -> None:
    wrong = [line for path in sorted(PACKAGE.rglob("*.py")) for line in undocumented(path)]
    assert not wrong


def test_missing_documentation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "silent.py"
    path.write_text(
        'def documented(x):\n    """Sums. Collective: all ranks."""\n    dist.all_reduce(x)\n'
        "def silent(x):\n    dist.all_reduce(x)\n"
        "class A:\n    def gather(self, x):\n        return x.full_tensor()\n"
    )
    assert undocumented(path) == ["silent.py:4 silent", "silent.py:7 A.gather"]
