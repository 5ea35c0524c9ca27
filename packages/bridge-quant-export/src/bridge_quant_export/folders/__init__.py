"""Quantised checkpoint folders: described from their headers, verified, and written in the other format."""
