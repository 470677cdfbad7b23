"""Adding a method of our own to peft, the one place that touches peft's closed registry."""

from typing import Any

from peft import PeftType
from peft.utils import register_peft_method


def extend_peft(name: str, config_cls: Any, model_cls: Any, prefix: str) -> PeftType:
    """Make peft know a new method; a second call for the same name changes nothing.

    peft registers only names that its `PeftType` enumeration has, so a member is added first.
    `PeftType` is a `str` enumeration: the member is built as a `str` and entered in its maps.
    Returns the enumeration member.
    """
    key = name.upper()
    if key in PeftType.__members__:
        return PeftType[key]
    member = str.__new__(PeftType, key)
    member._name_ = key
    member._value_ = key
    PeftType._member_map_[key] = member
    PeftType._member_names_.append(key)
    PeftType._value2member_map_[key] = member
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)
    return member
