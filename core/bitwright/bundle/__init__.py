"""What an export says of itself, so that it can be proven later: record, reference samples, comparison, gates.

`record` is what was simulated (decisions, digests, hashes, samples), `agreement` decides whether two networks compute
the same but for rounding, `export_gate` and `checks` ask it of a fresh and of a reopened export, `crushed` finds
outputs that the quantization has silenced, `source_guard` keeps the user's own model from being overwritten.
"""
