"""Megatron's pipeline layout string (`pipeline_model_parallel_layout`).

Letters: `E` embedding, `t` decoder layer, `m` multi-token-prediction layer, `L` output layer and loss.
`|` ends a chunk, `x*3` repeats a letter (or a `|`), `(tt|)*29` repeats what is in parentheses, commas
only please the eye. Chunks come in the order in which a token passes them: all pipeline ranks of the
first virtual stage, then all of the second.

Grammar and rules: megatron-core 0.16.1 and 0.19.2 (the same code in both),
`transformer/pipeline_parallel_layer_layout.py`. Its two text substitutions are kept as they are, so
that one string never means two things; hence, as there, no blanks and no nested parentheses.
"""

from __future__ import annotations

import re

from bridge_core.errors import LayoutError

OPTION = "pipeline_model_parallel_layout"
EMBEDDING, DECODER, MTP, LOSS = "E", "t", "m", "L"
_LETTERS = frozenset((EMBEDDING, DECODER, MTP, LOSS))

# Groups first, single characters after: a count may hold for the last letter of an unrolled group.
_REPEATS = (
    re.compile(r"\((?P<body>[^)]+)\)\*(?P<count>\d+)"),
    re.compile(r"(?P<body>.)\*(?P<count>\d+)"),
)
# A guard against a mistyped count that would fill the memory; Megatron has none.
_MAX_LETTERS = 1_000_000


def parse_layout_string(text: str) -> tuple[str, ...]:
    """Unroll a layout string into one string of letters per chunk: `"Et*2|(t|)*2mL"` is `("Ett", "t", "t", "mL")`.

    Raises:
        LayoutError: something is left that is no layer letter, or it unrolls to over a million letters.
    """
    unrolled = text.replace(",", "")
    for pattern in _REPEATS:
        unrolled = _unroll(unrolled, pattern, text)
    chunks = tuple(unrolled.split("|"))
    for number, chunk in enumerate(chunks):
        if unknown := sorted(set(chunk) - _LETTERS):
            raise LayoutError(
                f"chunk {number} of the pipeline layout holds {', '.join(map(repr, unknown))}",
                where=f"{OPTION}={text!r}",
                expected="the letters E, t, m and L; '|' between chunks; '*n' after a letter or after (...)",
                got=repr(chunk),
                fix="blanks, nested parentheses and parentheses without '*n' are not part of Megatron's grammar",
            )
    return chunks


def check_layout_chunks(chunks: tuple[str, ...], *, pp: int, text: str) -> None:
    """Refuse what Megatron refuses whatever the number of layers; `text` is for the message only.

    Raises:
        LayoutError: chunks that do not divide over `pp`, an embedding or output layer that is not where
            it has to be, or MTP layers outside of one chunk of the last virtual stage.
    """
    if len(chunks) % pp:
        raise _refused(
            f"{len(chunks)} chunks do not divide over pp={pp}", f"a multiple of {pp} chunks", len(chunks), text
        )
    letters = "".join(chunks)
    counts = letters.count(EMBEDDING), letters.count(LOSS)
    if counts != (1, 1) or not (letters.startswith(EMBEDDING) and letters.endswith(LOSS)):
        raise _refused(
            "the pipeline layout does not run from one embedding to one output layer",
            "'E' once, as the first letter, and 'L' once, as the last",
            f"{counts[0]} x 'E', {counts[1]} x 'L', first {letters[:1]!r}, last {letters[-1:]!r}",
            text,
        )
    with_mtp = [number for number, chunk in enumerate(chunks) if MTP in chunk]
    if not with_mtp:
        return
    if DECODER in letters[letters.index(MTP) :]:
        raise _refused("a decoder layer comes after an MTP layer", "all 't' before the first 'm'", letters, text)
    if len(with_mtp) > 1 or with_mtp[0] < len(chunks) - pp:
        raise _refused(
            "MTP layers are not in one chunk of the last virtual stage",
            f"all 'm' in one of chunks {len(chunks) - pp}..{len(chunks) - 1} (pp={pp}, {len(chunks)} chunks)",
            f"'m' in chunk(s) {', '.join(map(str, with_mtp))}",
            text,
        )


def _unroll(text: str, pattern: re.Pattern[str], original: str) -> str:
    letters = 0
    for match in pattern.finditer(text):
        # Nine digits bound the work of int(); longer counts are over the limit anyway.
        count = int(match["count"]) if len(match["count"]) <= 9 else _MAX_LETTERS + 1
        letters += len(match["body"]) * count
    if letters > _MAX_LETTERS:
        raise _refused(
            "the pipeline layout unrolls to too many letters", f"at most {_MAX_LETTERS}", "a larger count", original
        )
    return pattern.sub(lambda match: match["body"] * int(match["count"]), text)


def _refused(what: str, expected: object, got: object, text: str) -> LayoutError:
    return LayoutError(what, where=f"{OPTION}={text!r}", expected=expected, got=got)
