"""Every tensor that an export will write, from the plan and what each layer is quantised to: before a byte is packed.

No torch and no processes: the manifest of a model of any size and layout is arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from bridge_core.errors import CoverageError
from bridge_core.geometry import Shape
from bridge_core.patterns import fill
from bridge_core.plan import Entry, Plan
from bridge_quant_export.configs.layers import QuantizedLayers
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats.format import Format, Writer
from bridge_quant_export.formats.kv_cache import kv_tensor
from bridge_quant_export.readers import READERS, check_writable
from bridge_quant_export.readers.reader import misfits

_WEIGHT = ".weight"


class Instance(NamedTuple):
    """One Megatron tensor of a whole model: its entry in the plan, and the global numbers of layer and expert."""

    entry: str
    layer: int
    expert: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an export writes.

    Attributes:
        shapes: of every tensor, by the name it has in the files, in their order.
        dtypes: safetensors names.
        layers: what the configurations say.
        dtype: dtype of most unquantised elements: the model's.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    layers: QuantizedLayers
    dtype: str


def make_manifest(
    plan: Plan,
    formats: Mapping[Instance, Format],
    *,
    writer: Writer,
    dtypes: Mapping[str, str],
    kv_layers: Iterable[Instance] = (),
) -> Manifest:
    """Names, dtypes and shapes of everything, and the facts for the configurations.

    Args:
        plan: of the model, in any layout.
        formats: of the Megatron tensors that are quantised, of all ranks.
        writer: the checkpoint format.
        dtypes: of the HF tensors as they would be without quantisation, by name.
        kv_layers: the attention weights (those that make `k_proj`) of layers whose KV cache is quantised.

    Raises:
        FormatError: no reader takes a format from this writer, a weight does not fit its format, or a quantised
            Megatron tensor makes HF tensors that are no matrices of linear layers.
    """
    for format in {*formats.values()}:
        check_writable(writer, format)
    made = _Made(plan, writer, dtypes)
    kv = set(kv_layers)
    for instance, name, shape in hf_instances(plan):
        format = formats.get(instance)
        if format is None:
            made.plain(name, shape)
        else:
            made.packed(name, shape, format)
        if instance in kv and (which := kv_projection(name)):
            made.kv_scale(name, which)
    for name, copy in plan.copies.items():
        made.copy(name, copy.of, written=name in plan.written_copies)
    layers = QuantizedLayers(
        quantized=made.quantized, unquantized=frozenset(made.unquantized - made.quantized.keys()), fp8_kv_cache=bool(kv)
    )
    layers.check()
    if not made.elements:
        raise CoverageError("the model has no tensor that is not quantised", where=plan.family.name)
    return Manifest(shapes=made.shapes, dtypes=made.dtypes, layers=layers, dtype=made.elements.most_common(1)[0][0])


def hf_instances(plan: Plan) -> Iterator[tuple[Instance, str, Shape]]:
    """Every HF tensor once, in the order of the table, with the Megatron tensor that it is (first) made of."""
    for entry in plan.entries:
        for tensor in entry.hf:
            seen: set[str] = set()
            for layer, expert in entry.instances():
                name = fill(tensor.name, layer, expert)
                if name not in seen:
                    seen.add(name)
                    yield Instance(entry.name, layer, expert), name, tensor.shape


def quantisable(entry: Entry) -> bool:
    """Whether an entry is the weight of a linear layer or of several: matrices, and no table of embeddings."""
    matrices = all(len(tensor.shape) == 2 and tensor.name.endswith(_WEIGHT) for tensor in entry.hf)
    return matrices and "embedding" not in entry.name


def module_of(name: str) -> str:
    """The HF module that a weight belongs to.

    Raises:
        FormatError: it is no weight of a linear layer.
    """
    if not name.endswith(_WEIGHT):
        raise FormatError("only the weights of linear layers can be packed", where=name, expected="a name in .weight")
    return name.removesuffix(_WEIGHT)


def kv_projection(name: str) -> str | None:
    """`k` or `v` for the weights of the projections that fill the KV cache."""
    return {"k_proj": "k", "v_proj": "v"}.get(name.removesuffix(_WEIGHT).rpartition(".")[2])


def kv_name(name: str, which: str, writer: Writer) -> str:
    """The name of a KV scale, from the weight of the projection."""
    attention = module_of(name).rpartition(".")[0]
    return f"{attention}.{kv_tensor('k' if which == 'k' else 'v', writer).suffix}"


class _Made:
    """A manifest in the making."""

    def __init__(self, plan: Plan, writer: Writer, dtypes: Mapping[str, str]) -> None:
        self._plan, self._given = plan, dtypes
        self._writer: Writer = writer
        self._checked: set[tuple[Format, Shape, str]] = set()
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.quantized: dict[str, Format] = {}
        self.unquantized: set[str] = set()
        self.elements: Counter[str] = Counter()

    def plain(self, name: str, shape: Shape) -> None:
        """A tensor as it is; what it belongs to is not quantised."""
        self._add(name, shape, self._given[name])
        self.elements[self._given[name]] += prod(shape)
        if len(shape) >= 2:
            # Experts that are stacked in one tensor are not modules with a weight; their parent is excluded.
            module = module_of(name) if name.endswith(_WEIGHT) else name.rpartition(".")[0]
            self.unquantized.add(module)

    def packed(self, name: str, shape: Shape, format: Format) -> None:
        """The tensors of a quantised weight."""
        module, dtype = module_of(name), self._given[name]
        format.check_shape(self._writer, shape, where=name)
        specs = format.tensors(self._writer, shape, dtype)
        if (format, shape, dtype) not in self._checked:
            self._check_readers(format, shape, dtype, name)
            self._checked.add((format, shape, dtype))
        for spec in specs:
            self._add(f"{module}.{spec.suffix}", spec.shape, spec.dtype)
        self.quantized[module] = format

    def kv_scale(self, name: str, which: str) -> None:
        spec = kv_tensor("k" if which == "k" else "v", self._writer)
        self._add(kv_name(name, which, self._writer), spec.shape, spec.dtype)

    def copy(self, name: str, of: str, *, written: bool) -> None:
        """A tensor that repeats another, or would: its module is excluded, or quantised, as the other's is."""
        module, original = name.removesuffix(_WEIGHT), of.removesuffix(_WEIGHT)
        format = self.quantized.get(original)
        if format is None or not written:
            if name.endswith(_WEIGHT) and len(self._plan.hf_tensors[of]) >= 2:
                self.unquantized.add(module)
            if written:
                self._add(name, self.shapes[of], self.dtypes[of])
            return
        for spec in format.tensors(self._writer, self._plan.hf_tensors[of], self._given[of]):
            self._add(f"{module}.{spec.suffix}", spec.shape, spec.dtype)
        self.quantized[module] = format

    def _add(self, name: str, shape: Shape, dtype: str) -> None:
        if name in self.shapes:
            raise CoverageError("two tensors of the export have one name", where=name)
        self.shapes[name], self.dtypes[name] = shape, dtype

    def _check_readers(self, format: Format, shape: Shape, dtype: str, name: str) -> None:
        """At least one of the readers of the format takes the tensors of this layer."""
        specs = format.tensors(self._writer, shape, dtype)
        wrong = {}
        for reader in READERS.values():
            needs = reader.reads.get((self._writer, format.name))
            if needs is None:
                continue
            found = misfits(needs, specs, shape, format.group_size)
            if not found:
                return
            wrong[reader.name] = "; ".join(found)
        raise FormatError(
            f"no reader takes this layer as {format.title}",
            where=name,
            expected="tensors that at least one reader takes",
            got="\n            ".join(f"{reader}: {why}" for reader, why in wrong.items()),
            fix="leave the layer unquantised, or export in another dtype (dtype=...)",
        )
