"""Where the factors of an adapter live: the one description that training and conversion share.

A linear layer y = W x has a mode, which says how tensor parallelism cuts W [out, in]:

    mode         W is cut along   A [r, in]              B [out, r], magnitude [out]
    column       out              on every rank          cut along out, like W
    row          in               cut along in, like W   on every rank
    replicated   nothing          on every rank          on every rank

In an expert layer tensor parallelism is expert tensor parallelism, and every factor has the expert as its
first dim, cut by expert parallelism: A [E, r, in], B [E, out, r], magnitude [E, out]. A factor that all experts
share has no such dim; every rank holds the whole of it and uses the part that its share of W asks for.

A fused linear is made of parts (q, k, v; gate, up). A canonical adapter has one A [r, in] and one
B [rows of the part, r] for each. In `linear_qkv` the parts' rows alternate query group by query group; in
`linear_fc1` gate comes before up, on every rank and in the whole, so that a rank's rows of W are two runs of
the whole's rows: W has two blocks.

Pure integers: nothing here knows torch, megatron or processes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from bridge_core.errors import LayoutError

Mode = Literal["column", "row", "replicated"]
Sharing = Literal["each", "shared", "shared_outer"]
Sum = Literal["none", "sequence", "factor", "all"]

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"


@dataclass(frozen=True)
class Part:
    """A logical linear inside a fused one.

    Attributes:
        name: `"q"`, `"k"`, `"v"`, `"gate"`, `"up"`.
        rows: of the whole part.
        groups: into how many runs of equal length its rows are dealt in the fused linear.
    """

    name: str
    rows: int
    groups: int = 1

    def local(self, size: int) -> Part:
        """The share of one of `size` tensor-parallel ranks."""
        return Part(self.name, self.rows // size, max(1, self.groups // size))


@dataclass(frozen=True)
class Linear:
    """A linear layer of the whole model.

    Attributes:
        mode: how tensor parallelism cuts its weight.
        in_features, out_features: of the whole weight, of one expert if it is an expert layer.
        experts: how many experts the layer has in all; 0 if it is not an expert layer.
        blocks: of how many blocks of equal rows the weight consists, each cut by itself: 2 for [gate; up].
        parts: what a fused linear is made of, in the order of its rows; empty if it is not fused.
    """

    mode: Mode
    in_features: int
    out_features: int
    experts: int = 0
    blocks: int = 1
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Factor:
    """One tensor of an adapter, whole, and which part of it a rank holds.

    Attributes:
        shape: of the whole tensor, with the expert dim if it has one.
        cut: the dim that (expert) tensor parallelism cuts in storage; None if every rank holds all of it.
        used: of a factor that is held whole, the dim of which a rank uses only its share; None for all.
        by_expert: whether dim 0 is the expert, cut by expert parallelism.
        shared: whether all experts of a layer share it.
        blocks: of how many blocks the cut or used dim consists, each cut by itself.
    """

    shape: tuple[int, ...]
    cut: int | None = None
    used: int | None = None
    by_expert: bool = False
    shared: bool = False
    blocks: int = 1

    def local_shape(self, size: int, experts: int | None = None) -> tuple[int, ...]:
        """Shape on one of `size` (expert) tensor-parallel ranks, with `experts` local experts."""
        shape = list(self.shape)
        if self.cut is not None:
            shape[self.cut] //= size
        if self.by_expert and experts is not None:
            shape[0] = experts
        return tuple(shape)

    def runs(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Start and length of the runs along the cut or used dim that make up a rank's share, in its order."""
        dim = self.cut if self.cut is not None else self.used
        if dim is None:
            return []
        length = self.shape[dim] // (size * self.blocks)
        return [((block * size + rank) * length, length) for block in range(self.blocks)]


