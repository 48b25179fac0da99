"""quantkit: dynamic mixed-precision GGUFs of DeepSeek-V3/R1, planned to the byte and built in one pass."""

__version__ = "0.1.0"
