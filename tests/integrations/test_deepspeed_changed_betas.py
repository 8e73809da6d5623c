"""A schedule that changes beta2 of one group, under BF16_Optimizer, which has only the total norm of all groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.integrations.deepspeed_engines import Seen, gather, note_step
from tests.integrations.deepspeed_resume import Run
from tests.integrations.deepspeed_setups import BF16, CLIPPED, FP32_GRADIENTS, Setup, zero
from tests.problems import worst_relative_error
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

SETUP = Setup(zero(1) | BF16 | FP32_GRADIENTS, CLIPPED.with_all(betas=(0.1, 0.98)))
CHANGED_AT, GROUP, BETAS = 5, 1, (0.1, 0.7)


def walk(folder: str, resumes: bool) -> Seen:
    """Take all steps of the problem, optionally resuming on another engine just before the change."""
    run, seen = Run(SETUP), Seen()
    for step in range(SETUP.problem.steps):
        if step == CHANGED_AT:
            if resumes:
                run.save(Path(folder))
                run.engine.destroy()
                run = Run(SETUP)
                run.load(Path(folder))
            run.engine.basic_optimizer.param_groups[GROUP]["betas"] = BETAS
        run.take_steps(range(step, step + 1))
        note_step(run.engine, seen)
    gather(run.engine, run.model.by_name(), seen)
    run.engine.destroy()
    return seen


@pytest.mark.parametrize("resumes", [False, True], ids=["in one go", "resumed"])
def test_the_mean_covers_all_groups_after_beta2_of_one_changes(tmp_path: Path, resumes: bool) -> None:
    problem = SETUP.rounded
    changed, unchanged = problem.oracle(), problem.oracle()
    means: list[float] = []
    for step in range(problem.steps):
        if step == CHANGED_AT:
            changed.groups[GROUP] = replace(changed.groups[GROUP], betas=BETAS)
        means.append(changed.step(problem.oracle_gradients(step)).mean)
        unchanged.step(problem.oracle_gradients(step))
    assert worst_relative_error(unchanged.parameters, changed, problem) > 1e-2, "the change matters"
    for seen in run_ranks(walk, 2, str(tmp_path), resumes):
        assert seen.means == pytest.approx(means, rel=1e-5)
        assert worst_relative_error(seen.parameters, changed, problem) < 1e-5
