"""What the user brings and may write as a string or as a table: the large model, the task."""

from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from plugbridge.config.strict import Name, StrictConfig

LoadIn = Literal["8bit", "4bit"]
Score = Literal["sum", "mean", "first"]
"""What of an option's tokens a choice is made on: the sum of their log-probabilities, the mean, or the first one's."""
NEW_TOKENS = 32
OPTION = "{option}"
SHORTHAND = {"large": "path"}
"""Keys that hold a table or a string, and the table's key that a string stands for."""
BRANCHES = ("TaskConfig", "LargeConfig")
"""Tables that a string may stand for."""


class LargeConfig(StrictConfig):
    """The large model, and how its weights are loaded."""

    path: Name = Field(description="Hugging Face id or local directory: what `large` is where it is no table")
    load_in: LoadIn | None = Field(
        default=None,
        description="quantise the weights wherever the large model only runs forward: `8bit` (LLM.int8) or `4bit` "
        "(NF4), through bitsandbytes, and in mode backprop, where LoRA is then QLoRA; score, prune and ceiling read "
        "the weights as `dtype` says",
    )


class TaskConfig(StrictConfig):
    """The user's own task: a jsonl file, a prompt, and label words, options of each row, or a text to write."""

    file: Name | None = Field(default=None, description="one jsonl file, split 80/10/10 by the seed")
    train: Name | None = Field(default=None, description="jsonl file of training rows")
    validation: Name | None = Field(default=None, description="jsonl file of validation rows")
    test: Name | None = Field(default=None, description="jsonl file of test rows")
    prompt: str = Field(description="template such as '{text} Topic:'; fields of the row in braces")
    words: dict[str, str] | None = Field(
        default=None,
        description="label -> label word, with its leading space for GPT-2; or give `options` or `generate`",
    )
    options: Name | None = Field(
        default=None,
        description="the field that lists a row's own options, for multiple choice; the label is then the right "
        "option's text, a list of texts that are all right, or the option's number, a whole number from 0",
    )
    option: str = Field(
        default=OPTION, description="template of an option, such as ' {option}', with its leading space for GPT-2"
    )
    generate: str | None = Field(
        default=None,
        description="template of the text to write, such as ' {label}', with its leading space for GPT-2; the label "
        "is then a text, or a list of texts that are all right, and training writes the first",
    )
    max_new_tokens: int = Field(default=NEW_TOKENS, ge=1, le=100_000, description="the most tokens that are written")
    metrics: list[str] | None = Field(
        default=None,
        min_length=1,
        description="what to measure, the first is the headline: accuracy and macro_f1, matthews, or f1 of two labels; "
        "of a row's own options accuracy; of what is written exact_match and token_f1 (as it is written), squad_match "
        "and squad_f1 (SQuAD's normalisation first: case, punctuation and articles do not count), or rouge_l (needs "
        "`plugbridge[rouge]`)",
    )
    score: Score | None = Field(
        default=None,
        description="what options are ranked by: the `sum` of their tokens' log-probabilities (label words' default), "
        "the `mean` (that of a row's own options), or the `first` token's; training raises the same",
    )
    label: Name = Field(default="label", description="the field that holds the label")
    passage: Name | None = Field(default=None, description="the field that may be cut when a prompt is too long")
    id: Name | None = Field(
        default=None,
        description="the field that tells rows apart, for the predictions' files; by default file and line",
    )

    @field_validator("words", mode="before")
    @classmethod
    def _labels_are_texts(cls, value: Any) -> Any:
        """From Python: numbers stand for themselves, truth values are refused (`true` or `True`?)."""
        if not isinstance(value, dict):
            return value
        words = cast(dict[Any, Any], value)
        if any(isinstance(label, bool) for label in words):
            raise ValueError("a label is a truth value; expected a text, quote it")
        texts = {str(label) if isinstance(label, int) else label: word for label, word in words.items()}
        if len(texts) < len(words):
            raise ValueError("a label stands twice, as a number and as a text; keep one")
        return texts

    @model_validator(mode="after")
    def _one_source(self) -> "TaskConfig":
        three = [self.train, self.validation, self.test]
        if (self.file is None) == (not any(three)) or (any(three) and not all(three)):
            raise ValueError("give either `file`, or all of `train`, `validation` and `test`")
        if sum(way is not None for way in (self.words, self.options, self.generate)) != 1:
            raise ValueError("give either `words`, `options` or `generate`")
        if self.options is None and self.option != OPTION:
            raise ValueError("`option` is the template of a row's own options; it needs `options`")
        if self.generate is None and self.max_new_tokens != NEW_TOKENS:
            raise ValueError("`max_new_tokens` is for texts that are written; it needs `generate`")
        if self.generate is not None and self.score is not None:
            raise ValueError("`score` ranks options; it does not go with `generate`")
        if self.words is not None and len(self.words) < 2:
            raise ValueError("`words` has no two labels, so there is nothing to choose; give at least two")
        return self
