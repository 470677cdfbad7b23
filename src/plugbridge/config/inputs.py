"""What the user brings and may write as a string or as a table: the large model, the task."""

from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from plugbridge.config.strict import Name, StrictConfig

LoadIn = Literal["8bit", "4bit"]
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
        "(NF4), through bitsandbytes; score, prune and ceiling read the weights as `dtype` says",
    )


class TaskConfig(StrictConfig):
    """The user's own task: a jsonl file, a prompt, and label words or a text to write."""

    file: Name | None = Field(default=None, description="one jsonl file, split 80/10/10 by the seed")
    train: Name | None = Field(default=None, description="jsonl file of training rows")
    validation: Name | None = Field(default=None, description="jsonl file of validation rows")
    test: Name | None = Field(default=None, description="jsonl file of test rows")
    prompt: str = Field(description="template such as '{text} Topic:'; fields of the row in braces")
    words: dict[str, str] | None = Field(
        default=None, description="label -> label word, with its leading space for GPT-2; or give `generate`"
    )
    generate: str | None = Field(
        default=None,
        description="template of the text to write, such as ' {label}', with its leading space for GPT-2; the label "
        "is then a text, or a list of texts that are all right, and training writes the first",
    )
    max_new_tokens: int = Field(default=32, ge=1, le=100_000, description="the most tokens that are written")
    metrics: list[str] | None = Field(
        default=None,
        min_length=1,
        description="what to measure, the first is the headline: accuracy and macro_f1, matthews, or f1 of two labels; "
        "of what is written exact_match and token_f1, or rouge_l (needs `plugbridge[rouge]`)",
    )
    label: Name = Field(default="label", description="the field that holds the label")
    passage: Name | None = Field(default=None, description="the field that may be cut when a prompt is too long")

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
        if (self.words is None) == (self.generate is None):
            raise ValueError("give either `words` or `generate`")
        return self
