"""`adai-dist build`: compilation of the kernels ahead of time."""

from __future__ import annotations

import argparse
import os

from adai_dist.cli.exit import report_error
from adai_dist.cli.parser import Commands


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "build",
        help="compile the kernels ahead of time",
        description="Compile the kernels into TORCH_EXTENSIONS_DIR (default: ~/.cache/torch_extensions), where "
        "training finds them. For GPUs that this machine does not have, set TORCH_CUDA_ARCH_LIST.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), help="default: the devices of this machine")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import torch

    from adai_dist.kernels.build import EXTENSIONS, BuildError, load

    has_cuda = options.device == "all" or (options.device is None and torch.cuda.is_available())
    code = 0
    for device_type in ("cpu", "cuda") if has_cuda else (options.device or "cpu",):
        extension = EXTENSIONS[device_type]
        variable = f"DS_BUILD_{extension.name.upper()}"  # DeepSpeed's convention for leaving out an operator
        if os.environ.get(variable) == "0":
            print(f"{extension.name}: left out, {variable}=0", flush=True)
            continue
        try:
            library = load(extension)
        except BuildError as error:
            code = report_error(f"{extension.name}: {error}")
            continue
        took = "up to date" if library.seconds is None else f"compiled in {library.seconds:.1f} s"
        print(f"{extension.name}: {library.path}, {took}", flush=True)
    return code
