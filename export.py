"""Export a model for other runtimes: `python export.py --version FOLDER --format onnx --out DIR`."""

import sys

from configs.cli import parse
from configs.export import ExportArgs
from utils.errors import run_main


def main() -> int:
    """Parse the options, then import what they need."""
    args = parse(ExportArgs, "export.py")
    from model.export.build import run

    sys.stdout.write(run(args) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
