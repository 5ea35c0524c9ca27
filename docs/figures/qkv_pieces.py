"""Draw `qkv_pieces.svg`: Qwen3's q, k, v, the fused linear_qkv, its cut for TP = 2, and the runs of one piece.

Every position comes from a plan; nothing about the layout is known here. Run this file to draw again:

    python docs/figures/qkv_pieces.py
"""

from __future__ import annotations

from pathlib import Path

from bridge_core import AutoBridge, ParallelLayout, Piece
from bridge_core.geometry import runs

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}
LAYOUT = ParallelLayout(tp=2)
NAME = "decoder.layers.{layer}.self_attention.linear_qkv.weight"
WIDTH, HEIGHT = 900, 830
ROWS_PER_PIXEL = 8
BYTES_PER_PIXEL = 8 * 2**20 / 720
COLOURS = {"q": "#4c78a8", "k": "#e8871e", "v": "#54a24b"}
LEFT, MIDDLE, RIGHT, THICK = 60, 370, 660, 110
RANK = 1  # the rank whose pieces are shown strong


class Drawing:
    """SVG elements, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, fill: str, *, strong: bool = True) -> None:
        opacity = 1 if strong else 0.3
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" fill-opacity="{opacity}" '
            'stroke="#ffffff" stroke-width="1"/>'
        )

    def frame(self, x: float, y: float, w: float, h: float) -> None:
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="none" stroke="#333333" stroke-width="1.2"/>'
        )

    def band(self, x1: float, top1: float, end1: float, x2: float, top2: float, end2: float, fill: str) -> None:
        """A ribbon from one vertical edge to another."""
        mid = (x1 + x2) / 2
        self.lines.append(
            f'<path d="M{x1:g},{top1:g} C{mid:g},{top1:g} {mid:g},{top2:g} {x2:g},{top2:g} L{x2:g},{end2:g} '
            f'C{mid:g},{end2:g} {mid:g},{end1:g} {x1:g},{end1:g} Z" fill="{fill}" fill-opacity="0.16"/>'
        )

    def quad(self, x1: float, w1: float, y1: float, x2: float, w2: float, y2: float, fill: str) -> None:
        """A ribbon from one horizontal edge to another."""
        self.lines.append(
            f'<path d="M{x1:g},{y1:g} L{x1 + w1:g},{y1:g} L{x2 + w2:g},{y2:g} L{x2:g},{y2:g} Z" '
            f'fill="{fill}" fill-opacity="0.2"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", fill: str = "#222222",
        bold: bool = False, mono: bool = False,
    ) -> None:  # fmt: skip
        family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, Helvetica, Arial, sans-serif"
        weight = ' font-weight="600"' if bold else ""
        self.lines.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size}"{weight} text-anchor="{anchor}" '
            f'fill="{fill}">{words}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.lines.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#b3261e" stroke-width="1.6" '
            'stroke-dasharray="6 4"/>'
        )

    def svg(self) -> str:
        title = "Pieces between q, k, v and linear_qkv of Qwen3, cut for two tensor-parallel ranks"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">\n'
            f"<title>{title}</title>\n"
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self.lines) + "\n</svg>\n"


def letter(piece: Piece) -> str:
    """q, k or v, from the name of the HF tensor."""
    return piece.source.tensor.rpartition("_proj")[0][-1]


def blocks(piece: Piece, side: str, width: int) -> list[tuple[float, float]]:
    """Top and height in pixels of each of a piece's groups in the tensor of one side."""
    view = getattr(piece, side)
    height = piece.shape[1] / ROWS_PER_PIXEL
    return [((view.offset + g * view.strides[0]) / width / ROWS_PER_PIXEL, height) for g in range(piece.shape[0])]


