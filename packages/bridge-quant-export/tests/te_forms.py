"""ModelOpt's own forms of Transformer Engine's modules, for those of the CPU host backend that stand for them.

ModelOpt 0.47 defines them only where Transformer Engine can be imported (quantization/plugins/megatron.py, below
`if HAS_TE`). How their quantisers are saved needs nothing of it: names, offsets and replicas are that file's code here.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_GROUPED, _EXPERTS, _ATTENTION = "_QuantMegatronTEGroupedLinear", "_MegatronTEGroupedMLP", "_QuantTEDotProductAttention"


def _defined(base: type) -> dict[str, Any]:
    """The classes, with another base in the place of ModelOpt's form of TE's grouped linear."""
    from modelopt.torch.quantization.plugins import megatron

    tree = ast.parse(inspect.getsource(megatron))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", None) == "HAS_TE"]
    classes = [node for node in block.body if isinstance(node, ast.ClassDef)]
    found = [node for node in classes if node.name in (_GROUPED, _EXPERTS, _ATTENTION)]
    assert len(found) == 3
    for node in found:
        node.decorator_list = []
    names = vars(megatron) | {"_QuantTEGroupedLinear": base}
    exec(compile(ast.Module(found, []), megatron.__file__, "exec"), names)
    return names


class _ExtraState:
    """What TE's attention has from its base class: torch asks the class whether a module has such a state."""

    def get_extra_state(self) -> None:
        pass

    def set_extra_state(self, state: Any) -> None:
        pass


@contextmanager
def te_forms() -> Iterator[None]:
    """While it is open, host modules are quantised and saved in these forms."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.plugins import megatron

    from bridge_core.runtime.host import linears
    from bridge_quant_export.prepare import register_host_modules

    register_host_modules()
    kinds = (
        linears.HostColumnParallelGroupedLinear,
        linears.HostRowParallelGroupedLinear,
        linears.HostDotProductAttention,
    )
    ours = {kind: QuantModuleRegistry[kind] for kind in kinds}
    column, row, attention = ours.values()
    by_column, by_row = _defined(column), _defined(row)
    saved = by_column[_ATTENTION].sharded_state_dict
    theirs: dict[type, type] = {
        kinds[0]: type("Column", (by_column[_GROUPED], megatron._MegatronColumnParallelLinear), {}),
        kinds[1]: type("Row", (by_row[_GROUPED], megatron._MegatronRowParallelLinear), {}),
        kinds[2]: type("Attention", (_ExtraState, attention), {"sharded_state_dict": saved}),
        TEGroupedMLP: by_column[_EXPERTS],
    }
    for kind in ours:
        QuantModuleRegistry.unregister(kind)
    try:
        for kind, form in theirs.items():
            QuantModuleRegistry.register({kind: f"te_{kind.__name__}"})(form)
        yield
    finally:
        for kind in theirs:
            QuantModuleRegistry.unregister(kind)
        for kind, form in ours.items():
            QuantModuleRegistry.register({kind: f"bridge_{kind.__name__}"})(form)
