"""The parallel layout of a run, and where each rank stands in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bridge_core.errors import LayoutError
from bridge_core.topology.layout_string import OPTION, check_layout_chunks, parse_layout_string
from bridge_core.topology.ranks import AXES, RankGrid

DEFAULT_ORDER = "tp-cp-ep-dp-pp"
"""Megatron's order of the mesh axes, fastest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoords:
    """Where one rank stands on every mesh axis.

    (tp, cp, dp, pp) is its place for dense weights, (etp, ep, expert_dp, pp) the one for expert weights.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


@dataclass(frozen=True, slots=True, init=False)
class ParallelLayout:
    """How a model is spread over ranks: TP x PP x VPP x EP x ETP x CP x DP, and how layers meet stages.

    Immutable, hashable and complete: what was left open (`etp`, `dp`, `vpp` with a layout string) is
    filled in at construction, so equal layouts compare equal. `dataclasses.replace` keeps what was filled
    in; pass `etp=None, dp=None` along to have them derived again.

    Attributes:
        tp, pp, ep, cp: sizes as in Megatron's options `--tensor-model-parallel-size` and so on.
        vpp: model chunks per pipeline rank. 1 stands for Megatron's None (no interleaving); with a
            layout string, 1 also stands for "as many as the string has".
        etp: tensor-parallel size of expert weights; None takes Megatron's default, `tp`.
        dp: data-parallel size of dense weights; None takes the smallest for which `etp * ep` divides
            `tp * cp * dp`. `ep` lives inside these ranks and does not multiply the world.
        order: mesh axes from fastest to slowest, as in `initialize_model_parallel`, in any case. An axis
            of size 1 may be left out.
        num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split, account_for_loss_in_pipeline_split,
        pipeline_model_parallel_layout: as in Megatron's `TransformerConfig`.

    Raises:
        LayoutError: the sizes, the order or the pipeline options contradict each other.
    """

    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    cp: int
    dp: int
    order: str
    num_layers_in_first_pipeline_stage: int | None
    num_layers_in_last_pipeline_stage: int | None
    account_for_embedding_in_pipeline_split: bool
    account_for_loss_in_pipeline_split: bool
    pipeline_model_parallel_layout: str | None
    _dense: RankGrid = field(init=False, repr=False, compare=False)
    _expert: RankGrid = field(init=False, repr=False, compare=False)

    # Written out, because a generated one could not take None for a field that is always an int afterwards.
    def __init__(
        self,
        *,
        tp: int = 1,
        pp: int = 1,
        vpp: int = 1,
        ep: int = 1,
        etp: int | None = None,
        cp: int = 1,
        dp: int | None = None,
        order: str = DEFAULT_ORDER,
        num_layers_in_first_pipeline_stage: int | None = None,
        num_layers_in_last_pipeline_stage: int | None = None,
        account_for_embedding_in_pipeline_split: bool = False,
        account_for_loss_in_pipeline_split: bool = False,
        pipeline_model_parallel_layout: str | None = None,
    ) -> None:
        _check_text("order", order)
        sizes = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": tp if etp is None else etp, "cp": cp}
        _check_sizes(sizes)
        if dp is None:
            dp = sizes["etp"] * ep // math.gcd(sizes["etp"] * ep, tp * cp)
        ends = {
            "num_layers_in_first_pipeline_stage": num_layers_in_first_pipeline_stage,
            "num_layers_in_last_pipeline_stage": num_layers_in_last_pipeline_stage,
        }
        _check_sizes({"dp": dp} | {name: count for name, count in ends.items() if count is not None})
        if pipeline_model_parallel_layout is not None:
            _check_text(OPTION, pipeline_model_parallel_layout)
            sizes["vpp"] = _vpp_of_string(pipeline_model_parallel_layout, pp=pp, vpp=vpp)
        rest = {
            "dp": dp,
            "order": order.lower(),
            "account_for_embedding_in_pipeline_split": account_for_embedding_in_pipeline_split,
            "account_for_loss_in_pipeline_split": account_for_loss_in_pipeline_split,
            "pipeline_model_parallel_layout": pipeline_model_parallel_layout,
        }
        for name, value in (sizes | ends | rest).items():
            object.__setattr__(self, name, value)
        _check_pipeline_options(self)
        dense, expert = _rank_grids(self)
        object.__setattr__(self, "_dense", dense)
        object.__setattr__(self, "_expert", expert)

    @property
    def world_size(self) -> int:
        """Number of ranks, `tp * cp * dp * pp`."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def expert_dp(self) -> int:
        """How many ranks hold the same shard of the same experts."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    def coords(self, rank: int) -> RankCoords:
        """Where global `rank` stands; plain arithmetic, whatever the size of the world.

        Raises:
            LayoutError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(
                f"rank {rank} does not exist",
                where=str(self),
                expected=f"0 <= rank < {self.world_size}",
                got=rank,
            )
        dense, expert = self._dense, self._expert
        return RankCoords(
            tp=dense.index("tp", rank),
            cp=dense.index("cp", rank),
            dp=dense.index("dp", rank),
            pp=dense.index("pp", rank),
            etp=expert.index("tp", rank),
            ep=expert.index("ep", rank),
            expert_dp=expert.index("dp", rank),
        )

    def rank_of(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The global rank at this place of the dense grid; the inverse of `coords`."""
        return self._dense.rank({"tp": tp, "cp": cp, "dp": dp, "pp": pp})

    def groups(self, axes: str, *, is_expert: bool = False) -> list[list[int]]:
        """The global ranks of every process group over `axes` (`"tp"`, `"dp-cp"`), in Megatron's order.

        Args:
            axes: Megatron's axis names joined by hyphens. In the expert grid, `"tp"` means `etp` and
                `"dp"` means `expert_dp`; there `"cp"`, and in the dense grid `"ep"`, has size 1.
            is_expert: take the grid of the expert weights.
        """
        return (self._expert if is_expert else self._dense).groups(axes)

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values, with what was derived filled in; `from_dict` reads them back."""
        return {name: getattr(self, name) for name in _option_names()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ParallelLayout:
        """A layout from options by name; those that are absent take their defaults.

        Raises:
            LayoutError: a name is unknown, or the options contradict each other.
        """
        names = _option_names()
        if unknown := sorted(set(options) - set(names)):
            raise LayoutError(
                f"unknown layout option(s): {', '.join(unknown)}",
                expected=f"names among {', '.join(names)}",
                got=", ".join(options),
            )
        return cls(**options)

    def __str__(self) -> str:
        options = self.to_dict()
        shown = {name: options[name] for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")}
        shown |= {name: value for name, value in options.items() if value not in (None, False, DEFAULT_ORDER)}
        return "ParallelLayout(" + ", ".join(f"{name}={value!r}" for name, value in shown.items()) + ")"


def _option_names() -> list[str]:
    return [item.name for item in fields(ParallelLayout) if not item.name.startswith("_")]


def _check_sizes(sizes: Mapping[str, object]) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:  # `type`, because True is an int
            raise LayoutError(f"{name} is not a positive integer", where=name, expected="an int >= 1", got=repr(size))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise LayoutError(f"{name} is not a string", where=name, expected="a string", got=repr(value))


def _vpp_of_string(text: str, *, pp: int, vpp: int) -> int:
    chunks = parse_layout_string(text)
    check_layout_chunks(chunks, pp=pp, text=text)
    found = len(chunks) // pp
    if vpp not in (1, found):
        raise LayoutError(
            f"vpp={vpp} contradicts the pipeline layout",
            where=f"{OPTION}={text!r}",
            expected=f"vpp={found}: {len(chunks)} chunks over pp={pp}",
            got=f"vpp={vpp}",
            fix="leave vpp out; it follows from the string",
        )
    return found


def _check_pipeline_options(layout: ParallelLayout) -> None:
    """Megatron's cross checks that need no number of layers.

    Source: megatron-core 0.19.2, `TransformerConfig.__post_init__`, and `initialize_model_parallel` for vpp.
    """
    if layout.vpp > 1 and layout.pp == 1:
        raise LayoutError(
            f"vpp={layout.vpp} needs more than one pipeline rank",
            where=str(layout),
            expected="pp >= 2",
            got="pp=1",
            fix="leave vpp at 1, or raise pp",
        )
    options = layout.to_dict()
    ends = [name for name in options if name.startswith("num_layers_in_") and options[name] is not None]
    accounts = [name for name in options if name.startswith("account_for_") and options[name]]
    text = [OPTION] if layout.pipeline_model_parallel_layout is not None else []
    used = [names for names in (ends, accounts, text) if names]
    if len(used) > 1:
        raise LayoutError(
            "pipeline options exclude each other",
            where=str(layout),
            expected=f"num_layers_in_*_pipeline_stage, account_for_*_in_pipeline_split or {OPTION}: one kind",
            got=", ".join(name for names in used for name in names),
        )
    if len(ends) == 2 and layout.pp < 2:
        # Stricter than Megatron, which builds as many layers as the second number says and forgets the rest.
        raise LayoutError(
            "one pipeline rank cannot be given two numbers of layers",
            where=str(layout),
            expected="pp >= 2",
            got=f"pp=1 with {' and '.join(ends)}",
            fix="leave both out",
        )
    if len(ends) == 2 and layout.pp == 2 and layout.vpp > 1:
        # get_transformer_layer_offset of 0.16.1 and 0.19.2 divides by the number of middle ranks, zero here.
        raise LayoutError(
            f"Megatron cannot build first and last pipeline stages by number with pp=2 and vpp={layout.vpp}",
            where=str(layout),
            expected="a pipeline rank between the first and the last, or only one of the two numbers",
            got="pp=2 with " + " and ".join(ends),
            fix="leave num_layers_in_last_pipeline_stage out: the last rank takes the layers that remain",
        )


def _rank_grids(layout: ParallelLayout) -> tuple[RankGrid, RankGrid]:
    """The dense and the expert numbering; their pipeline stages have to be the same ranks.

    Source: megatron-core 0.16.1 and 0.19.2, `parallel_state.initialize_model_parallel`.
    """
    dense_ranks, expert_ranks = layout.tp * layout.cp * layout.dp, layout.etp * layout.ep
    if dense_ranks % expert_ranks:
        raise LayoutError(
            f"the expert grid does not divide the {layout.world_size} ranks",
            where=str(layout),
            expected=f"tp*cp*dp*pp to be a multiple of etp*ep*pp = {expert_ranks * layout.pp}",
            got=f"{layout.tp}*{layout.cp}*{layout.dp}*{layout.pp} = {layout.world_size}",
            fix="leave dp out to get the smallest that fits, or choose another ep or etp",
        )
    sizes = dict.fromkeys(AXES, 1) | {"pp": layout.pp}
    dense_sizes = sizes | {"tp": layout.tp, "dp": layout.dp, "cp": layout.cp}
    expert_sizes = sizes | {"tp": layout.etp, "dp": layout.expert_dp, "ep": layout.ep}
    dense = RankGrid.from_order(layout.order, dense_sizes)
    expert = RankGrid.from_order(layout.order, expert_sizes)
    pp_last = layout.order.endswith("pp") or layout.expert_dp == layout.dp
    if layout.pp > 1 and not (pp_last and dense.stride("pp") == expert.stride("pp")):
        raise LayoutError(
            "dense and expert weights would have different pipeline stages",
            where=str(layout),
            expected="'pp' last in the order; otherwise expert_dp == dp and equal strides of 'pp' in both grids",
            got=f"order={layout.order!r}, dp={layout.dp}, expert_dp={layout.expert_dp}, "
            f"strides {dense.stride('pp')} (dense) and {expert.stride('pp')} (expert)",
            fix=f"use order={DEFAULT_ORDER!r}",
        )
    return dense, expert
