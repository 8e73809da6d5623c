"""The command line: `adai-dist train | sweep | run | compare | bench | soak | build | to-universal`.

What the user got wrong is one line on stderr and exit code 2, on every rank. Ctrl-C exits with 130, a checkpoint that
cannot be written or read with one line and 1, another failure with its traceback and 1; a program under `run` ends as
it would have ended by itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import adai_dist
from adai_dist.integrations.script import NoProgramError, run_program, split_local_rank

if TYPE_CHECKING:
    from adai_dist.recipes.config import Recipe
    from adai_dist.recipes.world import World

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_STOPPED = 1, 2, 130, 143  # the last two are 128 + the signal


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process; returns only where a program under `run` came to its end."""
    launcher_words, words = split_local_rank(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        if _names_a_program(words[1:]):
            _run(words[1:], launcher_words)
            return
        words = words[: 2 if {"-h", "--help"}.intersection(words[1:2]) else 1]
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    # argparse takes no positional argument after an option; key=value may stand anywhere.
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and options.command not in ("train", "sweep")):
        parser.error(f"unrecognized arguments: {' '.join(stray or rest)}")
    if options.command in ("train", "sweep"):
        options.overrides = [*options.overrides, *rest]
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        code = options.run(options)
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted")
        _leave(EXIT_INTERRUPTED)
    except Exception:
        traceback.print_exc()
        _leave(EXIT_FAILURE)
    _leave(code)


def _names_a_program(words: Sequence[str]) -> bool:
    is_module = words[:1] == ["-m"]
    return len(words) > is_module and not words[is_module].startswith("-")


def _run(words: Sequence[str], launcher_words: Sequence[str]) -> None:
    """Not left to argparse: whatever stands behind the program's name belongs to the program."""
    is_module = words[0] == "-m"
    name, *own = words[is_module:]
    try:
        run_program(name, [*launcher_words, *own], is_module=is_module)
    except NoProgramError as error:
        sys.exit(_complain(str(error)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adai-dist", description="Adaptive Inertia for distributed training with PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"adai-dist {adai_dist.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model from a recipe, alone or under a launcher")
    config_help = "a recipe: a YAML file, or the name of a shipped one, such as lm_tiny"
    train.add_argument("--config", required=True, metavar="RECIPE", help=config_help)
    train.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint; the same as run.resume=true"
    )
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe")
    train.set_defaults(run=_train)

    sweep = commands.add_parser(
        "sweep",
        help="train a recipe with each of its optimizers and several seeds, and compare them",
        description="Run a recipe once for every optimizer and seed, into OUT/NAME/OPTIMIZER-seedSEED. What has "
        "finished is not run again. Leaves a picture (OUT/NAME/sweep.png) and prints a table.",
    )
    sweep.add_argument("--config", required=True, metavar="RECIPE", help=config_help)
    sweep.add_argument("--optimizers", default="", metavar="A,B", help="default: all that the recipe has settings for")
    sweep.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each; default: %(default)s")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe")
    sweep.set_defaults(run=_sweep)

    run = commands.add_parser(
        "run",
        help="run a script in which DeepSpeed knows Adai, AdaiW and AdaiV2",
        usage="adai-dist run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        description="Run a script or module as Python would run it. The arguments behind its name belong to it.",
    )

    def complain(_: argparse.Namespace) -> NoReturn:
        run.error("the script or module to run is missing")

    run.set_defaults(run=complain)

    compare = commands.add_parser("compare", help="draw finished runs on one picture and list them")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders such as runs/lm_tiny")
    compare.add_argument("--out", type=Path, default=Path("compare.png"), metavar="FILE", help="default: compare.png")
    compare.set_defaults(run=_compare)

    bench = commands.add_parser("bench", help="measure the optimizer's step on this machine, beside AdamW's")
    bench.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--numel", type=int, metavar="N", help="number of parameters; default: 33554432")
    size.add_argument("--shapes", metavar="NAME", help="gpt2-124m, llama-7b-layer, or tiny-148: the time of the host")
    bench.add_argument("--dtype", metavar="NAME", help="of parameters: float32 (default), bfloat16 or float16")
    bench.add_argument("--repetitions", type=int, metavar="N", help="times every case is run, in turns; default: 25")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: what torch takes")
    bench.add_argument("--no-others", action="store_true", help="leave DeepSpeed and pytorch_optimizer out")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results, and on what they were measured")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw a bar chart, a PNG file")
    bench.set_defaults(run=_bench)

    soak = commands.add_parser(
        "soak",
        help="train a tiny model for very long, to see that ranks do not drift apart and memory stays",
        description="Train a tiny model on the ranks that a launcher started, and compare them now and then. "
        "Ends with 1 where ranks drift apart, or where memory grows.",
    )
    soak.add_argument("--steps", type=int, metavar="N", help="default: 100000")
    soak.add_argument("--layout", choices=("ddp", "fsdp2", "local"), help="default: ddp, then fsdp2; local must fail")
    soak.add_argument("--check-every", type=int, metavar="N", help="steps between two checks; default: 1000")
    soak.add_argument("--overflow-every", type=int, metavar="N", help="steps between two infinities; default: 997")
    soak.add_argument("--max-growth", type=float, metavar="MIB", help="memory that a rank may gain; default: 8")
    soak.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    soak.set_defaults(run=_soak)

    build = commands.add_parser(
        "build",
        help="compile the kernels ahead of time",
        description="Compile the kernels into TORCH_EXTENSIONS_DIR (default: ~/.cache/torch_extensions), where "
        "training finds them. For GPUs that are not in this machine, list them in TORCH_CUDA_ARCH_LIST.",
    )
    build.add_argument("--device", choices=("cpu", "cuda", "all"), help="default: what this machine has")
    build.set_defaults(run=_build)

    to_universal = commands.add_parser(
        "to-universal", help="convert a DeepSpeed checkpoint, for another number of ranks or another ZeRO stage"
    )
    to_universal.add_argument(
        "input", type=Path, metavar="IN", help="folder of one checkpoint, such as run/global_step100"
    )
    to_universal.add_argument("output", type=Path, metavar="OUT", help="folder to write")
    to_universal.add_argument(
        "--num-workers", type=int, default=1, metavar="N", help="processes that convert; default: %(default)s"
    )
    to_universal.set_defaults(run=_to_universal)
    return parser


