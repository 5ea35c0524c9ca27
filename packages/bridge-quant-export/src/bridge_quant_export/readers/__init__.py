"""What the programs that load quantised checkpoints require, and what a writer may therefore write. No torch."""

from __future__ import annotations

from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats.format import Format, Writer
from bridge_quant_export.readers import compressed_tensors, sglang, tensorrt_llm, vllm
from bridge_quant_export.readers.reader import Reader

READERS: dict[str, Reader] = {
    reader.name: reader for reader in (vllm.READER, sglang.READER, tensorrt_llm.READER, compressed_tensors.READER)
}
"""By name."""


def readers_of(writer: Writer, format: Format) -> list[str]:
    """Names of the programs that read a format as a writer writes it."""
    return [name for name, reader in READERS.items() if (writer, format.name) in reader.reads]


def check_writable(writer: Writer, format: Format) -> None:
    """Refuse what nobody would read.

    Raises:
        FormatError: no reader takes the format from this writer; names each reader's reason.
    """
    if readers_of(writer, format):
        return
    reasons = [f"{name}: {reader.refuses[writer, format.name]}" for name, reader in READERS.items()]
    other: Writer = "compressed-tensors" if writer == "modelopt" else "modelopt"
    elsewhere = readers_of(other, format)
    raise FormatError(
        f"no reader takes {format.title} in the {writer} format",
        expected="a format that at least one reader takes",
        got="\n            ".join(reasons),
        fix=f"write it as {other}, for {', '.join(elsewhere)}" if elsewhere else "quantise to another format",
    )


def check_mixture(writer: Writer, formats: list[Format]) -> None:
    """Refuse formats that no reader takes side by side.

    Raises:
        FormatError: there is none for this mixture; says what each takes.
    """
    names = {format.name for format in formats}
    if len(names) < 2 or any(names <= reader.mixes.get(writer, frozenset()) for reader in READERS.values()):
        return
    mixing = {name: reader.mixes[writer] for name, reader in READERS.items() if writer in reader.mixes}
    raise FormatError(
        f"no reader takes this mixture in the {writer} format",
        expected="\n            ".join(f"{name}: {', '.join(sorted(takes))}" for name, takes in mixing.items()),
        got=", ".join(sorted(names)),
        fix="leave some of the layers unquantised, or quantise them to formats that stand side by side above",
    )
