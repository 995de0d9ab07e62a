"""Training of the tokenizer, without Ray and without storage."""
