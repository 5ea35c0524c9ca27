"""Every rule against the same rearrangement written with numpy's reshape and concatenate, whole and cut."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import apply

from bridge_core.errors import ConfigError
from bridge_core.geometry import restrict
from bridge_core.rules import (
    QKV,
    Column,
    Either,
    FusedQKV,
    GatedQKV,
    GateUp,
    Packed,
    Replicated,
    Row,
    Rule,
    Transposed,
    Vocab,
)

sizes = st.integers(1, 4)


def distinct(rule: Rule, target: str, dims: dict) -> dict[str, np.ndarray]:
    """HF tensors of a rule, no two elements of which are equal."""
    tensors, at = {}, 0
    for tensor in rule.expand(target, dims).hf:
        tensors[tensor.name] = np.arange(at, at + prod(tensor.shape)).reshape(tensor.shape)
        at += prod(tensor.shape)
    return tensors


def made(rule: Rule, target: str, dims: dict, hf: dict[str, np.ndarray]) -> np.ndarray:
    """The Megatron tensor by the rule's pieces; -1 where nothing was written."""
    expansion = rule.expand(target, dims)
    flat = np.full(prod(expansion.shape), -1)
    for piece in expansion.pieces:
        apply(piece, hf[piece.source.tensor].reshape(-1), flat)
    return flat.reshape(expansion.shape)


