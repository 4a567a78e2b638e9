"""quality.py: what a type loses, where that was measured: on one model of this repository's, and on no other."""

from __future__ import annotations

MODEL = "storyteller-52m"
KLD = {"q4_k_m": 0.0169, "iq4_xs": 0.02522, "q3_k_m": 0.04137, "q2_k": 0.10899}
"""Mean KL divergence from the bf16 checkpoint on 9,192 held-out tokens of what dsv2 quantize makes at the size of a
type: the variant `all` of tests/bench/bench_quality.csv, which a test holds them to."""
