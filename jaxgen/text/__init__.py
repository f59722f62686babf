"""Text on the host: tokenizers, from published files or trained on a data set's captions."""
