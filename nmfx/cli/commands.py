"""The commands and what each takes: the options of its settings, and a few arguments of its own. Imports no torch. It has a few
lines more than other files, as the command line is easier to see in one piece.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nmfx import __version__
from nmfx.cli.arguments import Parser, whole
from nmfx.settings.flags import add_flags
from nmfx.settings.option import options_of
from nmfx.settings.search import Choices, DominoSettings, SearchSettings
from nmfx.settings.stages import (
    BenchSettings,
    CorrectSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    FinetuneSettings,
    ModelSettings,
    RecalibrateSettings,
)
from nmfx.settings.training import Settings

EPILOG = """\
a first tour, in an empty folder (real digits, two minutes; needs nmfx[demo]):
  nmfx convert digits                     build, find the sites, digits.nmfx/
  nmfx search                             a pattern for each of its layers
  nmfx recalibrate --data digits          batch norms to fit, no training
  nmfx correct --data digits              kept weights as well, no training
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
POLICY = ("layout", "remainder")
STRICT = "random weights are an error, not a warning (as with NMFX_STRICT_WEIGHTS=1 in the environment)"


def parser() -> Parser:
    """The parser of the whole command line."""
    result = Parser(
        prog="nmfx",
        description="Layer-wise N:M sparsity for any timm or torchvision network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"nmfx {__version__}")
    result.add_argument("-v", "--verbose", action="store_true", help="log what the library does, show full tracebacks")
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shared = Parser(add_help=False)
    shared.add_argument(  # SUPPRESS: what was said before the command stays
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what the library does, show tracebacks"
    )
    for name, (add, said) in COMMANDS.items():
        add(commands.add_parser(name, help=said, parents=[shared]))
    return result


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Build a model by name, find its sites, verify the conversion, and write a work directory NAME.nmfx/."
    parser.add_argument("model", help="a name of torchvision or timm; prefixes torchvision: and timm: say which")
    add_flags(parser, ModelSettings)
    _classes(parser)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--pattern", metavar="N:M", help="this pattern on every site that can take it")
    chosen.add_argument("--scheme", metavar="FILE", help="a scheme file, YAML or the published one-line format")
    add_flags(parser, Choices, only=POLICY)
    parser.add_argument("--graph", action="store_true", help="print the fx graph of the converted model")
    _output(parser, "work directory (default: NAME.nmfx)")


def _search(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Choose a pattern for every site. Works on the work directory in the current folder, the one named, or --model; with "
        "none of these, on the embedded demo network. One that was converted from a compressed checkpoint gets sparser: no "
        "site takes more than it has. With --data, the knapsack and spdy look at a few training pictures, and domino runs the "
        "published loop, which the same command resumes."
    )
    _work(parser, "work directory made by nmfx convert")
    parser.add_argument("--model", metavar="NAME", help="convert this model first, if NAME.nmfx is not there yet")
    choices, loop = options_of(Choices), options_of(DominoSettings)
    data = ("sensitivity", "pictures", "seconds", "lr", "batch_size", "most", "seed", *loop)
    add_flags(parser, SearchSettings, without=(*choices, *data))
    parser.add_argument(
        "--target-latency",
        metavar="2x",
        help="times faster than the best dense run on this CPU, by nmfx.compile; every pattern of every site is timed first",
    )
    parser.add_argument(
        "--latency-batch", type=whole(1, 4096), default=1, metavar="B", help="batch size to be fast for (default: 1)"
    )
    add_flags(parser.add_argument_group("what a site may be given"), SearchSettings, only=choices)
    group = parser.add_argument_group("searching with data")
    add_flags(group, DataSettings, required=False)
    add_flags(group, SearchSettings, only=data)
    _device(group)
    parser.add_argument("--events", action="store_true", help="list every step of the search, or choice of an exact one")
    _figures(parser)
    _output(parser, "scheme file (default: scheme.yaml in the work directory, with scheme.txt beside it)")


def _recalibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Masks change what batch norms see. Move the running means and variances of a work directory's masked model by the "
        "difference that its masks make on a few hundred pictures, and write DIR/recalibrated/model.safetensors: what export, "
        "evaluate and bench take where nothing has been fine-tuned."
    )
    _work(parser, "work directory with a scheme")
    _other_scheme(parser)
    _pictures(parser)
    add_flags(parser, RecalibrateSettings)
    _output(parser, "folder to write to (default: DIR/recalibrated)")


