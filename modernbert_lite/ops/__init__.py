"""What layers compute on: tensors in, tensors out."""
