"""One kind of kernel state, one file: how it is read, and how it is rebuilt."""
