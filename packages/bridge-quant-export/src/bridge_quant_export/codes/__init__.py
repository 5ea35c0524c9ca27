"""Number codes in plain torch: rows of fp32 to codes and back. Arithmetic only; formats give them meaning."""
