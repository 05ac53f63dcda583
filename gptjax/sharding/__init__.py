"""The device mesh, the table of rules from logical to mesh axes, and the rows that each process holds. Knows no model."""
