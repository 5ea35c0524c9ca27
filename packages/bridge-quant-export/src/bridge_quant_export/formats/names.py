"""Names that formats and packing share."""

WHOLE_SHAPE = "whole shape"
"""A part that no format makes: the shape of the whole weight, which a shard does not know."""
