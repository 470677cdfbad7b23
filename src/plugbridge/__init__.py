"""plugbridge: tune a language model you can run but not train.

Importing this package makes our PEFT methods known to `peft`, as soon as peft itself is imported:
`PeftModel.from_pretrained` then reads their checkpoints. Nothing heavy is imported before that.
"""

from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

from plugbridge.version import __version__

__all__ = ["__version__"]


def _register_methods(_peft: Any) -> None:
    import_module("plugbridge.tuners.bottleneck")


register_post_import_hook(_register_methods, "peft")
