"""What lies beside an adapter checkpoint and says how to read it: `run_config.yaml`, ours or Megatron-Bridge's.

Megatron-Bridge (0.7, peft/lora.py, canonical_lora.py, dora.py) writes a section `peft` with a `_target_`, the name of
a class; the last part of it is compared with a short list, and nothing is imported. Our own section says the
settings of every layer. Where there is neither, they can be given by hand.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.run_config import RUN_CONFIG, read_run_config
from bridge_core.errors import CheckpointError, ConfigError
from bridge_peft.errors import MissingCheckpointError
from bridge_peft.placement import Sharing
from bridge_peft.settings import AdapterSettings

SECTION = "bridge_peft"
_KINDS = ("LoRA", "VLMLoRA", "CanonicalLoRA", "DoRA")
_BY_HAND = "give the settings by hand: r and alpha (--r, --alpha), perhaps use_rslora, dropout"


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """Settings that the user gives, which go before what a file says.

    Attributes:
        r, alpha: of all layers; both or none.
        rslora: whether alpha is divided by the square root of r.
        dropout: probability while training.
    """

    r: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if (self.r is None) != (self.alpha is None) or (self.r is not None and self.r < 1):
            raise ConfigError(
                "r and alpha go together",
                where="r, alpha (--r, --alpha)",
                expected="both, r at least 1",
                got=f"r={self.r}, alpha={self.alpha}",
                fix="give both, or none",
            )


NOTHING = ByHand()


@dataclass(frozen=True)
class Said:
    """What is known of an adapter checkpoint's settings.

    Attributes:
        by_layer: settings by Megatron name, for each adapter name; from our own section.
        r, alpha, rslora, dropout: of all layers, where layers are not told apart.
        per_topk: whether experts have r divided by how many of them a token is sent to (`normalize_moe_lora`).
        where: the file, for messages.
        hf_config: config.json of the base, if the file has it.
    """

    by_layer: Mapping[str, Mapping[str, AdapterSettings]] = field(default_factory=dict)
    r: int = 0
    alpha: float = 0.0
    rslora: bool = False
    dropout: float = 0.0
    per_topk: bool = False
    where: object = None
    hf_config: Mapping[str, Any] | None = None

    def settings(
        self,
        adapter: str,
        layer: str,
        *,
        rank: int,
        topk: int,
        is_expert: bool,
        dora: bool,
        parts: tuple[str, ...],
        sharing: Sharing,
    ) -> AdapterSettings:
        """The settings of one layer, given what its tensors show.

        Args:
            adapter, layer: names.
            rank: of its tensors. Experts may be filled up to a multiple of the ranks that cut them.
            topk: experts that a token is sent to.
            is_expert, dora, parts, sharing: what it is.
        """
        if (named := self.by_layer.get(adapter)) is not None:
            if layer not in named:
                raise CheckpointError(
                    "the configuration does not know an adapted layer",
                    where=f"{self.where}: {SECTION}.adapters.{adapter}",
                    expected=layer,
                    got=f"{len(named)} layers",
                    fix=f"save the adapter again, or {_BY_HAND}",
                )
            return named[layer]
        r = self.r // topk if self.per_topk and is_expert else self.r
        filled_up = self.per_topk and is_expert and r < rank < self.r
        return AdapterSettings(
            r=rank if filled_up else r,
            alpha=self.alpha,
            rslora=self.rslora,
            dropout=self.dropout,
            dora=dora,
            parts=parts,
            sharing=sharing,
        )


def read_settings(folder: Path, by_hand: ByHand) -> Said:
    """What is known of the settings of the adapters in a checkpoint folder.

    Raises:
        MissingCheckpointError: there is no run_config.yaml, and nothing was given by hand.
        CheckpointError: it cannot be read; names the line.
        ConfigError: it does not describe LoRA, canonical LoRA or DoRA.
    """
    path = folder / RUN_CONFIG
    config = read_run_config(path) if path.is_file() else None
    hf_config = None if config is None else _hf_config(config)
    if by_hand.r is not None and by_hand.alpha is not None:
        return Said(
            r=by_hand.r,
            alpha=by_hand.alpha,
            rslora=by_hand.rslora,
            dropout=by_hand.dropout,
            where="r, alpha as given",
            hf_config=hf_config,
        )
    if config is None:
        raise MissingCheckpointError(
            "nothing says how the adapter is configured",
            where=path,
            expected=f"{RUN_CONFIG} with a section `peft`",
            got="no such file",
            fix=_BY_HAND,
        )
    if (section := config.get(SECTION)) is not None:
        return Said(_by_layer(section, path), where=path, hf_config=hf_config)
    return _of_megatron_bridge(config, path, hf_config)


def _hf_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for section in (config.get(SECTION), config.get("bridge_core")):
        if isinstance(section, Mapping) and isinstance(section.get("hf_config"), Mapping):
            return section["hf_config"]
    return None


def _by_layer(section: Any, where: Path) -> dict[str, dict[str, AdapterSettings]]:
    adapters = section.get("adapters") if isinstance(section, Mapping) else None
    if not isinstance(adapters, Mapping) or not all(isinstance(layers, Mapping) for layers in adapters.values()):
        raise CheckpointError(
            f"section `{SECTION}` cannot be read",
            where=where,
            expected="adapters: {name: {layer: settings}}",
            got=section,
            fix=_BY_HAND,
        )
    return {
        name: {layer: AdapterSettings.from_dict(values, where=f"{where}: {layer}") for layer, values in layers.items()}
        for name, layers in adapters.items()
    }


def _of_megatron_bridge(config: Mapping[str, Any], where: Path, hf_config: Mapping[str, Any] | None) -> Said:
    section = config.get("peft")
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{RUN_CONFIG} does not say how the adapter is configured",
            where=f"{where}: peft",
            expected="a mapping with _target_, dim and alpha",
            got=f"sections {', '.join(config)}" if section is None else repr(section),
            fix=_BY_HAND,
        )
    kind = str(section.get("_target_", "")).rpartition(".")[2]
    if kind not in _KINDS:
        raise ConfigError(
            "this kind of adapter is not converted",
            where=f"{where}: peft._target_",
            expected=", ".join(_KINDS),
            got=repr(section.get("_target_")),
            fix=f"if its tensors are plain LoRA factors, {_BY_HAND}",
        )
    dim, alpha = section.get("dim"), section.get("alpha")
    if type(dim) is not int or dim < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ConfigError(
            "rank and scaling of the adapter are not said",
            where=f"{where}: peft",
            expected="dim (a positive whole number) and alpha (a number)",
            got=f"dim={dim!r}, alpha={alpha!r}",
            fix=_BY_HAND,
        )
    return Said(
        r=dim,
        alpha=alpha,
        dropout=float(section.get("dropout") or 0.0),
        per_topk=bool(section.get("normalize_moe_lora")),
        where=where,
        hf_config=hf_config,
    )


def write_settings(adapters: Mapping[str, Mapping[str, AdapterSettings]], hf_config: Mapping[str, Any] | None) -> str:
    """The text of a run_config.yaml for an adapter checkpoint. JSON is YAML: no library is needed to write it.

    The section `peft` is for readers that know Megatron-Bridge's; it says the settings of the most layers.

    Args:
        adapters: settings by Megatron name of the layer, for each adapter name.
        hf_config: config.json of the base, so that an export needs nothing else.
    """
    every = [one for layers in adapters.values() for one in layers.values()]
    common = Counter(every).most_common(1)[0][0]
    kind = "canonical_lora.CanonicalLoRA" if common.parts else "dora.DoRA" if common.dora else "lora.LoRA"
    section = {
        "adapters": {
            name: {layer: settings.to_dict() for layer, settings in layers.items()} for name, layers in adapters.items()
        },
        "hf_config": hf_config,
    }
    peft = {
        "_target_": f"megatron.bridge.peft.{kind}",
        "dim": common.r,
        "alpha": common.alpha,
        "dropout": common.dropout,
    }
    return json.dumps({"peft": peft, SECTION: section}, indent=2)
