"""Parts of ``benchmarks/ms_deform_attn.py``."""
