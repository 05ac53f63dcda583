"""The verbs, one file each: a frozen dataclass `Command` of a verb's arguments, and in `run` what it does with them.
`arguments` turns words into such a dataclass and prints its help. What the arguments may be stands on the fields, as
in a config. Nothing but `cli` imports from here.
"""
