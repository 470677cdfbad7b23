"""Libraries that cost much to import and that few runs use. Nothing heavy is imported here."""

import sys
from contextlib import suppress
from importlib import import_module
from typing import Any, cast

_BITSANDBYTES = "bitsandbytes"
_ASKED = (
    ("peft.import_utils", "is_bnb_available"),
    ("peft.import_utils", "is_bnb_4bit_available"),
    ("transformers.utils.import_utils", "is_bitsandbytes_available"),
)
"""Functions that look once whether bitsandbytes is there, and remember it."""


def leave_out_bitsandbytes() -> bool:
    """Have libraries believe that bitsandbytes is not installed; whether none of them had been imported yet.

    peft 0.21 imports it wherever it is installed (`peft/helpers.py`), and it torch's compiler: as long as peft and all
    of transformers take together. Nothing is changed where peft or bitsandbytes has been imported already.
    """
    fresh = "transformers" not in sys.modules
    if "peft" not in sys.modules and _BITSANDBYTES not in sys.modules:
        cast(dict[str, Any], sys.modules)[_BITSANDBYTES] = None  # what Python keeps for a module that is not there
    return fresh


def bring_back_bitsandbytes() -> Any:
    """The library bitsandbytes, which peft and transformers know from now on. Raises ImportError."""
    left_out = _BITSANDBYTES in sys.modules and cast(Any, sys.modules[_BITSANDBYTES]) is None
    if left_out:
        del sys.modules[_BITSANDBYTES]
    library = import_module(_BITSANDBYTES)
    if left_out:
        for module, name in _ASKED:
            with suppress(AttributeError):  # not imported yet, or another version's name
                getattr(sys.modules.get(module), name).cache_clear()
        helpers: Any = sys.modules.get("peft.helpers")
        if helpers is not None:
            helpers.bnb = library
    return library
