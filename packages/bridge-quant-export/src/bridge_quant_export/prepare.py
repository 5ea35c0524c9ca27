"""Before `mtq.quantize`: a Megatron model's own process groups for ModelOpt, and the CPU host backend's modules.

ModelOpt 0.47 (quantization/plugins/megatron.py) asks megatron-core's global `parallel_state` for the groups over which
it synchronises ranges, unless a module brings them along. It knows mcore's and Transformer Engine's linears; those of
`bridge_core.runtime.host` are told to it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge_core.extras import require
from bridge_core.runtime.homes import unwrap


def prepare_for_modelopt(model: Any, groups: Any = None) -> None:
    """Let `mtq.quantize` quantise this model with its own groups: no global state is read. Communicates nothing.

    Args:
        model: chunks of this rank, wrapped or not; quantise each chunk afterwards.
        groups: process groups of the model; by default those it was built with.

    Raises:
        MissingExtraError: nvidia-modelopt is not installed.
    """
    distributed = require("modelopt.torch.utils.distributed", extra="modelopt", package="bridge-quant-export")
    from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry

    chunks = unwrap(model)
    groups = groups or chunks[0].pg_collection
    dense = distributed.ParallelState(groups.dp_cp, groups.tp)
    expert = distributed.ParallelState(groups.expt_dp, groups.expt_tp, groups.ep)
    register_host_modules()
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if (form := QuantModuleRegistry.get(type(module))) is not None:
                # Modules that only hold others keep their groups under another name.
                attribute = "_parallel_state" if issubclass(form, QuantModule) else "parallel_state"
                setattr(module, attribute, expert if ".experts." in f"{name}." else dense)


def register_host_modules() -> None:
    """Tell ModelOpt's registry of the CPU host backend's linears and attention. Again does nothing.

    Their quantised forms compute as those of the Transformer Engine modules do that they stand for: one input
    quantiser for a layer, and for experts a weight quantiser each.
    """
    require("modelopt.torch.quantization", extra="modelopt", package="bridge-quant-export")
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from modelopt.torch.quantization import nn as quantized
    from modelopt.torch.quantization.nn.modules.quant_linear import _QuantLinear

    from bridge_core.runtime.host import linears

    registry = quantized.QuantModuleRegistry
    if linears.HostColumnParallelGroupedLinear in registry:
        return
    column = registry[ColumnParallelLinear]
    # A mixin of linears that ModelOpt joins it with; what those have, its own class does not declare.
    quant_module: Any = quantized.QuantModule

    class QuantHostGroupedLinear(quant_module):
        """Grouped experts: one quantiser for the tokens of all, one for each weight."""

        def _setup(self) -> None:
            self.input_quantizer = quantized.TensorQuantizer(_QuantLinear.default_quant_desc_input)
            self.output_quantizer = quantized.TensorQuantizer(_QuantLinear.default_quant_desc_output)
            self.output_quantizer.disable()
            self.weight_quantizer = quantized.GroupedQuantizer(
                *(quantized.TensorQuantizer(_QuantLinear.default_quant_desc_weight) for _ in range(self.num_gemms))
            )

        def iter_weights_for_calibration(self) -> Iterator[tuple[Any, Any]]:
            for index, quantizer in enumerate(self.weight_quantizer):
                yield self.get_parameter(f"weight{index}"), quantizer

        def expert_weight(self, index: int) -> Any:
            return self.weight_quantizer[index](super().expert_weight(index))

        def forward(self, x: Any, m_splits: Any) -> Any:
            return super().forward(self.input_quantizer(x), m_splits)

    class QuantHostColumnGroupedLinear(QuantHostGroupedLinear):
        """Ranges of a weight that is cut along its outputs are synchronised accordingly."""

        _is_column_parallel = True

    class QuantHostRowGroupedLinear(QuantHostGroupedLinear):
        """As above, along its inputs."""

        _is_row_parallel = True

    class QuantHostAttention(quant_module):
        """Attention whose keys and values are quantised as they are stored in a KV cache."""

        def _setup(self) -> None:
            for which in "qkv":
                setattr(self, f"{which}_bmm_quantizer", quantized.TensorQuantizer())

        def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            query, key = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key)
            return super().forward(query, key, self.v_bmm_quantizer(value), *args, **kwargs)

    def register(kind: type, form: type) -> None:
        registry.register({kind: f"bridge_{kind.__name__}"})(form)

    register(linears.HostLayerNormColumnParallelLinear, column)
    register(linears.HostDuplicatedLinear, _QuantLinear)
    register(linears.HostColumnParallelGroupedLinear, QuantHostColumnGroupedLinear)
    register(linears.HostRowParallelGroupedLinear, QuantHostRowGroupedLinear)
    register(linears.HostDotProductAttention, QuantHostAttention)
