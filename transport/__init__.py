"""Bytes between hosts: end points and streams. Knows nothing of processes."""
