"""phaul moves running Linux process trees between hosts."""

__version__ = "0.1.0"