def factors(
    linear: Linear,
    rank: int,
    *,
    sharing: Sharing = "each",
    parts: Collection[str] = (),
    magnitude: bool = False,
) -> dict[str, Factor]:
    """The factors of an adapter of a linear layer, by name.

    Args:
        linear: the whole layer.
        rank: r.
        sharing: what the experts of a layer share; without meaning for other layers.
        parts: for a canonical adapter, which parts of the fused linear it adapts.
        magnitude: with the magnitude [out] of DoRA.

    Returns:
        `lora_A`, `lora_B` and perhaps `lora_magnitude`; for parts `lora_A_q`, `lora_B_q` and so on.
    """
    column, row = linear.mode == "column", linear.mode == "row"
    share_a = bool(linear.experts) and (sharing == "shared" or (sharing == "shared_outer" and column))
    share_b = bool(linear.experts) and (sharing == "shared" or (sharing == "shared_outer" and row))
    down = _factor(linear, (rank, linear.in_features), 1 if row else None, shared=share_a)
    out = 0 if column else None
    found: dict[str, Factor] = {}
    for part in linear.parts if parts else ():
        if part.name in parts:
            found[f"{A}_{part.name}"] = down
            found[f"{B}_{part.name}"] = _factor(linear, (part.rows, rank), out, shared=share_b)
    if not parts:
        found = {A: down, B: _factor(linear, (linear.out_features, rank), out, share_b, linear.blocks)}
    if magnitude:
        found[MAGNITUDE] = _factor(linear, (linear.out_features,), out, blocks=linear.blocks)
    return found


def _factor(linear: Linear, shape: tuple[int, ...], dim: int | None, shared: bool = False, blocks: int = 1) -> Factor:
    blocks = 1 if dim is None else blocks
    if shared:
        return Factor(shape, used=dim, shared=True, blocks=blocks)
    if not linear.experts:
        return Factor(shape, cut=dim, blocks=blocks)
    return Factor((linear.experts, *shape), None if dim is None else dim + 1, by_expert=True, blocks=blocks)


def missing_sum(linear: Linear, factor: Factor, *, communicates: bool, sequence_parallel: bool) -> Sum:
    """Which sum over ranks a factor's gradient still lacks when its layer's backward is done.

    Args:
        communicates: whether the layer itself gathers its input and reduces its output. Expert layers leave
            that to the token dispatcher, and overlapped shared experts to the layer around them.
        sequence_parallel: whether activations outside of tensor-parallel layers are cut along the sequence.

    Returns:
        "none": the gradient is complete. "sequence": every tensor-parallel rank saw its own tokens; mcore's
        `finalize_model_grads` adds them up when the parameter says `sequence_parallel`. "factor": the ranks
        of the layer's (expert) tensor-parallel group hold partial sums, to be added when the gradient leaves
        the factor. "all": every rank that holds experts of the layer has a partial sum; data-parallel
        reduction and the sum over tensor-parallel ranks together add each of them once.
    """
    if factor.shared:
        return "all"
    if factor.cut is not None:
        return "none"
    if linear.mode == "replicated":
        return "sequence" if sequence_parallel else "none"
    if not communicates:
        return "factor"
    return "sequence" if sequence_parallel else "none"


def fused_parts(
    name: str,
    out_features: int,
    *,
    gated: bool,
    query_groups: int | None = None,
    heads: int | None = None,
    head_size: int | None = None,
) -> tuple[Part, ...]:
    """The parts of a fused linear by the last part of its name; empty if it is not one or of another form.

    Args:
        out_features: rows of the whole linear.
        gated: whether `linear_fc1` holds gate and up.
        query_groups, heads, head_size: of the attention layer.
    """
    if name == "linear_fc1" and gated:
        return Part("gate", out_features // 2), Part("up", out_features // 2)
    if name == "linear_qkv" and query_groups and heads and head_size:
        rows: Mapping[str, int] = {
            "q": heads * head_size,
            "k": query_groups * head_size,
            "v": query_groups * head_size,
        }
        if sum(rows.values()) == out_features:  # otherwise queries come with a gate, or the like
            return tuple(Part(part, count, query_groups) for part, count in rows.items())
    return ()


def check_cut(name: str, linear: Linear, size: int) -> None:
    """Refuse a layer whose dims, or whose query groups, do not divide by the ranks that cut it.

    Raises:
        LayoutError: names the dim.
    """
    dims = {"out_features": linear.out_features // linear.blocks} if linear.mode == "column" else {}
    dims |= {"in_features": linear.in_features} if linear.mode == "row" else {}
    dims |= {f"query groups of {part.name}": part.groups for part in linear.parts if part.groups > 1}
    for what, count in dims.items():
        if count % size:
            raise LayoutError(
                "a layer cannot be cut into equal shares",
                where=f"{name}: {what}",
                expected=f"a multiple of {size}",
                got=count,
                fix="choose another tensor-parallel size",
            )
