"""Adapters between Megatron and Hugging Face: the same factors under other names, in other rows.

`bases` reads from bridge-core's plan which HF weights a Megatron layer is made of. `fuse` takes the factors of
a layer apart and joins them again. `layouts` knows the names in an HF file, `peft_config` its configuration.
`hf_adapter` and `checkpoint` are the two kinds of folder; `live` are models on ranks. `offline` and `ranks`
put them together.
"""