def _train(options: argparse.Namespace) -> int:
    return _on_all_ranks(options, _train_one, ["run.resume=true"] if options.resume else [])


def _sweep(options: argparse.Namespace) -> int:
    return _on_all_ranks(options, _train_all, [])


def _on_all_ranks(
    options: argparse.Namespace, work: Callable[[argparse.Namespace, Recipe, World], str], overrides: list[str]
) -> int:
    """Reads the recipe, joins the other ranks, and prints on one of them what the work comes to."""
    try:
        from adai_dist.recipes.checkpoint import CheckpointError
        from adai_dist.recipes.interrupt import Stopped
        from adai_dist.recipes.recipe_file import load_recipe
        from adai_dist.recipes.refusal import RecipeError
        from adai_dist.recipes.world import join_world

        # Before the ranks meet: loading it takes seconds, and not the same on all of them.
        importlib.import_module("adai_dist.recipes.sweep")
    except ModuleNotFoundError as error:
        return _complain(f"training needs the package {error.name}; got none; run: pip install 'adai-dist[train]'")
    try:
        recipe = load_recipe(options.config, [*options.overrides, *overrides])
        with join_world(recipe.device, recipe.run.timeout) as world:
            logging.getLogger("adai_dist").setLevel(logging.WARNING if world.is_main else logging.ERROR)
            outcome = work(options, recipe, world)
            if world.is_main:
                print(f"\n{outcome}", flush=True)
    except RecipeError as error:
        _leave(_complain(str(error)))
    except Stopped as error:
        _complain(str(error))
        _leave(EXIT_STOPPED)
    except CheckpointError as error:  # of which the traceback says nothing more
        _complain(str(error))
        _leave(EXIT_FAILURE)
    return 0


def _train_one(options: argparse.Namespace, recipe: Recipe, world: World) -> str:
    from adai_dist.recipes.summary import summary_table
    from adai_dist.recipes.train import train

    return summary_table(train(recipe, world))


def _train_all(options: argparse.Namespace, recipe: Recipe, world: World) -> str:
    from adai_dist.recipes.sweep import plan_sweep, sweep
    from adai_dist.tools.plots import plot_seeds, seeds_table

    chosen = [name for name in options.optimizers.split(",") if name]
    summaries = sweep(plan_sweep(recipe, chosen, options.seeds), world)
    picture = Path(recipe.run.out) / recipe.run.name / "sweep.png"
    if world.is_main:
        plot_seeds(summaries, picture)
    return f"{seeds_table(summaries)}\n\n{picture}"