def _correct(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Give the kept weights of a work directory's masked model new values, layer after layer, so that its outputs come back "
        "to the dense network's on a few hundred pictures: no labels, no training, minutes. Masks are chosen with the values, "
        "batch norms matched. Writes DIR/corrected/model.safetensors: what export, evaluate and bench take where nothing has "
        "been fine-tuned, and what `nmfx finetune --from` can start from."
    )
    _work(parser, "work directory with a scheme")
    _other_scheme(parser)
    _pictures(parser)
    add_flags(parser, CorrectSettings)
    _output(parser, "folder to write to (default: DIR/corrected)")


def _finetune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a work directory's model under its scheme, with the published settings unless told otherwise, and write "
        "DIR/finetune/model.safetensors (the best epoch) and model.last.safetensors. The same command goes on with a run that "
        "was stopped, and with more --epochs extends it, at the learning rate that the longer schedule has there. Several "
        "processes: torchrun --nproc_per_node=K -m nmfx finetune ..."
    )
    _work(parser, "work directory with a scheme")
    start = parser.add_argument_group("what to start from, and how masks train")
    start.add_argument("--from", dest="start", metavar="FILE", help="a compressed checkpoint instead of the dense weights")
    start.add_argument("--scheme", metavar="FILE|dense", help="another scheme than the work directory's, or none")
    training = options_of(Settings)
    add_flags(start, FinetuneSettings, without=training)
    _pictures(parser)
    add_flags(parser.add_argument_group("training"), FinetuneSettings, only=training)
    _output(parser, "folder to write to (default: DIR/finetune)")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Top-1, top-5 and loss on the validation pictures: of a compressed checkpoint, of plain weights with --model, of a "
        "model by name, or of a work directory's dense, masked, recalibrated and fine-tuned model."
    )
    _what(parser)
    parser.add_argument("--model", metavar="NAME", help="the network that plain weights are for")
    parser.add_argument("--reference", metavar="FILE|DIR|MODEL", help="also the share of answers that agree with this model's")
    add_flags(parser, ModelSettings, without=("weights",))
    _classes(parser)
    _pictures(parser)
    add_flags(parser, EvaluateSettings)
    _strict(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what is in a work directory, a compressed checkpoint, a scheme file, or a model by name."
    _what(parser)
    add_flags(parser, ModelSettings, only=("input_size",))
    _classes(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the scheme files and the compressed checkpoint of a work directory to DIR/export/: the fine-tuned weights if "
        "they were trained under this scheme, else the recalibrated ones, else those it was made with."
    )
    _work(parser, "work directory made by nmfx convert")
    _other_scheme(parser)
    add_flags(parser, ExportSettings)
    _output(parser, "folder to write to (default: DIR/export)")


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time a network in one run, engine after engine in turns: dense by PyTorch, torch.compile with frozen weights and ONNX "
        "Runtime, and converted by nmfx.compile. Of a work directory (its fine-tuned model, or its scheme), a compressed "
        "checkpoint, or a model by name under a scheme found at --target."
    )
    _what(parser)
    _other_scheme(parser)
    add_flags(parser, BenchSettings)
    add_flags(parser, ModelSettings, only=("input_size",))
    _classes(parser)
    parser.add_argument("--sites", action="store_true", help="also list how each site is computed, and what was measured")
    _figures(parser, html=False)
    _strict(parser)
    _force(parser)


