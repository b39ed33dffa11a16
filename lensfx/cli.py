"""The `lensfx` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from lensfx import __version__
from lensfx.errors import LensError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 if all went well, 1 for an error it explains."""
    parser = argparse.ArgumentParser(
        prog="lensfx", description="Any PyTorch model as a graph that can be read and rewritten."
    )
    parser.add_argument("--version", action="version", version=f"lensfx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="wrap the embedded model and find its induction heads")
    demo.add_argument("--seed", type=int, default=7, help="seed of the token sequences")
    options = parser.parse_args(arguments)
    try:
        from lensfx.demo.story import tell

        tell(Console(), seed=options.seed)
    except LensError as error:
        print(f"lensfx: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
