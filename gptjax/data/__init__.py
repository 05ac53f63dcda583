"""Text in, rows of tokens out: sources (files, TFDS) are built into a store, tokenizers and the stream (Grain) read it.

`files` and `formats` say what a source holds, `build` makes it a data set of `store` on all cores, `cache` keeps it,
`sources` puts them together; `reading` and `stream` turn records into rows.
"""
