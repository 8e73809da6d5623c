"""The matrix of versions: its rows, the results of each row, and the page that shows them.

`noxfile.py` builds an environment for each row, runs the modules of its columns and records the result in
`docs/versions/`; `docs/versions.md` is the rendering of all recorded results. Standard library only: nox imports this.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "versions"
PAGE = ROOT / "docs" / "versions.md"

NEWEST = "newest"
"""The version that constraints.txt pins."""

INSTALLED = ("torch", "deepspeed", "accelerate", "transformers", "numpy")
"""Distributions whose versions are recorded, if they are installed."""

_TESTING = ("expecttest", "hypothesis", "numpy", "packaging", "pytest", "pytest-timeout", "pytest-xdist")
_TRAINING = ("matplotlib", "omegaconf", "pydantic", "pyyaml", "tensorboard", "tqdm")

Column = Mapping[str, str]
"""Modules below tests/, and the regular expression that the tests of this column match in each; "" matches all."""


@dataclass(frozen=True)
class Kind:
    """Rows that differ in the version of one distribution, or of Python."""

    name: str
    title: str
    versions: tuple[str, ...]
    columns: Mapping[str, Column]
    requirements: tuple[str, ...] = ()
    unpinned: tuple[str, ...] = ()
    """Distributions besides `name` whose pins do not suit every version."""


@dataclass(frozen=True)
class Row:
    """One environment."""

    kind: Kind
    version: str

    @property
    def name(self) -> str:
        return f"{self.kind.name}-{self.version}"

    @property
    def python(self) -> str:
        return self.version if self.kind.name == "python" else "3.11"

    @property
    def requirements(self) -> tuple[str, ...]:
        return (*_TESTING, *self.kind.requirements)

    def constraints(self, pins: str) -> str:
        """Return the contents of constraints.txt with the version of this row."""
        if self.kind.name == "python" or self.version == NEWEST:
            return pins
        replaced = (self.kind.name, *self.kind.unpinned)
        kept = [line for line in pins.splitlines() if line.partition("==")[0] not in replaced]
        exact = self.version if self.version.count(".") == 2 else f"{self.version}.*"
        return "\n".join([*kept, f"{self.kind.name}=={exact}", ""])


def files(columns: Mapping[str, Column]) -> list[str]:
    """Return the paths of the modules of all columns, each once."""
    return [f"tests/{module}.py" for module in dict.fromkeys(itertools.chain.from_iterable(columns.values()))]


def _all_of(*modules: str) -> Column:
    return dict.fromkeys(modules, "")


_CORE = _all_of(
    "test_adai",
    "test_equations",
    "test_hyper",
    "test_clipping",
    "test_nonfinite",
    "test_skipped_steps",
    "test_gradscaler",
    "test_state_dict",
    "test_written_states",
    "test_unusual_gradients",
    "test_torch_optim_kit",
    "test_public_api",
)
_KERNELS = _all_of("test_cpu_kernels", "test_backends", "test_host_copy")
_TRAJECTORY = _all_of("distributed/test_trajectory")

_PARITY = "integrations/test_deepspeed_parity"
_VARIANTS = "integrations/test_deepspeed_variants"
_NONFINITE = "integrations/test_deepspeed_nonfinite"
_MODELS = "integrations/test_deepspeed_models"
_TRAINER = "integrations/test_deepspeed_accelerate"

KINDS = (
    Kind(
        "deepspeed",
        "DeepSpeed",
        ("0.16.0", "0.16.9", "0.18.6", "0.18.9", "0.19.4", "0.19.6", NEWEST),
        {
            "parity": {_PARITY: r"^(?!.*accumulation)"},
            "accumulation": {_PARITY: "accumulation"},
            "unused": {_VARIANTS: "unused|micro_batch"},
            "clipping": {_PARITY: "clip", _VARIANTS: "clipped"},
            "coupled decay": {_VARIANTS: "coupled_weight_decay"},
            "checkpoint": _all_of("integrations/test_deepspeed_checkpoint", "integrations/test_deepspeed_universal"),
            "BF16_Optimizer": dict.fromkeys((_PARITY, _VARIANTS, _NONFINITE, _MODELS), r"\[bf16-optimizer"),
            "NVMe": _all_of("integrations/test_deepspeed_nvme"),
            "fp16": {_NONFINITE: "dynamic_loss_scale"},
            "MoE": {_MODELS: "mixture_of_experts"},
            "pipeline": _all_of("integrations/test_deepspeed_pipeline"),
            "op builder": _all_of("integrations/test_deepspeed_op_builder"),
        },
        ("deepspeed", "pyyaml", "transformers"),
    ),
    Kind(
        "python",
        "Python",
        ("3.10", "3.11", "3.12", "3.13"),
        {"core": _CORE, "kernels": _KERNELS, "trajectory": _TRAJECTORY},
    ),
    Kind(
        "torch",
        "torch",
        ("2.6", "2.8", "2.10", NEWEST),
        {
            "core": _CORE,
            "kernels": _KERNELS,
            "trajectory": _TRAJECTORY,
            "layouts": _all_of(
                "distributed/test_fsdp1",
                "distributed/test_mesh_layouts",
                "distributed/test_zero_redundancy",
                "distributed/test_configured_sharding",
                "distributed/test_checkpoint_resharding",
            ),
        },
        unpinned=("sympy", "setuptools"),
    ),
    Kind(
        "accelerate",
        "Accelerate",
        ("1.3", "1.6", "1.10", NEWEST),
        {
            "swap refused": {_TRAINER: "accelerate_replaces|may_not_replace"},
            "configurations": _all_of("configs/test_accelerate_configs", "configs/test_launched_by_accelerate"),
            "prepare": {
                _TRAINER: "client_optimizer_is_exact$|named_in_the_json",
                "integrations/test_accelerate_grad_scaler": "",
            },
            "save_state": _all_of("integrations/test_accelerate_checkpoint"),
        },
        ("accelerate", "deepspeed", "transformers", *_TRAINING),
    ),
    Kind(
        "transformers",
        "transformers",
        ("4.50", "4.57", NEWEST),
        {
            "Trainer": {
                "integrations/test_accelerate_grad_scaler": "trainer",
                _TRAINER: "trainer",
                "integrations/test_deepspeed_ignored_optimizer": "trainer|remedy|auto",
            },
            "language models": _all_of("test_recipe_language"),
        },
        ("accelerate", "datasets>=4.0", "deepspeed", "transformers", *_TRAINING),
        unpinned=("datasets", "dill", "fsspec", "huggingface-hub", "multiprocess", "tokenizers"),
    ),
)
ROWS = {row.name: row for kind in KINDS for row in (Row(kind, version) for version in kind.versions)}


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Counts of the tests of one column; errors count as failures."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = {"passed": self.passed, "**failed**": self.failed, "skipped": self.skipped}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


@dataclass
class Result:
    """What one row has shown."""

    date: str
    versions: dict[str, str]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    """The number of tests by the reason of their skip."""


def read_report(report: Path, columns: Mapping[str, Column], result: Result) -> None:
    """Add the outcomes of the columns to a result, from the JUnit file of the run.

    A module in which no test ran that matches the column is a failure. Failures include those of tests that no column
    counts.
    """
    by_module = _tests(report)
    failures = {
        f"{module}::{test}" for module, cases in by_module.items() for test, case in cases.items() if _has_failed(case)
    }
    skips: dict[str, str] = {}
    for title, column in columns.items():
        outcome = result.outcomes[title] = Outcome()
        for module, words in column.items():
            cases = {name: case for name, case in by_module.get(module, {}).items() if re.search(words, name)}
            if not cases:
                outcome.failed += 1
                failures.add(f"{module}: no test that matches {words!r}")
            for test, case in cases.items():
                name = f"{module}::{test}"
                outcome.seconds = round(outcome.seconds + float(case.get("time", 0)), 1)
                if _has_failed(case):
                    outcome.failed += 1
                elif (skip := case.find("skipped")) is not None:
                    outcome.skipped += 1
                    skips[name] = skip.get("message", "")
                else:
                    outcome.passed += 1
    result.failures = sorted(failures)
    result.skips = dict(sorted(Counter(skips.values()).items()))


def _has_failed(case: ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def _tests(report: Path) -> dict[str, dict[str, ElementTree.Element]]:
    """Return the elements of all tests by module below tests/ and by name, with the class if there is one."""
    found: dict[str, dict[str, ElementTree.Element]] = defaultdict(dict)
    if not report.exists():
        return found
    for case in ElementTree.parse(report).iter("testcase"):
        *folders, last = case.get("classname", "").split(".")
        is_class = bool(folders) and not last.startswith("test_")
        path, prefix = (folders, f"{last}::") if is_class else ([*folders, last], "")
        found["/".join(path[1:])][f"{prefix}{case.get('name')}"] = case
    return found


def write_result(name: str, result: Result, folder: Path = RESULTS) -> None:
    """Record the result of a row in place of the previous one."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Return the recorded results by row."""
    results: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["outcomes"] = {title: Outcome(**counts) for title, counts in content["outcomes"].items()}
        results[path.stem] = Result(**content)
    return results


