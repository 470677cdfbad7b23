"""How a row is put to one kind of model: prompt, then label words, options, or a text to write."""

import json
import string
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from plugbridge.config.inputs import Score
from plugbridge.errors import ConfigError, DataError
from plugbridge.parsing import one_line, require_characters, shown


class PromptForm(BaseModel):
    """How rows are put to one kind of model.

    Either `prompt` or `prompts` (chosen by the value of field `prompt_by`). Then one way to answer:

    - `words`: label to label word.
    - `options`: templates; the label is then the right option's number.
    - `options_from`: the field that lists a row's options, each put into the template `option`; the label is then the
      right option's text, a list of such texts, or the option's number.
      Options are ranked by `score` (`decision`).
    - `generate`: the model writes a text of at most `max_new_tokens`. The template is filled once for every text of
      the label field, and training writes the first. With `judge` the label is one of `words` instead, and what was
      written is judged against the template's text (`metrics.JUDGES`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = None
    prompts: dict[str, str] | None = None
    prompt_by: str | None = None
    words: dict[str, str] | None = None
    options: tuple[str, ...] | None = None
    options_from: str | None = None
    option: str = "{option}"
    generate: str | None = None
    judge: Literal["referent"] | None = None
    score: Score | None = None
    max_new_tokens: PositiveInt = 32

    @model_validator(mode="after")
    def _one_of_each(self) -> "PromptForm":
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either `prompt` or `prompts`")
        if (self.prompts is None) != (self.prompt_by is None):
            raise ValueError("`prompts` and `prompt_by` go together")
        _check_answers(self)
        if self.words is not None:
            _check_words(self.words)
        if self.options_from is not None and "option" not in template_fields(self.option):
            raise ValueError(f"`option` is {shown(self.option)}; it must hold {{option}}, the option's text")
        if self.judge == "referent" and set(self.words or ()) != {"true", "false"}:
            raise ValueError("`judge = referent` needs `words` for true and false")
        return self

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A form that does not use the later keys is dumped, and so digested by its runs, as it was before them."""
        found = dump(self)
        later = {
            "options_from": self.options_from is None, "option": self.options_from is None,
            "generate": self.generate is None, "judge": self.judge is None, "max_new_tokens": self.generate is None,
            "score": self.generate is not None or self.decision == "mean",
        }  # fmt: skip
        return {key: value for key, value in {**found, "score": self.decision}.items() if not later.get(key, False)}

    @property
    def decision(self) -> Score:
        """How options are ranked where the form does not say.

        Of fixed label words by the sum: it is the word's probability, while the mean favours words of many tokens,
        whose later ones are nearly certain. Of options that rows bring, whose lengths differ freely, by the mean, as a
        sum would favour the short ones (Brown et al. 2020, section 2.4).
        """
        return self.score or ("mean" if self.words is None and self.generate is None else "sum")

    @property
    def same_options(self) -> bool:
        """Whether every row has the same options."""
        return self.words is not None and self.generate is None


def _check_answers(form: PromptForm) -> None:
    ways = [form.words, form.options, form.options_from]
    given = sum(way is not None for way in ways)
    if form.generate is None:
        if given != 1:
            raise ValueError("give either `words` or `options` (or `options_from`, or `generate`)")
        if form.judge is not None:
            raise ValueError("`judge` reads what a model wrote; it needs `generate`")
    elif form.score is not None:
        raise ValueError("`score` ranks options; it does not go with `generate`")
    elif given != (1 if form.judge is not None else 0) or (form.judge is not None and form.words is None):
        raise ValueError("`generate` stands alone, or with `judge` and `words`")


def _check_words(words: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for label, word in words.items():
        if not word.strip():
            raise ValueError(f"the label word of {shown(label)} is empty")
        if word in seen:
            raise ValueError(f"labels {shown(seen[word])} and {shown(label)} have the same word {shown(word)}")
        seen[word] = label


def template_fields(template: str) -> list[str]:
    """Field names that a ``{field}`` template uses. Raises ConfigError for a broken template."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"prompt template {shown(template)} is not usable: {error}") from error
    if any(not str(name).isidentifier() or spec or conversion for _, name, spec, conversion in parts):
        raise ConfigError(f"prompt template {shown(template)} must use plain {{field}} names")
    return [str(name) for _, name, _, _ in parts]


def fill(template: str, raw: Mapping[str, Any], where: str, blank: Collection[str] = ()) -> str:
    """Fill a template with a row's fields. Raises DataError for a field that `text_field` refuses."""
    values = {name: text_field(raw, name, where, name in blank) for name in template_fields(template)}
    return template.format(**values)


def prompt_of(form: PromptForm, raw: Mapping[str, Any], where: str, blank: Collection[str] = ()) -> str:
    """A row's prompt. Raises DataError as `fill` and `template_of`."""
    return fill(template_of(form, raw, where), raw, where, blank)


def template_of(form: PromptForm, raw: Mapping[str, Any], where: str) -> str:
    """The template of a row's prompt. Raises DataError for a value of `prompt_by` that has no prompt."""
    if form.prompts is None or form.prompt_by is None:
        return form.prompt or ""
    choice = str(field_of(raw, form.prompt_by, where))
    if choice not in form.prompts:
        raise DataError(f"{where}: {form.prompt_by} is {shown(choice)}; expected one of {sorted(form.prompts)}")
    return form.prompts[choice]


def text_field(raw: Mapping[str, Any], name: str, where: str, blank: bool = False) -> str:
    """A field as text: a text, a number or a truth value.

    Raises DataError for one that is missing, null, a list or an object, has a NUL, or is blank unless `blank`.
    """
    value = field_of(raw, name, where)
    if not isinstance(value, str | int | float):
        found = {type(None): "null", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
        raise DataError(f"{where}: field {shown(name)} is {found}; expected a text, a number or a truth value")
    text = text_of(value)
    require_characters(text, f"{where}: field {shown(name)}", DataError)
    if not blank and not text.strip():
        raise DataError(f"{where}: field {shown(name)} is blank; expected a text")
    return text


def text_of(value: Any) -> str:
    """A field as text: what is no text is written as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def field_of(raw: Mapping[str, Any], name: str, where: str) -> Any:
    """A row's field; truth values as JSON writes them. Raises DataError if it is missing."""
    if name not in raw:
        raise DataError(
            f"{where}: field {shown(name)} is missing; the row has {one_line(', '.join(sorted(raw))) or 'none'}"
        )
    value = raw[name]
    return value if not isinstance(value, bool) else str(value).lower()
