"""The one data model: CRIU-compatible entries, page maps and image sets."""