def draw() -> str:
    plan = AutoBridge.from_hf_config(CONFIG).plan(LAYOUT)
    entry = plan.entry(NAME)
    hidden = entry.shape[1]
    out = Drawing()
    out.text(LEFT + THICK / 2, 30, "Hugging Face", size=15, anchor="middle", bold=True)
    out.text(MIDDLE + THICK / 2, 30, "Megatron, all rows", size=15, anchor="middle", bold=True)
    out.text(RIGHT + THICK / 2, 30, "Megatron, TP = 2", size=15, anchor="middle", bold=True)

    top = {"q": 74.0, "k": 370.0, "v": 538.0}
    fused_top = 88.0
    fused_height = entry.shape[0] / ROWS_PER_PIXEL
    per_rank = entry.pieces[0].shape[0] // LAYOUT.tp
    for piece in entry.pieces:
        name = letter(piece)
        sources, targets = blocks(piece, "source", hidden), blocks(piece, "target", hidden)
        rows = piece.shape[0] * piece.shape[1]
        out.text(LEFT, top[name] - 8, f"{name}_proj.weight ({rows}, {hidden})", size=11, mono=True)
        for group, ((at, height), (to, _)) in enumerate(zip(sources, targets, strict=True)):
            strong = group // per_rank == RANK
            y, fused_y = top[name] + at, fused_top + to
            if strong:
                out.band(LEFT + THICK, y, y + height, MIDDLE, fused_y, fused_y + height, COLOURS[name])
            out.rect(LEFT, y, THICK, height, COLOURS[name], strong=strong)
            out.rect(MIDDLE, fused_y, THICK, height, COLOURS[name], strong=strong)
            shade = "#ffffff" if strong else "#333333"
            for x, place in ((LEFT, y), (MIDDLE, fused_y)):
                out.text(x + THICK / 2, place + height / 2 + 4, f"{name}{group}", size=10, anchor="middle", fill=shade)
        out.frame(LEFT, top[name], THICK, rows / ROWS_PER_PIXEL)
    out.text(MIDDLE, fused_top - 8, f"linear_qkv.weight {entry.shape}", size=11, mono=True)
    out.frame(MIDDLE, fused_top, THICK, fused_height)
    cut = fused_top + fused_height / LAYOUT.tp
    out.line(MIDDLE - 14, cut, MIDDLE + THICK + 14, cut)

    for rank in range(LAYOUT.tp):
        form = plan.local_form(NAME, rank)
        y0 = 76.0 + rank * (fused_height / LAYOUT.tp + 40)
        height = form.shape[0] / ROWS_PER_PIXEL
        begin = fused_top + rank * height
        out.band(MIDDLE + THICK, begin, begin + height, RIGHT, y0, y0 + height, "#777777")
        for piece in form.pieces:
            name = letter(piece)
            for group, (at, tall) in enumerate(blocks(piece, "target", hidden)):
                out.rect(RIGHT, y0 + at, THICK, tall, COLOURS[name], strong=rank == RANK)
                words = f"{name}{group + rank * per_rank}"
                shade = "#ffffff" if rank == RANK else "#333333"
                out.text(RIGHT + THICK / 2, y0 + at + tall / 2 + 4, words, size=10, anchor="middle", fill=shade)
                if rank == RANK and group < 2:
                    offset = piece.target.offset + group * piece.target.strides[0]
                    out.text(RIGHT + THICK + 8, y0 + at + 10, f"{offset:,}", size=11, mono=True)
        out.text(RIGHT, y0 - 8, f"rank {rank}: {form.shape}", size=11, mono=True)
        out.frame(RIGHT, y0, THICK, height)
        if rank == RANK:
            out.text(RIGHT + THICK + 8, y0 - 22, "offset in elements", size=11)

    runs_of_q(out, plan.local_form(NAME, RANK).pieces, entry.pieces[0].numel * 2)
    return out.svg()


def runs_of_q(out: Drawing, pieces: tuple[Piece, ...], source_bytes: int) -> None:
    """Two tapes of bytes, and rank 1's runs of q between them."""
    left, upper, lower, tall = 150.0, 716.0, 780.0, 22.0
    q = next(piece for piece in pieces if letter(piece) == "q")
    found = list(runs(q))
    size = found[0].length * 2 / 2**20
    out.text(
        60, 696, f"The runs of rank {RANK}&#8217;s piece q: {len(found)} of {found[0].length:,} elements, "
        f"{size:g} MiB each in bf16", size=13, bold=True,
    )  # fmt: skip
    out.text(left - 8, upper + 15, "q_proj", size=11, anchor="end", mono=True)
    out.text(left - 8, lower + 15, f"rank {RANK}", size=11, anchor="end", mono=True)
    for piece in pieces:
        for run in runs(piece):
            x, wide = run.target * 2 / BYTES_PER_PIXEL, run.length * 2 / BYTES_PER_PIXEL
            out.rect(left + x, lower, wide, tall, COLOURS[letter(piece)], strong=letter(piece) == "q")
    step = found[0].length * 2
    for at in range(0, source_bytes, step):
        strong = found[0].source * 2 <= at <= found[-1].source * 2
        out.rect(left + at / BYTES_PER_PIXEL, upper, step / BYTES_PER_PIXEL, tall, COLOURS["q"], strong=strong)
    for run in found:
        wide = run.length * 2 / BYTES_PER_PIXEL
        source, target = (left + offset * 2 / BYTES_PER_PIXEL for offset in (run.source, run.target))
        out.quad(source, wide, upper + tall, target, wide, lower, COLOURS["q"])
    out.frame(left, upper, source_bytes / BYTES_PER_PIXEL, tall)
    out.frame(left, lower, sum(piece.numel for piece in pieces) * 2 / BYTES_PER_PIXEL, tall)
    for mebibytes in range(0, 9, 2):
        out.text(
            left + mebibytes * 2**20 / BYTES_PER_PIXEL, lower + tall + 14, f"{mebibytes} MiB", size=10, anchor="middle"
        )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
