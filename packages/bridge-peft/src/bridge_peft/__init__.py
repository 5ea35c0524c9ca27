"""LoRA on Megatron-Core modules: adapters that train in any parallel layout, and travel to Hugging Face and back.

The names below are loaded on first use: importing this package needs neither torch nor megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.extras import late

if TYPE_CHECKING:
    from bridge_peft.apply import LoraReport as LoraReport
    from bridge_peft.apply import apply_lora as apply_lora
    from bridge_peft.config import LoraConfig as LoraConfig
    from bridge_peft.converting.merging import merge_hf as merge_hf
    from bridge_peft.converting.offline import export_adapter_ckpt as export_adapter_ckpt
    from bridge_peft.converting.offline import import_adapter_ckpt as import_adapter_ckpt
    from bridge_peft.converting.rank_checkpoints import load_adapter_ckpt as load_adapter_ckpt
    from bridge_peft.converting.rank_checkpoints import save_adapter_ckpt as save_adapter_ckpt
    from bridge_peft.converting.ranks import export_adapter_weights as export_adapter_weights
    from bridge_peft.converting.ranks import load_hf_adapter as load_hf_adapter
    from bridge_peft.converting.ranks import save_hf_adapter as save_hf_adapter
    from bridge_peft.merge import merge_adapters as merge_adapters
    from bridge_peft.merge import merged_weights as merged_weights
    from bridge_peft.merge import unmerge_adapters as unmerge_adapters
    from bridge_peft.sharded import adapter_entries as adapter_entries
    from bridge_peft.switch import delete_adapter as delete_adapter
    from bridge_peft.switch import disable_adapters as disable_adapters
    from bridge_peft.switch import enable_adapters as enable_adapters
    from bridge_peft.switch import set_adapter as set_adapter

__version__ = "0.1.0"

_HOME = {
    "LoraConfig": "config",
    "LoraReport": "apply",
    "adapter_entries": "sharded",
    "apply_lora": "apply",
    "delete_adapter": "switch",
    "disable_adapters": "switch",
    "enable_adapters": "switch",
    "export_adapter_ckpt": "converting.offline",
    "export_adapter_weights": "converting.ranks",
    "import_adapter_ckpt": "converting.offline",
    "load_adapter_ckpt": "converting.rank_checkpoints",
    "load_hf_adapter": "converting.ranks",
    "merge_adapters": "merge",
    "merge_hf": "converting.merging",
    "merged_weights": "merge",
    "save_adapter_ckpt": "converting.rank_checkpoints",
    "save_hf_adapter": "converting.ranks",
    "set_adapter": "switch",
    "unmerge_adapters": "merge",
}
__all__ = [
    "LoraConfig",
    "LoraReport",
    "adapter_entries",
    "apply_lora",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "export_adapter_ckpt",
    "export_adapter_weights",
    "import_adapter_ckpt",
    "load_adapter_ckpt",
    "load_hf_adapter",
    "merge_adapters",
    "merge_hf",
    "merged_weights",
    "save_adapter_ckpt",
    "save_hf_adapter",
    "set_adapter",
    "unmerge_adapters",
]


__getattr__, __dir__ = late(__name__, _HOME)
