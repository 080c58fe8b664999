"""Kinds of open files: one module a kind, with its dump and its restore side by side.

A new kind is a new module here with a subclass of `base.FileKind`; nothing else has to change.
"""