def _run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run a recipe: build, search, correct, fine-tune, export, evaluate. A stage is skipped when its output is there and "
        "still what the recipe asks for; a changed setting runs its stage and the later ones again; a stopped run goes on."
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or a packaged recipe by name, as digits or resnet50-0.80"
    )
    parser.add_argument("-o", "--out", metavar="DIR", help="folder to run in (default: NAME.nmfx)")
    parser.add_argument(
        "--data-root", metavar="DIR", help="where the pictures are: the image folder, or a named data set's place"
    )
    stages = ("build", "search", "correct", "finetune", "export", "evaluate")
    parser.add_argument("--until", choices=stages, metavar="STAGE", help=f"the last stage to run: {', '.join(stages)}")
    parser.add_argument("--force", action="store_true", help="run every stage anew")
    parser.add_argument(
        "--check", action="store_true", help="only check, without data: build, search, one update on random pictures"
    )
    _strict(parser)


def _models(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List models with their parameters, sites, the share of the parameters that sites cover, the share of the sites that "
        "fx graphs reach, and whether masked equals pre-masked on the CPU: outputs, and a training step."
    )
    what = 'a glob such as "timm:vit_*", or part of a name (default: all)'
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help=what)
    parser.add_argument("--measure", action="store_true", help="measure those listed that were not measured, without memory")


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show where schemes for one network differ, and what each keeps."
    parser.add_argument("schemes", nargs="+", metavar="SCHEME", help="scheme file, checkpoint or work directory; two or more")
    parser.add_argument("--model", metavar="NAME|DIR", help="the network, where no scheme says it (DIR: a work directory)")
    add_flags(parser, ModelSettings, only=("input_size",))
    _classes(parser)
    parser.add_argument("--all", action="store_true", help="also list the sites that agree")
    _figures(parser)
    _force(parser)


def _work(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("work", nargs="?", metavar="DIR", help=what)


def _other_scheme(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", metavar="FILE", help="another scheme than the work directory's")


def _what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", metavar="FILE|DIR|MODEL", help="default: the work directory in this folder")


def _classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes", type=whole(1, 1_000_000), metavar="N", help="classes of a model given by name, where not its own number"
    )


def _pictures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    add_flags(group, DataSettings)
    _device(group)


def _device(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--device", default="auto", help="auto: the first GPU, or the CPU (GPUs are untested)")


def _figures(parser: argparse.ArgumentParser, *, html: bool = True) -> None:
    parser.add_argument("--figure", metavar="FILE", help="draw the result: .png, .svg or .pdf (needs nmfx[figures])")
    if html:
        parser.add_argument("--html", metavar="FILE", help="write the result as one page (needs nmfx[figures])")


def _output(parser: argparse.ArgumentParser, what: str) -> None:
    _strict(parser)
    parser.add_argument("-o", "--out", metavar="PATH", help=what)
    _force(parser)


def _strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict-weights", action="store_true", help=STRICT)


def _force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "convert": (_convert, "build a model, find its sites, write a work directory"),
    "search": (_search, "choose a pattern for every site under a budget"),
    "recalibrate": (_recalibrate, "match the masked model's batch norms to the dense model's, without training"),
    "correct": (_correct, "correct the kept weights against the dense model's outputs, without training"),
    "finetune": (_finetune, "train the masked model on pictures; stopped runs go on"),
    "evaluate": (_evaluate, "measure the accuracy of a checkpoint, work directory or model"),
    "export": (_export, "write scheme files and the compressed checkpoint"),
    "bench": (_bench, "time the network on this machine's CPU: dense engines and the sparse runtime"),
    "run": (_run, "build, search, fine-tune, export and evaluate as a recipe says"),
    "inspect": (_inspect, "show a checkpoint, scheme, work directory or model"),
    "compare": (_compare, "show where schemes for one network differ"),
    "models": (_models, "list the models of timm and torchvision, with what was measured"),
}
