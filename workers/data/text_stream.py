"""Text out of ids that come one after the other, as soon as it is certain."""

from workers.data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not a whole one yet."""


class TextStream:
    """Decodes ids as they come; all pieces together are what the tokenizer makes of all ids at once.

    A character whose bytes are several tokens comes with the last of them. A decoder may look at the token before (one
    puts a space between words and none at the beginning), so the piece before is decoded once more with each.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = []
        self._open: list[int] = []

    def add(self, token: int) -> str:
        """Take a token and return the text that has become certain by it, often one token's, or none."""
        self._open.append(token)
        text = self._text()
        return "" if text.endswith(UNKNOWN) else self._close(text)

    def rest(self) -> str:
        """Return what is left: the beginning of a character that nothing has completed."""
        return self._close(self._text())

    def _text(self) -> str:
        known = self.tokenizer.decode(self._before)
        return self.tokenizer.decode(self._before + self._open)[len(known) :]

    def _close(self, text: str) -> str:
        if text:  # What stands for no text alone would hide what comes before it.
            self._before, self._open = self._open, []
        return text
