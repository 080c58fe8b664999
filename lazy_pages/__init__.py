"""Post-copy: answers page faults of a restored tree from a remote page source."""
