"""`quantization_config` and `hf_quant_config.json` from what the layers of a model are quantised to. No torch."""
