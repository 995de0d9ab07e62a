"""Training of the tokenizer on tensors, without input or output."""
