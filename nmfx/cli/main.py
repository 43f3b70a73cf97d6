"""The `nmfx` command: its arguments, and what becomes of errors."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from nmfx import __version__

EPILOG = """\
a first tour:
  nmfx search                          search a pattern for each layer of the embedded demo network
  nmfx convert resnet50                build, find the sites, verify, write resnet50.nmfx/
  nmfx search --target 0.875           search the work directory in this folder
  nmfx export --baked --onnx           scheme, compressed checkpoint, plain weights, ONNX
  nmfx inspect resnet50.nmfx           what is in a work directory, checkpoint, scheme or model
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nmfx",
        description="Layer-wise N:M sparsity for any timm or torchvision network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nmfx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the library does, show full tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_convert(commands.add_parser("convert", help="build a model, find its sites, write a work directory"))
    _add_search(commands.add_parser("search", help="choose a pattern for every site under a budget"))
    _add_export(commands.add_parser("export", help="write scheme files and the compressed checkpoint"))
    inspect = commands.add_parser("inspect", help="show a checkpoint, scheme, work directory or model")
    inspect.add_argument("what", metavar="FILE|DIR|MODEL")
    inspect.add_argument("--input-size", metavar="CxHxW", help="input of a model given by name")
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Build a model by name, find its sites, verify the conversion, and write a work directory NAME.nmfx/."
    parser.add_argument("model", help="a name of torchvision or timm; prefixes torchvision: and timm: say which")
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="auto|pretrained|none|FILE",
        help="auto: pretrained, or random where they cannot be had (default); none: random; FILE: safetensors or .pth",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--pattern", metavar="N:M", help="this pattern on every site that can take it")
    chosen.add_argument("--scheme", metavar="FILE", help="a scheme file, YAML or the published one-line format")
    _add_policy(parser)
    parser.add_argument("--input-size", metavar="CxHxW", help="input without the batch, as in 3x224x224")
    parser.add_argument("--graph", action="store_true", help="print the fx graph of the converted model")
    _add_output(parser, "work directory (default: NAME.nmfx)")


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Choose a pattern for every site. Works on the work directory in the current folder, the one named, or --model; with "
        "none of these, on the embedded demo network."
    )
    parser.add_argument("work", nargs="?", metavar="DIR", help="work directory made by nmfx convert")
    parser.add_argument("--model", metavar="NAME", help="convert this model first, if NAME.nmfx is not there yet")
    parser.add_argument("--target", type=float, default=0.875, help="sparsity to reach, 0 <= target < 1 (default: 0.875)")
    parser.add_argument("--budget", choices=("params", "macs"), default="params", help="what the target counts")
    parser.add_argument("--method", default="domino", help="domino (default), knapsack, erk or uniform")
    parser.add_argument("--m", type=int, default=16, help="group size M (default: 16)")
    parser.add_argument("--candidates", metavar="N,N,...", help="the N's to choose from (default: powers of two up to M)")
    parser.add_argument("--keep-dense", action="append", default=[], metavar="GLOB", help="sites that stay dense; repeatable")
    _add_policy(parser)
    parser.add_argument("--events", action="store_true", help="list every step of the search")
    _add_output(parser, "scheme file (default: scheme.yaml in the work directory, with scheme.txt beside it)")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write the scheme files and the compressed checkpoint of a work directory to DIR/export/."
    parser.add_argument("work", nargs="?", metavar="DIR", help="work directory made by nmfx convert")
    parser.add_argument("--scheme", metavar="FILE", help="another scheme than the work directory's")
    parser.add_argument("--baked", action="store_true", help="also a plain state dict with real zeros")
    parser.add_argument("--onnx", action="store_true", help="also an ONNX file with real zeros (needs nmfx[onnx])")
    _add_output(parser, "folder to write to (default: DIR/export)")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout", choices=("strict", "flat"), default="strict", help="groups within rows of input channels, or across them"
    )
    parser.add_argument(
        "--remainder",
        choices=("dense", "smaller", "short"),
        default="dense",
        help="rows that M does not divide: stay dense (default), take a smaller M, or end in a short group",
    )


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--out", metavar="PATH", help=what)
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error of ours, 130 when interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not args.verbose:
        warnings.simplefilter("ignore")  # of the model libraries; ours are said in plain words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bars on a terminal without them
    from nmfx.errors import NmfxError

    try:
        command = import_module(f"nmfx.cli.{args.command}")
        command.run(args)
        sys.stdout.flush()
    except NmfxError as error:
        if args.verbose:
            raise
        from nmfx.cli.console import errors

        errors().print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True, highlight=False)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
