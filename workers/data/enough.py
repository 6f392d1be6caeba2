"""Whether there is enough in the sources for a run, and whether it fits."""

from collections.abc import Sequence

from workers.common.errors import ConfigError
from workers.data.corpus import SPLITS, Corpus, check_vocabulary
from workers.data.packing import Packing, packing_of, samples_in


def check_corpora(
    corpora: tuple[Corpus, ...], seq_len: int, drawn: Sequence[int], vocab_size: int, most_long: int = 0
) -> None:
    """Refuse sources that are too small, conversations that are too long, and tokens that the model does not have.

    Args:
        corpora: of a run.
        seq_len: tokens of a sequence.
        drawn: sequences of each that a step takes at most; none of a source that is only validated on.
        vocab_size: of the model.
        most_long: conversations of a source that may be longer than a sequence.

    Raises:
        ConfigError: with everything that is wrong with them.
    """
    check_vocabulary(max(corpus.vocab_size for corpus in corpora), vocab_size)
    problems: list[str] = []
    for corpus, most in zip(corpora, drawn, strict=True):
        problems += check_corpus(corpus, seq_len, most, most_long)
    if problems:
        raise ConfigError("\n".join(problems))


def check_corpus(corpus: Corpus, seq_len: int, drawn: int, most_long: int = 0) -> list[str]:
    """Return what is wrong with a source of which a step takes so many sequences; nothing where all is well."""
    problems, name = [], f"source {corpus.name}" if corpus.name else "the corpus"
    if (long := too_long(corpus, seq_len)) > most_long:
        problems.append(
            f"{_told_long(corpus, seq_len)}, data.max_long_conversations={most_long}; none is cut: raise "
            f"train.seq_len, or set data.max_long_conversations={long} to train without them"
        )
    if (samples := samples_in(corpus, corpus.train, seq_len)) < max(1, drawn):
        problems.append(
            f"{name} has {samples} training sequences of {seq_len} tokens, fewer than one global batch takes of it "
            f"({max(1, drawn)}); lower train.seq_len or train.global_batch, or add text to it"
        )
    if not samples_in(corpus, corpus.validation, seq_len):
        problems.append(
            f"the held-out split of {name} has {Corpus.tokens(corpus.validation)} tokens, not one sequence of "
            f"{seq_len}; raise data.held_out_fraction or lower train.seq_len"
        )
    return problems


def too_long(corpus: Corpus, seq_len: int) -> int:
    """Return how many conversations of a source are longer than a sequence; of text, none."""
    return sum(packing.too_long for packing in _packings(corpus, seq_len))


def told(corpus: Corpus, seq_len: int) -> str:
    """Return what there is to tell of conversations in sequences; empty for text."""
    if not corpus.chat_template:
        return ""
    train, _ = _packings(corpus, seq_len)
    full = train.num_tokens / max(1, train.num_samples * train.capacity)
    left_out = f"; {_told_long(corpus, seq_len)}, and left out" if too_long(corpus, seq_len) else ""
    return (
        f"{corpus.name or 'chat'}: {train.num_documents:,} conversations in {train.num_samples:,} sequences of "
        f"{seq_len} tokens, {full:.1%} full{left_out}"
    )


def _told_long(corpus: Corpus, seq_len: int) -> str:
    packings = _packings(corpus, seq_len)
    long, longest = too_long(corpus, seq_len), max(packing.longest for packing in packings)
    of = f" of source {corpus.name}" if corpus.name else ""
    all_ = long + sum(packing.num_documents for packing in packings)
    return (
        f"{long:,} of {all_:,} conversation(s){of} {'is' if long == 1 else 'are'} longer than train.seq_len={seq_len} "
        f"tokens and the last target (the longest has {longest:,})"
    )


def _packings(corpus: Corpus, seq_len: int) -> list[Packing]:
    if not corpus.chat_template:
        return []
    return [packing_of(corpus, getattr(corpus, split), seq_len) for split in SPLITS]
