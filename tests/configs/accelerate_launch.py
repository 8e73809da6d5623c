"""The environment that `accelerate launch --config_file FILE` sets for the ranks."""

from __future__ import annotations

import os
from pathlib import Path

from tests.recipe_runs import ROOT

FILES = {path.stem: path for path in sorted((ROOT / "configs/accelerate").glob("*.yaml"))}


def environment_of(path: Path, *flags: str) -> dict[str, str]:
    """Return the variables that accelerate adds, using its own parser; `flags` are command-line options."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(path), "--main_process_port", "0", *flags, "train.py"]
    args, defaults, has_precision = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:  # as in launch_command
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, variables = prepare_deepspeed_cmd_env(args)
    else:
        variables = prepare_multi_gpu_env(args)
    return {name: value for name, value in variables.items() if os.environ.get(name) != value and name != "PYTHONPATH"}
