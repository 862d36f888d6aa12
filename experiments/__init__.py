"""Studies made with rlt_jax, run from a checkout; not part of the installed package."""
