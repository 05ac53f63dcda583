"""Text in, rows of tokens out: sources (TFDS) -> tokenizers -> stream (Grain)."""
