"""python -m kvreplay.similarity TRACE --out DIR"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from kvreplay import matrices, style
from kvreplay.schema import TraceError
from kvreplay.similarity.draw import draw
from kvreplay.similarity.trace import SimilarityError, analyse, sentences
from kvreplay.trace import Trace


def run(path: Path, out: Path) -> list[Path]:
    """Analyses a trace, prints the sentences and returns the written files."""
    with Trace(path) as trace:
        tables, note = analyse(trace), matrices.provenance(trace)
    print("\n".join(sentences(tables)))
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style.venue_params("neurips2024")):
        return draw(tables, note, out)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 when there is nothing to compare or nowhere to write, 3 for a bad
    trace."""
    parser = argparse.ArgumentParser(
        prog="python -m kvreplay.similarity", description="how alike the tokens of a trace are: keys and values"
    )
    parser.add_argument("trace", metavar="TRACE", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where tables and figures go")
    options = parser.parse_args(arguments)
    matplotlib.use("Agg")
    try:
        paths = run(options.trace, options.out)
    except (SimilarityError, OSError) as error:
        print(f"kvreplay.similarity: {error}", file=sys.stderr)
        return 2
    except TraceError as error:
        print(f"kvreplay.similarity: {error}", file=sys.stderr)
        return 3
    print("\n" + "\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
