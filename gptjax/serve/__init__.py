"""A model over HTTP, by OpenAI's API: one thread computes, one event loop speaks, and neither waits for the other."""
