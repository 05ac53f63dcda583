"""The device mesh, the table of rules from logical to mesh axes, and the rows that each process holds. It knows no
model."""
