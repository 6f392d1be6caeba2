"""The tokenizer of models that are trained on bytes: each text is its UTF-8 bytes, and byte 0 ends a document.

Hugging Face's libraries read it, too. Byte-level tokenizers write each byte as a printable character (GPT-2's
convention), and a special token is looked for in the text as it is written: byte 0 would be written "Ā", and that
letter (U+0100) would end a document wherever it stands. So byte 0 is written as what it is, the character U+0000,
whose UTF-8 is that byte: a text that has it says the end of a document, and nothing else does.
"""

import json

END_OF_DOCUMENT = 0
"""The byte that ends a document in a byte-level corpus."""


def byte_tokenizer() -> dict[str, str]:
    """Return the files of the tokenizer, with their content."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    characters, end = byte_characters(), chr(END_OF_DOCUMENT)
    vocabulary = {character: byte for byte, character in enumerate(characters)} | {end: END_OF_DOCUMENT}
    del vocabulary[characters[END_OF_DOCUMENT]]
    # Where special tokens are read as text the pre-tokenizer writes byte 0 as "Ā", which is then the only unknown one.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(about, indent=2)}


def byte_characters() -> list[str]:
    """Return the printable character by which byte-level tokenizers write each byte (GPT-2's convention)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
