"""The `nmfx` command: its arguments, and what becomes of errors."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from nmfx import __version__
from nmfx.cli.arguments import Parser, add_strict, real, seed, shared, whole, workers
from nmfx.cli.flags import add_flags
from nmfx.settings.training import Settings

EPILOG = """\
a first tour, in an empty folder (real digits, two minutes; needs nmfx[demo]):
  nmfx convert digits                     build, find the sites, digits.nmfx/
  nmfx search                             a pattern for each of its layers
  nmfx recalibrate --data digits          batch norms to fit, no training
  nmfx finetune --data digits --batch-size 32 --epochs 5   train it; it resumes
  nmfx evaluate --data digits             accuracy, from dense to fine-tuned
  nmfx export --baked                     compressed checkpoint, plain weights
  nmfx inspect                            what a directory, file or model holds
  nmfx bench --batch 1 --turns 5          its speed here, dense and sparse
  nmfx run digits --check                 the same from one recipe, a dry run
  nmfx models "timm:vit_*"                what is known of models by name

your own: nmfx convert resnet50 [--weights FILE] [--classes N], and a folder of
pictures for --data: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg
"""


def _parser() -> Parser:
    parser = Parser(
        prog="nmfx",
        description="Layer-wise N:M sparsity for any timm or torchvision network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nmfx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the library does, show full tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add, said) in COMMANDS.items():
        add(commands.add_parser(name, help=said, parents=[shared()]))
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Build a model by name, find its sites, verify the conversion, and write a work directory NAME.nmfx/."
    parser.add_argument("model", help="a name of torchvision or timm; prefixes torchvision: and timm: say which")
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="auto|pretrained|none|FILE",
        help="auto: pretrained, or random where they cannot be had (default); none: random; FILE: safetensors or .pth, or a "
        "compressed checkpoint of nmfx, to search a sparser scheme from",
    )
    _add_entry(parser)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--pattern", metavar="N:M", help="this pattern on every site that can take it")
    chosen.add_argument("--scheme", metavar="FILE", help="a scheme file, YAML or the published one-line format")
    _add_policy(parser)
    _add_size(parser)
    _add_classes(parser)
    parser.add_argument("--graph", action="store_true", help="print the fx graph of the converted model")
    add_strict(parser)
    _add_output(parser, "work directory (default: NAME.nmfx)")


def _add_entry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights-entry",
        metavar="NAME",
        help="which weights of a training checkpoint, as state_dict or state_dict_ema (default: averaged ones first)",
    )


def _add_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes", type=whole(1, 1_000_000), metavar="N", help="classes of a model given by name, where not its own number"
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-size", metavar="CxHxW", help="input without the batch, as in 3x224x224")


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Choose a pattern for every site. Works on the work directory in the current folder, the one named, or --model; with "
        "none of these, on the embedded demo network. One that was converted from a compressed checkpoint gets sparser: no "
        "site takes more than it has."
    )
    parser.add_argument("work", nargs="?", metavar="DIR", help="work directory made by nmfx convert")
    parser.add_argument("--model", metavar="NAME", help="convert this model first, if NAME.nmfx is not there yet")
    parser.add_argument(
        "--target", help="sparsity to reach, as 0.875, or times fewer, as 8x (default: 0.875, or what is in reach)"
    )
    parser.add_argument(
        "--budget",
        choices=("params", "macs", "bytes", "latency"),
        help="what the target counts (default: params; bytes: of the packed weights; latency: see --target-latency)",
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="KIND=SHARE",
        help="instead of --target and --budget, one or two of: params, macs or bytes, and the share to keep or times fewer, as "
        "in --limit params=0.125 --limit macs=4x",
    )
    parser.add_argument(
        "--target-latency",
        metavar="2x",
        help="times faster than the best dense run on this CPU, by nmfx.compile; every pattern of every site is timed first",
    )
    parser.add_argument(
        "--latency-batch", type=whole(1, 4096), default=1, metavar="B", help="batch size to be fast for (default: 1)"
    )
    parser.add_argument("--method", default=None, help="knapsack (default), domino, spdy, erk or uniform")
    _add_choices(parser.add_argument_group("what a site may be given"))
    _add_policy(parser)
    _add_data(parser.add_argument_group("searching with data"))
    parser.add_argument("--events", action="store_true", help="list every step of the search, or choice of an exact one")
    parser.add_argument("--figure", metavar="FILE", help="draw the result: .png, .svg or .pdf (needs nmfx[figures])")
    parser.add_argument("--html", metavar="FILE", help="write the result as one page (needs nmfx[figures])")
    add_strict(parser)
    _add_output(parser, "scheme file (default: scheme.yaml in the work directory, with scheme.txt beside it)")


def _add_choices(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--m",
        metavar="M,M,...",
        help="group size M (default: 16, or that of a compressed start), or several: knapsack and spdy mix them, the others "
        "take the largest that fits a site",
    )
    parser.add_argument("--candidates", metavar="N,N,...", help="the N's to choose from (default: powers of two up to M)")
    parser.add_argument("--patterns", metavar="N:M,...", help="only these patterns, as 2:4 for hardware")
    parser.add_argument(
        "--keep-dense", action="append", default=[], metavar="GLOB", help="sites or modules that stay dense; repeatable"
    )
    parser.add_argument(
        "--min-density", action="append", default=[], metavar="[GLOB=]SHARE", help="least density of the sites; repeatable"
    )


def _add_data(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--data",
        metavar="DIR|NAME",
        help="an image folder, digits, fashion-mnist, or a timm data set such as torch/cifar100: the "
        "knapsack and spdy look at a few training pictures, domino runs the published loop (resumed by the same command)",
    )
    parser.add_argument("--data-root", metavar="DIR", help="where a named data set is kept")
    parser.add_argument(
        "--sensitivity",
        default=None,
        help="what the knapsack sums up: weight (default), activation, gradient (default with --data) or measured",
    )
    parser.add_argument("--pictures", type=whole(), default=256, help="training pictures to look at (default: 256)")
    parser.add_argument("--seconds", type=real(above=True), default=60.0, help="time limit of spdy (default: 60)")
    parser.add_argument("--no-eta", action="store_true", help="domino without layer-wise penalty factors, the ablation")
    parser.add_argument("--lr", type=real(), default=0.01, help="domino: learning rate (default: 0.01)")
    parser.add_argument("--decay", type=real(), default=0.1, help="domino: penalty on kept weights (default: 0.1)")
    parser.add_argument("--vote-every", type=whole(), default=100, metavar="T", help="domino: iterations between votes (100)")
    parser.add_argument(
        "--most", type=whole(), default=100_000, metavar="T", help="domino: iterations to give up after (100000)"
    )
    parser.add_argument(
        "--batch-size", type=whole(), default=64, help="pictures a batch, of all processes together (default: 64)"
    )
    parser.add_argument("--workers", type=workers, default=0, help="processes that read pictures (default: 0)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", default="auto", help="auto: the first GPU, or the CPU (GPUs are untested)")


def _add_recalibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Masks change what batch norms see. Move the running means and variances of a work directory's masked model by the "
        "difference that its masks make on a few hundred pictures, and write DIR/recalibrated/model.safetensors: what export, "
        "evaluate and bench take where nothing has been fine-tuned."
    )
    parser.add_argument("work", nargs="?", metavar="DIR", help="work directory with a scheme")
    parser.add_argument("--scheme", metavar="FILE", help="another scheme than the work directory's")
    pictures = parser.add_argument_group("pictures")
    _add_pictures(pictures, batch=64)
    pictures.add_argument("--pictures", type=whole(), help="training pictures to look at (default: 512, or all)")
    pictures.add_argument("--seed", type=seed, default=0, help="which ones (default: 0)")
    add_strict(parser)
    _add_output(parser, "folder to write to (default: DIR/recalibrated)")


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a work directory's model under its scheme, with the published settings unless told otherwise, and write "
        "DIR/finetune/model.safetensors (the best epoch) and model.last.safetensors. The same command goes on with a run that "
        "was stopped, and with more --epochs extends it, at the learning rate that the longer schedule has there. Several "
        "processes: torchrun --nproc_per_node=K -m nmfx finetune ..."
    )
    parser.add_argument("work", nargs="?", metavar="DIR", help="work directory with a scheme")
    start = parser.add_argument_group("what to start from")
    start.add_argument("--from", dest="start", metavar="FILE", help="a compressed checkpoint instead of the dense weights")
    start.add_argument("--weights", choices=("none",), help="none: random weights")
    start.add_argument("--scheme", metavar="FILE|dense", help="another scheme than the work directory's, or none")
    start.add_argument(
        "--training",
        choices=("sr-ste", "ste", "fixed"),
        default="sr-ste",
        help="masks follow the weights with a pull on dropped ones (default) or without, or stay as they are (ASP)",
    )
    start.add_argument("--decay", type=real(), default=2e-4, help="sr-ste: lambda, the pull on dropped weights (default: 2e-4)")
    _add_pictures(parser.add_argument_group("pictures"), batch=256)
    add_flags(parser.add_argument_group("training"), Settings, without=("batch_size", "workers"))
    add_strict(parser)
    _add_output(parser, "folder to write to (default: DIR/finetune)")


def _add_pictures(parser: argparse._ArgumentGroup, *, batch: int) -> None:
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR|NAME",
        help="an image folder, digits, fashion-mnist, or a timm data set such as torch/cifar100",
    )
    parser.add_argument("--data-root", metavar="DIR", help="where a named data set is kept")
    parser.add_argument(
        "--batch-size", type=whole(), default=batch, help=f"pictures a batch, of all processes together (default: {batch})"
    )
    parser.add_argument("--workers", type=workers, default=0, help="processes that read pictures (default: 0)")
    parser.add_argument("--device", default="auto", help="auto: the first GPU, or the CPU (GPUs are untested)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Top-1, top-5 and loss on the validation pictures: of a compressed checkpoint, of plain weights with --model, of a "
        "model by name, or of a work directory's dense, masked, recalibrated and fine-tuned model."
    )
    _add_what(parser)
    parser.add_argument("--model", metavar="NAME", help="the network that plain weights are for")
    _add_entry(parser)
    _add_classes(parser)
    parser.add_argument("--reference", metavar="FILE|DIR|MODEL", help="also the share of answers that agree with this model's")
    _add_size(parser)
    add_strict(parser)
    _add_pictures(parser.add_argument_group("pictures"), batch=256)


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", metavar="FILE|DIR|MODEL", help="default: the work directory in this folder")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what is in a work directory, a compressed checkpoint, a scheme file, or a model by name."
    _add_what(parser)
    parser.add_argument("--input-size", metavar="CxHxW", help="input of a model given by name")
    _add_classes(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the scheme files and the compressed checkpoint of a work directory to DIR/export/: the fine-tuned weights if "
        "they were trained under this scheme, else the recalibrated ones, else those it was made with."
    )
    parser.add_argument("work", nargs="?", metavar="DIR", help="work directory made by nmfx convert")
    parser.add_argument("--scheme", metavar="FILE", help="another scheme than the work directory's")
    parser.add_argument(
        "--epoch",
        choices=("best", "last"),
        default="best",
        help="of fine-tuning: that of the highest top-1 (default), or the last",
    )
    parser.add_argument("--baked", action="store_true", help="also a plain state dict with real zeros")
    parser.add_argument("--onnx", action="store_true", help="also an ONNX file with real zeros (needs nmfx[onnx])")
    add_strict(parser)
    _add_output(parser, "folder to write to (default: DIR/export)")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time a network in one run, engine after engine in turns: dense by PyTorch, torch.compile with frozen weights and ONNX "
        "Runtime, and converted by nmfx.compile. Of a work directory (its fine-tuned model, or its scheme), a compressed "
        "checkpoint, or a model by name under a scheme found at --target."
    )
    _add_what(parser)
    parser.add_argument("--scheme", metavar="FILE", help="another scheme than the work directory's")
    parser.add_argument("--target", default="0.875", help="for a model by name: sparsity of parameters (default: 0.875)")
    parser.add_argument("--m", type=whole(2, 64), default=16, help="for a model by name: group size M (default: 16)")
    _add_size(parser)
    _add_classes(parser)
    parser.add_argument("--batch", default="1,8", metavar="B,B,...", help="batch sizes (default: 1,8)")
    parser.add_argument("--threads", metavar="T,T,...", help="numbers of threads (default: 1 and all)")
    parser.add_argument("--turns", type=whole(1, 100_000), default=15, help="turns of every engine (default: 15)")
    parser.add_argument("--sites", action="store_true", help="also list how each site is computed, and what was measured")
    parser.add_argument("--figure", metavar="FILE", help="draw the result: .png, .svg or .pdf (needs nmfx[figures])")
    add_strict(parser)
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run a recipe: build, search, fine-tune, export, evaluate. A stage is skipped when its output is there and still what "
        "the recipe asks for; a changed setting runs its stage and the later ones again; a stopped run goes on."
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or a packaged recipe by name, as digits or resnet50-0.80"
    )
    parser.add_argument("-o", "--out", metavar="DIR", help="folder to run in (default: NAME.nmfx)")
    parser.add_argument(
        "--data-root", metavar="DIR", help="where the pictures are: the image folder, or a named data set's place"
    )
    stages = ("build", "search", "finetune", "export", "evaluate")
    parser.add_argument("--until", choices=stages, metavar="STAGE", help=f"the last stage to run: {', '.join(stages)}")
    parser.add_argument("--force", action="store_true", help="run every stage anew")
    add_strict(parser)
    parser.add_argument(
        "--check", action="store_true", help="only check, without data: build, search, one update on random pictures"
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List models with their parameters, sites, the share of the parameters that sites cover, the share of the sites that "
        "fx graphs reach, and whether masked equals pre-masked on the CPU: outputs, and a training step."
    )
    what = 'a glob such as "timm:vit_*", or part of a name (default: all)'
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help=what)
    parser.add_argument("--measure", action="store_true", help="measure those listed that were not measured, without memory")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show where schemes for one network differ, and what each keeps."
    parser.add_argument("schemes", nargs="+", metavar="SCHEME", help="scheme file, checkpoint or work directory; two or more")
    parser.add_argument("--model", metavar="NAME|DIR", help="the network, where no scheme says it (DIR: a work directory)")
    _add_size(parser)
    _add_classes(parser)
    parser.add_argument("--all", action="store_true", help="also list the sites that agree")
    parser.add_argument("--figure", metavar="FILE", help="also a picture: .png, .svg or .pdf (needs nmfx[figures])")
    parser.add_argument("--html", metavar="FILE", help="also one self-contained page (needs nmfx[figures])")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


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


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "convert": (_add_convert, "build a model, find its sites, write a work directory"),
    "search": (_add_search, "choose a pattern for every site under a budget"),
    "recalibrate": (_add_recalibrate, "match the masked model's batch norms to the dense model's, without training"),
    "finetune": (_add_finetune, "train the masked model on pictures; stopped runs go on"),
    "evaluate": (_add_evaluate, "measure the accuracy of a checkpoint, work directory or model"),
    "export": (_add_export, "write scheme files and the compressed checkpoint"),
    "bench": (_add_bench, "time the network on this machine's CPU: dense engines and the sparse runtime"),
    "run": (_add_run, "build, search, fine-tune, export and evaluate as a recipe says"),
    "inspect": (_add_inspect, "show a checkpoint, scheme, work directory or model"),
    "compare": (_add_compare, "show where schemes for one network differ"),
    "models": (_add_models, "list the models of timm and torchvision, with what was measured"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    args = _parser().read(argv)
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not args.verbose:
        warnings.simplefilter("ignore")  # of the model libraries; ours are said in plain words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bars on a terminal without them
    try:
        command = import_module(f"nmfx.cli.{args.command}")
        command.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; nothing half-written", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.verbose:
            raise
        from nmfx.cli.console import errors

        errors().print(f"[bold red]error:[/] {_escaped(_said(error))}", soft_wrap=True, highlight=False)
        return 1
    return 0


def _said(error: Exception) -> str:
    """An error in one line: ours as it is, the system's with its file, and what nobody foresaw with the way to see more."""
    from nmfx.errors import NmfxError
    from nmfx.text import sentence

    if isinstance(error, NmfxError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {sentence(error)}; the same with `nmfx -v` in front shows where"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
