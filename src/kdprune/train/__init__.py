"""The one training loop, and the gradient of a mini-batch in parts that fit."""
