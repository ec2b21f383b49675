"""A task: questions, gold answers, prompts and marks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """Questions with gold answers, and the functions that build prompts and mark outputs.

    Args:
        name: name of the data set.
        questions, golds: lists of the same length.
        max_new_tokens: default limit of generated tokens.
        instruction: text added to each question. With None, the question itself is the prompt, and no chat template is
            applied.
        mark: (output, gold) -> (the answer found in the output or None, whether it is correct).
        marker: everything that `mark` depends on besides its arguments, such as its version. A resumed run marks rows
            of another marker again. With None, it marks all rows again.
    """

    name: str
    questions: list[str]
    golds: list[str]
    max_new_tokens: int
    instruction: str | None
    mark: Callable[[str, str], tuple[str | None, bool]]
    marker: str | None = None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The texts that the model receives, including the special tokens of a chat template."""
        if self.instruction is None:
            return self.questions
        asked = [question + self.instruction for question in self.questions]
        if tokenizer.chat_template is None:
            return [text + "\n\n" for text in asked]
        chats = [[{"role": "user", "content": text}] for text in asked]
        rendered: list[str] = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)  # type: ignore[assignment]
        return rendered

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
        """Token ids of the texts from `prompts`. No special tokens are added to texts from a chat template.

        Raises:
            ValueError: the tokenizer does not know a word.
        """
        templated = self.instruction is not None and tokenizer.chat_template is not None
        try:
            ids: list[list[int]] = tokenizer(prompts, add_special_tokens=not templated)["input_ids"]
            return ids
        except Exception as error:  # tokenizers raises plain exceptions
            raise ValueError(
                f"The model's tokenizer cannot read {self.name!r} ({error}): use a model that knows these words; "
                "the embedded model only knows chains."
            ) from error


def hash_of(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
