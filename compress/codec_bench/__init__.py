"""File sizes, accuracies and speeds beside NNCodec on the same weights: what ``docs/codec.md`` is made of."""
