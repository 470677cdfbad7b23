"""The application: its commands in the order of `--help`, and the entry point."""

import gc
import logging
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

from plugbridge import __version__
from plugbridge.cli.bench import bench_app
from plugbridge.cli.completion import whole_settings
from plugbridge.cli.describe import explain, families, methods, tasks
from plugbridge.cli.help import Command, Group, columns
from plugbridge.cli.plan import plan
from plugbridge.cli.report import report, submit
from plugbridge.cli.reproduce import reproduce
from plugbridge.cli.run import run
from plugbridge.cli.stages import STAGES, stage_command
from plugbridge.cli.streams import GONE, OutputError, drop_output, standard_streams
from plugbridge.cli.sweep import sweep
from plugbridge.cli.terminal import err, out
from plugbridge.errors import PlugbridgeError
from plugbridge.interrupts import ENDING, Stopped, raise_stopped
from plugbridge.parsing import one_line

EPILOG = """
Start with a file, config.yaml:

  small: gpt2          # a model you can train, and a large one of its kind
  large: gpt2-xl
  task: wordnet-kind   # a name of `plugbridge tasks`, or your own rows

  plugbridge plan config.yaml      what it will take; loads nothing
  plugbridge run config.yaml       the whole job; given again, it goes on
  plugbridge report runs/config    what came of it
  plugbridge explain               every key of the file

Completion in your shell:  plugbridge --install-completion
"""

SHORT = {
    "run": "Do the whole job; finished stages are skipped.",
    "tune": "Tune the small model.",
    "score": "Rank the large model's units.",
    "couple": "Train module, plug and Bridge together.",
    "evaluate": "Score every model of the run.",
    "families": "List the model families.",
    "tasks": "List the tasks.",
    "methods": "List the parameter-efficient methods.",
    "explain": "Explain every key of a run's YAML file.",
    "prune": "Prune the large model into the Bridge.",
    "repair": "Fit the Bridge to the large model's forward passes.",
    "polish": "Tune the plugged module's factors, forward only.",
    "plug": "Fold all into a peft checkpoint of the large model.",
    "ceiling": "Tune the large model itself, for reference.",
    "plan": "Predict memory, time and disk of every stage.",
    "report": "Print a finished run as a table and draw its pictures.",
    "sweep": "Compare combinations of settings on validation rows.",
    "submit": "Answer SuperGLUE's test rows with a finished run.",
    "reproduce": "Make a table or figure of the paper, ours beside it.",
}
"""Commands in a line of the help: their own first sentences would be cut on narrow terminals."""

RESUMING = ("run", *STAGES, "sweep", "bench", "reproduce")
"""Commands that go on where they were when they are given again."""


class Commands(Group):
    """The commands, of which none ends in a traceback when it is interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            for number in ENDING:  # one more would cut the end short
                signal.signal(number, signal.SIG_IGN)
            again = "; run the same command again to resume" if ctx.invoked_subcommand in RESUMING else ""
            err.print(f"\ninterrupted{again}")
            raise typer.Exit(128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Tune a language model you can run but not train: tune a small sibling, prune the large "
    "model into a Bridge, couple them, and plug the result into the large model.",
    epilog=EPILOG,
    context_settings={"terminal_width": columns()},
)
app.command(cls=Command, short_help=SHORT["run"])(run)
for _name, _help in STAGES.items():
    app.command(_name, cls=Command, short_help=SHORT[_name])(stage_command(_name, _help))
for _command in (plan, report, sweep, submit, families, tasks, methods, explain, reproduce):
    app.command(cls=Command, short_help=SHORT[_command.__name__])(_command)
app.add_typer(bench_app, name="bench", short_help="Run grids; write their tables and pictures.")

_LONGEST = 2000  # characters of an error: users' own texts may be in it


def _version(show: bool) -> None:
    if show:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options that stand before the command."""
    del version


def _fail(error: PlugbridgeError) -> NoReturn:
    with suppress(OSError):  # where standard error is full, too
        err.print(Text.assemble(("error:", "bold red"), " ", one_line(error, _LONGEST)))
    sys.exit(2)


def _run() -> None:
    try:
        app(prog_name="plugbridge")  # whatever it was begun by; shells ask for what completes this name
    except OutputError:
        raise
    except PlugbridgeError as error:
        _fail(error)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    # Before torch is imported: OpenMP threads that spin while they wait slow a busy machine down twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Before it multiplies anything: oneDNN keeps what it compiles for every shape of a bfloat16 product, 0.6 MiB each,
    # 1,024 of them where nothing is said. Rows of all lengths would fill that.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
    # peft imports bitsandbytes wherever it is installed, which then logs of kernels and casts nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # a scheduler's end, or a closed terminal's, is as good as Ctrl-C
    ending = [n for n in ENDING if n != signal.SIGINT and signal.getsignal(n) == signal.SIG_DFL]
    for number in ending:
        signal.signal(number, raise_stopped)
    whole_settings()
    try:
        with standard_streams():
            _run()
    except OutputError as error:
        drop_output()
        if error.gone:
            sys.exit(GONE)
        _fail(error)
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
        gc.freeze()  # the libraries' objects end with the process: looking through them first takes long
