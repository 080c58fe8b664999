"""What phaul costs on this machine: `python -m bench`. Needs root; results are for people to read."""
