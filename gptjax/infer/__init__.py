"""One engine makes all text: `request` is what it is asked for and what has come of it, `sampling` draws a token,
`programs` are what runs on the devices (fill a cache with a prompt, decode, copy a prefix), `engine` decides what they
run on (slots, queue, prefixes), `text` turns tokens into text as they come. The terminal, Python, evaluation, the
server and rollouts stand on it, so that a token means the same everywhere.
"""
