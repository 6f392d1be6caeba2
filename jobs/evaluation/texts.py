"""A tokenizer as transformers reads its files: special tokens in a text are tokens, a template may put some around it.

In training what looks like a special token is text. Who compares a model with others reads as they do.
"""

import json

from tokenizers import Tokenizer as Reference

from workers.data.tokenizer import Tokenizer


class Texts:
    """The ids of texts and the texts of ids, equal to those of transformers' AutoTokenizer.

    Args:
        tokenizer: of which an export has the files.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        files = tokenizer.files
        self._reference = Reference.from_str(files["tokenizer.json"])
        about = json.loads(files["tokenizer_config.json"])
        self._special = {
            one["content"] for one in json.loads(files["tokenizer.json"])["added_tokens"] if one["special"]
        }
        self.begin, self.end = about.get("bos_token"), about.get("eos_token")
        """Of a document, as they are written; None without one."""

    @property
    def end_id(self) -> int | None:
        """Id of the token that ends a document."""
        return self._id_of(self.end)

    @property
    def prefix_id(self) -> int | None:
        """Id of what stands before a text that has nothing before it: what begins a document, else what ends one."""
        return self._id_of(self.begin or self.end)

    def special_id(self, text: str) -> int | None:
        """Return the id of a special token, which decoding leaves out; None of any other text."""
        return self._id_of(text) if text in self._special else None

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Return the ids; `special`: with what the template puts around a text, None: unless it begins so already."""
        if special is None:
            prefix = self.begin or self.end
            special = prefix is None or not text.startswith(prefix)
        return self._reference.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text, without special tokens."""
        return self._reference.decode(ids, skip_special_tokens=True)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._reference.token_to_id(token)