# -- the page ----------------------------------------------------------------------------------------------------------

_INTRODUCTION = """\
# Tested versions

<!-- Written by `make test-versions` from the results in docs/versions/. Do not edit. -->

`make test-versions` builds an environment for each row of these tables and runs the tests named in the columns;
`make test-versions ARGS="-s torch-2.6"` runs one row. All rows run on a CPU, with gloo; nothing here has been run on a
GPU. "newest" is the version that `constraints.txt` pins, and all other packages have the versions pinned there, unless
a release requires others. A dash marks what has not been run. Below each table are the modules in `tests/` that its
columns count, with a regular expression where only the tests whose names match it count.
"""


def render(results: Mapping[str, Result]) -> str:
    """Return the page for the results recorded so far."""
    return "\n".join([_INTRODUCTION, *(_section(kind, results) for kind in KINDS)])


def _section(kind: Kind, results: Mapping[str, Result]) -> str:
    lines = [f"## {kind.title}", "", _line([kind.title, "date", *kind.columns, "with"])]
    lines.append("|---" * (len(kind.columns) + 3) + "|")
    notes: list[str] = []
    for version in kind.versions:
        name = Row(kind, version).name
        if name not in results:
            lines.append(_line([version, *"–" * (len(kind.columns) + 2)]))
            continue
        result = results[name]
        others = dict(result.versions)
        own = others.pop("Python" if kind.name == "python" else kind.name)
        cells = [str(result.outcomes.get(title, "–")) for title in kind.columns]
        around = ", ".join(f"{other} {number}" for other, number in others.items())
        lines.append(_line([own if version != NEWEST else f"{own} (newest)", result.date, *cells, around]))
        notes += [f"- {own}: {count} skipped: {reason}" for reason, count in result.skips.items()]
        notes += [f"- {own}: failed: `{failure}`" for failure in result.failures]
    contents = [
        f"- **{title}**: {', '.join(_describe(module, words) for module, words in column.items())}"
        for title, column in kind.columns.items()
    ]
    return "\n".join([*lines, "", *([*notes, ""] if notes else []), "Tests of the columns:", "", *contents, ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _describe(module: str, words: str) -> str:
    return f"`{module}`" + (f" (`{words}`)" if words else "")
