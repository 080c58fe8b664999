"""Generated from `phaul/proto/`: see `phaul/generate.py`."""
