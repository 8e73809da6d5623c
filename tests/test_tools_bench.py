"""The benchmark counts bytes correctly, times the operations that its cases name, and reports complete results."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adai_dist.cli import main
from adai_dist.tools.bench import SHAPES, Settings, bench_table, measure
from adai_dist.tools.bench.cases import (
    COPY_BYTES,
    LOW_STEP,
    MIXED_STEP,
    REFERENCE,
    STEP,
    Case,
    Model,
    adai_cases,
    adamw_cases,
)
from adai_dist.tools.bench.memory import extra_bytes
from adai_dist.tools.bench.other_packages import other_cases
from adai_dist.tools.bench.shapes import shapes_of_numel
from adai_dist.tools.bench.timing import _times

CPU = torch.device("cpu")
NO_MASTER = f"{LOW_STEP}, no master"
OURS = ["observe", "advance", "Adai", STEP, f"{STEP}, retired", LOW_STEP, f"{LOW_STEP}, retired"]
OURS += [MIXED_STEP, f"{MIXED_STEP}, retired"]
OURS += [f"{STEP}, coupled decay", "AdaiV2 d=0, clipped", "Adai by equations, clipped"]
OURS_IN_16_BITS = [*OURS[:9], NO_MASTER, *OURS[9:]]
OTHERS = ("deepspeed", "deepspeed.ops", "deepspeed.ops.adam", "pytorch_optimizer")
ADAMW = ["AdamW fused", REFERENCE, "AdamW foreach, clipped"]


@pytest.fixture(autouse=True)
def _logging_and_a_short_copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(COPY_BYTES, "cpu", 2**20)
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers


def small_model(dtype: torch.dtype = torch.float32) -> Model:
    return Model.of([(17, 5), (3,), (40,)], CPU, dtype)


def matrices(dtype: torch.dtype = torch.float32) -> Model:
    return Model.of([(3, 64), (5, 32)], CPU, dtype)


def every_case(model: Model) -> dict[str, Case]:
    return {case.name: case for case in (*adai_cases(model)[0], *adamw_cases(model))}


def run(case: Case) -> None:
    case.prepare()
    case.run()


# -- counted bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_tensors", "numel"),
    [("gpt2-124m", 148, 124_439_808), ("llama-7b-layer", 9, 202_383_360), ("tiny-148", 148, 2368)],
)
def test_the_shapes_are_those_of_the_models(name: str, num_tensors: int, numel: int) -> None:
    shapes = SHAPES[name]()
    assert (len(shapes), sum(map(prod, shapes))) == (num_tensors, numel)


def test_the_shapes_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        config = transformers.LlamaConfig(num_hidden_layers=1)
        layer = transformers.LlamaModel(config).layers[0]
    gpt2.tie_weights()
    assert [tuple(param.shape) for param in gpt2.parameters()] == SHAPES["gpt2-124m"]()
    assert sorted(tuple(param.shape) for param in layer.parameters()) == sorted(SHAPES["llama-7b-layer"]())


@pytest.mark.parametrize(("numel", "sizes"), [(1, [1]), (2**20, [2**20]), (2**21 + 3, [2**20, 2**20, 3])])
def test_a_number_of_parameters_is_split_into_tensors(numel: int, sizes: list[int]) -> None:
    assert shapes_of_numel(numel) == [(2**10, 2**10) if size == 2**20 else (size,) for size in sizes]


# Bytes moved per parameter: observe reads g; advance reads theta, g, m, v, P and writes theta, m, v, P, without P if
# retired; coupled decay also reads theta in observe. With master weights, theta has a remainder of 2 bytes; v in 8 bits
# has a scale of 2 bytes for 32 elements. AdamW reads theta, g, m, v and writes theta, m, v, all in the dtype of theta;
# clipping reads g, then reads and writes it.
IN_32_BITS = {
    **{"observe": 4, "advance": 36, "Adai": 40, STEP: 40, f"{STEP}, retired": 32},
    **{LOW_STEP: 28, f"{LOW_STEP}, retired": 24, MIXED_STEP: 24.125, f"{MIXED_STEP}, retired": 22.125},
    **{f"{STEP}, coupled decay": 44, "AdaiV2 d=0, clipped": 40, "Adai by equations, clipped": 40},
    **{"AdamW fused": 28, REFERENCE: 40, "AdamW foreach, clipped": 40},
}
IN_16_BITS = {
    **{"observe": 2, "advance": 34, "Adai": 36, STEP: 36, f"{STEP}, retired": 28},
    **{LOW_STEP: 24, f"{LOW_STEP}, retired": 20, NO_MASTER: 20},
    **{MIXED_STEP: 20.125, f"{MIXED_STEP}, retired": 18.125},
    **{f"{STEP}, coupled decay": 40, "AdaiV2 d=0, clipped": 36, "Adai by equations, clipped": 36},
    **{"AdamW fused": 14, REFERENCE: 20, "AdamW foreach, clipped": 20},
}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, IN_32_BITS), (torch.bfloat16, IN_16_BITS), (torch.float16, IN_16_BITS)],
)
def test_counted_bytes_equal_those_counted_by_hand(dtype: torch.dtype, expected: dict[str, float]) -> None:
    model = matrices(dtype)
    assert model.numel == 3 * 64 + 5 * 32
    assert {name: case.num_bytes / model.numel for name, case in every_case(model).items()} == expected


@pytest.mark.parametrize(
    ("dtype", "states", "low", "adamw"),
    [(torch.float32, 12, 6, 8), (torch.bfloat16, 14, 8, 4), (torch.float16, 14, 8, 4)],
)
def test_bytes_of_states_include_remainders(dtype: torch.dtype, states: int, low: int, adamw: int) -> None:
    model = matrices(dtype)
    counted = {name: case.state_bytes / model.numel for name, case in every_case(model).items()}
    expected = dict.fromkeys(counted, float(states)) | {f"{STEP}, retired": states - 4}
    expected |= {LOW_STEP: low, f"{LOW_STEP}, retired": low - 2} | dict.fromkeys(ADAMW, adamw)
    expected |= {MIXED_STEP: low - 1.9375, f"{MIXED_STEP}, retired": low - 2.9375}
    if dtype != torch.float32:
        expected[NO_MASTER] = low - 2
    assert counted == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_bytes_equal_those_of_the_tensors(dtype: torch.dtype) -> None:
    model = matrices(dtype)
    ours, (kernels, low, mixed) = adai_cases(model)
    cases = {case.name: case for case in ours}
    adamw = adamw_cases(model)[0]
    fused = torch.optim.AdamW(model.params, fused=True)
    fused.step()

    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    gradients = size([param.grad for param in model.params if param.grad is not None])
    observed = {"advance": 0, LOW_STEP: gradients, MIXED_STEP: gradients, "AdamW fused": 0}
    pairs = (cases["advance"], kernels), (cases[LOW_STEP], low), (cases[MIXED_STEP], mixed), (adamw, fused)
    for case, optimizer in pairs:
        states = size([x for state in optimizer.state.values() for x in state.values() if x.ndim > 0])
        assert case.state_bytes == states
        assert case.num_bytes == observed[case.name] + gradients + 2 * (size(model.params) + states)


# -- cases ------------------------------------------------------------------------------------------------------------


def contents(model: Model, states: dict[Tensor, dict[str, Tensor]], name: str) -> list[Tensor]:
    return [(states[param][name] if name else param.detach()).clone() for param in model.params]


def written_by(case: Case, model: Model, states: dict[Tensor, dict[str, Tensor]], other: str) -> str:
    """Run a case; return which parameters and states it has changed, among them the state named ``other``."""
    case.prepare()
    names = ("", "exp_avg", "exp_avg_sq", "beta1_prod", other)
    before = {name: contents(model, states, name) for name in names}
    case.run()
    after = {name: contents(model, states, name) for name in names}
    return " ".join(name or "param" for name in names if not all(map(torch.equal, before[name], after[name])))


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("observe", ""),
        ("advance", "param exp_avg exp_avg_sq beta1_prod step"),
        (STEP, "param exp_avg exp_avg_sq beta1_prod step"),
        (f"{STEP}, retired", "param exp_avg exp_avg_sq step"),
        (LOW_STEP, "param"),
        (MIXED_STEP, "param"),
        ("AdamW fused", "param"),
    ],
)
def test_a_case_writes_what_its_name_says(case: str, changed: str) -> None:
    model = small_model()
    ours, (optimizer, *_) = adai_cases(model)
    cases = {item.name: item for item in (*ours, *adamw_cases(model))}
    assert written_by(cases[case], model, optimizer.state, "step") == changed


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        (STEP, "param master_param"),
        (LOW_STEP, "param exp_avg exp_avg_sq beta1_prod master_param"),
        (f"{LOW_STEP}, retired", "param exp_avg exp_avg_sq master_param"),
        (NO_MASTER, "param exp_avg exp_avg_sq beta1_prod"),
    ],
)
def test_a_case_with_16_bit_parameters_writes_what_its_name_says(
    case: str, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(torch.bfloat16)
    ours, (kernels, low, _) = adai_cases(model)
    cases = {item.name: item for item in ours}
    assert written_by(cases[case], model, low.state, "master_param") == changed
    for param in model.params:
        assert low.state[param]["master_param"] is kernels.state[param]["master_param"]
    assert not caplog.records, "no case without master weights warns of it"


def test_no_case_writes_to_the_moments_of_another() -> None:
    model = small_model()
    ours, optimizers = adai_cases(model)
    cases = {case.name: case for case in ours}
    moments = [
        state[name] for each in optimizers for state in each.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    before = [moment._version for moment in moments]
    run(cases["Adai by equations, clipped"])
    assert [moment._version for moment in moments] == before


def test_only_clipped_steps_clip() -> None:
    model = small_model()
    ours, (optimizer, low, mixed) = adai_cases(model)
    cases = {case.name: case for case in ours}
    bounds: dict[str, float | None] = {}
    for case in cases.values():
        case.prepare()
        of_case = low if "bfloat16" in case.name else mixed if "mixed8" in case.name else optimizer
        bounds[case.name] = of_case.max_grad_norm
    del bounds["Adai by equations, clipped"]
    assert bounds == {name: None if name == "Adai" else model.max_norm for name in bounds}
    assert float(torch.stack([param.grad.norm() for param in model.params if param.grad is not None]).norm()) > 0
    run(cases["AdaiV2 d=0, clipped"])
    assert optimizer.param_groups[0]["dampening"] == 0.0
    run(cases["Adai, clipped, coupled decay"])
    assert optimizer.param_groups[0]["weight_decay"] > 0.0
    assert not optimizer.param_groups[0]["decoupled"]


def test_one_case_steps_by_the_equations_and_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", "auto")
    model = small_model()
    case = {case.name: case for case in adai_cases(model)[0]}["Adai by equations, clipped"]
    run(case)
    assert "equations" in repr(case.run.__self__)  # type: ignore[attr-defined]
    assert os.environ["ADAI_DIST_KERNELS"] == "auto"


def test_no_case_always_follows_the_same_one() -> None:
    called: list[str] = []
    cases = [Case(name, "torch", lambda name=name: called.append(name), 1) for name in "abcd"]
    times = _times(cases, Settings(repetitions=12))
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abcd", 12)
    rounds = [called[i : i + 4] for i in range(0, len(called), 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    before = {name: {called[i - 1] for i in range(1, len(called)) if called[i] == name} for name in "abcd"}
    assert all(len(names) >= 3 for names in before.values())


def test_extra_memory_is_the_peak_of_memory_held_at_one_time() -> None:
    def allocate() -> None:
        large = torch.empty(3 * 2**20, dtype=torch.uint8)
        del large
        small = [torch.empty(2**20, dtype=torch.uint8) for _ in range(2)]
        del small

    assert extra_bytes(allocate, CPU) == 3 * 2**20
    assert extra_bytes(lambda: None, CPU) == 0


# -- reports ----------------------------------------------------------------------------------------------------------


def test_every_case_is_measured_and_the_columns_are_consistent() -> None:
    report = measure(Settings(numel=2**20 + 3, repetitions=3, threads=1, others=False))
    rows = {row["case"]: row for row in report["rows"]}
    stored = {name: rows[name]["state_bytes_per_parameter"] for name in ("copy", STEP, LOW_STEP, MIXED_STEP, REFERENCE)}
    assert stored == {"copy": None, STEP: 12, LOW_STEP: 6, MIXED_STEP: 4.06, REFERENCE: 8}
    assert list(rows) == ["copy", *OURS, *ADAMW]
    assert (report["numel"], report["num_tensors"], report["threads"]) == (2**20 + 3, 2, 1)
    assert report["command"].endswith("--numel 1048579 --dtype float32 --repetitions 3 --threads 1 --no-others")
    assert report["hardware"]["cpu"]
    assert report["versions"]["torch"] == torch.__version__
    assert re.match("cpu: (compiled kernels|equations)", report["kernels"])
    assert rows[REFERENCE]["ratio"] == 1.0
    copy = rows.pop("copy")
    assert (copy["bytes_per_parameter"], copy["ratio"], copy["copy_share"]) == (None, None, 1.0)
    assert copy["gigabytes_per_second"] == pytest.approx(2 * 2**20 / copy["milliseconds"] / 1e6)
    for row in rows.values():
        assert 0 < row["fastest"] <= row["lower_quartile"] <= row["milliseconds"] <= row["upper_quartile"]
        moved = row["bytes_per_parameter"] * (2**20 + 3)
        assert row["gigabytes_per_second"] == pytest.approx(moved / row["milliseconds"] / 1e6, rel=1e-3)
        assert row["copy_share"] == pytest.approx(row["gigabytes_per_second"] / copy["gigabytes_per_second"])
        assert row["ratio"] == pytest.approx(row["milliseconds"] / rows[REFERENCE]["milliseconds"])
    assert rows["AdamW foreach, clipped"]["extra_bytes"] > 4 * 2**20, "it has temporaries as large as a parameter"
    assert rows["AdamW fused"]["extra_bytes"] < 2**10
    assert json.loads(json.dumps(report)) == report


def test_the_table_has_a_line_for_every_case_and_every_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in OTHERS:
        monkeypatch.setitem(sys.modules, module, None)
    report = measure(Settings(shapes="tiny-148", repetitions=1, dtype="bfloat16"))
    lines = bench_table(report).splitlines()
    assert lines[0] == "$ adai-dist bench --device cpu --shapes tiny-148 --dtype bfloat16 --repetitions 1"
    assert lines[1].startswith("2,368 parameters in 148 tensors, bfloat16; median of 1 ")
    assert "2 CPU threads" in lines[2] or f"{torch.get_num_threads()} CPU threads" in lines[2]
    assert lines[3] == f"kernels: {report['kernels']}"
    assert re.split(r"\s{2,}", lines[5]) == [
        *("case", "ms", "spread", "bytes/param", "state/param", "GB/s", "of copy", "ratio", "extra MiB"),
    ]
    assert [line[:41].strip() for line in lines[6:23]] == ["copy", *OURS_IN_16_BITS, *ADAMW]
    assert len({len(line) for line in lines[5:23]}) == 1, "columns are aligned"
    assert lines[-1].startswith("AdamW keeps bfloat16 states. Adai keeps master weights, except ")
    assert [line for line in lines if line.startswith("not installed: DeepSpeed CPUAdam (package deepspeed")]
    assert "not installed: pytorch_optimizer Adai (package pytorch_optimizer)" in lines


def test_a_failing_package_is_reported_and_does_not_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError("no compiler\nand more lines")

    for module in OTHERS:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", Broken())  # type: ignore[arg-type]
    cases, missing = other_cases(small_model())
    assert cases == []
    assert missing[1] == "not measured: pytorch_optimizer Adai (RuntimeError: no compiler)"


def test_other_packages_cannot_change_the_parameters_of_the_cases() -> None:
    model = small_model()
    other = model.copy()
    for param in other.params:
        param.detach().fill_(torch.nan)
    assert all(param.isfinite().all() for param in model.params)
    assert all(a.grad is b.grad for a, b in zip(model.params, other.params, strict=True))


def end_of(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", *map(str, arguments)])
    return int(end.value.code or 0)


def test_the_command_prints_a_table_and_writes_json_and_a_picture(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--numel", "1000", "--repetitions", "1", "--no-others", "--dtype", "float16")
    assert end_of(*options, "--json", results, "--plot", picture) == 0
    stdout, _ = capfd.readouterr()
    report = json.loads(results.read_text())
    assert (report["numel"], report["dtype"], report["missing"]) == (1000, "float16", [])
    assert stdout == f"{bench_table(report)}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--numel", "0"], "numel must be at least 1; got 0; give a larger number"),
        (["--repetitions", "0"], "repetitions must be at least 1; got 0; give a larger number"),
        (["--threads", "-1"], "threads must be at least 1; got -1; give a larger number"),
        (["--device", "tpu"], "device must be available on this machine; got 'tpu'; use cpu"),
        (["--dtype", "float64"], "dtype must be one of float32, bfloat16, float16; got 'float64'; choose one"),
        (["--shapes", "gpt3"], "shapes must be one of gpt2-124m, llama-7b-layer, tiny-148; got 'gpt3'; choose one"),
        (["--json", "nowhere/x.json"], "--json and --plot must name writable files; got [Errno 2] "),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert end_of(*arguments) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert stderr.startswith(f"adai-dist: {message}")
    assert stderr.count("\n") == 1
