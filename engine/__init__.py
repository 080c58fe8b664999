"""Freeze a tree, read it into an image set, build a tree from an image set."""
