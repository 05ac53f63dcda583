"""Checkpoints of other libraries, in and out: an architecture is a table that says which part of our parameters each of
its tensors is (`architecture`), one file a family; `huggingface` reads and writes whole directories by it."""