def _compare(options: argparse.Namespace) -> int:
    from adai_dist.tools.plots import comparison_table, plot_comparison

    try:
        summaries = plot_comparison(options.runs, options.out)
    except (ValueError, OSError) as error:
        return _complain(str(error))
    print(f"{comparison_table(summaries)}\n\n{options.out}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from adai_dist.tools.bench import Setting, bench_table, measure

    plot = None
    if options.plot:
        try:
            from adai_dist.tools.plots import plot_bench as plot
        except ModuleNotFoundError as error:
            return _complain(f"--plot needs the package {error.name}; got none; run: pip install 'adai-dist[train]'")
    given = {name: getattr(options, name) for name in ("numel", "shapes", "dtype", "repetitions", "threads")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        setting = Setting(device=options.device, others=not options.no_others, **given)
        for path in filter(None, (options.json, options.plot)):  # not after minutes of measuring
            path.open("ab").close()
        report = measure(setting)
        print(bench_table(report))
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
        if plot:
            plot(report, options.plot)
    except OSError as error:
        return _complain(f"--json and --plot must name files that can be written; got {error}; name others")
    except ValueError as error:
        return _complain(str(error))
    return 0


def _soak(options: argparse.Namespace) -> int:
    try:
        from adai_dist.recipes.refusal import RecipeError
        from adai_dist.recipes.world import join_world
        from adai_dist.tools.soak import Soak, row, soak
    except ModuleNotFoundError as error:
        return _complain(f"soak needs the package {error.name}; got none; run: pip install 'adai-dist[train]'")
    names = ("steps", "check_every", "overflow_every", "max_growth")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    logging.getLogger("adai_dist").setLevel(logging.ERROR)  # the skipped steps are wanted
    try:
        plans = [Soak(layout=layout, **given) for layout in ([options.layout] if options.layout else ["ddp", "fsdp2"])]
        with join_world(options.device) as world:
            for plan in plans:
                if world.is_main:
                    print(f"\n{plan.layout}, {world.size} ranks, {plan.steps:,} steps\n{row(None)}", flush=True)
                for check in soak(plan, world.device):
                    if world.is_main:
                        print(row(check), flush=True)
                    if check.fault:
                        if world.is_main:
                            _complain(f"{plan.layout}, step {check.step:,}: {check.fault}")
                        return EXIT_FAILURE
    except (RecipeError, ValueError) as error:
        return _complain(str(error))
    return 0


def _build(options: argparse.Namespace) -> int:
    import torch

    from adai_dist.kernels.build import EXTENSIONS, BuildError, load

    has_cuda = options.device == "all" or (options.device is None and torch.cuda.is_available())
    code = 0
    for device_type in ("cpu", "cuda") if has_cuda else (options.device or "cpu",):
        extension = EXTENSIONS[device_type]
        variable = f"DS_BUILD_{extension.name.upper()}"  # DeepSpeed's way to leave an operator out
        if os.environ.get(variable) == "0":
            print(f"{extension.name}: left out, {variable}=0", flush=True)
            continue
        try:
            library = load(extension)
        except BuildError as error:
            code = _complain(f"{extension.name}: {error}")
            continue
        took = "up to date" if library.seconds is None else f"compiled in {library.seconds:.1f} s"
        print(f"{extension.name}: {library.path}, {took}", flush=True)
    return code


def _to_universal(options: argparse.Namespace) -> int:
    try:
        from adai_dist.integrations.deepspeed.universal import to_universal
    except ModuleNotFoundError as error:
        return _complain(
            f"to-universal needs the package {error.name}; got none; run: pip install 'adai-dist[deepspeed]'"
        )
    try:
        to_universal(options.input, options.output, num_workers=options.num_workers)
    except (ValueError, OSError, RuntimeError) as error:
        return _complain(str(error))
    print(options.output)
    return 0


def _complain(message: str) -> int:
    print(f"adai-dist: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return EXIT_USAGE


def _leave(code: int) -> NoReturn:
    """Ends the process; after a distributed run without destructors.

    Gloo's abort now and then, after all went well, and may wait for peers that are gone after an error: call this while
    the error, which keeps everything alive, is being handled.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    world = sys.modules.get("adai_dist.recipes.world")
    if world is not None and world.is_launched(os.environ):
        os._exit(code)
    sys.exit(code)
