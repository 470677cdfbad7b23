"""One command a stage: `plugbridge tune`, `score`, … `evaluate`."""

from collections.abc import Callable

from plugbridge.cli.options import ConfigArg, DataOption, OutOption, QuietOption, RedoOption, SetOption
from plugbridge.cli.run import execute_stages
from plugbridge.cli.terminal import out

STAGES = {
    "tune": "Tune the small model on the task.",
    "score": "Rank the large model's heads, channels and MLP units.",
    "prune": "Prune the large model into the Bridge, a model directory of its own.",
    "repair": "Fit the Bridge to the large model's forward passes; only with a `repair:` section.",
    "couple": "Train module, plug and Bridge together.",
    "polish": "Tune a factor for every place of the plugged module, forward only; needs a `polish:` section.",
    "plug": "Fold module and plug into a peft checkpoint of the large model.",
    "ceiling": "Tune the large model itself, with gradients: the reference, not the method.",
    "evaluate": "Score every model of the run.",
}


def stage_command(name: str, help_text: str) -> Callable[..., None]:
    """The command that runs one stage."""

    def command(
        config: ConfigArg,
        out_dir: OutOption = None,
        data: DataOption = None,
        sets: SetOption = None,
        redo: RedoOption = False,
        quiet: QuietOption = False,
    ) -> None:
        root = execute_stages(config, out_dir, data, sets, quiet, name, redo)
        out.print(f"{name}: done, in {root / name}")

    command.__doc__ = help_text
    return command