def shard(rule: Rule, target: str, dims: dict, hf: dict[str, np.ndarray], tp: int, rank: int) -> np.ndarray:
    """What one rank gets from the rule's pieces, cut by its split."""
    expansion = rule.expand(target, dims)
    assert expansion.split is not None
    shape = tuple(n // tp if d == expansion.split.dim else n for d, n in enumerate(expansion.shape))
    flat = np.full(prod(shape), -1)
    for box, at in expansion.split.blocks(expansion.shape, tp, rank, name=target):
        for piece in expansion.pieces:
            for part in restrict(piece, "target", expansion.shape, box, shape, at):
                apply(part, hf[part.source.tensor].reshape(-1), flat)
    return flat.reshape(shape)


@given(G=sizes, Q=sizes, H=sizes, D=sizes, bias=st.booleans())
def test_queries_keys_and_values_lie_group_by_group(G, Q, H, D, bias):
    dims = {"groups": G, "heads": G * Q, "head_dim": H, "hidden": D}
    tail = () if bias else ("hidden",)
    rest = () if bias else (D,)
    rule = QKV("{q,k,v}_proj", *tail)
    hf = distinct(rule, "qkv", dims)
    q, k, v = (hf[f"{name}_proj"].reshape(G, -1, H, *rest) for name in "qkv")
    expected = np.concatenate([q, k, v], axis=1).reshape(G * (Q + 2) * H, *rest)
    assert (made(rule, "qkv", dims, hf) == expected).all()


@given(heads=sizes, H=sizes, D=sizes, bias=st.booleans())
def test_fused_attention_of_a_tower_is_interleaved_by_heads(heads, H, D, bias):
    dims = {"vision_groups": heads, "vision_heads": heads, "vision_head_dim": H, "hidden": D}
    tail, rest = ((), ()) if bias else (("hidden",), (D,))
    rule = FusedQKV("attn.qkv", *tail, of="vision_")
    hf = distinct(rule, "qkv", dims)
    q, k, v = hf["attn.qkv"].reshape(3, heads, H, *rest)
    expected = np.stack([q, k, v], axis=1).reshape(3 * heads * H, *rest)
    assert (made(rule, "qkv", dims, hf) == expected).all()


@given(G=sizes, Q=sizes, H=sizes, D=sizes)
def test_gates_follow_the_queries_of_their_group(G, Q, H, D):
    dims = {"groups": G, "heads": G * Q, "head_dim": H, "hidden": D}
    rule = GatedQKV("{q,k,v}_proj", "hidden")
    hf = distinct(rule, "qkv", dims)
    both = hf["q_proj"].reshape(G, Q, 2, H, D)
    k, v = hf["k_proj"].reshape(G, 1, H, D), hf["v_proj"].reshape(G, 1, H, D)
    expected = np.concatenate([both[:, :, 0], both[:, :, 1], k, v], axis=1).reshape(-1, D)
    assert (made(rule, "qkv", dims, hf) == expected).all()


@given(groups=sizes, each=st.tuples(sizes, sizes, sizes), D=sizes, tp=st.sampled_from([1, 2, 3]))
def test_segments_are_ungrouped_and_each_cut_on_its_own(groups, each, D, tp):
    groups *= tp
    a, b, c = (groups * n for n in each)
    rule = Packed("proj_{ab,c}", (("a", "b"), ("c",)), "hidden", names="abc", groups="groups")
    dims = {"groups": groups, "a": a, "b": b, "c": c, "hidden": D}
    hf = distinct(rule, "in_proj", dims)
    by_group = hf["proj_ab"].reshape(groups, each[0] + each[1], D)
    segments = [by_group[:, : each[0]].reshape(-1, D), by_group[:, each[0] :].reshape(-1, D), hf["proj_c"]]
    assert (made(rule, "in_proj", dims, hf) == np.concatenate(segments)).all()
    for rank in range(tp):
        expected = np.concatenate([np.split(segment, tp)[rank] for segment in segments])
        assert (shard(rule, "in_proj", dims, hf, tp, rank) == expected).all()
    split = rule.expand("in_proj", dims).split
    assert split is not None
    assert split.names == ("a", "b", "c")


@given(F=sizes, D=sizes, tp=st.sampled_from([1, 2]))
def test_gate_and_up_are_each_cut_on_their_own(F, D, tp):
    rule, dims = GateUp("{gate,up}_proj", "ffn", "hidden"), {"ffn": F * tp, "hidden": D}
    hf = distinct(rule, "fc1", dims)
    for rank in range(tp):
        expected = np.concatenate([np.split(hf[f"{name}_proj"], tp)[rank] for name in ("gate", "up")])
        assert (shard(rule, "fc1", dims, hf, tp, rank) == expected).all()


@given(rows=sizes, columns=sizes, experts=sizes)
def test_a_transposed_matrix_is_the_transpose_also_of_stacked_experts(rows, columns, experts):
    dims = {"r": rows, "c": columns, "experts": experts}
    rule = Transposed(Packed("w", (("r", "r"),), "c"))
    hf = distinct(rule, "fc1", dims)
    assert (made(rule, "fc1", dims, hf) == hf["w"].T).all()
    stacked = rule.expand("fc1.weight{expert}", dims)
    assert stacked.hf[0].shape == (experts, columns, 2 * rows)


@pytest.mark.parametrize("rule", [Replicated("w", "r", "c"), Column("w", "r", "c"), Row("w", "r", "c")])
def test_plain_rules_copy_and_say_where_they_are_cut(rule):
    dims = {"r": 4, "c": 6}
    hf = distinct(rule, "w", dims)
    assert (made(rule, "w", dims, hf) == hf["w"]).all()
    split = rule.expand("w", dims).split
    if split is not None:
        for rank in range(2):
            assert (shard(rule, "w", dims, hf, 2, rank) == np.split(hf["w"], 2, axis=split.dim)[rank]).all()


def test_a_vocabulary_is_padded_at_its_end():
    rule, dims = Vocab("w", "vocab", "c"), {"vocab": 5, "padded_vocab": 8, "c": 2}
    hf = distinct(rule, "w", dims)
    found = made(rule, "w", dims, hf)
    assert (found[:5] == hf["w"]).all()
    assert (found[5:] == -1).all()


def test_forms_of_a_row_are_tried_in_order():
    row = Either(Column("a", "r"), Column("b", "r"), Column("c", "r"))
    names = []
    rule: Rule | None = row
    while rule is not None:
        names.append(rule.hf)
        rule = rule.otherwise
    assert names == ["a", "b", "c"]


def test_segments_that_do_not_divide_into_groups_are_refused():
    rule = Packed("w", ((3, 4),), groups=2)
    with pytest.raises(ConfigError, match="groups"):
        rule.expand("w", {})
