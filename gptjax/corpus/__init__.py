"""What happens to text before a model sees it: a recipe (`config/corpus`) names where documents come from and what each
goes through, and `build` makes a TFDS data set with a manifest of it.

`block` has documents as arrays, so that a rule looks at thousands at once; `repair`, `rules` and `near` are what they
go through, functions of a text or a block; `clean` takes one part of the sources through all of these, `copies` says
which documents stay, `shards` writes them, `look` shows what was made. Nothing here imports JAX.
"""
