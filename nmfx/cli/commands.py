"""The commands and what each takes: the options of its settings, and a few arguments of its own. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from nmfx import __version__
from nmfx.settings.choices import Choices
from nmfx.settings.flags import Parser, Part, arg, flags, group
from nmfx.settings.option import options_of
from nmfx.settings.search import DominoSettings, SearchSettings
from nmfx.settings.stages import (
    BenchSettings,
    CompressSettings,
    CorrectSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    FinetuneSettings,
    ModelSettings,
    PrecisionSettings,
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
  nmfx compress digits --data digits --minutes 0.2 -o one.nmfx  all in one

your own: nmfx compress resnet50 --data DIR [--weights FILE] [--classes N], or
the same by steps from nmfx convert on; DIR is a folder of pictures, labelled
where labels are needed: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg
"""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: its line of `nmfx --help`.
        description: the head of its own help.
        parts: what it takes.
        out: of a command that writes: where, and where by default.
        module: of `nmfx.cli`, that runs it; by default the one of its name.
    """

    help: str
    description: str
    parts: Sequence[Part]
    out: str = ""
    module: str = ""


def parser() -> Parser:
    """The parser of the whole command line."""
    result = Parser(
        prog="nmfx",
        description="Layer-wise N:M sparsity for any timm or torchvision network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--completion", choices=SHELLS, help="print what completes commands in a shell (needs nmfx[completion])"
    )
    result.add_argument("--version", action="version", version=f"nmfx {__version__}")
    result.add_argument("-v", "--verbose", action="store_true", help="log what the library does, show full tracebacks")
    commands = result.add_subparsers(dest="command", metavar="COMMAND")
    shared = Parser(add_help=False)
    shared.add_argument(  # SUPPRESS: what was said before the command stays
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what the library does, show tracebacks"
    )
    for name, command in COMMANDS.items():
        inner = commands.add_parser(name, help=command.help, description=command.description, parents=[shared])
        writing = (STRICT, arg("-o", "--out", metavar="PATH", help=command.out), FORCE) if command.out else ()
        for part in (*command.parts, *writing):
            part(inner)
    return result


CONVERTED = arg("work", nargs="?", metavar="DIR", help="work directory made by nmfx convert")
SEARCHED = arg("work", nargs="?", metavar="DIR", help="work directory with a scheme")
WHAT = arg("what", nargs="?", metavar="FILE|DIR|MODEL", help="default: the work directory in this folder")
OTHER_SCHEME = arg("--scheme", metavar="FILE", help="another scheme than the work directory's")
DEVICE = arg("--device", default="auto", help="auto: the first GPU, or the CPU (GPUs are untested)")
PICTURES = group("pictures", flags(DataSettings), DEVICE)
INT8 = group("compiling in int8", flags(PrecisionSettings), flags(DataSettings, required=False))
NETWORK = flags(ModelSettings, only=("input_size", "classes"))
FIGURE = arg("--figure", metavar="FILE", help="draw the result: .png, .svg or .pdf (needs nmfx[figures])")
HTML = arg("--html", metavar="FILE", help="write the result as one page (needs nmfx[figures])")
STRICT = arg(
    "--strict-weights",
    action="store_true",
    help="random weights are an error, not a warning (as with NMFX_STRICT_WEIGHTS=1 in the environment)",
)
JSON = arg("--json", action="store_true", help="show what was found as JSON, and nothing else on standard output")
FORCE = arg("--force", action="store_true", help="overwrite what is there")
CHOICES, LOOP, TRAINING = options_of(Choices), options_of(DominoSettings), options_of(Settings)
WITH_DATA = ("sensitivity", "pictures", "seconds", "lr", "batch_size", "most", "seed", *LOOP)
SHELLS = ("bash", "zsh")  # shtab knows tcsh as well, but not the options of commands there
STAGES = ("build", "search", "correct", "finetune", "export", "evaluate")

COMMANDS = {
    "convert": Command(
        "build a model, find its sites, write a work directory",
        "Build a model by name, find its sites, verify the conversion, and write a work directory NAME.nmfx/.",
        [
            arg("model", help="a name of torchvision or timm; prefixes torchvision: and timm: say which"),
            flags(ModelSettings),
            group(
                "",
                arg("--pattern", metavar="N:M", help="this pattern on every site that can take it; 2:4x4: one mask for 4 rows"),
                arg("--scheme", metavar="FILE", help="a scheme file, YAML or the published one-line format"),
            ),
            flags(Choices, only=("layout", "remainder")),
            arg("--graph", action="store_true", help="print the fx graph of the converted model"),
        ],
        out="work directory (default: NAME.nmfx)",
    ),
    "search": Command(
        "choose a pattern for every site under a budget",
        "Choose a pattern for every site. Works on the work directory in the current folder, the one named, or --model; with "
        "none of these, on the embedded demo network. One that was converted from a compressed checkpoint gets sparser: no "
        "site takes more than it has. With --data, the knapsack and spdy look at a few training pictures, and domino runs the "
        "published loop, which the same command resumes.",
        [
            CONVERTED,
            arg("--model", metavar="NAME", help="convert this model first, if NAME.nmfx is not there yet"),
            flags(SearchSettings, without=(*CHOICES, *WITH_DATA)),
            group("what a site may be given", flags(SearchSettings, only=CHOICES)),
            group("searching with data", flags(DataSettings, required=False), flags(SearchSettings, only=WITH_DATA), DEVICE),
            arg("--events", action="store_true", help="list every step of the search, or choice of an exact one"),
            FIGURE,
            HTML,
        ],
        out="scheme file (default: scheme.yaml in the work directory, with scheme.txt beside it)",
    ),
    "recalibrate": Command(
        "match the masked model's batch norms to the dense model's, without training",
        "Masks change what batch norms see. Move the running means and variances of a work directory's masked model by the "
        "difference that its masks make on a few hundred pictures, and write DIR/recalibrated/model.safetensors: what export, "
        "evaluate and bench take where nothing has been fine-tuned.",
        [SEARCHED, OTHER_SCHEME, PICTURES, flags(RecalibrateSettings)],
        out="folder to write to (default: DIR/recalibrated)",
        module="untrained",
    ),
    "correct": Command(
        "correct the kept weights against the dense model's outputs, without training",
        "Give the kept weights of a work directory's masked model new values, layer after layer, so that its outputs come back "
        "to the dense network's on a few hundred pictures: no labels, no training, minutes. Masks are chosen with the values, "
        "batch norms matched. The same command goes on with a stopped run. Writes DIR/corrected/model.safetensors: what "
        "export, evaluate and bench take where nothing has been fine-tuned, and what `nmfx finetune --from` can start from.",
        [SEARCHED, OTHER_SCHEME, PICTURES, flags(CorrectSettings)],
        out="folder to write to (default: DIR/corrected)",
        module="untrained",
    ),
    "finetune": Command(
        "train the masked model on pictures; stopped runs go on",
        "Train a work directory's model under its scheme, with the published settings unless told otherwise, and write "
        "DIR/finetune/model.safetensors (the best epoch) and model.last.safetensors. The same command goes on with a run that "
        "was stopped, and with more --epochs extends it, at the learning rate that the longer schedule has there. Several "
        "processes: torchrun --nproc_per_node=K -m nmfx finetune ...",
        [
            SEARCHED,
            group(
                "what to start from, and how masks train",
                arg("--from", dest="start", metavar="FILE", help="a compressed checkpoint instead of the dense weights"),
                arg("--scheme", metavar="FILE|dense", help="another scheme than the work directory's, or none"),
                flags(FinetuneSettings, without=TRAINING),
            ),
            PICTURES,
            group("training", flags(FinetuneSettings, only=TRAINING)),
        ],
        out="folder to write to (default: DIR/finetune)",
    ),
    "evaluate": Command(
        "measure the accuracy of a checkpoint, work directory or model",
        "Top-1, top-5 and loss on the validation pictures: of a compressed checkpoint, of plain weights with --model, of a "
        "model by name, or of a work directory's dense, masked, recalibrated and fine-tuned model.",
        [
            WHAT,
            arg("--model", metavar="NAME", help="the network that plain weights are for"),
            arg("--reference", metavar="FILE|DIR|MODEL", help="also the share of answers that agree with this model's"),
            flags(ModelSettings, without=("weights",)),
            PICTURES,
            flags(EvaluateSettings),
            STRICT,
            JSON,
        ],
    ),
    "export": Command(
        "write scheme files and the compressed checkpoint",
        "Write the scheme files and the compressed checkpoint of a work directory to DIR/export/: the fine-tuned weights if "
        "they were trained under this scheme, else the recalibrated ones, else those it was made with. A format can be added "
        "to an earlier export of the same.",
        [CONVERTED, OTHER_SCHEME, flags(ExportSettings), INT8, JSON],
        out="folder to write to (default: DIR/export)",
    ),
    "bench": Command(
        "time the network on this machine's CPU: dense engines and the sparse runtime",
        "Time a network in one run, engine after engine in turns: dense by PyTorch, torch.compile with frozen weights and ONNX "
        "Runtime, and converted by nmfx.compile. Of a work directory (its fine-tuned model, or its scheme), a compressed "
        "checkpoint, or a model by name under a scheme found at --target.",
        [
            WHAT,
            OTHER_SCHEME,
            flags(BenchSettings),
            INT8,
            NETWORK,
            arg("--sites", action="store_true", help="also list how each site is computed, and what was measured"),
            FIGURE,
            STRICT,
            JSON,
            FORCE,
        ],
    ),
    "compress": Command(
        "from a network and pictures to an accurate sparse checkpoint, in one command",
        "Build a network by name, search a scheme, correct its kept weights, distil it for some minutes, export it, and "
        "evaluate what came out: without a label but for the last. What is written is a work directory; the same command goes "
        "on with one that was stopped, and every other command takes it. For more than minutes, see nmfx finetune.",
        [
            arg("model", help="a name of torchvision or timm; prefixes torchvision: and timm: say which"),
            flags(CompressSettings),
            flags(ModelSettings),
            PICTURES,
            arg("-o", "--out", metavar="DIR", help="work directory (default: NAME.nmfx)"),
            arg("--force", action="store_true", help="run every stage anew"),
        ],
    ),
    "run": Command(
        "build, search, fine-tune, export and evaluate as a recipe says",
        "Run a recipe: build, search, correct, fine-tune, export, evaluate. A stage is skipped when its output is there and "
        "still what the recipe asks for; a changed setting runs its stage and the later ones again; a stopped run goes on.",
        [
            arg("recipe", metavar="RECIPE", help="a YAML file, or a packaged recipe by name, as digits or resnet50-0.80"),
            arg("-o", "--out", metavar="DIR", help="folder to run in (default: NAME.nmfx)"),
            arg("--data-root", metavar="DIR", help="where the pictures are: the image folder, or a named data set's place"),
            arg("--until", choices=STAGES, metavar="STAGE", help=f"the last stage to run: {', '.join(STAGES)}"),
            arg("--force", action="store_true", help="run every stage anew"),
            arg("--check", action="store_true", help="only check, without data: build, search, one update on random pictures"),
            STRICT,
        ],
    ),
    "inspect": Command(
        "show a checkpoint, compiled model, scheme, work directory or model",
        "Show what is in a work directory, a compressed checkpoint, a compiled model, a scheme file, or a model by name.",
        [WHAT, NETWORK, JSON],
    ),
    "compare": Command(
        "show where schemes for one network differ",
        "Show where schemes for one network differ, and what each keeps.",
        [
            arg("schemes", nargs="+", metavar="SCHEME", help="scheme file, checkpoint or work directory; two or more"),
            arg("--model", metavar="NAME|DIR", help="the network, where no scheme says it (DIR: a work directory)"),
            NETWORK,
            arg("--all", action="store_true", help="also list the sites that agree"),
            FIGURE,
            HTML,
            JSON,
            FORCE,
        ],
    ),
    "models": Command(
        "list the models of timm and torchvision, with what was measured",
        "List models with their parameters, sites, the share of the parameters that sites cover, the share of the sites that "
        "fx graphs reach, and whether masked equals pre-masked on the CPU: outputs, and a training step.",
        [
            arg(
                "pattern",
                nargs="?",
                default="*",
                metavar="PATTERN",
                help='a glob such as "timm:vit_*", or part of a name (default: all)',
            ),
            arg("--measure", action="store_true", help="measure those listed that were not measured, without memory"),
            JSON,
        ],
    ),
}
